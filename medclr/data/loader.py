"""Slice store -> batches: the order of the samples, the rows of each process, and reading ahead.

The order is a function of (seed, epoch) alone, so a run that is resumed at any step, or spread over another number of
processes, takes the same samples.

A store that fits in memory is read at random: from the second epoch on the system has it at hand. One that does not is
read shard by shard in random order, each from end to end and once an epoch, at the sequential speed of the disk; the
slices are shuffled within a window of shards, and the next window is read while one is trained on.

Shape letters: n slices of an epoch, B slices of a batch, S = size_px.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache
from threading import Event
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medclr.data.store import Store
from medclr.data.tables import StoredScan
from medclr.errors import MedclrError

READ_AHEAD = 3
"""Batches that are read, or lie ready, while the one before them is trained on: never more."""

READERS = 4
"""Threads that read them: a disk answers several questions at once faster than one after another."""


@dataclass(frozen=True)
class Facts:
    """What is known of the slices of a batch, besides their pixels."""

    index: Tensor
    """int64 [B], which slice of the store."""
    low: Tensor
    """float32 [B], 0.5 percentile of the scan, physical units."""
    high: Tensor
    """float32 [B], 99.5 percentile."""
    air: Tensor
    """float32 [B], what the padding holds."""
    content: Tensor
    """float32 [B,4], top, left, height and width in pixels of what is not padding."""
    modality: Tensor
    """int64 [B], index into ``modalities``."""
    scan: Tensor
    """int64 [B], row of the store's scans."""
    patient: Tensor
    """int64 [B], index into the store's patients."""
    slice_index: Tensor
    """int64 [B], d."""
    position: Tensor
    """float32 [B], d / (D - 1)."""
    label: Tensor
    """int64 [B], index into the store's labels; -1 = none."""
    group: Tensor
    """int64 [B], the same for volumes of one modality, plane and body part; below 0, and nobody else's, for a scan that
    is a single image."""
    modalities: tuple[str, ...]
    """Names, keys of ``medclr.scans.modality.MODALITIES``."""

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, rows: slice | Tensor) -> Self:
        """Some of its rows: a slice, or a tensor of row numbers or of truth values [B]."""
        return self._map(lambda tensor: tensor[rows])

    def facts(self) -> "Facts":
        """Without the pixels, if there are any."""
        return Facts(**{field.name: getattr(self, field.name) for field in fields(Facts)})

    @staticmethod
    def cat(parts: Sequence["Facts"]) -> "Facts":
        """Several, one behind the other."""
        columns: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(Facts)
            if field.name != "modalities"
        }
        return Facts(**columns, modalities=parts[0].modalities)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return type(self)(**values)


@dataclass(frozen=True)
class Batch(Facts):
    """Slices and what is known of them."""

    images: Tensor
    """float32 [B,1,S,S], physical units; [B,C,S,S] where neighbouring slices are channels."""


def load_facts(store: Store, indices: ArrayLike) -> Facts:
    """What a store knows of some slices, in the order asked for, without reading them."""
    return Facts(**_columns(store, np.asarray(indices, dtype=np.int64)))


def load_batch(store: Store, indices: ArrayLike, slices: int = 1) -> Batch:
    """Read slices of a store, in the order asked for.

    Args:
        store: where to read.
        indices: [B].
        slices: C, an odd number: each slice with its neighbours as channels, in order; beyond the first and the last
            slice of a scan that slice again.
    """
    indices = np.asarray(indices, dtype=np.int64)  # [B]
    if slices == 1:
        return Batch(**_columns(store, indices), images=torch.from_numpy(store.physical(indices))[:, None])
    scan = store.column("scan")  # [N], ascending
    first = np.searchsorted(scan, scan[indices])  # [B]
    last = np.searchsorted(scan, scan[indices], side="right") - 1  # [B]
    around = np.arange(slices) - slices // 2  # [C]
    wanted = np.clip(indices[:, None] + around, first[:, None], last[:, None])  # [B,C]
    size = store.info.size_px
    images = torch.from_numpy(store.physical(wanted.ravel())).view(len(indices), slices, size, size)  # [B,C,S,S]
    return Batch(**_columns(store, indices), images=images)


