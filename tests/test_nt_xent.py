"""NT-Xent against a double loop, MONAI, closed forms, and itself split over processes."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from medclr.losses.nt_xent import nt_xent


def pairs(n: int = 6, k: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, k, generator=generator, dtype=torch.float64).to(dtype)
    return a, b


def slow(a: Tensor, b: Tensor, temperature: float) -> float:
    """Equation 1 of the paper, literally, in Python floats."""
    views = [[float(v) for v in row] for row in torch.cat([a, b])]
    norms = [math.sqrt(sum(v * v for v in row)) for row in views]

    def similarity(i: int, j: int) -> float:
        return sum(p * q for p, q in zip(views[i], views[j], strict=True)) / (norms[i] * norms[j])

    n, total = len(a), 0.0
    for i in range(2 * n):
        twin = i + n if i < n else i - n
        others = sum(math.exp(similarity(i, k) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(similarity(i, twin) / temperature) / others)
    return total / (2 * n)


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_equals_the_equation(n: int, temperature: float) -> None:
    a, b = pairs(n)
    assert nt_xent(a, b, temperature).item() == pytest.approx(slow(a, b, temperature), abs=1e-12)


def test_equals_monai() -> None:
    from monai.losses import ContrastiveLoss

    a, b = pairs(16, 8, torch.float32)
    torch.testing.assert_close(nt_xent(a, b, 0.5), ContrastiveLoss(temperature=0.5)(a, b))


@pytest.mark.parametrize("n", [1, 4, 33])
def test_equal_embeddings_give_log_2n_minus_1(n: int) -> None:
    same = torch.ones(n, 3, dtype=torch.float64)
    assert nt_xent(same, same, 0.1).item() == pytest.approx(math.log(2 * n - 1), abs=1e-12)


def test_orthogonal_pairs_closed_form() -> None:
    """Twins equal, all else orthogonal: -log(e^(1/t) / (e^(1/t) + 2N-2))."""
    eye = torch.eye(4, dtype=torch.float64)
    assert nt_xent(eye, eye, 0.5).item() == pytest.approx(math.log1p(6 * math.exp(-2)), abs=1e-12)


def test_gradient() -> None:
    a, b = (x.requires_grad_() for x in pairs(3, 4))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (a, b))


def test_order_scale_and_role_do_not_matter() -> None:
    a, b = pairs()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = nt_xent(a, b, 0.2)
    torch.testing.assert_close(nt_xent(a[order], b[order], 0.2), loss)
    torch.testing.assert_close(nt_xent(b, a, 0.2), loss)
    torch.testing.assert_close(nt_xent(7 * a, 0.01 * b, 0.2), loss)
    assert not torch.isclose(nt_xent(a[order], b, 0.2), loss)  # other twins: another loss


def test_gradient_follows_the_order_of_rows() -> None:
    a, b = (x.requires_grad_() for x in pairs())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    grad, shuffled = (torch.autograd.grad(nt_xent(x, y, 0.2), a)[0] for x, y in ((a, b), (a[order], b[order])))
    torch.testing.assert_close(grad, shuffled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_small_temperature(dtype: torch.dtype) -> None:
    a, b = pairs(32, 16, dtype)
    a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(a, b, 0.005)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(a.grad).all()
    exact = slow_logsumexp(a.detach().double(), b.double(), 0.005)
    assert loss.item() == pytest.approx(exact, rel=1e-3)


def slow_logsumexp(a: Tensor, b: Tensor, temperature: float) -> float:
    """The equation with the largest term taken out of the sum, in float64, where e^200 does not matter."""
    unit = torch.nn.functional.normalize(torch.cat([a, b]), dim=1)
    n, losses = len(a), []
    for i in range(2 * n):
        scores = [float(unit[i] @ unit[k]) / temperature for k in range(2 * n)]
        top = max(s for k, s in enumerate(scores) if k != i)
        others = sum(math.exp(s - top) for k, s in enumerate(scores) if k != i)
        losses.append(top + math.log(others) - scores[(i + n) % (2 * n)])
    return sum(losses) / (2 * n)


def test_zero_embedding_is_finite() -> None:
    a, b = pairs(4, dtype=torch.float32)
    a[0] = 0
    a.requires_grad_()
    loss = nt_xent(a, b, 0.1)
    loss.backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


@dataclass
class FakeProcesses:
    """One of several processes, the views of all of which are known here."""

    rank: int
    parts: list[Tensor]

    def all_gather(self, x: Tensor) -> Tensor:
        assert torch.equal(x, self.parts[self.rank])
        return torch.cat(self.parts)


@pytest.mark.parametrize("world", [2, 3])
def test_mean_over_processes_is_the_whole_loss(world: int) -> None:
    a, b = pairs(6)
    shards = list(zip(a.chunk(world), b.chunk(world), strict=True))
    parts = [torch.nn.functional.normalize(torch.cat(shard), dim=1) for shard in shards]
    losses = [nt_xent(*shard, 0.2, FakeProcesses(rank, parts)) for rank, shard in enumerate(shards)]
    torch.testing.assert_close(torch.stack(losses).mean(), nt_xent(a, b, 0.2))


def test_refuses_views_of_unequal_shape() -> None:
    a, b = pairs()
    with pytest.raises(ValueError, match=r"\[6, 5\] and \[5, 5\]"):
        nt_xent(a, b[:5], 0.1)
