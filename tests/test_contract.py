"""What every method, reader and modality must keep to, whoever adds it: these tests ask for what is registered.

The contract of transforms is ``TestContract`` in test_augment.py; that every modality's views are images in [0,1] is
tested in test_augment_views.py.
"""

import ast
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from dicom_files import CT
from dicom_files import write as write_dicom
from PIL import Image
from test_augment_views import a_batch

import medclr
from medclr import checkpoint, methods, scans
from medclr.augment.views import two_views
from medclr.config import EncoderConfig, ViewsConfig, to_plain, to_yaml
from medclr.errors import ScanError
from medclr.methods import PretrainingMethod
from medclr.models.encoder import build_encoder
from medclr.pretrain import read_settings
from medclr.scans.modality import MODALITIES, Modality, modality_of
from medclr.scans.scan import Scan

SMALL = {"epochs": 1, "batch": 8, "views.size_px": 16, "device": "cpu", "monitor.sample": 16}


# ---- methods


def undocumented(settings: type) -> list[str]:
    """Fields of a dataclass that have no docstring under them, which would be their ``--help``."""
    (tree,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(tree, ast.ClassDef)
    return [
        ast.unparse(field.target)
        for field, below in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True)
        if isinstance(field, ast.AnnAssign)
        and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value)
    ]


