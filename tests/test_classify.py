"""Classification: pooling, class weights and several labels against slow loops; one answer for each whole scan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohort import save_manifest, save_nifti
from PIL import Image
from tiny import Tiny
from torch import Tensor, nn

from medclr import checkpoint, figures
from medclr.augment.views import plain_view
from medclr.config import EncoderConfig, ViewsConfig
from medclr.data.loader import load_batch
from medclr.data.prepare import prepare
from medclr.data.store import Store
from medclr.errors import MedclrError
from medclr.models.heads import ProjectionHead
from medclr.tasks import classify
from medclr.tasks.classify import Config, Model, Task

VIEWS = ViewsConfig(size_px=16, crop_area=(0.6, 1.0), strength=0.3, noise=0, blur=0, cutout=0)
DEPTHS = (1, 5, 3, 9, 2, 130)
LABELS = ("a|b", "b", "c", "|", "", "a")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six MR volumes of very different lengths, and an image, each of its own patient."""
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    scans: list[dict[str, Any]] = []
    for number, (depth, label) in enumerate(zip(DEPTHS, LABELS, strict=True)):
        voxels = rng.gamma(2, 50, (16, 16, depth)).astype(np.float32)
        path = save_nifti(folder / f"mr{number}.nii", voxels)
        scans.append({"path": path, "modality": "MR", "label": label, "patient": f"p{number}"})
    Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / "xr.png")
    scans.append({"path": folder / "xr.png", "modality": "XR", "label": "c", "patient": "p6"})
    prepare(save_manifest(folder / "scans.csv", scans), folder / "store", size_px=16)
    return Store(folder / "store")


