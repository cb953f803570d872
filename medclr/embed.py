"""Features of frozen encoders: one row a scan or a slice, as a table and as a picture.

Shape letters: n slices, m rows, F features.
"""

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclr import figures
from medclr.augment.views import plain_view
from medclr.config import nearest
from medclr.data.loader import load_batch
from medclr.data.single import SingleScan
from medclr.data.store import Store
from medclr.data.tables import StoredScan
from medclr.errors import MedclrError
from medclr.files import writing
from medclr.memory import keep_freed_memory
from medclr.models.encoder import Encoder
from medclr.models.frozen import Frozen, open_encoder
from medclr.models.weights import ResNetName
from medclr.progress import progress
from medclr.scans import read


@dataclass(frozen=True)
class EmbedSummary:
    """What ``medclr embed`` wrote."""

    table: Path
    picture: Path
    rows: int
    features: int

    def __str__(self) -> str:
        return f"{self.table}: {self.rows} rows of {self.features} features; picture in {self.picture}"


def embed(
    encoder: str,
    store: Path,
    out: Path,
    *,
    per: Literal["scan", "slice"] = "scan",
    colour: str = "label",
    size_px: int | None = None,
    like: Path | None = None,
    weights: Path | None = None,
    fetch: ResNetName | None = None,
    seed: int = 0,
) -> EmbedSummary:
    """Write features as a table, and a picture of them.

    Args:
        encoder: A run folder of ``medclr pretrain``, or ``random`` or ``imagenet``.
        store: Slice store.
        out: Table to write; its ending, .parquet or .csv, chooses the format. The picture stands beside it as .png.
        per: One row a scan (mean over its slices) or one a slice.
        colour: Column of the store's scans.csv that colours the picture.
        size_px: Side of the images that the encoder sees; by default what it was made for.
        like: With ``--encoder random``: a run folder whose network to take.
        weights: File with ImageNet weights in torchvision's format, for ``--encoder imagenet``.
        fetch: Download torchvision's weights of this ResNet instead, checked by their hash, for ``--encoder imagenet``.
        seed: Seed of ``--encoder random``, and of the picture's layout.
    """
    store, out = Path(store), Path(out)
    if out.suffix not in (".parquet", ".csv"):
        raise MedclrError(f"--out {out}: the ending chooses the format; use .parquet or .csv")
    picture = out.with_suffix(".png")
    for path in (out, picture):
        if path.exists():
            raise MedclrError(f"--out {out}: {path} exists already; choose another name or remove it")
    opened = Store(store)
    columns = [field.name for field in fields(StoredScan)]
    if colour not in columns:
        raise MedclrError(f"--colour {colour}: is no column of {store / 'scans.csv'}{nearest(colour, columns)}")
    model = open_encoder(encoder, size_px=size_px, like=like, weights=weights, fetch=fetch, seed=seed)
    features = extract(model, opened, np.arange(len(opened)))  # [n,F]
    scan = opened.column("scan")  # [n]
    if per == "scan":
        features, scan_of_row = scan_means(features, scan)  # [m,F], [m]
        extra: dict[str, Any] = {}
    else:
        scan_of_row = scan
        extra = {"slice_index": opened.column("slice_index").tolist()}
    identity = {
        name: [getattr(opened.scans[s], name) for s in scan_of_row]
        for name in ("scan_id", "patient_id", "modality", "label", "split")
    }
    _write_table(out, {**identity, **extra}, features)
    values = [str(getattr(opened.scans[s], colour)) for s in scan_of_row]
    points, made_by = layout(features, seed)
    kept = points[:, 0] == points[:, 0]  # rows outside the drawn sample are NaN
    shown = [value for value, keep in zip(values, kept, strict=True) if keep]
    title = f"{len(shown)} {per}s by {made_by}, coloured by {colour}"
    figures.embedding_map(picture, points[kept], shown, title)
    return EmbedSummary(out, picture, len(features), features.shape[1])


def extract(model: Frozen, store: Store, indices: NDArray[np.int64], batch: int = 128) -> NDArray[np.float32]:
    """Features [n,F] of the slices at ``indices``, from the frozen encoder in eval mode on plain views."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_freed_memory()
    parts = []
    with torch.inference_mode(), progress("embed", len(indices), "slices") as advance:
        for start in range(0, len(indices), batch):
            piece = load_batch(store, indices[start : start + batch], model.config.slices).to(device)
            parts.append(model(plain_view(piece, model.size_px)).float().cpu())  # [b,F]
            advance(len(piece.index))
    return torch.cat(parts).numpy()


def read_views(
    path: Path | str, encoder: Encoder, *, store_px: int | None = None, modality: str | None = None
) -> Tensor:
    """The slices of one scan, as the encoder expects them and as ``embed`` shows them to it.

    Args:
        path: a NIfTI volume, an image, or the folder of one DICOM series.
        encoder: from ``load_encoder``; its ``size_px`` is the side of the views.
        store_px: side of the slices in between, as ``--size-px`` of ``prepare``; None: as in the encoder's training.
        modality: for files that do not record it.

    Returns:
        [D,C,s,s] in [0,1], C neighbouring slices as channels if the encoder takes several.

    Raises:
        ScanError: the scan cannot be read.
    """
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    single = SingleScan(read(files, modality), store_px or encoder.store_px, keep_blank=True)
    return plain_view(load_batch(single, single.indices(), encoder.config.slices), encoder.size_px)


def scan_means(features: NDArray[np.float32], scan: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Mean features [m,F] of each scan and the scans' numbers [m], in ascending order."""
    numbers, row = np.unique(scan, return_inverse=True)  # [m], [n]
    sums = np.zeros((len(numbers), features.shape[1]))
    np.add.at(sums, row, features)
    return (sums / np.bincount(row)[:, None]).astype(np.float32), numbers.astype(np.int64)


def _write_table(out: Path, identity: dict[str, list[Any]], features: NDArray[np.float32]) -> None:
    names = [f"f{i:04d}" for i in range(features.shape[1])]
    with writing(out) as temporary:
        if out.suffix == ".csv":
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow([*identity, *names])
                for row, vector in enumerate(features):
                    writer.writerow([*(column[row] for column in identity.values()), *(f"{x:.7g}" for x in vector)])
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = {**identity, **dict(zip(names, features.T, strict=True))}
            pq.write_table(pa.table({name: pa.array(column) for name, column in columns.items()}), temporary)


def layout(features: NDArray[np.float32], seed: int, most: int = 5000) -> tuple[NDArray[np.float64], str]:
    """Points [m,2] to draw, and how they were made: t-SNE of 50 principal components; NaN beyond ``most`` rows."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    m = len(features)
    points = np.full((m, 2), np.nan)
    rows = np.sort(np.random.default_rng(seed).permutation(m)[:most])
    if len(rows) < 3:
        points[rows] = features[rows, :2]
        return points, "two features"
    parts = min(50, len(rows), features.shape[1])
    reduced = PCA(parts, random_state=seed).fit_transform(features[rows].astype(np.float64))  # [r,parts]
    if len(rows) < 10:
        points[rows, : min(parts, 2)] = reduced[:, :2]
        return np.nan_to_num(points), "principal components"
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points[rows] = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return points, "t-SNE"
