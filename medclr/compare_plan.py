"""What a comparison is to do: its settings, its cells, and the folder in which it goes on.

DIR/config.yaml                                         settings, and which weights and stores were found under them
DIR/cells/PROTOCOL/INIT/BUDGET/SEED/predictions.csv     what that model said of the test patients (medclr.outcomes)
DIR/cells/PROTOCOL/INIT/BUDGET/SEED/cases.csv           which patients it was given
DIR/cells/PROTOCOL/INIT/BUDGET/SEED/cell.json           how long it took; written last
DIR/cells/PROTOCOL/INIT/BUDGET/SEED/model/              its weights: of teachers, and of all with keep_models
DIR/features/                                           features of the probe, one file for all cells of an init
DIR/results.csv, DIR/report.html, DIR/figures/          what came of it
DIR/students.csv                                        the same of students, the differences to their teachers
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from medclr import checkpoint, files, tasks
from medclr.config import dataclass_options, differences, nearest, option_parser, parse, read_yaml, to_plain, to_yaml
from medclr.data.cases import parse_budget
from medclr.data.store import Store
from medclr.errors import MedclrError

Protocol = Literal["probe", "finetune"]


@dataclass(frozen=True)
class InitConfig:
    """One of the encoders that are compared."""

    encoder: str
    """random, imagenet, a run folder of medclr pretrain, or a file of torchvision's ResNet weights; same: the model of
    the teacher."""

    teacher: str | None = None
    """Another init, whose model of the same cell labels unlabelled slices softly: this one learns from that, as medclr
    distill does, and settings are then those of medclr distill, over those of all that it knows too. null: from the
    labelled cases."""

    store: Path | None = None
    """A slice store of its own, of the same scans, say at another size; null: that of all."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of medclr finetune for this one alone, by their dotted names; they win over those of all."""


