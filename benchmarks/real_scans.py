"""The whole road on real scans: what docs/results.md reports, made again by one command.

    python benchmarks/real_scans.py roads --data DIR --out DIR    five folders through index, prepare and pretrain
    python benchmarks/real_scans.py cxr   --data DIR --out DIR    chest X-rays: own pretraining, ImageNet, random

``--data`` holds hippocampus, mr_brain_dicom, ct_abdomen_dicom, ct_body and cxr_pediatric; ``--out`` must be new or hold
an interrupted run of the same command. Results are printed, and stand in ``--out`` with every picture.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import medclr
from medclr.figures import score_plot

CONFIGS = Path(__file__).parents[1] / "configs" / "pretrain"

ROADS = {
    "hippocampus": ("mr", {"modality": "MR"}),
    "mr_brain_dicom": ("mr", {}),
    "ct_abdomen_dicom": ("ct", {}),
    "ct_body": ("ct", {"modality": "CT"}),
    "cxr_pediatric": ("xray", {"modality": "XR"}),
}
"""Folder -> settings file and what the files do not say themselves."""

CXR = {
    "views.size_px": 64,
    "epochs": 60,
    "batch": 128,
    "precision": "bfloat16",
    "data.split": "train",
}
"""Chosen inside the training patients (docs/experiments.md), to end within 30 minutes on one core of this kind."""

CXR_EVALUATION_PX = 96
"""Side at which the frozen encoder sees whole images; crops show things larger, so a larger side fits it better."""


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
        print(medclr.pretrain(store, run, config=CONFIGS / f"{config}.yaml", settings=few))


def only(root: Path, name: str, folder: Path) -> Path:
    """A folder that holds one file of ``root``: label maps beside a scan are not scans."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if not link.exists():
        link.symlink_to((root / name).resolve())
    return folder


def cxr(data: Path, out: Path) -> None:
    """Probe of a ResNet-18 pretrained on the training patients, against ImageNet and random, on the same split."""
    root = data / "cxr_pediatric"
    manifest, own_store, imagenet_store, run = out / "cxr.csv", out / "store96", out / "store224", out / "run"
    split = "train=0.7,test=0.3"
    labels = root / "labels.csv"
    print(medclr.index([root], manifest, labels=labels, modality="XR", split=split, key_file=public_key(out)))
    print(medclr.prepare(manifest, own_store, size_px=96, workers=2, key_file=public_key(out)))
    print(medclr.prepare(manifest, imagenet_store, size_px=224, workers=2, key_file=public_key(out)))
    print(medclr.pretrain(own_store, run, config=CONFIGS / "xray.yaml", settings=CXR))
    whole = {"size_px": CXR_EVALUATION_PX}
    encoders = {
        "SimCLR": (str(run), own_store, whole),
        "ImageNet": ("imagenet", imagenet_store, {}),
        "random": ("random", own_store, {**whole, "like": run}),
    }
    series = {}
    for name, (encoder, store, options) in encoders.items():
        shutil.rmtree(out / f"probe_{name}", ignore_errors=True)  # of an earlier call of this script
        report = medclr.probe(encoder, store, out=out / f"probe_{name}", **options)
        print(report)
        scores = [s for s in report.scores if (s.classifier, s.metric) == ("logistic", "macro AUC")]
        series[name] = [(s.train_patients, s.mean, s.low, s.high) for s in scores]
    title = f"Chest X-rays, frozen features: {scores[0].seeds} seeds, {scores[0].test_patients} test patients"
    score_plot(out / "scores.png", series, "macro AUC (95 % interval over patients)", title)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["roads", "cxr"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    {"roads": roads, "cxr": cxr}[chosen.part](chosen.data, chosen.out)
