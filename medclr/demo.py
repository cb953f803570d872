"""The whole road on phantom patients: every verb once, with the command that does the same on your own scans."""

import time
from dataclasses import dataclass
from pathlib import Path

from medclr.errors import MedclrError
from medclr.progress import duration

SETTINGS = {"epochs": 10, "batch": 128, "views.size_px": 64}
"""Short enough for two cores; everything else is the modality-mixed default."""


@dataclass(frozen=True)
class DemoSummary:
    """The table at the end, and where the pictures lie."""

    table: str
    pictures: tuple[Path, ...]
    seconds: float

    def __str__(self) -> str:
        shown = "\n".join(f"  {picture}" for picture in self.pictures)
        return f"\n{self.table}\nPictures to look at:\n{shown}\nThe whole road took {duration(self.seconds)}."


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
    if patients < 8:
        raise MedclrError("--patients must be at least 8, so that both classes have training and test patients")
    from medclr.data.phantom import write_cohort

    started = time.perf_counter()
    cohort, manifest, store, run = out / "scans", out / "phantom.csv", out / "store", out / "run"

    print(_step(f"draw {patients} phantom patients: CT as DICOM series, MR as NIfTI, X-ray as PNG"))
    print(write_cohort(cohort, patients=patients, seed=seed))

    from medclr.data.index import index

    labels, masks, split = cohort / "labels.csv", cohort / "mr_masks", "train=0.7,test=0.3"
    print(_step(f"medclr index {cohort} --out {manifest} --labels {labels} --masks {masks} --split {split}"))
    print(index([cohort], manifest, labels=labels, masks=masks, split=split, key_file=out / "key"))

    from medclr.data.prepare import prepare

    print(_step(f"medclr prepare {manifest} --out {store} --size_px 96 --workers 2"))
    print(prepare(manifest, store, size_px=96, workers=2))

    from medclr.pretrain import pretrain

    words = " ".join(f"--{name} {value}" for name, value in SETTINGS.items())
    print(_step(f"medclr pretrain --store {store} --out {run} --data.split train {words}"))
    print(pretrain(store, run, settings={**SETTINGS, "data.split": "train", "seed": seed}))

    from medclr.embed import embed
    from medclr.probe import probe

    reports = []
    for encoder in (str(run), "random"):
        print(_step(f"medclr probe --encoder {encoder} --store {store} --budgets 4 8 100%"))
        reports.append(probe(encoder, store, budgets=["4", "8", "100%"], seeds=3))
    print(_step(f"medclr embed --encoder {run} --store {store} --out {out}/features.parquet --colour modality"))
    features = embed(str(run), store, out / "features.parquet", colour="modality")
    print(features)
    pictures = (run / "figures" / "views.png", run / "figures" / "curves.png", features.picture)
    return DemoSummary("\n".join(map(str, reports)), pictures, time.perf_counter() - started)


def _step(text: str) -> str:
    return f"\n$ {text}"
