"""NT-Xent in its forms against a double loop, MONAI, closed forms, and itself split over processes."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses import nt_xent as module
from medclr.losses.nt_xent import nt_xent, unit

FORMS = ("dense", "blocks")
RULES: list[dict[str, Any]] = [
    {"negatives": negatives, "positives": positives, "reach": reach}
    for negatives in ("all", "other_scans", "other_patients")
    for positives, reach in (
        ("augmentation", 1),
        ("neighbouring_slice", 1),
        ("neighbouring_slice", 3),
        ("same_patient", 1),
    )
]

forms = pytest.mark.parametrize("form", FORMS)
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(str(value) for value in rule.values()))


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The views of these small batches, too, fall into several tiles, the last of them cut."""
    monkeypatch.setitem(module.TILE, "cpu", 5)


@dataclass(frozen=True)
class Ids:
    patient: Tensor
    scan: Tensor
    slice_index: Tensor

    def __getitem__(self, rows: Any) -> "Ids":
        return Ids(self.patient[rows], self.scan[rows], self.slice_index[rows])


IDS = Ids(
    patient=torch.tensor([4, 4, 4, 4, 4, 9, 9, 2]),  # with several scans, with one, with one slice
    scan=torch.tensor([7, 7, 7, 1, 1, 3, 3, 8]),
    slice_index=torch.tensor([5, 6, 9, 6, 7, 0, 1, 0]),  # near in the same scan, near in another one, far
)


def pairs(n: int = 8, k: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, k, generator=generator, dtype=torch.float64).to(dtype)
    return a, b


def slow(
    a: Tensor,
    b: Tensor,
    temperature: float,
    ids: Ids = IDS,
    negatives: str = "all",
    positives: str = "augmentation",
    reach: int = 1,
) -> float:
    """The definition, literally, in Python floats; the largest term is taken out of each sum, for e^400 is no float."""
    views = [[float(v) for v in row] for row in torch.cat([a, b])]
    norms = [math.sqrt(sum(v * v for v in row)) for row in views]
    n, total = len(a), 0.0
    patient, scan, position = (column.tolist() * 2 for column in (ids.patient, ids.scan, ids.slice_index))

    def score(i: int, j: int) -> float:
        return sum(p * q for p, q in zip(views[i], views[j], strict=True)) / (norms[i] * norms[j]) / temperature

    def is_positive(i: int, j: int) -> bool:
        if positives == "same_patient":
            return bool(patient[i] == patient[j])
        if positives == "neighbouring_slice":
            return bool(scan[i] == scan[j] and abs(position[i] - position[j]) <= reach)
        return i % n == j % n

    def is_negative(i: int, j: int) -> bool:
        kin = {"all": [i] * 2, "other_scans": scan, "other_patients": patient}[negatives]
        return True if negatives == "all" else bool(kin[i] != kin[j])

    for i in range(2 * n):
        attracting = [j for j in range(2 * n) if j != i and is_positive(i, j)]
        compared = [j for j in range(2 * n) if j != i and (is_positive(i, j) or is_negative(i, j))]
        top = max(score(i, j) for j in compared)
        total += top + math.log(sum(math.exp(score(i, j) - top) for j in compared))
        total -= sum(score(i, j) for j in attracting) / len(attracting)
    return total / (2 * n)


@forms
@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("temperature", [0.005, 0.1, 0.5, 2.0])
def test_equals_the_equation(form: Any, n: int, temperature: float) -> None:
    a, b = pairs(n)
    expected = slow(a, b, temperature, IDS[:n])
    assert nt_xent(a, b, temperature, form=form).item() == pytest.approx(expected, abs=1e-12)


@forms
@rules
def test_equals_the_definition_with_patients(form: Any, rule: dict[str, Any]) -> None:
    a, b = pairs()
    loss = nt_xent(a, b, 0.3, ids=IDS, form=form, **rule)
    assert loss.item() == pytest.approx(slow(a, b, 0.3, **rule), abs=1e-12)


def test_every_rule_is_another_loss_unless_all_the_patient_attracts() -> None:
    a, b = pairs()
    losses = {tuple(rule.values()): round(nt_xent(a, b, 0.3, ids=IDS, **rule).item(), 9) for rule in RULES}
    same_patient = {loss for (_, positives, _), loss in losses.items() if positives == "same_patient"}
    assert len(same_patient) == 1  # positives stay in the denominator: nothing is left to leave out
    assert len(set(losses.values())) == len(RULES) - 2


