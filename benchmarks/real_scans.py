"""The whole road on real scans: what docs/results.md reports, made again by one command.

    python benchmarks/real_scans.py roads --data DIR --out DIR    five folders through index, prepare and pretrain
    python benchmarks/real_scans.py cxr   --data DIR --out DIR    chest X-rays: own pretraining, ImageNet, random
    python benchmarks/real_scans.py hippocampus --data DIR --out DIR    few labelled volumes, segmented
    python benchmarks/real_scans.py methods --data DIR --out DIR    the same after each method of pretraining
    python benchmarks/real_scans.py cxr_methods --data DIR --out DIR    what those methods give up for whole images

``--data`` holds hippocampus, mr_brain_dicom, ct_abdomen_dicom, ct_body and cxr_pediatric; ``--out`` must be new or hold
an interrupted run of the same command. Results are printed, and stand in ``--out`` with every picture.
"""

import argparse
import contextlib
import hashlib
from pathlib import Path

import medclr

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

ROADS = {
    "hippocampus": ("mr", {"modality": "MR"}),
    "mr_brain_dicom": ("mr", {}),
    "ct_abdomen_dicom": ("ct", {}),
    "ct_body": ("ct", {"modality": "CT"}),
    "cxr_pediatric": ("xray", {"modality": "XR"}),
}
"""Folder -> settings file and what the files do not say themselves."""

CXR = {"views.size_px": 64, "batch": 128, "data.split": "train"}
"""Of both pretraining runs; chosen inside the training patients (docs/experiments.md)."""

CXR_RUNS = {
    "cxr-imagenet-simclr": {"encoder.name": "efficientnet-lite0", "init": "imagenet", "epochs": 25, "optim.lr": 0.03},
    "cxr-simclr": {"epochs": 10, "precision": "bfloat16", "simclr.temperature": 0.5},
}
"""14 and 4 minutes on one core."""

HIPPOCAMPUS = {**CXR, "encoder.name": "efficientnet-lite0", "init": "imagenet", "epochs": 10, "optim.lr": 0.03}

METHODS = {
    "views.size_px": 64, "data.split": "train", "encoder.width": 0.25, "encoder.stem": "medium",
    "precision": "bfloat16", "optim.name": "adamw", "optim.lr": 0.002, "optim.lr_scaling": "none",
}  # fmt: skip
"""Of all methods alike."""

VOLUMES = {"batch": 64, "epochs": 20, "views.crop_area": [0.5, 1.0], "views.strength": 0.5, "views.cutout": 0.0}
"""The crops of the hippocampus are small already, so views show at least half of one. Each slice alone, although five
are seen later: with five, SimCLR learns what helps nobody (docs/experiments.md)."""

METHOD_RUNS = {
    "simclr": ("mr", {}),
    "positional": ("positional", {}),
    "dense": ("dense", {}),
    "masked": ("masked", {}),
    "positional-dense": (
        "dense",
        {"epochs": 10, "dense.global_weight": 1.0, "dense.global_positives": "position", "init": "positional"},
    ),
}
"""Run -> settings file, and what differs; init names a run before it. 4 to 24 minutes each on a shared core."""

CXR_METHOD_RUNS = {"simclr": "xray", "dense": "dense", "masked": "masked"}
"""Run -> settings file; an X-ray has no position for positional."""


def public_key(out: Path) -> Path:
    """Public scans need no secret; with a known key, everyone gets the same pseudonyms and so the same split."""
    key = out / "key"
    if not key.exists():
        out.mkdir(parents=True, exist_ok=True)
        key.touch(mode=0o600)
        key.write_text(hashlib.sha256(b"medclr public scans").hexdigest())
    return key


def roads(data: Path, out: Path) -> None:
    """Each folder to a pretrained encoder; two epochs, because the road is what is shown."""
    for name, (config, options) in ROADS.items():
        root = data / name
        if name == "cxr_pediatric":
            options = {**options, "labels": root / "labels.csv"}
        if name == "hippocampus":
            root, options = root / "images", {**options, "masks": root / "labels"}
        if name == "ct_body":
            root = only(root, "ct.nii.gz", out / "ct_body_scans")
        manifest, store, run = out / f"{name}.csv", out / f"{name}_store", out / f"{name}_run"
        print(f"\n== {name}")
        print(medclr.index([root], manifest, key_file=public_key(out), **options))
        print(medclr.prepare(manifest, store, size_px=96, workers=2, key_file=public_key(out)))
        few = {"views.size_px": 64, "epochs": 2, "batch": 16, "data.slices_per_scan": 20, "precision": "bfloat16"}
        print(medclr.pretrain(store, run, config=CONFIGS / "pretrain" / f"{config}.yaml", settings=few))


