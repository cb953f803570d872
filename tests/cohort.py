"""Small scans on disk, and manifests of them, for the tests of the slice store and what reads it."""

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclr.data.manifest import FileRow, ScanRow, write_manifest
from medclr.scans import read


def save_nifti(path: Path, voxels: NDArray, spacing_mm: tuple[float, float, float] = (1, 1, 3)) -> Path:
    """[X,Y,Z] with axes that run right, anterior, superior."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing_mm, 1.0])), path)
    return path


def save_manifest(path: Path, scans: list[dict]) -> Path:
    """Each scan: path, modality, and if it has them: patient, label, split, mask, n_slices."""
    rows, file_rows = [], []
    for number, scan in enumerate(scans):
        source: Path = scan["path"]
        n_slices = scan.get("n_slices") or len(read([source], scan["modality"]).voxels)
        row = ScanRow(
            scan_id=f"scan{number:03d}",
            patient_id=scan.get("patient", f"patient{number:03d}"),
            study_id="",
            modality=scan["modality"],
            body_part="",
            plane="",
            path=source.name,
            n_slices=n_slices,
            rows=1,
            columns=1,
            spacing_z_mm=None,
            spacing_y_mm=None,
            spacing_x_mm=None,
            sha256=f"{number:064x}",
            label=scan.get("label", ""),
            mask_path=scan["mask"].name if "mask" in scan else "",
            split=scan.get("split", ""),
        )
        rows.append(row)
        for kind, file in (("image", source), ("mask", scan.get("mask"))):
            if file is not None:
                size = file.stat().st_size
                file_rows.append(FileRow(row.scan_id, kind, str(file.parent), file.name, size, 0, "", ""))  # type: ignore[arg-type]
    return write_manifest(path, rows, file_rows, []).path


def mixed_cohort(folder: Path, seed: int = 0) -> Path:
    """Manifest of 3 CT volumes, 3 MR volumes (2 with masks) and 4 radiographs (3 with labels) of 8 patients.

    Patients 1 and 2 have a CT and an MR. The CT are whole numbers, the MR are fractions.
    """
    rng = np.random.default_rng(seed)
    scans = []
    for i in range(3):
        hu = rng.integers(-1000, 2000, (20, 18, 9 + i), dtype=np.int16)
        scans.append(
            {"path": save_nifti(folder / f"ct{i}.nii.gz", hu), "modality": "CT", "patient": f"p{i}", "split": "train"}
        )
    for i in range(3):
        signal = rng.gamma(2, 100, (14, 30, 7)).astype(np.float32)
        scan = {
            "path": save_nifti(folder / f"mr{i}.nii.gz", signal),
            "modality": "MR",
            "patient": f"p{i + 1}",
            "split": "train",
        }
        if i < 2:
            mask = rng.integers(0, 3, signal.shape, dtype=np.uint8)
            scan["mask"] = save_nifti(folder / "masks" / f"mr{i}.nii.gz", mask)
        scans.append(scan)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 33), dtype=np.uint8)).save(folder / f"xr{i}.png")
        label = ("sick", "well", "", "sick")[i]
        scans.append(
            {"path": folder / f"xr{i}.png", "modality": "XR", "patient": f"p{i + 4}", "label": label, "split": "test"}
        )
    return save_manifest(folder / "mixed.csv", scans)
