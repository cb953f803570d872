"""LARS against a transcription in Python floats, and the groups that decide what it adapts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from medclr.errors import MedclrError
from medclr.optim import lars
from medclr.optim.lars import LARS, build_optimizer, param_groups

Weights = list[list[float]]


def slow_lars(
    weights: Weights, gradients: list[Weights], lrs: list[float], *, decay: float, adapt: bool, momentum: float = 0.9
) -> Weights:
    """The update of google-research/simclr, lars_optimizer.py, one scalar at a time; classic momentum, no Nesterov."""
    weights = [list(w) for w in weights]
    buffers = [[0.0] * len(w) for w in weights]
    for grads, lr in zip(gradients, lrs, strict=True):
        for w, g, v in zip(weights, grads, buffers, strict=True):
            g = [gi + decay * wi for gi, wi in zip(g, w, strict=True)]
            trust = 1.0
            if adapt:
                w_norm, g_norm = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
                if w_norm > 0 and g_norm > 0:
                    trust = 0.001 * w_norm / g_norm
            for i in range(len(w)):
                v[i] = momentum * v[i] + lr * trust * g[i]
                w[i] -= v[i]
    return weights


def problem(steps: int = 100) -> tuple[list[nn.Parameter], list[list[Tensor]], list[float]]:
    """Tensors of several sizes, one of them zero, gradients for each step, and a learning rate that changes."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 5, 64)
    weights = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes]
    weights.append(nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    gradients = [
        [torch.randn(len(w), generator=generator, dtype=torch.float64) * 10 ** (-i) for i, w in enumerate(weights)]
        for _ in range(steps)
    ]
    gradients[7][1].zero_()  # a dead gradient
    return weights, gradients, [3.0 * (step + 1) / steps for step in range(steps)]


def run(optimizer: torch.optim.Optimizer, weights: Any, gradients: Any, lrs: list[float]) -> None:
    for grads, lr in zip(gradients, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("bucket", [1, 6, 2**19])
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.3])
def test_equals_the_reference_over_100_steps(
    adapt: bool, decay: float, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lars, "BUCKET", bucket)
    weights, gradients, lrs = problem()
    start = [w.tolist() for w in weights]
    group = {"params": weights, "weight_decay": decay, "adapt": adapt}
    run(LARS([group], lr=0.0), weights, gradients, lrs)
    expected = slow_lars(start, [[g.tolist() for g in s] for s in gradients], lrs, decay=decay, adapt=adapt)
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.detach(), torch.tensor(e, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_without_adaptation_and_at_constant_rate_it_is_sgd() -> None:
    ours, gradients, _ = problem()
    theirs, _, _ = problem()
    lrs = [0.05] * len(gradients)
    run(LARS([{"params": ours, "adapt": False, "weight_decay": 0.01}], lr=0.0), ours, gradients, lrs)
    run(torch.optim.SGD(theirs, lr=0.0, momentum=0.9, weight_decay=0.01), theirs, gradients, lrs)
    for w, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, e)


def test_equals_pytorch_optimizer_where_the_definitions_agree() -> None:
    """A constant rate, because its rate is outside the momentum; no decay, because it adds the norms of both parts."""
    from pytorch_optimizer import LARS as Theirs

    def matrices_and_vectors() -> tuple[list[nn.Parameter], list[list[Tensor]]]:
        flat, gradients, _ = problem()
        weights = [nn.Parameter(w.detach().view(8, 8) if len(w) == 64 else w.detach()) for w in flat]
        return weights, [[g.view_as(w) for g, w in zip(step, weights, strict=True)] for step in gradients]

    ours, gradients = matrices_and_vectors()
    theirs, _ = matrices_and_vectors()
    lrs = [0.5] * len(gradients)
    groups = [{"params": [w for w in ours if (w.ndim > 1) == adapt], "adapt": adapt} for adapt in (True, False)]
    run(LARS(groups, lr=0.0), ours, gradients, lrs)
    run(Theirs(theirs, lr=0.5, momentum=0.9), theirs, gradients, lrs)
    for w, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-12, atol=1e-12)


