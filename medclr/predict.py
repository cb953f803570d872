"""New scans -> what a trained model says of them: scores of scans, or masks on the grid of their files.

Scans are found, read and encoded exactly as ``medclr index`` and ``medclr prepare`` do for training.

    DIR/scores.csv       classification: a row a scan, with its class and the probability of each
    DIR/masks.csv        segmentation: a row a scan, with the names of its masks and the volume of each class
    DIR/masks/           segmentation: NIfTI on the grid of the source
    DIR/seg/             segmentation of DICOM: DICOM SEG. It belongs to the patient's study and so names the patient;
                         nothing else here does
    DIR/rejected.csv     what could not be predicted, and why
    DIR/overview.png     the first scans with what was said of them
    DIR/prediction.json  the model and the options; written last
    DIR/unfinished/      until then: a line for each scan that is done

Letters: n stored slices of a scan, S side of a stored slice, D slices of its source, K classes.
"""

import contextlib
import csv
import io
import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

import medclr
from medclr import figures, files
from medclr.augment.views import plain_view
from medclr.config import differences
from medclr.data.index import Scan as Indexed
from medclr.data.index import rejected_name, row_of
from medclr.data.loader import load_batch
from medclr.data.manifest import Rejected, ScanRow, SourceFiles
from medclr.data.places import Namer, places_path
from medclr.data.readings import Entry, entries_of
from medclr.data.roots import Roots, bring_all, copies_path, files_of
from medclr.data.shard import decode
from medclr.data.single import SingleScan
from medclr.data.store import to_source_grid
from medclr.data.walk import Refused
from medclr.errors import MedclrError, ScanError
from medclr.figures_masks import COLOURS
from medclr.memory import keep_freed_memory
from medclr.progress import progress
from medclr.scans import bids
from medclr.scans.dicom_seg import write_seg
from medclr.scans.dicom_values import unheard
from medclr.scans.modality import modality_of
from medclr.scans.nifti_labels import write_like, write_stack
from medclr.scans.policy import DEFAULT, Plane, Policy
from medclr.scans.privacy import Pseudonyms, default_key_file, load_key
from medclr.sources import Brought, archive, dicomdir
from medclr.trained import Trained, load_model

PIECE = 32
"""Slices that are segmented at once: the answer is K maps a slice, and K can be more than a hundred."""

SHOWN = 12
"""Scans of the overview."""

LEGEND = 16
"""Classes that its legend names; colours repeat before."""

Labels = NDArray[np.uint16]


@dataclass(frozen=True)
class PredictSummary:
    """What ``medclr predict`` wrote."""

    out: Path
    scans: int
    rejected: int
    learnt_from: int
    """Scans of patients from whom the model learnt."""
    without_seg: int
    """DICOM scans of whose masks no DICOM SEG could be made."""

    def __str__(self) -> str:
        text = f"{self.out}: {self.scans:,} scan{'s' * (self.scans != 1)} predicted; see {self.out / 'overview.png'}"
        if self.learnt_from:
            text += f"\n{self.learnt_from:,} of them are of patients from whom the model learnt: no test of it"
        if self.without_seg:
            text += f"\n{self.without_seg:,} of them could get no DICOM SEG; the column note of masks.csv says why"
        if self.rejected:
            text += f"\n{self.out / 'rejected.csv'}: {self.rejected:,} could not be predicted, and why"
        return text


@dataclass(frozen=True)
class Said:
    """What the model said of one scan: a line of the journal, and a row of the table."""

    scan_id: str
    patient_id: str
    study_id: str
    modality: str
    path: str
    """As in ``ScanRow``: an opaque id, unless paths are kept."""
    volume: int
    irregular: str
    learnt_from: bool
    """Whether the model learnt from this patient."""
    numbers: list[float]
    """[K]: probabilities, or the volume of each class in ml."""
    mask: str = ""
    """Segmentation: the NIfTI, relative to DIR; and below."""
    dicom_seg: str = ""
    note: str = ""
    """Why there is no DICOM SEG of a DICOM scan."""


@dataclass
class Job:
    """One prediction as it goes on."""

    out: Path
    trained: Trained
    device: torch.device
    namer: Namer
    dicom_seg: bool
    done: dict[str, Said] = field(default_factory=dict)
    """By scan_id."""
    rejected: list[Rejected] = field(default_factory=list)
    maps: bool | None = None
    """Whether the model answers with maps, which become masks, and not with scores; None: it was not asked yet."""

    @property
    def classes(self) -> tuple[str, ...]:
        """K names, of maps without the background."""
        return self.trained.model.classes

    def reject(self, entry: Entry, reason: str) -> None:
        """List a scan among the rejected."""
        self.rejected.append(Rejected(rejected_name(self.namer, Refused(entry.root, entry.path, "")), reason))