@forms
def test_equals_monai(form: Any) -> None:
    from monai.losses import ContrastiveLoss

    a, b = pairs(16, 8, torch.float32)
    torch.testing.assert_close(nt_xent(a, b, 0.5, form=form), ContrastiveLoss(temperature=0.5)(a, b))


@forms
@pytest.mark.parametrize("n", [1, 4, 33])
def test_equal_embeddings_give_log_2n_minus_1(form: Any, n: int) -> None:
    same = torch.ones(n, 3, dtype=torch.float64)
    assert nt_xent(same, same, 0.1, form=form).item() == pytest.approx(math.log(2 * n - 1), abs=1e-12)


@forms
@pytest.mark.parametrize(
    ("rule", "compared"),
    [
        ({"negatives": "other_patients"}, [7, 7, 7, 7, 7, 13, 13, 15]),  # the twin and the views of other patients
        ({"negatives": "other_scans"}, [11, 11, 11, 13, 13, 13, 13, 15]),
        ({"negatives": "other_patients", "positives": "same_patient"}, [15] * 8),  # all, as positives
        ({"negatives": "other_scans", "positives": "neighbouring_slice"}, [13, 13, 11, 15, 15, 15, 15, 15]),
    ],
)
def test_equal_embeddings_give_the_log_of_what_is_compared(form: Any, rule: Any, compared: list[int]) -> None:
    same = torch.ones(8, 3, dtype=torch.float64)
    expected = sum(math.log(count) for count in compared) / 8
    assert nt_xent(same, same, 0.1, ids=IDS, form=form, **rule).item() == pytest.approx(expected, abs=1e-12)


@forms
def test_orthogonal_pairs_closed_form(form: Any) -> None:
    """Twins equal, all else orthogonal: -log(e^(1/t) / (e^(1/t) + 2N-2))."""
    eye = torch.eye(4, dtype=torch.float64)
    assert nt_xent(eye, eye, 0.5, form=form).item() == pytest.approx(math.log1p(6 * math.exp(-2)), abs=1e-12)


@forms
def test_orthogonal_patients_closed_form(form: Any) -> None:
    """All views of a patient equal, patients orthogonal: 4 positives less itself, and 4 negatives at cosine 0."""
    a = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0)
    ids = Ids(torch.tensor([0, 0, 1, 1]), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    loss = nt_xent(a, a, 0.5, ids=ids, positives="same_patient", form=form)
    assert loss.item() == pytest.approx(math.log(3 * math.exp(2) + 4) - 2, abs=1e-12)


@forms
@rules
def test_gradient(form: Any, rule: dict[str, Any]) -> None:
    a, b = (x.requires_grad_() for x in pairs(k=3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3, ids=IDS, form=form, **rule), (a, b))


@pytest.mark.parametrize("rule", [RULES[0], RULES[6]], ids=["plain", "neighbours"])
def test_the_dense_form_can_be_derived_twice(rule: dict[str, Any]) -> None:
    a, b = (x.requires_grad_() for x in pairs(k=3))
    assert torch.autograd.gradgradcheck(lambda a: nt_xent(a, b, 0.3, ids=IDS, form="dense", **rule), a)


@pytest.mark.parametrize(("tile", "n"), [(1, 8), (5, 8), (16, 8), (64, 300), (512, 300)])
@rules
def test_blocks_equal_dense(monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], tile: int, n: int) -> None:
    monkeypatch.setitem(module.TILE, "cpu", tile)
    generator = torch.Generator().manual_seed(0)
    scan = torch.randint(30, (n,), generator=generator)
    ids = Ids(scan // 3, scan, torch.randint(12, (n,), generator=generator))
    a, b = (x.requires_grad_() for x in pairs(n, 16))
    dense, blocks = (nt_xent(a, b, 0.1, ids=ids, form=form, **rule) for form in FORMS)  # type: ignore[arg-type]
    torch.testing.assert_close(blocks, dense, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(loss, (a, b)) for loss in (blocks, dense))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_auto_takes_blocks_for_many_views_and_they_refuse_a_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_VIEWS", 14)
    a, b = (x.requires_grad_() for x in pairs())

    def derive_twice(n: int) -> Tensor:
        (grad,) = torch.autograd.grad(nt_xent(a[:n], b[:n], 0.2), a, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), a)[0]

    assert derive_twice(7).abs().max() > 0
    with pytest.raises(MedclrError, match="cannot be differentiated twice; ask for the dense form"):
        derive_twice(8)


