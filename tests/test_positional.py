"""Contrast by position, against a slow reference, closed forms, and itself split over processes; and the method."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import medclr
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.losses import nt_xent as module
from medclr.losses.nt_xent import nt_xent
from medclr.losses.positional import Positional, positional_nt_xent
from medclr.methods.positional import Config

FORMS = ("dense", "blocks")
forms = pytest.mark.parametrize("form", FORMS)
reaches = pytest.mark.parametrize("reach", [0.05, 0.3, 1.0])


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The views of these small batches, too, fall into several tiles, the last of them cut."""
    monkeypatch.setitem(module.TILE, "cpu", 5)


KINDS = (
    ("MR", "axial", "brain", 30),  # modality, plane, body part, depth
    ("CT", "axial", "brain", 30),
    ("MR", "sagittal", "brain", 30),
    ("MR", "axial", "knee", 30),
    ("MR", "", "", 30),
    ("MR", "axial", "brain", 1),
    ("MR", "", "", 1),
)


@dataclass(frozen=True)
class Places:
    patient: Tensor
    kind: Tensor
    position: Tensor

    @property
    def group(self) -> Tensor:
        return torch.where(self.kind < 5, self.kind, -1 - self.patient)  # a single image is in a group of its own

    def __getitem__(self, rows: Any) -> "Places":
        return Places(self.patient[rows], self.kind[rows], self.position[rows])


PLACES = Places(
    patient=torch.tensor([4, 4, 4, 9, 9, 2, 2, 5, 7, 8, 3, 3, 6, 10, 11, 12]),
    kind=torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 5, 5, 2, 2, 3, 4, 4, 6]),
    position=torch.tensor(
        [0.0, 0.02, 0.5, 0.01, 0.45, 0.5, 1.0, 0.5, 0.5, 0.5, 0.01, 0.45, 0.48, 0.5, 0.46, 0.5], dtype=torch.float64
    ),
)


def pairs(n: int = 16, k: int = 5) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a, b


def slow(a: Tensor, b: Tensor, temperature: float, places: Places, reach: float) -> float:
    """The definition, literally, in Python floats."""
    views = [[float(v) for v in row] for row in torch.cat([a, b])]
    norms = [math.sqrt(sum(v * v for v in row)) for row in views]
    n, total = len(a), 0.0
    patient, position = places.patient.tolist() * 2, places.position.tolist() * 2
    kind = [KINDS[number] for number in places.kind.tolist()] * 2

    def score(i: int, j: int) -> float:
        return sum(p * q for p, q in zip(views[i], views[j], strict=True)) / (norms[i] * norms[j]) / temperature

    def weight(i: int, j: int) -> float:
        if i % n == j % n:
            return 1.0
        if patient[i] == patient[j] or kind[i] != kind[j] or kind[i][3] == 1:
            return 0.0
        return max(0.0, 1 - float(abs(position[i] - position[j])) / reach)

    def is_compared(i: int, j: int) -> bool:
        return i % n == j % n or patient[i] != patient[j] or abs(position[i] - position[j]) >= reach

    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        total += math.log(sum(math.exp(score(i, j)) for j in others if is_compared(i, j)))
        total -= sum(weight(i, j) * score(i, j) for j in others) / sum(weight(i, j) for j in others)
    return total / (2 * n)


@forms
@reaches
@pytest.mark.parametrize("n", [2, 8, 16])
def test_equals_the_definition(form: Any, reach: float, n: int) -> None:
    a, b = pairs(n)
    loss = positional_nt_xent(a, b, 0.3, places=PLACES[:n], reach=reach, form=form)
    assert loss.item() == pytest.approx(slow(a, b, 0.3, PLACES[:n], reach), abs=1e-12)


@forms
def test_equal_embeddings_give_the_log_of_what_is_compared(form: Any) -> None:
    same = torch.ones(16, 3, dtype=torch.float64)
    loss = positional_nt_xent(same, same, 0.1, places=PLACES, reach=0.1, form=form)
    compared = [29] * 2 + [31] * 14  # two slices of a patient are near each other, and left out
    assert loss.item() == pytest.approx(sum(map(math.log, compared)) / 16, abs=1e-12)


@forms
def test_patients_that_agree_at_every_place_closed_form(form: Any) -> None:
    """4 patients of 3 slices far apart; embeddings tell the places, which are orthogonal, and nothing else: of the 23
    other views 7 are positives at cosine 1, the 16 of other places are at 0, whatever their patient."""
    place = torch.arange(12) % 3
    places = Places(torch.arange(12) // 3, torch.zeros(12, dtype=torch.int64), place / 2)
    z = torch.eye(3, dtype=torch.float64)[place]
    loss = positional_nt_xent(z, z, 0.5, places=places, reach=0.1, form=form)
    assert loss.item() == pytest.approx(math.log(7 * math.exp(2) + 16) - 2, abs=1e-12)


@forms
def test_without_anything_near_it_is_nt_xent(form: Any) -> None:
    a, b = pairs()
    places = replace(PLACES, position=torch.arange(16) / 15)
    torch.testing.assert_close(positional_nt_xent(a, b, 0.2, places=places, reach=0.05, form=form), nt_xent(a, b, 0.2))


@forms
@pytest.mark.parametrize(
    "kind",
    [[5, 5, 6, 6], [0, 1, 5, 5], [0, 2, 5, 6], [0, 3, 1, 5], [0, 4, 5, 6]],
    ids=["single images", "modalities", "planes", "body parts", "not recorded"],
)
def test_what_shows_nothing_alike_does_not_attract(form: Any, kind: list[int]) -> None:
    """Four patients, all but one slice at the same height."""
    a, b = pairs(5)
    places = Places(torch.arange(5), torch.tensor([*kind, 0]), torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]))
    torch.testing.assert_close(positional_nt_xent(a, b, 0.2, places=places, reach=0.1, form=form), nt_xent(a, b, 0.2))