def predict(
    scans: list[Path],
    model: Path,
    out: Path,
    *,
    modality: str | None = None,
    policy: Policy = DEFAULT,
    plane: Plane | None = None,
    threshold: float = 0.5,
    dicom_seg: bool = True,
    keep_paths: bool = False,
    key_file: Path | None = None,
    copies: Path | None = None,
) -> PredictSummary:
    """Ask a trained model about new scans.

    An interrupted prediction goes on when the same command is given again. A scan that cannot be read, or of a modality
    that the model was not trained on, is listed in rejected.csv, and the others go on.

    Args:
        scans: Files (DICOM, NIfTI, PNG, JPEG, TIFF) and whatever medclr index takes: folders, archives, DICOMDIRs.
        model: Run folder of medclr finetune or distill.
        out: Folder to write; new, or left by the same command.
        modality: What files show that do not say it themselves: CT, MR, XR, US, PT, NM or OT.
        policy: What to do with scans that are not plain.
        plane: How NIfTI volumes are cut into slices; if not given, as those that the model learnt from if all of those
            were cut alike, else across their coarsest spacing.
        threshold: Where several classes can be true: those of at least this probability are.
        dicom_seg: Whether masks of DICOM scans are written as DICOM SEG as well, which name the patient.
        keep_paths: Write paths into the tables and messages, not opaque ids.
        key_file: Secret key of the pseudonyms, made on first use; if not given, ~/.config/medclr/key.
        copies: Where archives are unpacked, for the owner alone; if not given, OUT.copies beside the folder.

    Raises:
        MedclrError: there is no such model or scan, nothing could be predicted, or ``out`` holds something else.
    """
    out, given = Path(out), scans if isinstance(scans, list | tuple) else [scans]
    if not 0 < threshold < 1:
        raise MedclrError(f"--threshold {threshold}: is no probability between 0 and 1")
    shows = modality_of(modality).name if modality else None
    trained = load_model(model)
    key_file = Path(key_file) if key_file else default_key_file()
    key = Pseudonyms(load_key(key_file))
    namer = Namer(key, key_file, keep_paths)
    if plane is None and len(learnt := trained.facts.get("planes", [])) == 1 and learnt[0] in get_args(Plane):
        (plane,) = learnt
    asked = {"modality": shows, "policy": asdict(policy), "plane": plane, "threshold": threshold}
    asked |= {"dicom_seg": dicom_seg, "keep_paths": keep_paths, "key": key.name}
    claim = {
        "medclr_version": medclr.__version__,
        "task": trained.task,
        "model": files.sha256(trained.path / "model.json"),
        "classes": list(trained.model.classes),
        **asked,
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = Job(out, trained, device, namer, dicom_seg)
    with files.alone(out):
        job.done = _resume(out, claim)
        roots = _brought(given, Path(copies) if copies else copies_path(out))
        found, refused = files_of(roots, [key_file, places_path(key_file), out], None)
        entries, unreadable = entries_of(found, roots.folders, None, namer, key, policy, plane)
        job.rejected = [Rejected(rejected_name(namer, r), r.reason) for r in dict.fromkeys(refused + unreadable)]
        waiting = _waiting(job, entries, shows, key)
        namer.save()
        text = "\n".join([json.dumps(claim), *(json.dumps(asdict(said)) for said in job.done.values()), ""])
        files.write_text(_journal(out), text)
        _predict(job, waiting)
        _finish(job, claim, threshold)
    said = job.done.values()
    learnt_from, without_seg = sum(one.learnt_from for one in said), sum(bool(one.note) for one in said)
    return PredictSummary(out, len(said), len(job.rejected), learnt_from, without_seg)


# What was given -> scans


def _brought(given: Sequence[Path], copies: Path) -> Roots:
    """As ``bring_all``; a file by itself becomes its folder, of which this file alone counts."""
    alone: dict[Path, list[str]] = {}
    others: list[Path] = []
    for path in dict.fromkeys(map(Path, given)):
        if path.is_file() and not (archive.is_archive(path) or dicomdir.is_dicomdir(path)):
            whole = path.absolute()
            alone.setdefault(whole.parent, []).append(whole.name)
        else:
            others.append(path)
    roots = bring_all(others, copies)
    inside = [one.folder for one in roots.brought]
    single = [
        Brought(folder, names)
        for folder, names in alone.items()
        if not any(folder.is_relative_to(other) for other in inside)  # found there anyway
    ]
    return Roots([*roots.brought, *single], roots.copies)


def _waiting(job: Job, entries: Sequence[Entry], shows: str | None, key: Pseudonyms) -> list[tuple[Entry, ScanRow]]:
    """The scans that are still to be predicted, in the order of a manifest; what none can be of is rejected."""
    rows: dict[str, tuple[Entry, ScanRow]] = {}
    for entry in entries:
        modality = entry.modality or shows
        if modality is None:
            job.reject(entry, "does not say its modality; give it with --modality")
        elif modality not in job.trained.modalities:
            job.reject(
                entry, f"is {modality}, and the model was trained on {' and '.join(job.trained.modalities)} alone"
            )
        else:
            row = row_of(Indexed(entry, _patient(entry, key), modality, None, None), "", key, job.namer)
            if row.scan_id in rows:
                job.reject(entry, "the same bytes stand at the same path under another root")
            else:
                rows[row.scan_id] = entry, row
    ordered = sorted(rows.values(), key=lambda pair: (pair[1].patient_id, pair[1].scan_id))
    return [pair for pair in ordered if pair[1].scan_id not in job.done]


def _patient(entry: Entry, key: Pseudonyms) -> str:
    """As ``medclr index`` has it where only the files speak; here a picture may be a patient of its own."""
    subject = bids.subject(entry.path)
    return entry.patient or (key("patient", subject) if subject else key("patient", "", entry.sha256))


# The predictions


def _predict(job: Job, waiting: Sequence[tuple[Entry, ScanRow]]) -> None:
    """Predict what is still to be, and note each scan in the journal."""
    keep_freed_memory()
    job.trained.model.to(job.device)
    total = sum(row.n_slices for _, row in waiting)
    with (
        files.mendable(job.out),
        _journal(job.out).open("a", encoding="utf-8") as journal,
        progress("predict", total, "slices") as advance,
        unheard(),  # around both threads: each is silent as well, but would let the other be heard when it ends first
        contextlib.closing(_decoded(waiting, job.trained.model.encoder.store_px)) as decoded,
        torch.inference_mode(),
    ):
        for entry, row, single in decoded:
            if isinstance(single, str):
                job.reject(entry, single)
            else:
                said = _ask(job, entry, row, single)
                print(json.dumps(asdict(said)), file=journal, flush=True)
                job.done[said.scan_id] = said
            advance(row.n_slices)


def _decoded(
    waiting: Sequence[tuple[Entry, ScanRow]], size_px: int
) -> Generator[tuple[Entry, ScanRow, SingleScan | str]]:
    """Each scan as a store of its own, or why it is none; a thread reads the next one meanwhile."""

    def read(entry: Entry, row: ScanRow) -> SingleScan | str:
        source = _source(entry, row)
        try:
            scan, _ = decode(row, source)
            return SingleScan(scan, size_px, row)
        except MedclrError as error:
            return source.renamed(str(error)).removeprefix(f"{row.path}: ")

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        ahead: list[Future[SingleScan | str]] = []
        try:
            for i, (entry, row) in enumerate(waiting):
                while len(ahead) < 2 and i + len(ahead) < len(waiting):
                    ahead.append(pool.submit(read, *waiting[i + len(ahead)]))
                yield entry, row, ahead.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _source(entry: Entry, row: ScanRow) -> SourceFiles:
    paths = [file.absolute() for file in entry.files]
    return SourceFiles(paths, None, dict.fromkeys(paths, row.path))


def _ask(job: Job, entry: Entry, row: ScanRow, single: SingleScan) -> Said:
    """What the model says of one scan; its masks are written."""
    model = job.trained.model
    batch = load_batch(single, single.indices(), model.encoder.config.slices)
    facts: dict[str, Any] = {name: getattr(row, name) for name in ("scan_id", "patient_id", "study_id", "modality")}
    facts |= {"path": row.path, "volume": row.volume, "irregular": single.scan.irregular}
    facts |= {"learnt_from": row.patient_id in job.trained.patients}
    if job.maps is None:
        job.maps = model.infer(batch.select(slice(0, 1)).to(job.device)).ndim == 4
    if job.maps:
        parts = (batch.select(slice(start, start + PIECE)).to(job.device) for start in range(0, len(batch), PIECE))
        labels = np.concatenate([model.infer(part).argmax(1).cpu().numpy().astype(np.uint16) for part in parts])
        said = Said(**facts, **_write_masks(job, entry, row, single, labels))
        where = np.flatnonzero(labels[(slice(None), *_content(single))].any((1, 2)))  # slices with something found
        shown = int(where[len(where) // 2]) if len(where) else len(single) // 2
        words = [f"{name} {_short(ml)} ml" for name, ml in zip(job.classes, said.numbers, strict=True) if ml]
    else:
        (probability,) = model.infer(batch.to(job.device)).tolist()  # [K]
        said = Said(**facts, numbers=probability)
        shown = len(single) // 2
        labels = np.zeros((len(single), *batch.images.shape[2:]), dtype=np.uint16)
        words = [f"{name} {p:.2f}" for name, p in zip(job.classes, probability, strict=True)]
    tiles = _journal(job.out).parent
    if len(list(tiles.glob("*.npz"))) < SHOWN:  # kept until the end, so that a prediction that goes on has it as well
        image = plain_view(batch.select(slice(shown, shown + 1)), single.info.size_px)[0].numpy()  # [C,S,S]
        title = f"{row.scan_id}, slice {int(batch.slice_index[shown]) + 1} of {single.scan.depth}"
        tile = {"image": image[len(image) // 2][_content(single)], "labels": labels[shown][_content(single)]}
        with files.writing(tiles / f"{row.scan_id}.npz", flushed=False) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **tile, title=title, words=", ".join(words) or "nothing found")
    return said


def _content(single: SingleScan) -> tuple[slice, slice]:
    """Where slices lie in the square; around it is padding."""
    scan = single.scan
    return (
        slice(scan.content_top, scan.content_top + scan.content_height),
        slice(scan.content_left, scan.content_left + scan.content_width),
    )


def _short(ml: float) -> str:
    return f"{ml:,.0f}" if ml >= 100 else f"{ml:.3g}"


def _write_masks(job: Job, entry: Entry, row: ScanRow, single: SingleScan, labels: Labels) -> dict[str, Any]:
    """Write the masks of a scan from labels [n,S,S]; what the table says of them."""
    scan, paths = single.scan, [file.absolute() for file in entry.files]
    on_source = to_source_grid(labels, scan)
    values = np.array([0, *_values(job.trained)], dtype=np.uint16)  # of class 0..K in the masks that it was trained on
    voxel_ml = float(abs(np.linalg.det(np.array(scan.affine).reshape(4, 4)[:3, :3]))) / 1000
    count = np.bincount(on_source.ravel(), minlength=len(values))[1:]  # [K]
    facts: dict[str, Any] = {"numbers": [float(f"{n * voxel_ml:.6g}") for n in count]}
    facts["mask"] = f"masks/{row.scan_id}.nii.gz"
    if entry.series or entry.is_picture:
        stack = on_source.reshape(scan.depth, scan.height, scan.width)
        write_stack(job.out / facts["mask"], values[stack], np.array(scan.affine).reshape(4, 4))
    else:
        write_like(job.out / facts["mask"], values[on_source], paths[0])
    if entry.series and job.dicom_seg:
        facts["dicom_seg"] = f"seg/{row.scan_id}.dcm"
        (job.out / "seg").mkdir(mode=0o700, exist_ok=True)  # for the owner alone
        try:
            write_seg(job.out / facts["dicom_seg"], stack, job.classes, paths, volume=row.volume)
        except ScanError as error:
            facts |= {"dicom_seg": "", "note": _source(entry, row).renamed(str(error)).removeprefix(f"{row.path}: ")}
    return facts


def _values(trained: Trained) -> Sequence[int]:
    """The number of each class in masks: as in those that a model was trained on, where it says so."""
    given: Sequence[int] = trained.facts["config"].get("labels") or ()
    return given or range(1, len(trained.model.classes) + 1)


# What is written


def _journal(out: Path) -> Path:
    return out / "unfinished" / "journal.jsonl"


def _resume(out: Path, claim: Mapping[str, Any]) -> dict[str, Said]:
    """What an interrupted prediction has done, by scan_id; a new one begins its journal.

    Raises:
        MedclrError: ``out`` holds something else.
    """
    if (out / "prediction.json").exists():
        raise MedclrError(f"{out}: holds a finished prediction; choose another --out")
    journal = _journal(out)
    done: dict[str, Said] = {}
    if journal.exists():
        first, *lines = journal.read_text(encoding="utf-8").splitlines() or ["{}"]
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # cut short as the process was killed
                said = Said(**json.loads(line))
                done[said.scan_id] = said
        if done and (other := differences(json.loads(first), dict(claim))):
            raise MedclrError(
                f"{out}: holds an interrupted prediction with other {', '.join(other)}; give the same model and options"
                " again, or choose another --out"
            )
    elif any(path.suffix != ".tmp" for path in out.iterdir()):
        raise MedclrError(f"{out}: exists and is no prediction; choose another --out")
    return done


def _finish(job: Job, claim: Mapping[str, Any], threshold: float) -> None:
    """Write the tables and the picture; ``prediction.json`` comes last, and then the journal goes.

    Raises:
        MedclrError: nothing could be predicted; the folder can be used again, with other options too.
    """
    out, said = job.out, sorted(job.done.values(), key=lambda one: (one.patient_id, one.scan_id))
    rejected = sorted(job.rejected, key=lambda one: (one.path, one.reason))
    _write_csv(out / "rejected.csv", ("path", "reason"), [(one.path, one.reason) for one in rejected])
    if not said:
        (reason, count), *_ = Counter(one.reason for one in rejected).most_common(1)
        raise MedclrError(
            f"{out}: nothing could be predicted; {count} of {len(rejected)} are like"
            f" {next(one.path for one in rejected if one.reason == reason)}: {reason}"
        )
    identity = ("scan_id", "patient_id", "study_id", "modality", "path", "volume", "irregular")
    rows = [[*(getattr(one, name) for name in identity), int(one.learnt_from)] for one in said]
    if any(one.mask for one in said):
        names = (*identity, "learnt_from", "mask", "dicom_seg", "note", *(f"ml {name}" for name in job.classes))
        own = [[one.mask, one.dicom_seg, one.note, *(f"{ml:.6g}" for ml in one.numbers)] for one in said]
        table = "masks.csv"
    else:
        several = bool(job.trained.facts["config"].get("multi_label"))
        names = (*identity, "learnt_from", "predicted", *(f"p {name}" for name in job.classes))
        own = [[_named(one, job.classes, threshold if several else None), *(f"{p:.9g}" for p in one.numbers)]
               for one in said]  # fmt: skip
        table = "scores.csv"
    _write_csv(out / table, names, [row + more for row, more in zip(rows, own, strict=True)])
    _draw(job, [one.scan_id for one in said])
    values = {"values": dict(zip(job.classes, _values(job.trained), strict=True))} if table == "masks.csv" else {}
    files.write_json(out / "prediction.json", {**claim, **values})
    shutil.rmtree(_journal(out).parent)
    with contextlib.suppress(OSError):  # it is not there, or not empty
        (out / "seg").rmdir()


def _named(said: Said, classes: Sequence[str], threshold: float | None) -> str:
    """The likeliest class; with a threshold all that reach it, parted by '|'."""
    if threshold is None:
        return classes[int(np.argmax(said.numbers))]
    return "|".join(name for name, p in zip(classes, said.numbers, strict=True) if p >= threshold)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    files.write_text(path, text.getvalue())


def _draw(job: Job, order: Sequence[str]) -> None:
    """``overview.png``: a slice of each of the first scans, with its scores or the outlines of what was found."""
    kept = [path for name in order if (path := _journal(job.out).parent / f"{name}.npz").exists()]
    columns = min(4, len(kept))
    lines = -(-len(kept) // columns)
    tile, text, head = 2.4, 0.4, 0.7  # inches
    figure = Figure(figsize=(max(columns * tile, 4.5), head + lines * (tile + text)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(job.classes))]
    met: set[int] = set()
    for axis, path in zip(axes, kept, strict=False):
        with np.load(path) as content:
            image, labels = content["image"], content["labels"]  # [h,w] each
            caption = [str(content["title"]), *textwrap.wrap(str(content["words"]), 44)[:3]]
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for k in set(np.unique(labels).tolist()) - {0}:
            around = np.pad(labels == k, 1)  # [h+2,w+2]: lines close at the border too
            down, across = (np.arange(-1, length - 1) for length in around.shape)
            axis.contour(across, down, around, levels=[0.5], colors=colours[k - 1], linewidths=1.2)
            met.add(k)
        axis.set_title("\n".join(caption), fontsize=6.5, color=figures.INK, loc="left")
    for axis in axes:
        axis.set_axis_off()
    stamp = ", a transductive model" if job.trained.facts.get("transductive") else ""
    title = f"{len(kept)} of {len(order):,} scan{'s' * (len(order) != 1)}{stamp}"
    figure.suptitle(title, fontsize=10, color=figures.INK, x=0.01, ha="left")
    if met:
        handles = [Patch(color=colours[k - 1], label=job.classes[k - 1]) for k in sorted(met)[:LEGEND]]
        figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figures.save(figure, job.out / "overview.png")