def only(root: Path, name: str, folder: Path) -> Path:
    """A folder that holds one file of ``root``: label maps beside a scan are not scans."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if not link.exists():
        link.symlink_to((root / name).resolve())
    return folder


def cxr(data: Path, out: Path) -> None:
    """Encoders pretrained on the training patients against ImageNet and random, frozen and fine-tuned."""
    cxr_store(data, out)
    cxr_store(data, out, 224)
    for run, settings in CXR_RUNS.items():
        config = CONFIGS / "pretrain" / "xray.yaml"
        print(medclr.pretrain(out / "stores" / "cxr", out / "runs" / run, config=config, settings=CXR | settings))
    compared("cxr", out)
    compared("cxr_finetune", out)


def cxr_store(data: Path, out: Path, size_px: int = 96) -> Path:
    """Labelled X-rays, 70 % of the patients to train and 30 % to test."""
    root = data / "cxr_pediatric"
    manifest, split = out / "cxr.csv", "train=0.7,test=0.3"
    labels, key = root / "labels.csv", public_key(out)
    store = out / "stores" / ("cxr" if size_px == 96 else f"cxr-{size_px}")
    print(medclr.index([root], manifest, labels=labels, modality="XR", split=split, key_file=key))
    print(medclr.prepare(manifest, store, size_px=size_px, workers=2, key_file=key))
    return store


def hippocampus_store(data: Path, out: Path) -> Path:
    """Slices with masks of 180 volumes, 91 to train and 89 to test."""
    root, manifest, split = data / "hippocampus", out / "hippocampus.csv", "train=0.55,test=0.45"
    masks, key, store = root / "labels", public_key(out), out / "stores" / "hippocampus"
    print(medclr.index([root / "images"], manifest, masks=masks, modality="MR", split=split, key_file=key))
    print(medclr.prepare(manifest, store, size_px=64, workers=2, key_file=key))
    return store


def hippocampus(data: Path, out: Path) -> None:
    """Anterior and posterior hippocampus with few labelled volumes."""
    store, run = hippocampus_store(data, out), out / "runs" / "hippocampus-imagenet-simclr"
    print(medclr.pretrain(store, run, config=CONFIGS / "pretrain" / "mr.yaml", settings=HIPPOCAMPUS))
    compared("hippocampus", out)


def methods(data: Path, out: Path) -> None:
    """The same volumes after each method of pretraining, in one small network."""
    store, runs = hippocampus_store(data, out), out / "runs"
    for name, (config, settings) in METHOD_RUNS.items():
        if "init" in settings:
            settings = {**settings, "init": runs / f"hippocampus-{settings['init']}"}
        file = CONFIGS / "pretrain" / f"{config}.yaml"
        print(medclr.pretrain(store, runs / f"hippocampus-{name}", config=file, settings=METHODS | VOLUMES | settings))
    compared("hippocampus_methods", out)
    compared("hippocampus_budgets", out)
    compared("hippocampus_longer", out)


def cxr_methods(data: Path, out: Path) -> None:
    """Frozen features of whole X-rays after the methods that are made for pixels, in the same small network."""
    store, settings = cxr_store(data, out), METHODS | {"batch": 128, "epochs": 12}
    for name, config in CXR_METHOD_RUNS.items():
        file = CONFIGS / "pretrain" / f"{config}.yaml"
        print(medclr.pretrain(store, out / "runs" / f"cxr-small-{name}", config=file, settings=settings))
    compared("cxr_methods", out)


def compared(name: str, out: Path) -> None:
    """A comparison of configs/compare; its paths are relative to ``out``."""
    with contextlib.chdir(out):
        print(medclr.compare(CONFIGS / "compare" / f"{name}.yaml", Path("comparisons") / name))


if __name__ == "__main__":
    parts = {part.__name__: part for part in (roads, cxr, hippocampus, methods, cxr_methods)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    parts[chosen.part](chosen.data.resolve(), chosen.out.resolve())