@dataclass(frozen=True)
class CompareConfig:
    """Settings of ``medclr compare``."""

    store: Path
    """Slice store with labels or masks."""

    inits: dict[str, InitConfig]
    """What is compared: a name, and below it encoder and, where it differs from the others, store and settings."""

    title: str = ""
    """Name of the cohort, in the report's title; empty: the store's."""

    task: str = "classify"
    """What to learn: classify or segment."""

    protocols: tuple[Protocol, ...] = ("finetune",)
    """probe: logistic regression on frozen features (classify alone); finetune: medclr finetune."""

    budgets: tuple[int | float | str, ...] = (5, 10, 20, 50)
    """Labelled patients: numbers (20), percentages (10%) or fractions (0.1)."""

    seeds: int = 5
    """Each budget is drawn and trained so many times: seeds 0, 1, ..., the same patients for every init."""

    reference: str | None = None
    """The init that the others are measured against; null: the first whose encoder is imagenet, else random."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of medclr finetune for all, by their dotted names, such as steps or network.name; the probe takes
    network and size_px from them."""

    modality: str | None = None
    """Only the scans of this modality; null: all."""

    test_share: float = 0.3
    """Share of patients held out by a hash of the id, where the manifest names no train and test split."""

    transductive: bool = False
    """Go on although an encoder was pretrained on test patients; every figure and table is stamped with it."""

    jobs: int = 1
    """Cells that are computed at the same time, each in a process of its own with its share of the cores."""

    resamples: int = 1000
    """Bootstrap samples of the test patients."""

    keep_models: bool = False
    """Keep the weights of every cell, not only its predictions and pictures."""

    def __post_init__(self) -> None:
        """Raise one MedclrError for all that cannot work."""
        names, budgets = list(self.inits), list(map(str, self.budgets))
        folders = [folder_name(name) for name in names]
        rules = {
            "task must be one of " + ", ".join(tasks.names()): self.task in tasks.names(),
            "inits must name at least one": bool(names),
            "inits must differ in letters or digits, because each has a folder": len(set(folders)) == len(folders)
            and "" not in folders,
            "budgets must be at least one, and no two alike": 0 < len(budgets) == len(set(budgets)),
            "protocols must be at least one, and no two alike": 0 < len(self.protocols) == len(set(self.protocols)),
            "protocols: probe goes with task classify": self.task == "classify" or "probe" not in self.protocols,
            "seeds must be at least 1": self.seeds >= 1,
            "jobs must be at least 1": self.jobs >= 1,
            "resamples must be at least 100": self.resamples >= 100,
            "test_share must be above 0 and below 1": 0 < self.test_share < 1,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise MedclrError("; ".join(wrong))
        if self.reference is not None and self.reference not in names:
            raise MedclrError(f"reference: {self.reference!r} is none of the inits{nearest(self.reference, names)}")
        for name, init in self.inits.items():
            if init.teacher is None and init.encoder == "same":
                raise MedclrError(f"inits.{name}: encoder 'same' is the model of a teacher; name the init that teaches")
            if init.teacher is None:
                continue
            if init.teacher not in names:
                raise MedclrError(
                    f"inits.{name}: teacher {init.teacher!r} is none of the inits{nearest(init.teacher, names)}"
                )
            if self.inits[init.teacher].teacher is not None:
                raise MedclrError(f"inits.{name}: its teacher {init.teacher} has a teacher itself; use rounds instead")
            if init.encoder != "same":
                raise MedclrError(
                    f"inits.{name}: write encoder: same, since the student starts from its teacher's model"
                )
            if init.store is not None:
                raise MedclrError(f"inits.{name}: its store is that of its teacher; leave it out")
            if "probe" in self.protocols:
                raise MedclrError(f"inits.{name}: a probe has no teacher; take protocol finetune alone")
        for budget in budgets:
            try:
                parse_budget(budget)
            except MedclrError as error:
                raise MedclrError(f"budgets: {error}") from None

    @property
    def referred(self) -> str:
        """The init that the others are measured against."""
        by_encoder = {init.encoder: name for name, init in reversed(self.inits.items())}
        return self.reference or by_encoder.get("imagenet") or by_encoder.get("random") or next(iter(self.inits))

    @property
    def teachers(self) -> set[str]:
        """The inits whose models teach others."""
        return {init.teacher for init in self.inits.values() if init.teacher is not None}

    def first_of(self, init: str) -> str:
        """The init that learns from the labelled cases: the teacher of a student, else the init itself."""
        return self.inits[init].teacher or init

    def store_of(self, init: str) -> Path:
        """The slice store of an init."""
        return self.inits[self.first_of(init)].store or self.store

    def settings_of(self, init: str) -> dict[str, Any]:
        """The settings of ``medclr finetune`` for an init or its teacher, by their dotted names."""
        return dotted(self.settings) | dotted(self.inits[self.first_of(init)].settings)

    def cells(self, protocol: str) -> "list[Cell]":
        """All cells of a protocol, seed after seed, so that an unfinished comparison is a whole one of fewer seeds.

        Teachers come before their students.
        """
        inits = sorted(self.inits, key=lambda init: self.inits[init].teacher is not None)
        return [
            Cell(protocol, init, str(budget), seed)
            for seed in range(self.seeds)
            for budget in self.budgets
            for init in inits
        ]


@dataclass(frozen=True)
class Cell:
    """One model of the grid."""

    protocol: str
    init: str
    budget: str
    """As asked for."""
    seed: int

    def __str__(self) -> str:
        return f"{self.protocol}, {self.init}, {self.budget} patients, seed {self.seed}".replace("% patients", "%")

    def folder(self, out: Path) -> Path:
        """Where its predictions are kept."""
        return out / "cells" / self.protocol / folder_name(self.init) / self.budget / str(self.seed)

    def teacher(self, plan: CompareConfig) -> "Cell | None":
        """The cell whose model teaches the one of this."""
        name = plan.inits[self.init].teacher
        return None if name is None else replace(self, init=name)

    def is_done(self, out: Path) -> bool:
        """Whether it need not be computed again."""
        folder = self.folder(out)
        return (folder / "cell.json").is_file() and (folder / "predictions.csv").is_file()


def folder_name(init: str) -> str:
    """``"ImageNet, then SimCLR"`` -> ``imagenet-then-simclr``."""
    return "-".join(re.findall(r"\w+", init.lower()))


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"network": {"name": "x"}}`` -> ``{"network.name": "x"}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_config(path: Path, **changes: Any) -> CompareConfig:
    """The settings in a YAML file.

    Args:
        path: of the file.
        changes: what wins over it.

    Raises:
        MedclrError: an unknown setting (with the nearest known one), a wrong type, or a value that cannot work.
    """
    content = read_yaml(path) | changes
    _check_names(path, "", content, CompareConfig)
    inits = content.get("inits")
    if not isinstance(inits, dict):
        raise MedclrError(f"{path}: inits: write a name a line, and below each its encoder")
    for name, init in inits.items():
        if not isinstance(init, dict):
            raise MedclrError(f"{path}: inits.{name}: write 'encoder: random', or what it is, below the name")
        _check_names(path, f"inits.{name}.", init, InitConfig)

    def add(parser: Any) -> None:
        dataclass_options(parser, CompareConfig)

    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in content.items()]
    try:
        options = parse(option_parser("medclr compare", "", add), words)
        return CompareConfig(**{each.name: getattr(options, each.name) for each in fields(CompareConfig)})
    except MedclrError as error:
        told = re.sub(r"Problem with given class_path '[\w.]+': ", "", str(error))
        raise MedclrError(f"{path}: {told}") from None


