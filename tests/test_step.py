"""A step: gradient caching is exact, its batch norm leaks nothing, and what is not finite changes nothing."""

import math
import os
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medclr.augment.views import Draws
from medclr.config import ViewsConfig
from medclr.data.loader import Batch, Facts
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.methods.simclr import Config, Method
from medclr.step import Plan, Result, Step, plan_of
from medclr.stop import GaveUp, StopRequest

B = 12
VIEWS = ViewsConfig(size_px=8)


def norm_of(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels) if kind == "group" else nn.BatchNorm2d(channels)


class TinyEncoder(nn.Module):
    """Image [B,1,H,W] -> features [B,32]."""

    features = 32

    def __init__(self, norm: str) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 16, 3), norm_of(norm, 16), nn.ReLU())
        self.net = nn.Sequential(*first, nn.Conv2d(16, 32, 3), norm_of(norm, 32), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))  # type: ignore[no-any-return]


def make_method(norm: str, dtype: torch.dtype = torch.float64) -> Method:
    torch.manual_seed(0)
    method = Method(Config(temperature=0.2, out_features=5), TinyEncoder(norm))
    if norm == "group":
        for layer in method.head.hidden:
            layer[1] = nn.LayerNorm(32)
        method.head.last[1] = nn.LayerNorm(5)
    return method.to(dtype)


def batch_of(n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    zeros, whole = torch.zeros(n), torch.arange(n)
    return Batch(
        index=whole,
        images=torch.rand(n, 1, 12, 12, generator=generator),
        low=zeros,
        high=zeros + 1,
        air=zeros,
        content=torch.tensor([[0.0, 0.0, 12.0, 12.0]]).expand(n, 4),
        modality=torch.arange(n) % 2,
        scan=whole // 2,
        patient=whole // 4,
        slice_index=whole % 2,
        position=zeros,
        label=whole * 0 - 1,
        group=torch.arange(n) % 2,
        modalities=("XR", "MR"),
    )


def pieces(plan: Plan, batch: Batch) -> Iterator[Batch]:
    mine = batch.select(torch.from_numpy(plan.rows))
    return (mine.select(torch.from_numpy(rows)) for rows in plan.pieces)


class Answers(StopRequest):
    """Asked to stop at the question with that number, or never; counts the questions."""

    def __init__(self, number: float = math.inf) -> None:
        super().__init__(Group())
        self.number, self.questions = number, 0

    def asked(self) -> bool:
        self.questions += 1
        return self.questions > self.number


def take(method: Method, chunk: int | None, batch: Batch, stop: StopRequest | None = None, step: int = 3) -> Result:
    plan = plan_of(len(batch), chunk, Group())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    draws = Draws(VIEWS, len(batch), seed=1, step=step)
    return Step(method, optimizer, plan, Group())(pieces(plan, batch), draws, stop or Answers())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("batch", "chunk"), [(12, None), (12, 12), (12, 6), (36, 6), (24, 12), (18, 3), (9, 3)])
def test_a_chunk_holds_the_same_slices_whatever_the_number_of_processes(
    batch: int, chunk: int | None, world: int
) -> None:
    if batch % world or (chunk and chunk % world):
        with pytest.raises(MedclrError, match="evenly"):
            plan_of(batch, chunk, Group(0, world))
        return
    one = plan_of(batch, chunk, Group())
    many = [plan_of(batch, chunk, Group(rank, world)) for rank in range(world)]
    assert sorted(np.concatenate([plan.rows for plan in many])) == list(range(batch))
    for number, (rows, views) in enumerate(one.passes):
        together = np.concatenate([plan.rows[plan.passes[number][0]] for plan in many])
        assert set(together) == set(one.rows[rows])
        assert all(plan.passes[number][1] == views for plan in many)
    for view in (0, 1):
        seen = np.concatenate([rows for rows, views in one.passes if view in views])
        assert sorted(seen) == list(range(batch)), "each slice goes once through the network in each view"


