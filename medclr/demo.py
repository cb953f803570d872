"""The whole road on phantom patients: every verb once, with the command that does the same on your own scans."""

import hashlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from medclr.errors import MedclrError
from medclr.progress import duration

SETTINGS = {"epochs": 12, "batch": 64, "views.size_px": 64, "data.slices_per_scan": 16, "data.split": "train"}
"""Short enough for two cores; everything else is as medclr comes."""

FEW = {
    "steps": 150, "batch": 16, "lr": 0.01, "encoder_lr": 1.0, "layer_decay": 1.0, "frozen_steps": 0.0,
    "segment.width": 8, "segment.labels": [1, 2], "segment.names": ["ventricles", "metastases"],
}  # fmt: skip
"""Of fine-tuning: a small decoder at a high rate, so that two cores see something in half a minute."""

CASES = "6"
"""Labelled patients."""


@dataclass(frozen=True)
class DemoSummary:
    """The table at the end, and where the pictures lie."""

    table: str
    pictures: tuple[Path, ...]
    seconds: float

    def __str__(self) -> str:
        shown = "\n".join(f"  {picture}" for picture in self.pictures)
        caution = "A cohort this small shows the road, not a result: see how wide the intervals are."
        took = f"The whole road took {duration(self.seconds)}."
        return f"\n{self.table}\n\n{caution}\n\nPictures to look at:\n{shown}\n{took}"


def demo(out: Path = Path("demo"), *, patients: int = 24, seed: int = 0) -> DemoSummary:
    """The whole road on a cohort of phantom patients.

    Args:
        out: Folder for the cohort, the store, the run and the pictures; must not exist, or be empty.
        patients: How many phantom patients to draw.
        seed: Another seed draws other patients.

    Raises:
        MedclrError: ``out`` holds something already, or there are too few patients to split.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MedclrError(f"--out {out}: exists already; remove it or choose another folder")
    if patients < 16:
        raise MedclrError("--patients must be at least 16, so that both classes have training and test patients")
    from medclr.data.phantom import write_cohort

    started = time.perf_counter()
    cohort, manifest, store, run, key = out / "scans", out / "phantom.csv", out / "store", out / "run", out / "key"

    print(f"\n{patients} phantom patients: CT as DICOM series, MR as NIfTI with masks, X-ray as PNG")
    print(write_cohort(cohort, patients=patients, seed=seed))
    # Phantoms have no secret: with a key that follows from the seed, the same patients are tested each time.
    key.touch(mode=0o600)
    key.write_text(hashlib.sha256(f"phantom {seed}".encode()).hexdigest())

    from medclr.data.index import index

    labels, masks, split = cohort / "labels.csv", cohort / "mr_masks", "train=0.6,test=0.4"
    tables = f"--labels {labels} --masks {masks} --split {split} --key-file {key}"
    print(f"\n$ medclr index {cohort} --out {manifest} {tables}")
    print(index([cohort], manifest, labels=labels, masks=masks, split=split, key_file=key))

    from medclr.data.prepare import prepare

    print(f"\n$ medclr prepare {manifest} --out {store} --size-px 96 --workers 2 --key-file {key}")
    print(prepare(manifest, store, size_px=96, workers=2, key_file=key))

    from medclr.pretrain import pretrain

    settings = {**SETTINGS, "seed": seed}
    words = " ".join(f"--{name} {value}" for name, value in settings.items())
    print(f"\n$ medclr pretrain --store {store} --out {run} {words}")
    print(pretrain(store, run, settings=settings))

    from medclr.embed import embed
    from medclr.probe import probe

    reports = []
    for encoder, like in ((str(run), None), ("random", run)):
        which = f"{encoder} --like {like}" if like else encoder
        print(f"\n$ medclr probe --encoder {which} --store {store} --budgets 4 100% --seeds 3")
        reports.append(probe(encoder, store, like=like, budgets=["4", "100%"], seeds=3))

    from medclr.finetune import finetune, setting_word
    from medclr.predict import predict

    model, words = out / "model", " ".join(f"--{k} {shlex.quote(setting_word(v))}" for k, v in FEW.items())
    asked = f"--task segment --encoder {run} --store {store} --modality MR --cases {CASES}"
    print(f"\n$ medclr finetune {asked} --out {model} {words}")
    print(finetune(store, model, task="segment", encoder=str(run), cases=CASES, modality="MR", settings=FEW))
    said = out / "predictions"
    print(f"\n$ medclr predict {cohort / 'mr'} --model {model} --modality MR --out {said} --key-file {key}")
    print(predict([cohort / "mr"], model, said, modality="MR", key_file=key))

    table = out / "features.parquet"
    print(f"\n$ medclr embed --encoder {run} --store {store} --out {table} --colour modality --seed {seed}")
    features = embed(str(run), store, table, colour="modality", seed=seed)
    print(features)
    drawn = [run / "figures" / "views.png", run / "figures" / "curves.png", model / "figures" / "overlays.png"]
    pictures = (*drawn, said / "overview.png", features.picture)
    return DemoSummary("\n\n".join(map(str, reports)), pictures, time.perf_counter() - started)
