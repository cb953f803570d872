"""One scan as a slice store of its own, in memory: what was trained on a store can then be asked about a new scan.

Shape letters: n stored slices, D slices of the scan, S = size_px.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

import medclr
from medclr.data.encode import encode, encoding_of
from medclr.data.manifest import ScanRow
from medclr.data.shard import seen_slices, stored_scan
from medclr.data.store import FORMAT_VERSION, Store, StoreInfo
from medclr.data.tables import StoredScan, slice_table
from medclr.scans.scan import Scan


class SingleScan(Store):
    """The store that ``medclr prepare`` would make of one scan: the same slices, and the same is known of them.

    Args:
        scan: the scan.
        size_px: S.
        row: the scan's row of a manifest; None: one without any id.
        keep_blank: whether slices that show nothing are among the slices.

    Raises:
        ScanError: the scan shows nothing.
    """

    def __init__(self, scan: Scan, size_px: int, row: ScanRow | None = None, *, keep_blank: bool = False) -> None:
        encoding = encoding_of(scan, size_px)
        kept = np.arange(len(scan.voxels)) if keep_blank else seen_slices(scan, None, encoding)  # [n]
        parts = [part.copy() for part in encode((scan.voxels[d] for d in kept), encoding, size_px)]
        self.scan: StoredScan = stored_scan(row or _nameless(scan), scan, encoding, kept)
        """Its row of ``scans.csv``."""
        self.path = Path()
        self.info = StoreInfo(
            format_version=FORMAT_VERSION,
            medclr_version=medclr.__version__,
            size_px=size_px,
            keep_blank=keep_blank,
            n_slices=len(kept),
            n_blank=len(scan.voxels) - len(kept),
            n_scans=1,
            n_patients=1,
            n_rejected=0,
            manifest_name="",
            manifest_sha256="",
            modalities=(scan.modality,),
            labels=tuple(filter(None, [self.scan.label])),
            masks=False,
            shard_slices=(len(kept),),
            files={},
        )
        self._columns = slice_table([self.scan], self.info.modalities, self.info.labels)
        self._pixels = np.concatenate(parts)  # [n,S,S]

    @property
    def scans(self) -> list[StoredScan]:
        """The one scan."""
        return [self.scan]

    def read(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """[B,S,S], as stored, in the order asked for."""
        return self._pixels[np.asarray(indices, dtype=np.int64)]

    def masks(self, indices: ArrayLike) -> NDArray[np.uint16]:
        """[B,S,S], 0 throughout."""
        return np.zeros_like(self.read(indices))


def _nameless(scan: Scan) -> ScanRow:
    depth, height, width = scan.voxels.shape
    return ScanRow("", "", "", scan.modality, "", "", "", depth, height, width, *scan.spacing_mm, sha256="")