def _columns(store: Store, indices: NDArray[np.int64]) -> dict[str, Any]:
    """The fields of ``Facts``."""

    def column(name: str, kind: type[np.number[Any]]) -> Tensor:
        return torch.from_numpy(store.column(name)[indices].astype(kind))

    floats = {name: column(name, np.float32) for name in ("low", "high", "air", "position")}
    whole = {name: column(name, np.int64) for name in ("modality", "scan", "patient", "slice_index", "label")}
    box = [column(f"content_{name}", np.float32) for name in ("top", "left", "height", "width")]  # [B] each
    scans = store.scans
    groups = [_group(scans[row], row) for row in whole["scan"].tolist()]
    return {
        "index": torch.from_numpy(indices.copy()),
        "content": torch.stack(box, 1),
        "group": torch.tensor(groups, dtype=torch.int64),
        **floats,
        **whole,
        "modalities": store.info.modalities,
    }


def _group(scan: StoredScan, row: int) -> int:
    """``Facts.group`` of the slices of a scan, which is that row of its store."""
    return -1 - row if scan.depth == 1 else _number(scan.modality, scan.plane, scan.body_part)


@cache
def _number(*words: str) -> int:
    """At least 0, and of the words alone: the same in every process and every store; an unknown '' is a word too."""
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:8], "big") >> 1  # 63 bits: never equal


