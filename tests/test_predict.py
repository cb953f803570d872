"""Predictions on new scans, against what the source files themselves say.

The model of most tests answers by intensity alone, so what it must say follows from the voxels that nibabel, pydicom or
SimpleITK read.
"""

import csv
import importlib
import json
import logging
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import marked
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from conftest import shared_data
from dicom_files import CT, write
from numpy.typing import NDArray
from PIL import Image
from test_dicom_seg import complaints, ordered, reread, series
from torch import Tensor

from medclr.cli import main
from medclr.config import EncoderConfig
from medclr.data.index import index
from medclr.data.loader import Batch, load_batch
from medclr.data.prepare import prepare
from medclr.data.store import Store, to_source_grid
from medclr.errors import MedclrError
from medclr.figures_masks import COLOURS
from medclr.models.encoder import build_encoder
from medclr.predict import predict
from medclr.tasks import TaskModel, classify, segment
from medclr.trained import export_model, load_model

LOW, HIGH = 300, 600
SIZE = 48


@dataclass(frozen=True)
class Config:
    """Of both models below."""

    labels: tuple[int, ...] = ()
    multi_label: bool = False


class Shades(TaskModel):
    """A voxel above LOW is of the first class, above HIGH of the second."""

    def __init__(self, config: Config, encoder: Any, classes: tuple[str, ...]) -> None:
        super().__init__()
        object.__setattr__(self, "encoder", encoder)  # no part of the module: its 45 MB need not be written each time
        self.classes = classes
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def infer(self, batch: Batch) -> Tensor:
        middle = batch.images[:, batch.images.shape[1] // 2]  # [n,S,S]
        label = (middle > LOW).long() + (middle > HIGH)
        return torch.nn.functional.one_hot(label, 3).permute(0, 3, 1, 2).float()


class Shares(Shades):
    """The share of voxels above LOW, and of those above HIGH."""

    def infer(self, batch: Batch) -> Tensor:
        scans = batch.scan.unique()
        above = [[(batch.images[batch.scan == s] > value).float().mean() for value in (LOW, HIGH)] for s in scans]
        return torch.tensor(above)


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are looked up by name: these two beside the real ones."""
    modules = {
        "shades": SimpleNamespace(Config=Config, Model=Shades),
        "shares": SimpleNamespace(Config=Config, Model=Shares),
    }
    monkeypatch.setattr(
        "medclr.tasks.get", lambda name: modules.get(name) or {"classify": classify, "segment": segment}[name]
    )


Export = Callable[..., Path]


@pytest.fixture(scope="module")
def encoder() -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 16)
    encoder.store_px = SIZE
    return encoder


@pytest.fixture
def export(encoder: Any, tmp_path: Path) -> Export:
    """Writes one of the two models and returns its run folder."""

    def write_model(task: str, *, patients: tuple[str, ...] = (), planes: tuple[str, ...] = (), **config: Any) -> Path:
        settings = Config(**config)
        model = {"shades": Shades, "shares": Shares}[task](settings, encoder, ("grey", "white"))
        facts = {"modalities": ["CT", "MR"], "patients": list(patients), "planes": list(planes)}
        run = tmp_path / f"run {task}{len(patients)}{''.join(planes)}"
        export_model(run / "model", task, settings, model, facts)
        return run

    return write_model


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected(voxels: NDArray[Any]) -> NDArray[np.int64]:
    return (voxels > LOW).astype(int) + (voxels > HIGH)


def grey(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


# ---- NIfTI


def turned() -> NDArray[np.float64]:
    """A rotation about no axis in particular."""
    a, b = 0.3, -0.5
    one = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    two = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return one @ two


def nifti(kind: str) -> Any:
    """A volume of 20 x 16 x 6 voxels whose third axis is the coarsest."""
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    affine[:3, 3] = -17.25, 30.5, 3.1
    voxels = grey((20, 16, 6))
    image_type, header = nib.Nifti1Image, None
    if kind == "flipped":
        affine[:3, :3] = np.diag([-2.0, 2.0, -5.0])
    elif kind == "permuted":
        affine[:3, :3] = np.array([[0, 0, 5.0], [-2.0, 0, 0], [0, 2.0, 0]])
    elif kind in ("oblique", "qform alone"):
        affine[:3, :3] = turned() @ np.diag([2.0, 2.0, 5.0])
    elif kind == "sheared":
        affine[:3, :3] = turned() @ np.diag([2.0, 2.0, 5.0])
        affine[:3, 2] += 0.4 * affine[:3, 0]
    elif kind == "4D":
        voxels = grey((20, 16, 6, 3))
    elif kind == "one slice of two axes":
        voxels = grey((20, 16))
    elif kind == "NIfTI-2":
        image_type = nib.Nifti2Image
        affine[0, 3] = 1 / 3  # needs more than float32
    elif kind == "pair":
        image_type = nib.Nifti1Pair
    elif kind == "big-endian":
        header = nib.Nifti1Header(endianness=">")
    image = image_type(voxels, affine, header)
    image.header["descrip"] = marked.TEXT
    if kind == "metres":
        image = nib.Nifti1Image(voxels, np.diag([0.001, 0.001, 0.001, 1]) @ affine)
        image.header.set_xyzt_units("meter")
    elif kind == "qform alone":
        image.set_qform(affine, code=1)
        image.set_sform(None, code=0)
    elif kind == "no orientation":
        image.set_qform(None, code=0)
        image.set_sform(None, code=0)
    return image


@pytest.mark.parametrize(
    "kind",
    ["plain", "flipped", "permuted", "oblique", "sheared", "4D", "one slice of two axes", "NIfTI-2", "pair",
     "big-endian", "metres", "qform alone", "no orientation"],
)  # fmt: skip
def test_masks_lie_on_the_voxels_of_a_nifti(kind: str, export: Export, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    name = "scan.img" if kind == "pair" else "scan.nii.gz"
    nib.save(nifti(kind), tmp_path / "scans" / name)
    source = nib.load(tmp_path / "scans" / name)
    out = tmp_path / "out"
    predict([tmp_path / "scans"], export("shades"), out, modality="MR", key_file=tmp_path / "key")
    rows = sorted(table(out / "masks.csv"), key=lambda row: int(row["volume"]))
    assert len(rows) == (3 if kind == "4D" else 1)
    voxels = np.asanyarray(source.dataobj)
    for volume, row in enumerate(rows):
        mask = nib.load(out / row["mask"])
        assert mask.shape == source.shape[:3]
        assert np.array_equal(mask.affine, source.affine)
        for got, wanted in zip(mask.get_qform(coded=True), source.get_qform(coded=True), strict=True):
            assert np.array_equal(got, wanted)
        assert mask.header.get_xyzt_units()[0] == source.header.get_xyzt_units()[0]
        assert np.array_equal(mask.header.get_zooms(), source.header.get_zooms()[:3])
        here = expected(voxels[..., volume] if kind == "4D" else voxels)
        assert np.array_equal(np.asanyarray(mask.dataobj), here)
        voxel_ml = abs(np.linalg.det(source.affine[:3, :3])) * (1e9 if kind == "metres" else 1) / 1000
        assert float(row["ml grey"]) == pytest.approx((here == 1).sum() * voxel_ml, rel=1e-5)
        assert float(row["ml white"]) == pytest.approx((here == 2).sum() * voxel_ml, rel=1e-5)


def test_masks_hold_the_numbers_of_the_masks_that_were_learnt(export: Export, tmp_path: Path) -> None:
    nib.save(nifti("plain"), tmp_path / "scan.nii")
    predict(
        [tmp_path / "scan.nii"],
        export("shades", labels=(7, 300)),
        tmp_path / "out",
        modality="MR",
        key_file=tmp_path / "key",
    )
    (row,) = table(tmp_path / "out" / "masks.csv")
    mask = np.asanyarray(nib.load(tmp_path / "out" / row["mask"]).dataobj)
    assert np.array_equal(mask, np.array([0, 7, 300])[expected(grey((20, 16, 6)))])
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["values"] == {"grey": 7, "white": 300}


# ---- DICOM


def test_masks_lie_on_the_voxels_of_a_dicom_series_as_itk_reads_it(export: Export, tmp_path: Path) -> None:
    tilted = [0.0, 0.6, -0.8, 1.0, 0.0, 0.0]
    normal = np.cross(tilted[:3], tilted[3:])
    for d, path in enumerate(series(tmp_path / "scan", 7, PixelSpacing=[1.5, 1.5], ImageOrientationPatient=tilted)):
        image = pydicom.dcmread(path)
        image.ImagePositionPatient = [*(np.array([4.0, -20.25, 13.0]) + 3 * d * normal).round(6)]
        image.save_as(path)
    out = tmp_path / "out"
    predict([tmp_path / "scan"], export("shades"), out, key_file=tmp_path / "key")
    (row,) = table(out / "masks.csv")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "scan")))
    source, mask = reader.Execute(), sitk.ReadImage(str(out / row["mask"]))
    assert mask.GetSize() == source.GetSize()
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(mask, what)() == pytest.approx(getattr(source, what)(), abs=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(mask), expected(sitk.GetArrayFromImage(source)))
    check_seg(out / row["dicom_seg"], ordered(sorted((tmp_path / "scan").iterdir())), sitk.GetArrayFromImage(mask))
    assert stat.S_IMODE((out / "seg").stat().st_mode) == 0o700


def check_seg(path: Path, files: tuple[Path, ...], labels: NDArray[Any]) -> None:
    """The same voxels stand in the DICOM SEG, by the images that its frames name."""
    found = reread(path)
    for image, here in zip(files, labels, strict=True):
        uid = pydicom.dcmread(image, stop_before_pixels=True).SOPInstanceUID
        assert np.array_equal(found.pop((uid, 1), np.zeros(here.shape)), here)
    assert not found


def test_a_gantry_tilt_stays_in_the_affine(export: Export, tmp_path: Path) -> None:
    for d in range(5):
        pixels = grey((6, 7), d).astype(np.uint16)
        place = {"ImagePositionPatient": [3.0, 1.25 * d, 4.0 * d], "PixelSpacing": [1.5, 1.5]}
        write(tmp_path / "scan" / f"{d}", pixels, **CT | place | {"RescaleIntercept": 0})
    out = tmp_path / "out"
    predict([tmp_path / "scan"], export("shades"), out, key_file=tmp_path / "key")
    (row,) = table(out / "masks.csv")
    assert "tilt" in row["irregular"]
    mask = nib.load(out / row["mask"])
    for d in range(5):
        image = pydicom.dcmread(tmp_path / "scan" / f"{d}")
        x, y, z = mask.affine @ [0, 0, d, 1] @ np.eye(4)[:, :3]
        assert (-x, -y, z) == pytest.approx(tuple(image.ImagePositionPatient), abs=1e-4)  # LPS
        assert np.array_equal(np.asanyarray(mask.dataobj)[:, :, d].T, expected(image.pixel_array))


def test_dicom_without_what_a_seg_needs_still_gets_its_nifti(export: Export, tmp_path: Path) -> None:
    for path in series(tmp_path / "scan", PixelSpacing=[1.5, 1.5]):
        image = pydicom.dcmread(path)
        del image.FrameOfReferenceUID
        image.save_as(path)
    done = predict([tmp_path / "scan"], export("shades"), tmp_path / "out", key_file=tmp_path / "key")
    (row,) = table(tmp_path / "out" / "masks.csv")
    assert (row["dicom_seg"], row["note"][:32]) == ("", "records no Frame of Reference UI")
    assert row["mask"]
    assert "1 of them could get no DICOM SEG" in str(done)
    assert not (tmp_path / "out" / "seg").exists()


def test_seg_can_be_left_out(export: Export, tmp_path: Path) -> None:
    series(tmp_path / "scan", PixelSpacing=[1.5, 1.5])
    predict([tmp_path / "scan"], export("shades"), tmp_path / "out", dicom_seg=False, key_file=tmp_path / "key")
    assert table(tmp_path / "out" / "masks.csv")[0]["dicom_seg"] == ""
    assert not (tmp_path / "out" / "seg").exists()


def test_a_real_series(export: Export, tmp_path: Path) -> None:
    folder = shared_data("mr_brain_dicom") / "study1" / "12-T1post-05670"
    predict([folder], export("shades"), tmp_path / "out", key_file=tmp_path / "key")
    (row,) = table(tmp_path / "out" / "masks.csv")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    source, mask = reader.Execute(), sitk.ReadImage(str(tmp_path / "out" / row["mask"]))
    assert mask.GetSize() == source.GetSize()
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(mask, what)() == pytest.approx(getattr(source, what)(), abs=1e-3)
    labels = sitk.GetArrayFromImage(mask)
    wanted = expected(sitk.GetArrayFromImage(source))  # shrunk to 48 px and enlarged again, so alike and not equal
    assert np.mean(labels == wanted) > 0.8
    check_seg(tmp_path / "out" / row["dicom_seg"], ordered(sorted(folder.iterdir())), labels)
    assert complaints(tmp_path / "out" / row["dicom_seg"]) == []


# ---- scores


def pictures(folder: Path, n: int = 5, seed: int = 0) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray((grey((20, 24), 100 * seed + i) + 20 * i).astype(np.uint16)).save(path)
    return paths


def test_scores_of_pictures_and_volumes(export: Export, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "scans")
    nib.save(nifti("plain"), tmp_path / "scans" / "v.nii.gz")
    out = tmp_path / "out"
    done = predict(
        [tmp_path / "scans"], export("shares"), out, modality="MR", keep_paths=True, key_file=tmp_path / "key"
    )
    rows = {row["path"]: row for row in table(out / "scores.csv")}
    assert len(rows) == done.scans == 6
    for name in [path.name for path in paths] + ["v.nii.gz"]:
        path = tmp_path / "scans" / name
        voxels = np.asarray(nib.load(path).dataobj if name == "v.nii.gz" else Image.open(path)).astype(float)
        h, w = (20, 16) if name == "v.nii.gz" else (20, 24)
        shares = [(voxels > value).mean() * h * w / SIZE**2 for value in (LOW, HIGH)]  # of the padded square
        row = rows[name]
        assert [float(row["p grey"]), float(row["p white"])] == pytest.approx(shares, rel=1e-5)
        assert row["predicted"] == "grey"
        assert row["scan_id"].startswith("s-")
    assert len({row["patient_id"] for row in rows.values()}) == 6
    assert not (out / "masks").exists()
    with Image.open(out / "overview.png") as picture:
        assert min(picture.size) > 300


def test_several_classes_are_true_from_a_threshold_on(export: Export, tmp_path: Path) -> None:
    path = pictures(tmp_path / "scans", 1)[0]
    run = export("shares", multi_label=True)
    said = {}
    for threshold in (0.001, 0.1, 0.9):
        out = tmp_path / f"out {threshold}"
        predict([path], run, out, modality="MR", threshold=threshold, key_file=tmp_path / "key")
        (row,) = table(out / "scores.csv")
        said[threshold] = row["predicted"]
    assert 0.001 < float(row["p white"]) < 0.1 < float(row["p grey"]) < 0.9
    assert said == {0.001: "grey|white", 0.1: "grey", 0.9: ""}


@pytest.mark.parametrize(
    ("task", "slices"), [("classify", 1), ("classify by attention", 3), ("segment", 1), ("segment", 3)]
)
def test_the_same_is_said_of_a_prepared_scan(task: str, slices: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder = build_encoder(EncoderConfig(slices=slices), 32)
    encoder.store_px = 40
    if task == "segment":
        settings: Any = segment.Config(labels=(1, 2), names=("a", "b"))
        model: TaskModel = segment.Model(settings, encoder, ("a", "b"))
    else:
        settings = classify.Config(pool="attention" if "attention" in task else "mean")
        model = classify.Model(settings, encoder, ("a", "b", "c"))
    export_model(tmp_path / "run" / "model", task.split()[0], settings, model, {"modalities": ["MR"], "patients": []})
    (tmp_path / "scans").mkdir()
    for i in range(2):
        voxels = grey((36, 50, 9), i).astype(np.float32) / 7  # is shrunk, and not of whole numbers
        voxels[:, :, 4] = 3  # a blank slice inside
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.2, 4.0, 1.0])), tmp_path / "scans" / f"{i}.nii.gz")
    key = tmp_path / "key"
    predict([tmp_path / "scans"], tmp_path / "run", tmp_path / "out", modality="MR", key_file=key)
    index([tmp_path / "scans"], tmp_path / "m.csv", modality="MR", key_file=key)
    prepare(tmp_path / "m.csv", tmp_path / "store", size_px=40, key_file=key)
    store, loaded = Store(tmp_path / "store"), load_model(tmp_path / "run").model
    assert {scan.blank for scan in store.scans} == {(4,)}
    for number, scan in enumerate(store.scans):
        batch = load_batch(store, np.flatnonzero(store.column("scan") == number), slices)
        with torch.inference_mode():
            wanted = loaded.infer(batch)
        if task == "segment":
            (row,) = (row for row in table(tmp_path / "out" / "masks.csv") if row["scan_id"] == scan.scan_id)
            mask = np.asanyarray(nib.load(tmp_path / "out" / row["mask"]).dataobj)
            assert not mask[:, :, 4].any()
            assert len(np.unique(mask)) > 1
            assert np.array_equal(mask, to_source_grid(wanted.argmax(1).numpy(), scan))
        else:
            (row,) = (row for row in table(tmp_path / "out" / "scores.csv") if row["scan_id"] == scan.scan_id)
            assert [float(row[f"p {name}"]) for name in "abc"] == pytest.approx(wanted[0].tolist(), rel=1e-5)


# ---- what is given


def test_files_folders_and_archives(export: Export, tmp_path: Path) -> None:
    one, two, *_ = pictures(tmp_path / "a")
    inside = pictures(tmp_path / "b", 2, seed=1)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for path in pictures(tmp_path / "c", 3, seed=2):
            archive.write(path, path.name)
    given = [one, two, one, inside[1], tmp_path / "b", tmp_path / "c.zip"]
    done = predict(given, export("shares"), tmp_path / "out", modality="MR", key_file=tmp_path / "key")
    assert (done.scans, done.rejected) == (2 + 2 + 3, 0)
    assert stat.S_IMODE((tmp_path / "out.copies").stat().st_mode) == 0o700


def test_files_of_one_series_are_one_scan(export: Export, tmp_path: Path) -> None:
    paths = series(tmp_path / "scan", PixelSpacing=[1.5, 1.5])
    assert predict(paths, export("shades"), tmp_path / "out", key_file=tmp_path / "key").scans == 1


def test_what_is_not_there_is_named(export: Export, tmp_path: Path) -> None:
    with pytest.raises(MedclrError, match=r"nowhere.nii.gz: no such"):
        predict([tmp_path / "nowhere.nii.gz"], export("shares"), tmp_path / "out", key_file=tmp_path / "key")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_scans_do_not_stop_the_others(export: Export, tmp_path: Path) -> None:
    nib.save(nifti("pair"), tmp_path / "scan.img")
    (tmp_path / "notes.txt").write_text("no scan")
    given = [tmp_path / name for name in ("notes.txt", "scan.img", "scan.hdr")]
    done = predict(given, export("shares"), tmp_path / "out", modality="MR", key_file=tmp_path / "key")
    assert (done.scans, done.rejected) == (1, 1)


def test_the_others_go_on(export: Export, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    nib.save(nifti("plain"), pictures(scans, 1)[0].with_name("sub-good_T1w.nii.gz"))  # its name says that it is MR
    whole = (scans / "sub-good_T1w.nii.gz").read_bytes()
    (scans / "sub-cut_T1w.nii.gz").write_bytes(whole[: len(whole) * 2 // 3])
    nib.save(nib.Nifti1Image(np.full((20, 16, 6), 7, np.int16), np.eye(4)), scans / "sub-flat_T1w.nii.gz")
    (scans / "notes.txt").write_text("no scan")
    write(
        scans / "pet", grey((6, 7)).astype(np.uint16), Modality="PT", Units="BQML", RescaleSlope=1, RescaleIntercept=0
    )
    done = predict([scans], export("shades"), tmp_path / "out", keep_paths=True, key_file=tmp_path / "key")
    assert [row["path"] for row in table(tmp_path / "out" / "masks.csv")] == ["sub-good_T1w.nii.gz"]
    reasons = {Path(row["path"]).name: row["reason"] for row in table(tmp_path / "out" / "rejected.csv")}
    assert len(reasons) == done.rejected == 5
    assert reasons["pet"] == "is PT, and the model was trained on CT and MR alone"
    assert reasons["0.png"] == "does not say its modality; give it with --modality"
    assert "compressed data" in reasons["sub-cut_T1w.nii.gz"]
    assert "nothing to see" in reasons["sub-flat_T1w.nii.gz"]
    assert "neither DICOM" in reasons["notes.txt"]


def test_nothing_at_all_is_an_error_and_can_be_mended(export: Export, tmp_path: Path) -> None:
    pictures(tmp_path / "scans", 2)
    run, out = export("shares"), tmp_path / "out"
    with pytest.raises(MedclrError, match=r"nothing could be predicted; 2 of 2 are like f-\w+: does not say"):
        predict([tmp_path / "scans"], run, out, key_file=tmp_path / "key")
    assert len(table(out / "rejected.csv")) == 2
    assert predict([tmp_path / "scans"], run, out, modality="MR", key_file=tmp_path / "key").rejected == 0
    assert table(out / "rejected.csv") == []


def test_patients_from_whom_the_model_learnt_are_marked(export: Export, tmp_path: Path) -> None:
    pictures(tmp_path / "scans", 3)
    key = tmp_path / "key"
    before = predict([tmp_path / "scans"], export("shares"), tmp_path / "a", modality="MR", key_file=key)
    known = table(tmp_path / "a" / "scores.csv")[1]["patient_id"]
    run = export("shares", patients=(known,))
    after = predict([tmp_path / "scans"], run, tmp_path / "b", modality="MR", key_file=key)
    assert [row["patient_id"] for row in table(tmp_path / "b" / "scores.csv") if row["learnt_from"] == "1"] == [known]
    assert "learnt" not in str(before)
    assert "1 of them are of patients from whom the model learnt" in str(after)


@pytest.mark.parametrize(
    ("learnt", "given", "cut"),
    [(("coronal",), None, "coronal"), (("coronal",), "axial", "axial"), (("axial", "coronal"), None, None)],
)
def test_volumes_are_cut_as_those_that_were_learnt(
    learnt: tuple[str, ...], given: Any, cut: str | None, export: Export, tmp_path: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    nib.save(nifti("plain"), scans / "a.nii")
    module = importlib.import_module("medclr.predict")
    depths = []
    with pytest.MonkeyPatch.context() as patch:
        ask = module._ask
        patch.setattr(
            module, "_ask", lambda job, entry, row, one: depths.append(row.n_slices) or ask(job, entry, row, one)
        )
        predict([scans], export("shares", planes=learnt), out, modality="MR", plane=given, key_file=tmp_path / "key")
    assert json.loads((out / "prediction.json").read_text())["plane"] == cut
    assert depths == [16 if cut == "coronal" else 6]


# ---- interruption


def test_an_interrupted_prediction_goes_on(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("medclr.predict")
    scans, key, run = tmp_path / "scans", tmp_path / "key", export("shades")
    pictures(scans, 14)
    predict([scans], run, tmp_path / "whole", modality="MR", key_file=key)
    out, ask, asked = tmp_path / "out", module._ask, []

    def interrupted(job: Any, entry: Any, row: Any, single: Any) -> Any:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(row.scan_id)
        return ask(job, entry, row, single)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict([scans], run, out, modality="MR", key_file=key)
    assert not (out / "prediction.json").exists()
    journal = out / "unfinished" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])  # as if it had been killed while it wrote the last line
    with pytest.raises(MedclrError, match="other plane"):
        predict([scans], run, out, modality="MR", plane="axial", key_file=key)
    with pytest.raises(MedclrError, match="other model"):
        predict([scans], export("shades", patients=("p-1",)), out, modality="MR", key_file=key)

    def counted(job: Any, entry: Any, row: Any, single: Any) -> Any:
        asked.append(row.scan_id)
        return ask(job, entry, row, single)

    monkeypatch.setattr(module, "_ask", counted)
    predict([scans], run, out, modality="MR", key_file=key)
    assert len(asked) == 4 + (14 - 3)
    names = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_folder_of_something_else_is_left_alone(export: Export, tmp_path: Path) -> None:
    (path,) = pictures(tmp_path / "scans", 1)
    run, key = export("shares"), tmp_path / "key"
    for place, words in ((tmp_path / "scans", "is no prediction"), (tmp_path / "done", "finished prediction")):
        if place.name == "done":
            predict([path], run, place, modality="MR", key_file=key)
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        with pytest.raises(MedclrError, match=words):
            predict([path], run, place, modality="MR", key_file=key)
        assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_out_may_lie_in_the_folder_of_the_scans(export: Export, tmp_path: Path) -> None:
    pictures(tmp_path / "scans", 2)
    run, key = export("shades"), tmp_path / "key"
    for name in ("first", "second"):  # the masks of the first are no scans for the second
        done = predict([tmp_path / "scans"], run, tmp_path / "scans" / name, modality="MR", key_file=key)
        assert done.scans == (2 if name == "first" else 3)


# ---- identity, picture, command line


@pytest.mark.parametrize("task", ["shades", "shares"])
def test_no_identity_is_written_but_in_seg(
    task: str, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / f"scans {marked.TEXT}"
    marked.write_dicom(root / "dicom")
    marked.write_nifti(root / "nifti", tmp_path / "elsewhere")
    marked.write_pictures(root / "pictures")
    caplog.clear()
    out = tmp_path / "out"
    done = predict([root], export(task), out, modality="MR", key_file=tmp_path / "key")
    print(done)
    assert done.scans >= 5
    assert done.rejected >= 10
    for path in out.rglob("*"):
        assert not marked.planted(str(path.relative_to(out)).encode())
        if path.is_file() and path.parent.name != "seg":
            assert not any(marked.planted(content) for content in marked.contents(path)), path.name
    told = capsys.readouterr()
    assert not marked.planted((told.out + told.err + caplog.text).encode())
    assert not logging.getLogger("pydicom").disabled
    segs = list(out.glob("seg/*.dcm"))
    assert len(segs) >= 2 * (task == "shades")
    assert all(marked.planted(path.read_bytes()) for path in segs)  # they belong to the patient's study


def test_an_error_names_no_patient(export: Export, tmp_path: Path) -> None:
    path = pictures(tmp_path / marked.TEXT, 1)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(MedclrError) as told:
        predict([path.parent], export("shares"), tmp_path / "out", modality="MR", key_file=tmp_path / "key")
    assert not marked.planted(str(told.value).encode())


def test_the_overview_shows_outlines(export: Export, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, LOW, (40, 40, 5)).astype(np.int16)
    for name in ("nothing", "something"):
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 4, 1.0])), tmp_path / f"{name}.nii")
        predict([tmp_path / f"{name}.nii"], export("shades"), tmp_path / name, modality="MR", key_file=tmp_path / "key")
        voxels[10:30, 10:30, 1] = HIGH
    wanted = np.array([int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    near = {}
    for name in ("nothing", "something"):
        with Image.open(tmp_path / name / "overview.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        near[name] = int((np.abs(pixels - wanted).max(2) < 30).sum())
    assert near["nothing"] == 0
    assert near["something"] > 200


def test_the_command_line(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = pictures(tmp_path / "scans", 2)
    words = ["predict", one, two, "--model", export("shares"), "--out", tmp_path / "out", "--modality", "MR"]
    assert main([*map(str, words), "--key_file", str(tmp_path / "key")]) == 0
    assert "2 scans predicted" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert main(["predict", str(one), "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no trained model" in capsys.readouterr().err