@pytest.mark.parametrize("name", methods.names())
class TestMethod:
    def test_settings_are_a_frozen_dataclass_that_explains_itself(self, name: str) -> None:
        settings = methods.get(name).Config
        assert dataclasses.is_dataclass(settings)
        assert settings.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert settings.__doc__
        assert undocumented(settings) == []

    def test_its_settings_survive_the_file_of_a_run(self, name: str, tmp_path: Path) -> None:
        config = methods.get(name).Config()
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml({"method": name, name: to_plain(config)}))
        request = read_settings(["--config", str(file), "--store", "s", "--out", "o"])
        assert request.own == config
        assert request.resolved[name] == to_plain(config)

    def test_the_loss_is_finite_and_trains_the_whole_encoder(self, name: str) -> None:
        module = methods.get(name)
        assert issubclass(module.Method, PretrainingMethod)
        torch.manual_seed(0)
        encoder = build_encoder(EncoderConfig(), 16)
        method = module.Method(module.Config(), encoder)
        assert method.encoder is encoder
        a, b = torch.rand(2, 6, 1, 16, 16)  # [B,1,S,S] each
        loss, logs = method.loss(a, b, None, None)
        loss.backward()
        assert loss.shape == ()
        assert loss.isfinite()
        for parameter, weight in encoder.named_parameters():
            assert weight.grad is not None, parameter
            assert weight.grad.isfinite().all(), parameter
        assert encoder.conv1.weight.grad.abs().sum() > 0
        assert all(value.shape == () and not value.requires_grad for value in logs.values())

    def test_embeds_an_image_alike_alone_and_in_a_batch(self, name: str) -> None:
        module = methods.get(name)
        torch.manual_seed(0)
        encoder = build_encoder(EncoderConfig(), 16)
        method = module.Method(module.Config(), encoder).eval()
        x = torch.rand(5, 1, 16, 16)
        with torch.inference_mode():
            features, embedding = method.embed(x)
            alone = method.embed(x[:1])
        assert features.shape == (5, encoder.features)
        assert embedding.shape[0] == 5
        assert embedding.ndim == 2
        torch.testing.assert_close(features, encoder(x))
        torch.testing.assert_close(alone, (features[:1], embedding[:1]))

    def test_runs_and_leaves_a_checkpoint_and_an_encoder(self, name: str, image_store: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        summary = medclr.pretrain(image_store, out, settings={**SMALL, "method": name})
        assert summary.steps == 6
        newest = checkpoint.latest(out)
        assert newest is not None
        module, encoder = methods.get(name), build_encoder(EncoderConfig(), 16)
        module.Method(module.Config(), encoder).load_state_dict(checkpoint.load(newest)["method"])
        for tensor, exported in zip(encoder.parameters(), medclr.load_encoder(out).parameters(), strict=True):
            assert torch.equal(tensor, exported)


NEW_METHOD = '''
"""A method in one file, as a newcomer would write it."""

from dataclasses import dataclass

from torch import nn

from medclr.methods import PretrainingMethod


@dataclass(frozen=True)
class Config:
    """Settings of pull."""

    force: float = 1.0
    """Multiplies the loss."""


class Method(PretrainingMethod):
    def __init__(self, config, encoder):
        super().__init__()
        self.force, self.encoder, self.head = config.force, encoder, nn.Linear(encoder.features, 3)

    def embed(self, x):
        features = self.encoder(x)
        return features, self.head(features)

    def objective(self, a, b, facts=None, group=None):
        return self.force * (a - b).square().mean(), {}
'''


@pytest.fixture
def new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "pull.py").write_text(NEW_METHOD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    yield "pull"
    sys.modules.pop("medclr.methods.pull", None)


def test_a_new_method_is_one_file(new_method: str, image_store: Path, tmp_path: Path) -> None:
    assert new_method in methods.names()
    settings = {**SMALL, "method": new_method, "pull.force": 2.0}
    medclr.pretrain(image_store, tmp_path / "run", settings=settings)
    assert "pull: {force: 2.0}" in (tmp_path / "run" / "config.yaml").read_text()
    assert medclr.load_encoder(tmp_path / "run").features == 512


# ---- readers

GREY = np.random.RandomState(0).randint(0, 4000, (24, 20)).astype(np.uint16)


def _dicom(folder: Path) -> Path:
    return write_dicom(folder / "example", GREY, **CT)


def _nifti(folder: Path) -> Path:
    path = folder / "example.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.stack([GREY, GREY + 1], axis=-1), np.diag([1.0, 1.5, 3.0, 1.0])), path)
    return path


def _image(folder: Path) -> Path:
    Image.fromarray(GREY).save(folder / "example.png")
    return folder / "example.png"


EXAMPLES: dict[str, Callable[[Path], Path]] = {"dicom": _dicom, "nifti": _nifti, "image": _image}
"""Reader -> writes a small valid file of its kind; a new reader adds its line here."""


def attempt(reader: Any, path: Path) -> Scan | None:
    """The scan, or None if the file is refused; whatever else is raised is a bug."""
    try:
        reader.read_header(path)
        return reader.read([path], "CT")  # type: ignore[no-any-return]
    except ScanError:
        return None


@pytest.mark.parametrize("name", scans.READERS)
class TestReader:
    @pytest.fixture
    def example(self, name: str, tmp_path: Path) -> Path:
        assert name in EXAMPLES, f"no example of a {name} file; add one to EXAMPLES in this test"
        return EXAMPLES[name](tmp_path)

    @pytest.fixture
    def reader(self, name: str) -> ModuleType:
        return importlib.import_module(f"medclr.scans.{name}")

    def test_offers_the_functions_of_the_protocol(self, name: str, reader: ModuleType) -> None:
        assert list(inspect.signature(getattr(reader, f"is_{name}")).parameters) == ["head"]
        for function in ("read_header", "find", "read"):
            promised = inspect.signature(getattr(scans.Reader, function)).parameters
            offered = inspect.signature(getattr(reader, function)).parameters
            assert list(offered) == list(promised)[1:], function  # without self
            for parameter in offered:
                assert offered[parameter].default == promised[parameter].default, (function, parameter)

    def test_a_valid_file_is_a_scan_that_agrees_with_its_header(
        self, name: str, reader: ModuleType, example: Path
    ) -> None:
        found, rejected = reader.find([reader.read_header(example)])
        assert rejected == []
        (one,) = found
        assert one.files == (example,)
        scan = scans.read(one.files, one.modality or "CT")
        assert isinstance(scan, Scan)
        assert scan.modality == (one.modality or "CT")
        assert scan.voxels.shape == one.shape
        assert sorted(scan.source_shape) == sorted(scan.voxels.shape)
        assert scan.spacing_mm == pytest.approx(one.spacing_mm)
        assert np.linalg.norm(scan.affine[:3, :3], axis=0) == pytest.approx(scan.spacing_mm)
        assert scan.voxels.max() > scan.voxels.min()

    def test_bytes_that_are_known_already_need_no_second_reading(self, reader: ModuleType, example: Path) -> None:
        assert repr(reader.read_header(example, example.read_bytes())) == repr(reader.read_header(example))

    def test_knows_its_own_files_and_only_those(self, name: str, reader: ModuleType, tmp_path: Path) -> None:
        for other in scans.READERS:
            head = EXAMPLES[other](tmp_path).read_bytes()[: scans.HEAD_BYTES]
            known = scans.reader_of(head)
            assert known is not None
            assert known[0] == other
            assert getattr(reader, f"is_{name}")(head) == (other == name)

    def test_garbage_is_refused(self, name: str, reader: ModuleType, tmp_path: Path) -> None:
        random, path = np.random.default_rng(0), tmp_path / "garbage"
        contents = [b"", b"\0", b"\0" * 5000, b"patient,label\nA,1\n" * 300]
        contents += [random.bytes(size) for size in (1, 131, 132, 352, 5000)]
        for content in contents:
            path.write_bytes(content)
            assert not getattr(reader, f"is_{name}")(content[: scans.HEAD_BYTES])
            assert attempt(reader, path) is None
            with pytest.raises(ScanError, match="garbage"):
                scans.read([path], "CT")

    def test_a_file_cut_short_is_refused(self, reader: ModuleType, example: Path) -> None:
        whole, expected = example.read_bytes(), attempt(reader, example)
        assert expected is not None
        cuts = {int(share * len(whole)) for share in np.linspace(0, 0.98, 50)} | {len(whole) - 1}
        for cut in sorted(cuts):
            example.write_bytes(whole[:cut])
            scan = attempt(reader, example)
            if scan is not None:  # nothing was lost but a trailer
                assert cut > 0.9 * len(whole)
                assert np.array_equal(scan.voxels, expected.voxels)

    def test_a_damaged_file_is_refused_or_read(self, reader: ModuleType, example: Path) -> None:
        random, whole = np.random.default_rng(0), example.read_bytes()
        outcomes = set()
        for _ in range(150):
            damaged = bytearray(whole)
            for place in random.integers(0, min(len(whole), 1000), 3):
                damaged[place] = random.integers(256)
            example.write_bytes(damaged)
            outcomes.add(attempt(reader, example) is None)
        assert True in outcomes


# ---- modalities


def test_every_word_for_a_modality_means_one_row() -> None:
    words = [
        word for row in MODALITIES.values() for word in {row.name.lower(), *map(str.lower, row.dicom), *row.aliases}
    ]
    assert len(words) == len(set(words)), "two rows share a word"
    for name, row in MODALITIES.items():
        assert name == row.name
        assert all(code == code.upper() for code in row.dicom)
        assert all(alias == alias.lower() for alias in row.aliases)
        for word in (name, *row.dicom, *row.aliases):
            assert modality_of(word) is modality_of(f" {word.swapcase()} ") is row


@pytest.mark.parametrize("row", MODALITIES.values(), ids=lambda row: row.name)
def test_windows_go_with_absolute_units_alone(row: Modality) -> None:
    absolute = row.scaling == "window"
    assert bool(row.windows) == (row.display is not None) == absolute
    assert all(window.width > 0 for window in row.windows)
    assert len({window.name for window in row.windows}) == len(row.windows)
    assert 0 <= row.rotation_deg <= 180
    if row.display is not None:
        assert row.air is not None
        assert row.air <= row.display.center - row.display.width / 2, "padding must not be brighter than black"


def test_a_new_modality_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Modality("OCT", dicom=("OPT",), aliases=("oct",), scaling="percentile", air=0.0)
    monkeypatch.setitem(MODALITIES, "OCT", row)
    assert modality_of("opt") is row
    views = two_views(a_batch(("OCT", "CT")), ViewsConfig(size_px=32), seed=0, step=0)
    for view in (views.a, views.b):
        assert view.shape == (12, 1, 32, 32)
        assert 0 <= float(view.min()) < float(view.max()) <= 1