@forms
@reaches
def test_gradient(form: Any, reach: float) -> None:
    a, b = (x.requires_grad_() for x in pairs(k=3))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return positional_nt_xent(a, b, 0.3, places=PLACES, reach=reach, form=form)

    assert torch.autograd.gradcheck(loss, (a, b))
    if form == "dense":
        assert torch.autograd.gradgradcheck(lambda a: loss(a, b), a)


@pytest.mark.parametrize("tile", [1, 7, 512])
def test_blocks_equal_dense(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setitem(module.TILE, "cpu", tile)
    n = 60 if tile == 1 else 300
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30, (n,), generator=generator)
    places = Places(ids, ids % 2, torch.rand(n, generator=generator))
    a, b = (x.requires_grad_() for x in pairs(n, 16))
    dense, blocks = (positional_nt_xent(a, b, 0.1, places=places, reach=0.2, form=form) for form in FORMS)  # type: ignore[arg-type]
    torch.testing.assert_close(blocks, dense, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(loss, (a, b)) for loss in (blocks, dense))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_weights_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    weights = Positional.weights

    def watched(self: Positional, rows: slice, columns: slice) -> Tensor:
        sizes.append(weights(self, rows, columns).numel())
        return weights(self, rows, columns)

    monkeypatch.setattr(Positional, "weights", watched)
    positional_nt_xent(*pairs(), 0.1, places=PLACES, reach=0.3, form="blocks")
    assert max(sizes) == 5 * 5


@forms
def test_order_scale_and_role_do_not_matter(form: Any) -> None:
    a, b = pairs()
    order = torch.tensor([3, 1, 5, 0, 7, 2, 4, 6, 13, 15, 8, 12, 10, 14, 9, 11])

    def loss(a: Tensor, b: Tensor, places: Places) -> Tensor:
        return positional_nt_xent(a, b, 0.2, places=places, reach=0.3, form=form)

    expected = loss(a, b, PLACES)
    torch.testing.assert_close(loss(a[order], b[order], PLACES[order]), expected)
    torch.testing.assert_close(loss(b, a, PLACES), expected)
    torch.testing.assert_close(loss(7 * a, 0.01 * b, PLACES), expected)
    assert not torch.isclose(loss(a, b, PLACES[order]), expected), "places matter"


@pytest.mark.parametrize("method", ["positional", "dense"])
def test_single_images_are_refused_before_a_run_is_begun(method: str, image_store: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": method, "epochs": 1, "batch": 4, "views.size_px": 16, "device": "cpu"}
    if method == "dense":
        settings |= {"dense.global_weight": 1.0, "dense.global_positives": "position"}
    with pytest.raises(MedclrError, match=r"store: all slices are at one place.*choose method simclr"):
        medclr.pretrain(image_store, tmp_path / "run", settings=settings)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused() -> None:
    a, b = pairs()
    with pytest.raises(MedclrError, match="position of 16 slices, and got none"):
        positional_nt_xent(a, b, 0.1, places=None, reach=0.1)
    with pytest.raises(MedclrError, match="position of 16 slices, and got those of 3"):
        positional_nt_xent(a, b, 0.1, places=PLACES[:3], reach=0.1)
    flat = replace(PLACES, position=torch.full((16,), 0.5))
    images = replace(flat, kind=torch.tensor([5, 6] * 8))
    for nowhere in (flat, images):
        with pytest.raises(MedclrError, match="all slices of a batch are at one place"):
            positional_nt_xent(a, b, 0.1, places=nowhere, reach=0.1)
    for wrong, named in (
        ({"reach": 0.0}, "reach: 0.0"),
        ({"temperature": 0.0}, "temperature"),
        ({"out_features": 0}, "out"),
    ):
        with pytest.raises(MedclrError, match=named):
            Config(**wrong)


# ---- several processes


def every_loss(group: Group) -> dict[str, Any]:
    """Loss of all processes and gradient of this one's embeddings, for each form."""
    rows = slice(group.rank * 16 // group.world_size, (group.rank + 1) * 16 // group.world_size)
    results = {}
    for form in FORMS:
        a, b = (x[rows].clone().requires_grad_() for x in pairs())
        loss = positional_nt_xent(a, b, 0.2, group, places=PLACES[rows], reach=0.3, form=form)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss / group.world_size, (a, b))
        results[form] = (group.mean(loss), *gradients)
    return results


@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [2, 4])
def test_real_processes_equal_one(processes: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    environment = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, timeout=280, env=environment)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    for name, (loss, *gradients) in every_loss(Group()).items():
        for of_rank in found:
            torch.testing.assert_close(of_rank[name][0], loss, rtol=1e-12, atol=1e-12)
        gathered = [torch.cat(parts) for parts in zip(*(of_rank[name][1:] for of_rank in found), strict=True)]
        torch.testing.assert_close(gathered, gradients, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    process = Group.from_environment()
    module.TILE["cpu"] = 5
    torch.save(every_loss(process), Path(sys.argv[1]) / f"{process.rank}.pt")
    process.close()
