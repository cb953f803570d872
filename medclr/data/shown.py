"""Slices as a viewer shows them, without torch: what ``medclr.augment.views.plain_view`` gives at the store's size."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medclr.data.store import Store
from medclr.scans.modality import MODALITIES


def shown(store: Store, indices: ArrayLike) -> NDArray[np.float32]:
    """[B,S,S] in [0,1]: the modality's display window, or the scan's robust range where it has none."""
    indices = np.asarray(indices, dtype=np.int64)  # [B]
    low, high = (store.column(name)[indices] for name in ("low", "high"))  # [B] each
    modality = store.column("modality")[indices]  # [B]
    for number, name in enumerate(store.info.modalities):
        if (window := MODALITIES[name].display) is not None:
            low = np.where(modality == number, np.float32(window.center - window.width / 2), low)
            high = np.where(modality == number, np.float32(window.center + window.width / 2), high)
    scale = 1 / np.maximum(high - low, np.finfo(np.float32).tiny ** 0.5)  # an empty range gives 0 up to it and 1 above
    values = store.physical(indices)  # [B,S,S]
    values -= low[:, None, None]
    values *= scale[:, None, None].astype(np.float32)
    return values.clip(0, 1, out=values)
