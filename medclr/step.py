"""One training step on a batch of any size, by any number of processes: its loss, and the gradients of the weights.

At once, or chunk by chunk with gradient caching (Gao et al., arXiv 2101.06983), which is exact: all views are embedded
without a graph; the loss and its gradient are taken on all embeddings; then each chunk is embedded again with a graph,
and fed its part of that gradient. The views are made again from (seed, step), not kept. So memory is that of one chunk
and of the embeddings, whatever the batch.

Batch norm takes its statistics over each pass through the network: over both views of the whole batch if there are no
chunks, else over one view of a chunk, the same in both passes; its running statistics move once a chunk. The chunks of
view a and those of view b are cut differently, so that images of one share the other as rarely as can be (never
with K >= C): else the statistics of a chunk would tell the network which view belongs to which (He et al., arXiv
1911.05722, section 3.3).

Letters: B slices of the batch, W processes, b = B/W of this process, C slices of a chunk over all processes,
K = B/C chunks, m = C/W, E components of an embedding, s side of a view.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from medclr.augment.views import Draws
from medclr.clock import Clock
from medclr.data.loader import Batch, Facts
from medclr.distributed import Group
from medclr.errors import MedclrError
from medclr.methods import PretrainingMethod
from medclr.stop import GaveUp, StopRequest

Rows = NDArray[np.int64]

ASKS = 32
"""At so many layers of the network, on the way there and on the way back, several processes ask each other in a step
without chunks whether to leave. Each time costs about 0.1 ms; a process alone asks itself at every layer."""


@dataclass(frozen=True)
class Plan:
    """Which rows of the global batch this process holds, and how they go through the network."""

    rows: Rows
    """[b], rows of the global batch: the slices of this process, in its own order."""

    passes: tuple[tuple[Rows, tuple[int, ...]], ...]
    """The numbers among ``rows`` of the slices that go through the network together, and the views (0, 1) of each."""

    @property
    def is_chunked(self) -> bool:
        """Whether gradients are cached."""
        return len(self.passes) > 1

    @property
    def pieces(self) -> list[Rows]:
        """What is read from the store for a step, in order: with chunks, everything once more for the second pass."""
        pieces = [rows for rows, _ in self.passes]
        return pieces * 2 if self.is_chunked else pieces


def plan_of(batch: int, chunk: int | None, group: Group) -> Plan:
    """Share a batch among processes such that every chunk holds the same slices whatever their number.

    Raises:
        MedclrError: it cannot be shared evenly.
    """
    world, rank = group.world_size, group.rank
    if batch % world:
        raise MedclrError(f"batch {batch} cannot be shared evenly by {world} processes")
    if chunk is None or chunk >= batch:
        b = batch // world
        return Plan(rank * b + np.arange(b), ((np.arange(b), (0, 1)),))
    if batch % chunk or chunk % world:
        raise MedclrError(f"chunk {chunk} must divide batch {batch}, and be shared evenly by {world} processes")
    k, m = batch // chunk, chunk // world
    # Slice u of chunk i has row i * C + u; a process has the same m values of u in each chunk. View b of it belongs to
    # chunk (i + u) mod K, so that a chunk of view b draws on as many chunks of view a as it can.
    u = np.arange(m)  # [m]: of this process
    i = np.arange(k)[:, None]  # [K,1]
    rows = i * chunk + rank * m + u  # [K,m]
    a = i * m + u  # [K,m], numbers among the rows
    b_chunks = (i - (rank * m + u)) % k * m + u  # [K,m]
    passes = [*((part, (0,)) for part in a), *((part, (1,)) for part in b_chunks)]
    return Plan(rows.reshape(-1), tuple(passes))


@dataclass(frozen=True)
class Result:
    """What a step found out."""

    loss: float
    """Of the global batch."""

    grad_norm: float
    """Euclidean norm of the gradient of all weights."""

    logs: Mapping[str, float]
    """What the method logs."""

    facts: Facts
    """The slices of this process."""

    is_lost: bool
    """Loss or gradient was not finite, so no weight has changed. An overflow of float16 does not count: the scale of
    the loss has been lowered, and training goes on."""


class Step:
    """Takes training steps with an optimizer.

    Args:
        method: network and objective, on its device.
        optimizer: of its parameters.
        plan: of the batch.
        group: the processes.
        autocast: type in which the network calculates where that is safe; None: its own.
        compiled: let torch.compile translate the network.
        clock: is told which part of the step begins.

    Attributes:
        scaler: keeps the gradients of float16 from vanishing; for other types it does nothing.
    """

    def __init__(
        self,
        method: PretrainingMethod,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        group: Group,
        autocast: torch.dtype | None = None,
        *,
        compiled: bool = False,
        clock: Clock | None = None,
    ) -> None:
        weight = next(method.parameters())
        self._device, self._dtype, self._autocast_dtype = weight.device, weight.dtype, autocast
        self._method, self._optimizer, self._plan, self._group = method, optimizer, plan, group
        self._clock = clock or Clock(self._device)
        self._asks_at_layers = self._device.type == "cpu" and not compiled  # a GPU's plain step takes seconds at most
        self._module: nn.Module = torch.compile(method) if compiled else method  # type: ignore[assignment]
        self._network = group.replicate(self._module)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=autocast is torch.float16)

    def __call__(self, batches: Iterator[Batch], draws: Draws, stop: StopRequest) -> Result:
        """Take the pieces of one batch from ``batches``, and one step.

        Args:
            batches: in the pieces of the plan.
            draws: of this step.
            stop: whether to leave before the weights change; asked between chunks, or else between layers.

        Raises:
            GaveUp: so; no weight and no running statistic has changed.
        """
        statistics = [buffer.clone() for buffer in self._method.buffers()]
        self._method.train()
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with stop.at_once():
                take = self._cached if self._plan.is_chunked else self._plain
                loss, logs, facts = take(batches, draws, stop)
        except GaveUp:
            self._restore(statistics)
            raise
        self._clock.to("optimizer")
        self.scaler.unscale_(self._optimizer)
        norm = get_total_norm([p.grad for p in self._method.parameters() if p.grad is not None])  # []
        both = torch.stack([self._group.mean(loss).double(), norm.double()])  # [2]: one wait for the device
        loss_value, norm_value = both.tolist()
        is_finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        has_overflown = self.scaler.is_enabled() and math.isfinite(loss_value) and self.scaler.get_scale() > 1
        if is_finite:
            self.scaler.step(self._optimizer)
        else:
            self._restore(statistics)
        self.scaler.update()
        self._clock.to("rest")
        means = {name: float(self._group.mean(value)) for name, value in logs.items()}
        return Result(loss_value, norm_value, means, facts, is_lost=not is_finite and not has_overflown)

    def _plain(
        self, batches: Iterator[Batch], draws: Draws, stop: StopRequest
    ) -> tuple[Tensor, Mapping[str, Tensor], Facts]:
        self._clock.to("data")
        batch = next(batches)
        inputs = self._inputs(batch, draws, *self._plan.passes[0])  # [2b,...] each
        stop.check()
        with self._asking(stop):
            with self._autocast():
                z = self._network(*inputs)  # [2b,E]
            za, zb = z.chunk(2)  # [b,E] each
            loss, logs = self._method.objective(za, zb, batch.to(self._device), self._group)
            self._clock.to("backward")
            self.scaler.scale(loss).backward()
        return loss.detach(), logs, batch

    @contextlib.contextmanager
    def _asking(self, stop: StopRequest) -> Iterator[None]:
        """Inside, ``stop`` is asked at the layers of the network: torch runs many of them in one call of its own."""

        def forward(layer: nn.Module, inputs: Any, output: Any) -> None:
            stop.check()
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda grad: stop.check())

        layers = [part for part in self._method.modules() if any(True for _ in part.parameters(recurse=False))]
        every = 1 if self._group.world_size == 1 else -(-len(layers) // ASKS)
        asked = layers[::every] if self._asks_at_layers else []
        handles = [layer.register_forward_hook(forward) for layer in asked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cached(
        self, batches: Iterator[Batch], draws: Draws, stop: StopRequest
    ) -> tuple[Tensor, Mapping[str, Tensor], Facts]:
        def piece() -> Batch:
            stop.check()
            self._clock.to("data")
            return next(batches)

        passes = self._plan.passes
        embeddings: list[Tensor] = []  # [m,E] of each pass
        known: list[Facts] = []
        with torch.no_grad(), _still_statistics(self._method), self._autocast():
            for rows, views in passes:
                batch = piece()
                embeddings.append(self._module(*self._inputs(batch, draws, rows, views)))
                if views == (0,):
                    known.append(batch.facts())
        z = embeddings[0].new_empty(2, len(self._plan.rows), *embeddings[0].shape[1:])  # [2,b,E]
        for (rows, (view,)), embedding in zip(passes, embeddings, strict=True):
            z[view, rows] = embedding
        z.requires_grad_()
        facts = Facts.cat(known)
        loss, logs = self._method.objective(z[0], z[1], facts.to(self._device), self._group)
        self._clock.to("backward")
        self.scaler.scale(loss).backward()
        assert z.grad is not None
        for number, (rows, views) in enumerate(passes):
            is_last = number == len(passes) - 1
            with contextlib.nullcontext() if is_last else self._group.unsynchronised(self._network):
                inputs = self._inputs(piece(), draws, rows, views)  # [m,...] each
                with self._autocast():
                    embedding = self._network(*inputs)  # [m,E]
                self._clock.to("backward")
                embedding.backward(z.grad[views[0], rows])
        return loss.detach(), logs, facts

    def _inputs(self, batch: Batch, draws: Draws, rows: Rows, views: tuple[int, ...]) -> list[Tensor]:
        """Views [len(views) * m,n,s,s] of a piece that holds the ``rows`` of this process, and what the method adds;
        n neighbouring slices are the channels.
        """
        self._clock.to("views")
        here = torch.from_numpy(self._plan.rows[rows])  # [m], rows of the global batch
        made = [draws.view(batch, view, here, self._device) for view in views]
        added = zip(*(self._method.inputs(batch, draws, view, here) for view in views), strict=True)
        others = [torch.cat(parts).to(self._device, self._dtype, non_blocking=True) for parts in added]
        inputs = [torch.cat(made).to(self._dtype, memory_format=torch.channels_last), *others]
        self._clock.to("forward")
        return inputs

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None)

    def _restore(self, statistics: Sequence[Tensor]) -> None:
        for buffer, before in zip(self._method.buffers(), statistics, strict=True):
            buffer.copy_(before)


@contextlib.contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm of a module in training leaves its running statistics as they are; what it computes is the same."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
