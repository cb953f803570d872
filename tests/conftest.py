"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's "&" starts us so, and no child would hear of Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes on the same cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(os.environ.get("MEDCLR_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def shared_data(name: str) -> Path:
    """A folder of real scans, or skip: they are licensed data that do not travel with medclr."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real scans {name!r} are not present; set MEDCLR_SHARED_DATA to their folder")
    return path


@pytest.fixture(scope="session")
def image_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 48 images of 24 patients in two classes, stripes that lie or stand, each over clouds of its own."""
    import numpy as np
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    from medclr.data.index import index
    from medclr.data.prepare import prepare

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = ["file,patient_id,label"]
    axis = np.sin(np.arange(40) / 2)
    for number in range(48):
        lying = number // 2 % 2
        stripes = np.broadcast_to(axis[:, None] if lying else axis[None, :], (40, 40))
        clouds = gaussian_filter(rng.normal(0, 1, (40, 40)), 5, mode="wrap")
        pixels = 120 + 40 * stripes + 60 * clouds / clouds.std() + rng.normal(0, 5, (40, 40))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number:02d}.png")
        rows.append(f"{number:02d}.png,patient {number // 2},{'lying' if lying else 'standing'}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    manifest, key = root / "images.csv", root / "key"
    key.touch(mode=0o600)
    key.write_text("00" * 32)  # known: pseudonyms decide the order of the scans and the split
    index([root], manifest, labels=root / "labels.csv", modality="XR", split="train=0.7,test=0.3", key_file=key)
    prepare(manifest, root / "store", size_px=32, key_file=key)
    return root / "store"


@pytest.fixture(scope="session")
def volume_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MR volumes of eight patients with masks: a bright block; five train, three test."""
    import numpy as np
    from cohort import save_manifest, save_nifti

    from medclr.data.prepare import prepare

    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    rows = []
    for number in range(8):
        mask = np.zeros((16, 16, 4), dtype=np.uint8)
        mask[4:9, 3 + number % 3 : 12] = 1
        voxels = (100 + 80 * mask + rng.normal(0, 5, mask.shape)).astype(np.float32)
        files = {
            "path": save_nifti(folder / f"v{number}.nii", voxels),
            "mask": save_nifti(folder / "masks" / f"v{number}.nii", mask),
        }
        rows.append({**files, "modality": "MR", "split": "train" if number < 5 else "test"})
    prepare(save_manifest(folder / "scans.csv", rows), folder / "store", size_px=16)
    return folder / "store"