def a_model(task_classes: tuple[str, ...] = ("a", "b", "c"), slices: int = 1, **settings: Any) -> Model:
    """With a classifier and an attention that are not zero."""
    torch.manual_seed(0)
    model = Model(Config(**settings), Tiny(EncoderConfig(slices=slices)), task_classes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def slow_pool(model: Model, features: Tensor, scan: Tensor) -> Tensor:
    """Scan by scan, slice by slice (Ilse et al. 2018, eq. 8 and 9)."""
    rows = []
    for number in range(int(scan.max()) + 1):
        here = [f for f, s in zip(features, scan, strict=True) if s == number]
        weights = []
        for f in here:
            if model.attention is None:
                weights.append(torch.tensor(1.0))
                continue
            v, u, w = model.attention.v, model.attention.u, model.attention.w
            gated = torch.tanh(v.weight @ f + v.bias) * torch.sigmoid(u.weight @ f + u.bias)
            weights.append((w.weight[0] @ gated + w.bias[0]).exp())
        total = sum(weights)
        rows.append(sum(w / total * f for w, f in zip(weights, here, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_pooling_equals_a_slow_loop(pool: str) -> None:
    model = a_model(pool=pool)
    features = torch.randn(11, 6, requires_grad=True)
    scan = torch.tensor([2, 0, 1, 2, 2, 0, 3, 1, 2, 2, 0])
    pooled, slow = model.pooled(features, scan), slow_pool(model, features, scan)
    torch.testing.assert_close(pooled, slow)
    weight = torch.randn(4, 6)
    gradients = [torch.autograd.grad((x * weight).sum(), features, retain_graph=True)[0] for x in (pooled, slow)]
    torch.testing.assert_close(*gradients)


def test_attention_starts_as_the_mean_and_survives_large_logits() -> None:
    torch.manual_seed(0)
    fresh = Model(Config(pool="attention"), Tiny(), ("a", "b"))
    features, scan = torch.randn(5, 6), torch.tensor([0, 0, 0, 1, 1])
    expected = torch.stack([features[:3].mean(0), features[3:].mean(0)])
    torch.testing.assert_close(fresh.pooled(features, scan), expected)
    assert fresh.attention is not None
    nn.init.constant_(fresh.attention.w.weight, 1e4)
    assert fresh.pooled(100 * features, scan).isfinite().all()


@pytest.mark.parametrize("pool", ["mean", "attention", "slices"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_infer_answers_for_each_scan_alone_in_whatever_order(store: Store, pool: str, multi_label: bool) -> None:
    model = a_model(pool=pool, multi_label=multi_label)
    with torch.inference_mode():
        order = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(store.column("scan"), [1, 3, 5, 6])))
        together = model.infer(load_batch(store, order))
        assert together.shape == (4, 3)
        for row, scan in zip(together, (1, 3, 5, 6), strict=True):
            batch = load_batch(store, np.flatnonzero(store.column("scan") == scan))
            (alone,) = model.infer(batch)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
            features = model.encoder(plain_view(batch, 16))
            if pool == "slices":
                logits = torch.stack([model.classifier(f) for f in features])  # [n,K]
                slow = (logits.sigmoid() if multi_label else logits.softmax(1)).mean(0)
            else:
                logits = model.classifier(slow_pool(model, features, torch.zeros(len(features), dtype=torch.int64)))
                slow = (logits.sigmoid() if multi_label else logits.softmax(1))[0]
            torch.testing.assert_close(row, slow, rtol=1e-4, atol=1e-5)
    assert together.isfinite().all()
    if not multi_label:
        torch.testing.assert_close(together.sum(1), torch.ones(4))


@pytest.mark.parametrize("pool", ["mean", "attention", "slices"])
def test_judge_says_what_infer_says_with_bounded_memory(
    store: Store, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(Config(pool=pool, multi_label=True), store)  # type: ignore[arg-type]
    model = a_model(task.classes, pool=pool, multi_label=True)
    read = []

    def counted(store: Store, indices: Any, slices: int = 1) -> Any:
        read.append(len(indices))
        return load_batch(store, indices, slices)

    monkeypatch.setattr(classify, "load_batch", counted)
    outcome = task.judge(model, task.scans[::-1])
    assert max(read) <= classify.PIECE < max(DEPTHS)
    assert sum(read) == sum(DEPTHS[i] for i in (0, 1, 2, 3, 5)) + 1
    assert outcome.scan_id == [store.scans[i].scan_id for i in task.scans]
    assert outcome.patient_id == ["p0", "p1", "p2", "p3", "p5", "p6"]
    assert outcome.multi_label
    truth = [[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert outcome.truth.tolist() == truth
    with torch.inference_mode():
        for scan, row in zip(task.scans, outcome.probability, strict=True):
            expected = model.infer(load_batch(store, np.flatnonzero(store.column("scan") == scan)))[0]
            assert row == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


def test_labels_modalities_and_strata(store: Store) -> None:
    one = Task(Config(), store)
    assert one.classes == ("a", "a|b", "b", "c", "|")
    several = Task(Config(multi_label=True), store)
    assert several.classes == ("a", "b", "c")
    # The rarest of a patient's classes: all occur twice, so the first in the alphabet; p3 is labelled with none.
    assert several.strata == {"p0": "a", "p1": "b", "p2": "c", "p3": "none", "p5": "a", "p6": "c"}
    assert Task(Config(multi_label=True), store, "xr").scans.tolist() == [6]
    with pytest.raises(MedclrError, match="needs labelled scans of modality XR of two classes at least"):
        Task(Config(), store, "XR")
    with pytest.raises(MedclrError, match="none of the 2 cases has label 'c'; take more"):
        several.check(np.array([0, 1]), "the 2 cases")
    several.check(np.array([0, 2]), "the 2 cases")


def logits_of(task: Task, model: Model, items: list[Any]) -> tuple[Tensor, Tensor]:
    """What the model says in the loss of these items: caught on its way."""
    caught: list[Tensor] = []
    hook = model.classifier.register_forward_hook(lambda module, given, out: caught.append(out.detach()))
    loss = task.loss(model, items, VIEWS, seed=0, step=1)
    hook.remove()
    return caught[0], loss.detach()


@pytest.mark.parametrize("pool", ["mean", "slices"])
@pytest.mark.parametrize("class_weights", ["balanced", "none"])
def test_the_loss_of_one_label_is_a_weighted_mean(store: Store, pool: str, class_weights: str) -> None:
    task = Task(Config(pool=pool, class_weights=class_weights), store)  # type: ignore[arg-type]
    scans = np.array([0, 1, 3, 6])  # a|b, b, |, c
    items = list(task.items(scans))
    assert len(items) == (4 if pool == "mean" else 1 + 5 + 9 + 1)
    model = a_model(task.classes, pool=pool)
    logits, loss = logits_of(task, model, items)
    assert len(logits) == len(items)
    of = [item if pool == "mean" else item[0] for item in items]
    names = [store.scans[i].label for i in of]
    total = weights = 0.0
    for row, name in zip(logits.double(), names, strict=True):
        weight = 1.0 if class_weights == "none" else len(names) / (len(task.classes) * names.count(name))
        total += weight * float(row.logsumexp(0) - row[task.classes.index(name)])
        weights += weight
    assert float(loss) == pytest.approx(total / weights, rel=1e-5)


def test_the_loss_of_several_labels_asks_each_class(store: Store) -> None:
    task = Task(Config(multi_label=True), store)
    items = list(task.items(task.scans))
    model = a_model(task.classes, multi_label=True)
    logits, loss = logits_of(task, model, items)
    truth = task.truth(task.scans)
    total = 0.0
    for i, k in np.ndindex(truth.shape):
        p = float(logits[i, k].double().sigmoid())
        odds = (truth[:, k] == 0).sum() / (truth[:, k] == 1).sum()
        total -= odds * np.log(p) if truth[i, k] else np.log(1 - p)
    assert float(loss) == pytest.approx(total / truth.size, rel=1e-5)


def test_no_class_weighs_more_than_twenty(store: Store) -> None:
    task = Task(Config(pool="slices"), store)
    task.items(np.array([0, 5]))  # 1 slice of one class, 130 of another
    weights = dict(zip(task.classes, task._weight.tolist(), strict=True))
    assert weights["a|b"] == 20
    assert weights["a"] == pytest.approx(131 / 130 / 5)


def test_slices_are_drawn_from_all_of_a_scan_by_seed_and_step(store: Store) -> None:
    task = Task(Config(slices_per_scan=8), store)
    first = [task._draw(5, np.random.default_rng([0, step, 3])) for step in range(200)]
    assert all(len(d) == 8 and (np.diff(d) > 0).all() for d in first)
    start = int(task._first[5])
    assert {int(i) - start for d in first for i in d} == set(range(130))
    assert task._draw(0, np.random.default_rng(0)).tolist() == [0]
    model = a_model(task.classes)

    def loss(seed: int, step: int) -> float:
        return float(task.loss(model, [3, 5, 1], VIEWS, seed=seed, step=step).detach())

    assert loss(0, 1) == loss(0, 1)
    assert len({loss(0, 1), loss(0, 2), loss(1, 1)}) == 3


def test_neighbouring_slices_are_seen(store: Store) -> None:
    task = Task(Config(), store)
    model = a_model(task.classes, slices=3)
    assert task.loss(model, [3, 5, 6], VIEWS, seed=0, step=0).isfinite()
    outcome = task.judge(model, task.scans)
    expected = model.infer(load_batch(store, np.flatnonzero(store.column("scan") == 3), 3))
    assert outcome.probability[3] == pytest.approx(expected[0].detach().numpy(), rel=1e-4, abs=1e-5)


def test_the_classifier_sits_on_the_first_layer_of_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Tiny()
    head = ProjectionHead(encoder.features)
    for part in (encoder, head):
        for name, tensor in part.state_dict().items():
            if name.endswith(("running_mean", "running_var", "bias")):
                tensor.uniform_(0.5, 1.5)
    checkpoint.export_encoder(tmp_path / "encoder", encoder, {}, head)
    model = Model(Config(layer="projection"), encoder, ("a", "b"))
    assert [len(stage) for stage in model.stages()] == [1] * 5
    named = model.start_from(tmp_path)
    assert set(named) == {name for name in model.state_dict() if name.startswith("first.")}
    assert model.stages() == [*encoder.stages()[:-1], [encoder.parts[-1], model.first]]
    x = torch.rand(3, 1, 16, 16)
    model.eval()
    head.eval()
    assert torch.equal(model.features(x), head.first(encoder(x)))
    plain = Model(Config(), encoder, ("a", "b"))
    assert plain.start_from(tmp_path) == []


def test_a_run_without_a_head_or_with_another_one_is_refused(tmp_path: Path) -> None:
    encoder = Tiny()
    model = Model(Config(layer="projection"), encoder, ("a", "b"))
    checkpoint.export_encoder(tmp_path / "none" / "encoder", encoder, {})
    with pytest.raises(MedclrError, match=r"kept no projection head; classify.layer must be encoder"):
        model.start_from(tmp_path / "none")
    checkpoint.export_encoder(tmp_path / "other" / "encoder", encoder, {}, ProjectionHead(64))
    with pytest.raises(MedclrError, match="projection head is of another size") as error:
        model.start_from(tmp_path / "other")
    assert "\n" not in str(error.value)


def test_autocast_does_not_reach_the_pooling() -> None:
    model = a_model(pool="attention")
    features, scan = torch.randn(300, 6).bfloat16(), torch.zeros(300, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = model.pooled(features, scan)
    assert torch.equal(pooled, model.pooled(features.float(), scan))
    assert pooled.dtype == torch.float32


def test_the_picture_counts_and_bears_the_stamp(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append((figure, path)))
    task = Task(Config(), store)
    outcome = task.judge(a_model(task.classes), task.scans)
    task.draw(a_model(task.classes), outcome, tmp_path, "transductive: pretrained on 3 of the 7 test patients")
    task.draw(a_model(task.classes), outcome, tmp_path)
    several = Task(Config(multi_label=True), store)
    judged = several.judge(a_model(several.classes, multi_label=True), several.scans)
    several.draw(a_model(several.classes), judged, tmp_path)
    (stamped, path), (plain, _) = drawn
    assert path == tmp_path / "confusion.png"
    assert "transductive" in stamped.get_suptitle()
    assert plain.get_suptitle() == ""
    (axis,) = stamped.axes
    counts = [int(text.get_text().split("\n")[1]) for text in axis.texts]
    expected = np.zeros((5, 5), dtype=int)
    for t, p in zip(outcome.truth, outcome.probability, strict=True):
        expected[t.tolist().index(1), p.tolist().index(max(p))] += 1
    assert counts == expected.ravel().tolist()


def test_settings_that_cannot_work() -> None:
    with pytest.raises(MedclrError, match="slices_per_scan must be at least 1"):
        Config(slices_per_scan=0)