@pytest.mark.parametrize(("batch", "chunk"), [(64, 8), (36, 6), (64, 4), (64, 32)])
def test_the_chunks_of_the_two_views_mix_the_slices(batch: int, chunk: int) -> None:
    plan = plan_of(batch, chunk, Group())
    a, b = ([set(rows.tolist()) for rows, views in plan.passes if views == (view,)] for view in (0, 1))
    most = max(len(x & y) for x in a for y in b)
    assert most == max(chunk * chunk // batch, 1), "as few as can be share both chunks"


def test_a_chunk_must_divide_the_batch() -> None:
    with pytest.raises(MedclrError, match="chunk 5 must divide batch 12"):
        plan_of(12, 5, Group())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two would add up the sums of a large batch in another order than those of a chunk, which float32 shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradient(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("dtype", "chunk", "tolerance"),
    [(torch.float64, 2, 1e-12), (torch.float64, 4, 1e-12), (torch.float32, 4, 1e-6), (torch.float32, 6, 1e-6)],
)
def test_gradient_caching_is_exact_where_normalisation_does_not_see_the_batch(
    one_thread: None, dtype: torch.dtype, chunk: int, tolerance: float
) -> None:
    whole, parts = make_method("group", dtype), make_method("group", dtype)
    expected, found = take(whole, None, batch_of(B)), take(parts, chunk, batch_of(B))
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert torch.equal(found.facts.index, expected.facts.index)
    error = (gradient(parts) - gradient(whole)).norm() / gradient(whole).norm()
    assert error < tolerance, "plain float32 itself is 1.4e-6 away from float64 here"
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in parts.parameters())


def test_batch_norm_sees_one_view_of_a_chunk_and_its_statistics_move_once_a_chunk() -> None:
    method, chunk = make_method("batch"), 4
    by_hand, batch = deepcopy(method), batch_of(B)
    result = take(method, chunk, batch)
    plan = plan_of(B, chunk, Group())
    draws = Draws(VIEWS, B, seed=1, step=3)
    z = [torch.zeros(B, 5, dtype=torch.float64) for _ in range(2)]
    by_hand.train()
    for rows, (view,) in plan.passes:
        rows_ = torch.from_numpy(rows)
        z[view] = z[view].index_copy(0, rows_, by_hand(draws.view(batch.select(rows_), view, rows_).double()))
    loss, _ = by_hand.objective(z[0], z[1])
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(
        [p.grad for p in method.parameters()], [p.grad for p in by_hand.parameters()], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(list(method.buffers()), list(by_hand.buffers()), rtol=1e-12, atol=1e-12)
    counts = [int(b) for name, b in method.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [len(plan.passes)] * len(counts)
    assert all(m.track_running_stats for m in method.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_stop_in_the_middle_of_a_step_leaves_everything_as_it_was(chunk: int | None) -> None:
    whole, stop = make_method("batch"), Answers()
    take(whole, chunk, batch_of(B), stop)
    layers = 4 + 4  # convolutions, batch norms; linear layers and batch norms of the head
    assert stop.questions == (2 * 2 * B // chunk if chunk else 1 + 2 * layers), "in each pass; there and back"
    for number in (0, stop.questions // 2, stop.questions - 1):
        method = make_method("batch")
        before = deepcopy(method.state_dict())
        answers = Answers(number)
        with pytest.raises(GaveUp):
            take(method, chunk, batch_of(B), answers)
        assert answers.questions == number + 1
        torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
        take(method, chunk, batch_of(B))
        torch.testing.assert_close(method.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_signal_ends_a_step_between_two_bytecodes() -> None:
    method = make_method("batch")
    before = deepcopy(method.state_dict())
    forward = TinyEncoder.forward

    def slow(self: TinyEncoder, x: Tensor) -> Tensor:
        out = forward(self, x)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return out

    began = time.monotonic()
    with StopRequest(Group()) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyEncoder, "forward", slow)
        with pytest.raises(GaveUp):
            take(method, None, batch_of(B), stop)
        with pytest.raises(GaveUp):  # it has not forgotten
            take(method, None, batch_of(B), stop)
    assert time.monotonic() - began < 10
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_step_that_is_not_finite_changes_nothing(chunk: int | None) -> None:
    method = make_method("batch")
    before = deepcopy(method.state_dict())
    batch = batch_of(B)
    images = batch.images.clone()
    images[5] = float("nan")
    result = take(method, chunk, replace(batch, images=images))
    assert result.is_lost
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    assert not take(method, chunk, batch).is_lost
    assert any(not torch.equal(a, b) for a, b in zip(method.state_dict().values(), before.values(), strict=True))


def test_only_one_chunk_of_views_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    forward = Method.forward

    def watched(self: Method, x: Tensor) -> Tensor:
        largest.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Method, "forward", watched)
    take(make_method("batch"), 2, batch_of(B))
    assert max(largest) == 2
    assert len(largest) == 2 * 2 * B // 2, "both views, twice"


def test_the_methods_facts_are_those_of_all_its_slices_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Facts] = []
    objective = Method.objective

    def watched(self: Method, a: Tensor, b: Tensor, facts: Facts, group: Group) -> object:
        seen.append(facts)
        return objective(self, a, b, facts, group)

    monkeypatch.setattr(Method, "objective", watched)
    for chunk in (None, 4):
        take(make_method("batch"), chunk, batch_of(B))
    assert seen[0].patient.tolist() == seen[1].patient.tolist() == (torch.arange(B) // 4).tolist()