class Loader:
    """Shuffled batches of some slices of a store, this process's share of each.

    Args:
        store: where to read.
        indices: the slices to draw from, such as ``store.indices("train")``.
        batch_size: B of the global batch, over all processes.
        seed: of the order.
        rows: which rows [b] of each global batch are this process's; None: all.
        pieces: in which pieces, numbers among ``rows``, a batch is handed out; None: in one.
        slices_per_scan: an epoch takes at most so many slices of each scan, drawn anew for each epoch; None: all.
        window_bytes: the slices are shuffled within whole shards of so many bytes together, which should fit in memory
            twice; None: all of them at once.
        slices: C, neighbouring slices as channels of each image.
        pinned: keep the pixels where a GPU can fetch them by itself, without anyone waiting; needs a GPU.

    Raises:
        MedclrError: the batch is larger than what an epoch holds.
    """

    def __init__(
        self,
        store: Store,
        indices: ArrayLike,
        batch_size: int,
        seed: int,
        rows: NDArray[np.int64] | None = None,
        pieces: Sequence[NDArray[np.int64]] | None = None,
        slices_per_scan: int | None = None,
        window_bytes: int | None = None,
        slices: int = 1,
        *,
        pinned: bool = False,
    ) -> None:
        self.store = store
        self.indices = np.asarray(indices, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.slices_per_scan = slices_per_scan
        self._channels = slices
        if slices_per_scan is not None and slices_per_scan < 1:
            raise MedclrError(f"data.slices_per_scan {slices_per_scan} must be at least 1, or null for all")
        self._window_bytes = window_bytes
        self._pinned = pinned
        self._rows = np.arange(batch_size) if rows is None else rows  # [b]
        self._pieces = [np.arange(len(self._rows))] if pieces is None else pieces
        n_slices = len(self.order(0))
        self.steps_per_epoch = n_slices // batch_size
        """The last, partial batch of an epoch is dropped."""
        if self.steps_per_epoch == 0:
            raise MedclrError(
                f"batch {batch_size} is larger than the data: an epoch holds {n_slices} slices; lower batch"
            )

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The slices [n] of an epoch, in order."""
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = generator.permutation(self.indices)
        if self._window_bytes is not None:
            shuffled = shuffled[np.argsort(self._window_of(epoch, shuffled), kind="stable")]
        if self.slices_per_scan is None:
            return shuffled
        scan = self.store.column("scan")[shuffled]
        by_scan = np.argsort(scan, kind="stable")
        first = np.searchsorted(scan[by_scan], scan[by_scan])  # where the scan's slices begin
        place = np.empty_like(by_scan)
        place[by_scan] = np.arange(len(scan)) - first  # how many slices of its scan come before each
        return shuffled[place < self.slices_per_scan]

    def _window_of(self, epoch: int, slices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The window [n] in which each of the slices is read: the shards in random order, cut into pieces."""
        assert self._window_bytes is not None
        shard = self.store.column("shard")
        wanted = np.flatnonzero(np.bincount(shard[self.indices]))  # the shards that hold any of the slices
        shards = np.random.default_rng([self.seed, epoch, 1]).permutation(wanted)
        size = self.store.shard_bytes[shards]
        _, window = np.unique((size.cumsum() - size) // self._window_bytes, return_inverse=True)  # ascending, no gaps
        window_of_shard = np.zeros(len(self.store.info.shard_slices), dtype=np.int64)
        window_of_shard[shards] = window
        return np.asarray(window_of_shard[shard[slices]])

    def share(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """This process's slices [b] of a step of an epoch with that order."""
        return order[step * self.batch_size : (step + 1) * self.batch_size][self._rows]

    def epochs(self, step: int, epochs: int) -> Generator[Batch]:
        """The batches of all ``epochs``, piece by piece, from ``step`` of the first on; threads read ahead."""
        return self._read_ahead(range(step, epochs * self.steps_per_epoch))

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """The batches of an epoch from ``start_step`` on, piece by piece; threads read ahead."""
        first = epoch * self.steps_per_epoch
        return self._read_ahead(range(first + start_step, first + self.steps_per_epoch))

    def _read_ahead(self, steps: range) -> Generator[Batch]:
        """The batches of steps, counted over all epochs."""
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
        through = None if self._window_bytes is None else _ReadThrough(self.store, self._windows(steps))
        waiting: deque[Future[Batch]] = deque()
        try:
            for epoch, slices in self._epochs_of(steps):
                order = self.order(epoch)
                windows = None if through is None else self._window_of(epoch, order)
                for step in slices:
                    mine = self.share(order, step)
                    last = (step + 1) * self.batch_size - 1
                    ready = through.until(epoch, windows[last]) if through and windows is not None else None
                    for piece in self._pieces:
                        waiting.append(pool.submit(self._read, mine[piece], ready))
                        if len(waiting) > READ_AHEAD:
                            yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            if through is not None:
                through.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def _epochs_of(self, steps: range) -> Iterator[tuple[int, range]]:
        """Each epoch of the steps, and which of its own steps those are."""
        per_epoch = self.steps_per_epoch
        for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
            first = epoch * per_epoch
            yield epoch, range(max(steps.start - first, 0), min(steps.stop - first, per_epoch))

    def _windows(self, steps: range) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
        """(epoch, number) of each window that the steps visit, in order, and its shards."""
        shard = self.store.column("shard")
        for epoch, of_epoch in self._epochs_of(steps):
            rows = slice(of_epoch.start * self.batch_size, of_epoch.stop * self.batch_size)
            order = self.order(epoch)
            window = self._window_of(epoch, order)[rows]  # ascending
            order = order[rows]
            for number in range(window[0], window[-1] + 1):
                first, end = np.searchsorted(window, [number, number + 1])
                yield (epoch, number), np.unique(shard[order[first:end]])

    def _read(self, indices: NDArray[np.int64], ready: "Future[None] | None") -> Batch:
        if ready is not None:
            ready.result()
        batch = load_batch(self.store, indices, self._channels)
        return replace(batch, images=batch.images.pin_memory()) if self._pinned else batch


class _ReadThrough:
    """Reads whole shards, one window ahead of the batches, so that the system has their slices at hand."""

    def __init__(self, store: Store, windows: Iterator[tuple[tuple[int, int], NDArray[np.int64]]]) -> None:
        self._store, self._windows = store, windows
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead-shards")
        self._begun: deque[tuple[tuple[int, int], Future[None]]] = deque()  # the window in use, and the next one
        self._stop = Event()

    def until(self, epoch: int, number: int) -> Future[None]:
        """Done when that window, and so all before it, has been read; the one behind it is begun, too."""
        wanted = (epoch, int(number))
        while not self._begun or self._begun[-1][0] <= wanted:
            following = next(self._windows, None)
            if following is None:
                break
            self._begun.append((following[0], self._pool.submit(self._read, following[1])))
        while self._begun[0][0] < wanted:
            self._begun.popleft()
        return self._begun[0][1]

    def _read(self, shards: NDArray[np.int64]) -> None:
        for shard in shards.tolist():
            for _ in self._store.read_through(shard):
                if self._stop.is_set():
                    return

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
