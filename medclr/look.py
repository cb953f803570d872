"""A look at a pretraining run: figures of the network on a fixed sample, and the contact sheet of its views.

Letters: n slices, F features, K components of an embedding, S side of a stored slice, s side of a view.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclr import figures, monitor
from medclr.augment.views import describe, plain_view, two_views
from medclr.config import PretrainConfig
from medclr.data.loader import load_batch
from medclr.data.store import Store
from medclr.distributed import Group
from medclr.methods import PretrainingMethod
from medclr.stop import StopRequest

Indices = NDArray[np.int64]

PART = 64
"""So many slices go through the network between two questions whether to leave: some seconds on a slow CPU."""


def look(
    method: PretrainingMethod,
    store: Store,
    indices: Indices,
    settings: PretrainConfig,
    device: torch.device,
    group: Group,
    stop: StopRequest,
) -> dict[str, float]:
    """Figures of the monitor on a fixed sample of the slices that are trained on, from the network in eval mode.

    The first process looks, the others answer with it whether to leave, and have no figures.

    Raises:
        GaveUp: they leave.
    """
    rng = np.random.default_rng([settings.seed, 1])
    sample = np.sort(rng.permutation(indices)[: settings.monitor.sample])  # [n]
    dtype = next(method.parameters()).dtype
    method.eval()
    features, embeddings, labels, patients = [], [], [], []
    with torch.inference_mode(), stop.at_once():
        for part in np.array_split(sample, -(-len(sample) // PART)):
            stop.check()
            if not group.is_first:
                continue
            batch = load_batch(store, part, settings.encoder.slices)
            x = plain_view(batch.to(device), settings.views.size_px).to(dtype)  # [b,C,s,s]
            f, z = method.embed(x)  # [b,F], [b,K]
            features.append(f)
            embeddings.append(z)
            labels.append(batch.label)
            patients.append(batch.patient)
    if not group.is_first:
        return {}
    z = torch.cat(embeddings).float().cpu()  # [n,K]
    figures = {"effective_rank": monitor.effective_rank(z), "uniformity": monitor.uniformity(z)}
    knn = monitor.knn_accuracy(torch.cat(features).float().cpu(), torch.cat(labels).cpu(), torch.cat(patients).cpu())
    return figures if math.isnan(knn) else {**figures, "knn": knn}


def draw_views(store: Store, indices: Indices, settings: PretrainConfig, out: Path, n: int = 8) -> None:
    """The contact sheet: ``n`` slices and the two views of each, captioned with the parameters drawn."""
    rng = np.random.default_rng([settings.seed, 2])
    modality = store.column("modality")[indices]  # [n]
    kinds = np.unique(modality)
    chosen = [rng.choice(indices[modality == kinds[i % len(kinds)]]) for i in range(n)]  # each modality in turn
    batch = load_batch(store, np.array(chosen))
    source = plain_view(batch, store.info.size_px)  # [n,1,S,S]
    views = two_views(batch, settings.views, seed=settings.seed, step=0)

    def tiles(images: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        return images[:, 0].float().cpu().numpy()

    captions = [
        [
            f"{batch.modalities[int(batch.modality[i])]}, slice {int(batch.slice_index[i])}",
            describe(views, 0, i),
            describe(views, 1, i),
        ]
        for i in range(n)
    ]
    columns = [("slice in the store", tiles(source)), ("view 1", tiles(views.a)), ("view 2", tiles(views.b))]
    figures.contact_sheet(out / "figures" / "views.png", columns, captions, "Two random views of each slice")
