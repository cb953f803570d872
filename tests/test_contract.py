"""What every method, task, reader and modality must keep to, whoever adds it: these tests ask for what is registered.

The contract of transforms is ``TestContract`` in test_augment.py; that every modality's views are images in [0,1] is
tested in test_augment_views.py.
"""

import ast
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from cohort import save_manifest, save_nifti
from dicom_files import CT
from dicom_files import write as write_dicom
from PIL import Image
from test_augment_views import a_batch
from tiny import Tiny, in_place_of, used

import medclr
from medclr import checkpoint, methods, scans, tasks
from medclr.augment.views import Draws, plain_view, two_views
from medclr.config import EncoderConfig, ViewsConfig, to_plain, to_yaml
from medclr.data.loader import load_batch
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.embed import extract
from medclr.errors import MedclrError, ScanError
from medclr.finetune import read_wish
from medclr.methods import PretrainingMethod
from medclr.models.encoder import build_encoder
from medclr.outcomes import read_outcome, write_outcome
from medclr.pretrain import read_settings
from medclr.scans.modality import MODALITIES, Modality, modality_of
from medclr.scans.scan import Scan
from medclr.trained import export_model, load_model

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
        batch = replace(a_batch(("MR",), 6, 16), position=torch.linspace(0, 1, 6))
        draws, rows = Draws(ViewsConfig(size_px=16), 6, seed=0, step=0), torch.arange(6)
        a, b = (draws.view(batch, view, rows) for view in (0, 1))  # [B,1,S,S] each
        inputs = (method.inputs(batch, draws, 0, rows), method.inputs(batch, draws, 1, rows))
        loss, logs = method.loss(a, b, batch, None, inputs)
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
        assert embedding.shape[0] % 5 == 0
        assert embedding.ndim == 2
        torch.testing.assert_close(features, encoder(x))
        torch.testing.assert_close(alone, (features[:1], embedding[: len(embedding) // 5]))

    def test_what_it_adds_to_a_view_follows_from_seed_step_and_row(self, name: str) -> None:
        module = methods.get(name)
        method = module.Method(module.Config(), build_encoder(EncoderConfig(), 16))
        batch, rows, views = a_batch(("MR",), 6, 16), torch.tensor([4, 1]), ViewsConfig(size_px=16)
        for view in (0, 1):
            whole, part = (
                method.inputs(batch.select(at), Draws(views, 6, seed=1, step=2), view, at)
                for at in (torch.arange(6), rows)
            )
            assert [x.shape[0] for x in whole] == [6] * len(whole)
            assert all(torch.equal(x[rows], y) for x, y in zip(whole, part, strict=True))

    def test_runs_and_leaves_a_checkpoint_and_an_encoder(self, name: str, labelled_store: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        summary = medclr.pretrain(labelled_store, out, settings={**SMALL, "method": name})
        assert summary.steps == 3
        newest = checkpoint.latest(out)
        assert newest is not None
        module, encoder = methods.get(name), build_encoder(EncoderConfig(), 16)
        module.Method(module.Config(), encoder).load_state_dict(checkpoint.load(newest)["method"])
        for tensor, exported in zip(encoder.parameters(), medclr.load_encoder(out).parameters(), strict=True):
            assert torch.equal(tensor, exported)

    def test_learns_from_neighbouring_slices_as_channels(self, name: str, labelled_store: Path, tmp_path: Path) -> None:
        settings = {**SMALL, "method": name, "encoder.slices": 3, "encoder.width": 0.25}
        medclr.pretrain(labelled_store, tmp_path / "run", settings=settings)
        encoder, store = medclr.load_encoder(tmp_path / "run"), Store(labelled_store)
        assert encoder.config.slices == encoder.conv1.weight.shape[1] == 3
        x = plain_view(load_batch(store, store.indices(), 3), 16)  # [N,3,16,16]
        with torch.inference_mode():
            torch.testing.assert_close(extract(encoder.eval(), store, store.indices()), encoder(x).numpy())


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


# ---- tasks


@pytest.fixture(scope="module")
def labelled_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten MR volumes of ten patients with labels and masks: bright bars that lie or stand, of 2 to 4 slices."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(10):
        mask = np.zeros((16, 16, 2 + number % 3), dtype=np.uint8)
        mask[slice(5, 9) if number % 2 else slice(None), slice(None) if number % 2 else slice(5, 9)] = 1
        voxels = (100 + 80 * mask + rng.normal(0, 5, mask.shape)).astype(np.float32)
        row = {"path": save_nifti(folder / f"v{number}.nii", voxels), "modality": "MR"}
        row["mask"] = save_nifti(folder / "masks" / f"v{number}.nii", mask)
        rows.append(row | {"label": "standing" if number % 2 else "lying", "split": "train" if number < 6 else "test"})
    prepare(save_manifest(folder / "scans.csv", rows), folder / "store", size_px=16)
    return folder / "store"


VIEWS = ViewsConfig(size_px=16, crop_area=(0.8, 1.0), strength=0.2, noise=0, blur=0, cutout=0)


@pytest.mark.parametrize("name", tasks.names())
class TestTask:
    @pytest.fixture
    def task(self, name: str, labelled_store: Path) -> Any:
        module = tasks.get(name)
        return module.Task(module.Config(), Store(labelled_store))

    @pytest.fixture
    def model(self, name: str, task: Any) -> Any:
        torch.manual_seed(0)
        return tasks.get(name).Model(task.config, Tiny(EncoderConfig(slices=3)), task.classes)

    def test_settings_are_a_frozen_dataclass_that_explains_itself(self, name: str) -> None:
        settings = tasks.get(name).Config
        assert dataclasses.is_dataclass(settings)
        assert settings.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert settings.__doc__
        assert undocumented(settings) == []

    def test_its_settings_survive_the_file_of_a_run(self, name: str, tmp_path: Path) -> None:
        config = tasks.get(name).Config()
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml({"task": name, name: to_plain(config)}))
        wish = read_wish(["--config", str(file), "--store", "s", "--out", "o"])
        assert wish.own == config
        assert wish.resolved[name] == to_plain(config)

    def test_knows_what_can_be_learnt_from(self, task: Any) -> None:
        store = task.store
        assert task.scans.tolist() == list(range(10))
        assert set(task.strata) == {scan.patient_id for scan in store.scans}
        assert len(task.classes) >= 1
        task.check(task.scans, "the cases")
        assert len(task.items(task.scans)) >= 10
        with pytest.raises(MedclrError, match="modality CT"):
            type(task)(task.config, store, "CT")

    def test_the_loss_is_finite_and_trains_encoder_and_head(self, task: Any, model: Any) -> None:
        assert isinstance(model, tasks.TaskModel)
        assert model.classes == task.classes
        items = task.items(task.scans)[:6]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):  # a head may start at zero, and then nothing reaches the encoder in the first step
            optimizer.zero_grad()
            loss = task.loss(model.train(), items, VIEWS, seed=0, step=step)
            loss.backward()
            optimizer.step()
        assert loss.shape == ()
        assert loss.isfinite()
        for parameter, weight in model.named_parameters():
            assert weight.grad is not None, parameter
            assert weight.grad.isfinite().all(), parameter
        for part in model.encoder.parts:
            assert part[0].weight.grad.abs().sum() > 0
        again = task.loss(model, items, VIEWS, seed=0, step=5)
        assert torch.equal(again, task.loss(model, items, VIEWS, seed=0, step=5))
        assert not torch.equal(again, task.loss(model, items, VIEWS, seed=1, step=5))

    def test_infers_of_whole_scans_alike_alone_and_in_a_batch(self, task: Any, model: Any) -> None:
        used(model).eval()
        scan = task.store.column("scan")
        with torch.inference_mode():
            batch = load_batch(task.store, np.flatnonzero((scan == 2) | (scan == 4)), 3)
            said = model.infer(batch)
            alone = model.infer(load_batch(task.store, np.flatnonzero(scan == 4), 3))
            each = model.slice_logits(torch.rand(5, 3, 16, 16))
        assert said.ndim in (2, 4)
        if said.ndim == 2:
            assert said.shape == (2, len(task.classes))
            assert each.shape == (5, len(task.classes))
        else:
            assert said.shape == (len(batch), len(task.classes) + 1, 16, 16)
            assert each.shape[:2] == (5, len(task.classes) + 1)
        assert 0 <= float(said.min()) <= float(said.max()) <= 1 + 1e-5
        torch.testing.assert_close(said.sum(1), torch.ones_like(said[:, 0]))
        torch.testing.assert_close(said[-len(alone) :], alone, rtol=1e-4, atol=1e-5)

    def test_a_model_from_disk_says_the_same(
        self, name: str, task: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used(model).eval()
        export_model(tmp_path, name, task.config, model, {"modalities": ["MR"], "patients": ["p"]})
        with in_place_of("resnet18"):
            loaded = load_model(tmp_path)
        assert (loaded.task, loaded.config, loaded.model.classes) == (name, task.config, task.classes)
        batch = load_batch(task.store, np.arange(5), 3)
        with torch.inference_mode():
            assert torch.equal(loaded.model.infer(batch), model.infer(batch))

    def test_judges_into_an_outcome_that_survives_the_file(self, task: Any, model: Any, tmp_path: Path) -> None:
        used(model).eval()
        outcome = task.judge(model, task.scans[6:])
        stored = [task.store.scans[i] for i in task.scans[6:]]
        assert list(outcome.scan_id) == [scan.scan_id for scan in stored]
        assert list(outcome.patient_id) == [scan.patient_id for scan in stored]
        assert outcome.classes == task.classes
        write_outcome(tmp_path / "predictions.csv", outcome)
        read = read_outcome(tmp_path / "predictions.csv")
        assert type(read) is type(outcome)
        assert read.metrics() == outcome.metrics()
        for metric in outcome.metrics():
            assert read.score(metric) == pytest.approx(outcome.score(metric), abs=1e-6, nan_ok=True)
        task.draw(model, outcome, tmp_path / "figures", "a stamp")

    def test_runs_from_settings_to_scores(self, name: str, labelled_store: Path, tmp_path: Path) -> None:
        settings = {"steps": 2, "batch": 4, "device": "cpu", "network.slices": 3}
        with in_place_of("resnet18"):
            summary = medclr.finetune(labelled_store, tmp_path / "run", task=name, settings=settings)
            assert load_model(tmp_path / "run").modalities == ("MR",)
        assert summary.scores.keys() == set(read_outcome(tmp_path / "run" / "predictions.csv").metrics())


NEW_TASK = '''
"""Whether a scan is brighter than another: a task in one file, as a newcomer would write it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from medclr import tasks
from medclr.augment.views import plain_view
from medclr.data.loader import load_batch
from medclr.outcomes import Classified


@dataclass(frozen=True)
class Config:
    """Settings of bright."""

    force: float = 1.0
    """Multiplies the loss."""


class Model(tasks.TaskModel):
    def __init__(self, config, encoder, classes):
        super().__init__()
        self.config, self.encoder, self.classes = config, encoder, classes
        self.head = nn.Linear(encoder.features, 2)

    def infer(self, batch):
        scan = batch.scan.unique(return_inverse=True)[1]
        each = self.head(self.encoder(plain_view(batch, self.encoder.size_px))).softmax(1)
        return torch.stack([each[scan == i].mean(0) for i in range(int(scan.max()) + 1)])


class Task(tasks.Task):
    def __init__(self, config, store, modality=None):
        self.config, self.store, self.classes = config, store, ("dark", "bright")
        self.scans = np.arange(len(store.scans))
        self.strata = {scan.patient_id: "any" for scan in store.scans}

    def check(self, scans, what):
        pass

    def items(self, scans):
        return np.flatnonzero(np.isin(self.store.column("scan"), scans)).tolist()

    def loss(self, model, items, views, *, seed, step):
        x = plain_view(load_batch(self.store, items), model.encoder.size_px)
        truth = (x.mean((1, 2, 3)) > x.mean()).long()
        return self.config.force * nn.functional.cross_entropy(model.head(model.encoder(x)), truth)

    def judge(self, model, scans):
        batch = load_batch(self.store, self.items(scans))
        with torch.inference_mode():
            probability = model.infer(batch).numpy().astype(float)
        who = [self.store.scans[i] for i in scans]
        truth = np.eye(2, dtype=int)[np.arange(len(scans)) % 2]
        return Classified([s.scan_id for s in who], [s.patient_id for s in who], self.classes, truth, probability)
'''


def test_a_new_task_is_one_file(labelled_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bright.py").write_text(NEW_TASK)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    assert "bright" in tasks.names()
    settings = {"steps": 2, "batch": 4, "device": "cpu", "bright.force": 2.0}
    with in_place_of("resnet18"):
        summary = medclr.finetune(labelled_store, tmp_path / "run", task="bright", settings=settings)
        assert load_model(tmp_path / "run").task == "bright"
    sys.modules.pop("medclr.tasks.bright")
    assert "macro AUC" in summary.scores
    assert "bright: {force: 2.0}" in (tmp_path / "run" / "config.yaml").read_text()


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