def _check_names(path: Path, prefix: str, content: Mapping[str, Any], settings: type) -> None:
    known = [each.name for each in fields(settings)]
    for key in content:
        if key not in known:
            raise MedclrError(f"{path}: unknown setting {f'{prefix}{key}'!r}{nearest(str(key), known)}")


HARMLESS = {"title", "reference", "jobs", "resamples", "keep_models"}
"""Settings that leave all predictions as they are, and so may differ when a comparison goes on."""

GROWING = {"protocols", "budgets", "seeds"}
"""Settings to which something may be added."""


RULES = "2"
"""Of how segmentations are judged and students are trained; raised with either, so that no cells of two rules meet.

2: on the masks of the files, which a store may have shrunk; students take the settings of all.
"""


def found(config: CompareConfig) -> dict[str, dict[str, str]]:
    """Init -> hashes of its weights and of its store's manifest, and the rules: what must not change under a name."""
    hashes = {}
    for name, init in config.inits.items():
        own = dotted(init.settings) if init.teacher else {}  # a student may have further weights, and slices
        path = Path(own.get("init", init.encoder))
        if path.is_dir():
            weights = files.sha256(checkpoint.encoder_folder(path) / "encoder.json")  # which holds that of the tensors
        else:
            weights = files.sha256(path) if path.is_file() else ""
        info = Store(Path(own.get("store", config.store_of(name)))).info
        hashes[name] = {"weights": weights, "store": f"{info.manifest_sha256} {info.size_px}"}
        if config.task == "segment" or init.teacher:
            hashes[name]["rules"] = RULES
    return hashes


def open_comparison(out: Path, config: CompareConfig) -> None:
    """Make the folder of a comparison, or accept one to which nothing but inits, budgets or seeds were added.

    Raises:
        MedclrError: it holds another comparison (names the differences), or something else.
    """
    resolved: dict[str, Any] = {**to_plain(config), "found": found(config)}
    resolved["budgets"] = [str(budget) for budget in config.budgets]
    existing = out / "config.yaml"
    was = read_yaml(existing) if existing.exists() else {}
    if {"inits", "found"} <= was.keys():
        now = {**resolved}
        for part in ("inits", "found"):  # whatever is new cannot contradict
            now[part] = {name: value for name, value in now[part].items() if name in was[part]}
        if any(hashes.get("rules") != now["found"][name].get("rules") for name, hashes in was["found"].items()
               if name in now["found"]):  # fmt: skip
            raise MedclrError(
                f"{out}: an earlier medclr judged its segmentations, or trained its students, by other rules; choose "
                "another --out"
            )
        changed = {key: pair for key, pair in differences(was, now).items() if key not in HARMLESS}
        for key in GROWING & changed.keys():
            before, after = changed[key]
            if after > before if isinstance(before, int) else set(before) < set(after):
                del changed[key]
        if changed:
            told = "; ".join(f"{name} was {before} and is now {after}" for name, (before, after) in changed.items())
            raise MedclrError(
                f"{out}: holds a comparison with other settings ({told}); inits, budgets and seeds can be added, for "
                "anything else choose another --out"
            )
    elif was or (out.exists() and (not out.is_dir() or any(p.name != files.LOCK_NAME for p in out.iterdir()))):
        raise MedclrError(f"{out}: exists and is not a comparison of medclr; choose another --out")
    files.write_text(existing, to_yaml(resolved))