def test_a_group_may_mix_kinds_of_numbers() -> None:
    weights, gradients, lrs = problem()
    singles = [nn.Parameter(w.detach().float()) for w in weights]
    mixed = [x for pair in zip(weights, singles, strict=True) for x in pair]
    run(LARS(mixed, lr=0.0), mixed, [[x for g in step for x in (g, g.float())] for step in gradients], lrs)
    for w, e in zip(singles, weights, strict=True):
        torch.testing.assert_close(w.double(), e.double(), rtol=1e-4, atol=1e-5)


class NoWaiting(TorchDispatchMode):
    """Refuses to bring a number from the device to Python, which is where a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_no_device() -> None:
    weights, gradients, _ = problem(8)
    optimizer = LARS([{"params": weights, "weight_decay": 0.1}], lr=0.1)
    for w, g in zip(weights, gradients[0], strict=True):
        w.grad = g
    with NoWaiting():
        optimizer.step()
        with pytest.raises(AssertionError):
            weights[0].sum().item()
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, gradients[0], strict=True))  # type: ignore[arg-type]


def test_step_length_does_not_depend_on_the_gradients_scale() -> None:
    ours, gradients, lrs = problem(10)
    scaled, _, _ = problem(10)
    run(LARS(ours[:3], lr=0.0), ours[:3], [g[:3] for g in gradients], lrs)
    run(LARS(scaled[:3], lr=0.0), scaled[:3], [[1000 * x for x in g[:3]] for g in gradients], lrs)
    for w, e in zip(ours[:3], scaled[:3], strict=True):
        torch.testing.assert_close(w, e)


def test_resumed_equals_uninterrupted() -> None:
    whole, gradients, lrs = problem()
    run(LARS(whole, lr=0.0), whole, gradients, lrs)
    parts, _, _ = problem()
    first = LARS(parts, lr=0.0)
    run(first, parts, gradients[:40], lrs[:40])
    second = LARS(parts, lr=0.0)
    second.load_state_dict(first.state_dict())
    run(second, parts, gradients[40:], lrs[40:])
    assert all(torch.equal(w, e) for w, e in zip(parts, whole, strict=True))


def test_parameters_without_gradient_stay() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LARS([used, unused], lr=1.0)
    used.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(used.detach(), torch.ones(2))
    assert torch.equal(unused.detach(), torch.ones(2))


class Network(nn.Module):
    """One of each kind, so shaped that shapes would mislead; a layer that is frozen, and one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm([3, 4]), nn.SyncBatchNorm(3)])
        self.linear = nn.Linear(3, 1)
        self.again = self.linear
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))  # one-dimensional, yet neither bias nor norm
        self.head = nn.Linear(3, 2)


def test_groups_go_by_the_kind_of_module() -> None:
    net = Network()
    decayed, plain = param_groups(net, weight_decay=0.1, exclude=[net.head])
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"conv.weight", "linear.weight", "scale"}
    norms = {f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    others = {"conv.bias", "linear.bias", "head.weight", "head.bias"}
    assert {names[id(p)] for p in plain["params"]} == norms | others
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)


@pytest.mark.parametrize(("name", "kind"), [("lars", LARS), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_every_optimizer_takes_the_groups_and_descends(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = build_optimizer(name, param_groups(net, 1e-4), lr=1.0 if name == "lars" else 0.01)
    assert isinstance(optimizer, kind)
    x = torch.randn(64, 4)
    losses = []
    for _ in range(100):
        loss = (net(x) - x[:, :1].square()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(MedclrError, match="'lamb' is unknown; use lars, adamw or sgd"):
        build_optimizer("lamb", [], lr=1.0)  # type: ignore[arg-type]