@forms
@rules
def test_order_scale_and_role_do_not_matter(form: Any, rule: dict[str, Any]) -> None:
    a, b = (x.requires_grad_() for x in pairs())
    order = torch.tensor([3, 1, 5, 0, 7, 2, 4, 6])

    def loss(a: Tensor, b: Tensor, ids: Ids) -> Tensor:
        return nt_xent(a, b, 0.2, ids=ids, form=form, **rule)

    expected = loss(a, b, IDS)
    torch.testing.assert_close(loss(a[order], b[order], IDS[order]), expected)
    torch.testing.assert_close(loss(b, a, IDS), expected)
    torch.testing.assert_close(loss(7 * a, 0.01 * b, IDS), expected)
    if rule["positives"] == "augmentation":
        assert not torch.isclose(loss(a[order], b, IDS), expected)  # other twins: another loss
    gradient, shuffled = (torch.autograd.grad(x, a)[0] for x in (expected, loss(a[order], b[order], IDS[order])))
    torch.testing.assert_close(gradient, shuffled)


@forms
def test_only_equality_of_ids_counts(form: Any) -> None:
    a, b = pairs()
    large = Ids(IDS.patient + 10**12, IDS.scan * 1000 + 10**9, IDS.slice_index)
    for rule in RULES:
        of_small, of_large = (nt_xent(a, b, 0.2, ids=ids, form=form, **rule) for ids in (IDS, large))
        torch.testing.assert_close(of_large, of_small)


@forms
def test_alone_with_the_twin_there_is_nothing_to_learn(form: Any) -> None:
    a, b = (x.requires_grad_() for x in pairs(4))
    one_patient = Ids(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.arange(4))
    for loss in (
        nt_xent(a, b, 0.1, ids=one_patient, negatives="other_patients", form=form),
        nt_xent(a[:1], b[:1], 0.1, form=form),
    ):
        assert loss.item() == pytest.approx(0, abs=1e-12)
        (gradient,) = torch.autograd.grad(loss, a)
        assert gradient.abs().max() < 1e-12


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_small_temperature_in_half_precision(form: Any, dtype: torch.dtype, autocast: torch.dtype) -> None:
    a, b = pairs(32, 16, dtype)
    a.requires_grad_()
    with torch.autocast("cpu", autocast):
        loss = nt_xent(a, b, 0.005, form=form)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad is not None
    assert a.grad.dtype == dtype
    exact = a.detach().double().requires_grad_()
    ids = Ids(*3 * [torch.arange(32)])
    assert loss.item() == pytest.approx(slow(exact.detach(), b.double(), 0.005, ids), rel=1e-5)
    (gradient,) = torch.autograd.grad(nt_xent(exact, b.double(), 0.005), exact)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(a.grad.double(), gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())


def test_backward_of_blocks_is_in_float32_even_under_autocast() -> None:
    a, b = (x.requires_grad_() for x in pairs(32, 16, torch.float32))
    loss = nt_xent(a, b, 0.005, form="blocks")
    (expected,) = torch.autograd.grad(loss, a, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(loss, a)
    assert torch.equal(gradient, expected)


SPOILERS: dict[str, Callable[[Tensor], Any]] = {
    "zero": lambda x: x[0].zero_(),
    "zeros": lambda x: x.zero_(),
    "huge": lambda x: x[0].mul_(1e30),
    "tiny": lambda x: x[0].mul_(1e-30),
    "the smallest": lambda x: x[0].fill_(1e-45),
    "duplicates": lambda x: x.copy_(x[:1].expand_as(x).clone()),
    "opposites": lambda x: x[1].copy_(-x[0]),
}


@forms
@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("temperature", [0.005, 0.5])
@pytest.mark.parametrize("rule", [RULES[0], RULES[-1]], ids=["plain", "patients"])
def test_odd_embeddings_are_finite(form: Any, spoiler: str, temperature: float, rule: dict[str, Any]) -> None:
    a, b = pairs(dtype=torch.float32)
    SPOILERS[spoiler](a)
    SPOILERS[spoiler](b)
    a.requires_grad_()
    loss = nt_xent(a, b, temperature, ids=IDS, form=form, **rule)
    loss.backward()
    assert a.grad is not None
    assert loss.isfinite()
    assert a.grad.isfinite().all()


def test_a_huge_embedding_keeps_its_direction() -> None:
    a, b = pairs(dtype=torch.float32)
    torch.testing.assert_close(nt_xent(a * 1e30, b * 1e-10, 0.1), nt_xent(a, b, 0.1))


def test_ids_are_asked_for_only_where_they_are_needed() -> None:
    a, b = pairs()
    nt_xent(a, b, 0.1)
    with pytest.raises(MedclrError, match=r"negatives 'other_scans': needs the patient, scan and slice"):
        nt_xent(a, b, 0.1, negatives="other_scans")
    with pytest.raises(MedclrError, match=r"negatives 'other_scans' and positives 'same_patient'"):
        nt_xent(a, b, 0.1, negatives="other_scans", positives="same_patient")
    with pytest.raises(MedclrError, match="got 8 images, but the patient, scan and slice of 3"):
        nt_xent(a, b, 0.1, ids=IDS[:3], positives="same_patient")


def test_refuses_views_of_unequal_shape() -> None:
    a, b = pairs()
    with pytest.raises(ValueError, match=r"\[8, 5\] and \[5, 5\]"):
        nt_xent(a, b[:5], 0.1)


# ---- several processes


@dataclass
class FakeProcess:
    """One of several processes, the views and ids of all of which are known here, in one graph."""

    rank: int
    views: list[Tensor]
    ids: list[Tensor]

    def all_gather(self, x: Tensor) -> Tensor:
        parts = self.views if x.is_floating_point() else self.ids
        assert torch.equal(x, parts[self.rank])
        return torch.cat(parts)


@forms
@rules
@pytest.mark.parametrize("world", [2, 4])
def test_mean_over_processes_is_the_whole_loss(form: Any, rule: dict[str, Any], world: int) -> None:
    a, b = (x.requires_grad_() for x in pairs())
    shards = [slice(rank * 8 // world, (rank + 1) * 8 // world) for rank in range(world)]
    views = [unit(torch.cat([a[rows], b[rows]])) for rows in shards]
    columns = torch.stack([IDS.patient, IDS.scan, IDS.slice_index], 1)
    ids = [columns[rows].repeat(2, 1) for rows in shards]
    losses = [
        nt_xent(a[rows], b[rows], 0.2, FakeProcess(rank, views, ids), ids=IDS[rows], form=form, **rule)
        for rank, rows in enumerate(shards)
    ]
    mean, whole = torch.stack(losses).mean(), nt_xent(a, b, 0.2, ids=IDS, **rule)
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-12)
    of_mean, of_whole = (torch.autograd.grad(loss, (a, b)) for loss in (mean, whole))
    torch.testing.assert_close(of_mean, of_whole, rtol=1e-12, atol=1e-12)


def every_loss(group: Group) -> dict[str, Any]:
    """Loss of all processes and gradient of this one's embeddings, for each form and rule."""
    rows = slice(group.rank * 8 // group.world_size, (group.rank + 1) * 8 // group.world_size)
    results = {}
    for form, (number, rule) in itertools.product(FORMS, enumerate(RULES)):
        a, b = (x[rows].clone().requires_grad_() for x in pairs())
        loss = nt_xent(a, b, 0.2, group, ids=IDS[rows], form=form, **rule)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss / group.world_size, (a, b))
        results[f"{form} {number}"] = (group.mean(loss), *gradients)
    return results


@pytest.mark.timeout(120)
def test_real_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, timeout=110, env=environment)
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (loss, *gradients) in every_loss(Group()).items():
        for rank in range(2):
            torch.testing.assert_close(two[rank][name][0], loss, rtol=1e-12, atol=1e-12)
        gathered = [torch.cat(parts) for parts in zip(two[0][name][1:], two[1][name][1:], strict=True)]
        torch.testing.assert_close(gathered, gradients, rtol=1e-12, atol=1e-12)


# ---- memory

MEASURE = """
import sys, torch
from pathlib import Path
from medclr.losses.nt_xent import nt_xent

def kilobytes(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))

def peak(n):
    a, b = (torch.randn(n, 128).requires_grad_() for _ in range(2))
    before = kilobytes("VmRSS")
    nt_xent(a, b, 0.1, form="blocks").backward()
    return kilobytes("VmHWM") - before

peak(64)  # what torch itself takes at its first use
print(peak(int(sys.argv[1]) // 2) * 1024 / 1e6)
"""


def megabytes(views: int) -> float:
    """What the loss in blocks, forward and backward, takes beyond its inputs in a fresh process."""
    command = [sys.executable, "-c", MEASURE, str(views)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_blocks_is_far_below_that_of_the_cosines() -> None:
    assert megabytes(8192) < 100  # the cosines alone: 268


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_65536_views_take_at_most_300_megabytes() -> None:
    assert megabytes(65536) < 300


if __name__ == "__main__":
    process = Group.from_environment()
    module.TILE["cpu"] = 5
    torch.save(every_loss(process), Path(sys.argv[1]) / f"{process.rank}.pt")
    process.close()
