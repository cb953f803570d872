"""MONAI's random transforms, which take one image at a time: applied by processes, the same whatever their number.

Processes and not threads, because most of what such a transform takes on a slice of a few hundred pixels is Python,
which runs in one thread at a time. They are forked, as the workers of torch's DataLoader are: they are there at once,
with MONAI imported, and a script of the user needs no ``if __name__ == "__main__"``.
"""

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np
import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor

from medclr.augment.transform import BatchTransform, Params, send
from medclr.errors import MedclrError

Images = NDArray[np.float32]
Seeds = NDArray[np.int64]


class MonaiTransforms(BatchTransform):
    """Some of MONAI's random transforms, one after the other, each image with seeds of its own.

    Args:
        entries: ``name`` and arguments of each.
        is_scaled: the images are in [0,1], and are clipped to it again.
    """

    takes_all: ClassVar[bool] = True

    def __init__(self, entries: Sequence[Mapping[str, Any]], *, is_scaled: bool) -> None:
        super().__init__(prob=1.0)
        self.is_scaled = is_scaled
        self.name = "+".join(entry["name"] for entry in entries)
        self._spec, self._count = json.dumps([dict(entry) for entry in entries]), len(entries)

    @property
    def key(self) -> str:
        """Its transforms."""
        return self.name

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``seed`` [n,k], one for each transform: each draws by itself whether it changes the image, and how."""
        return {"seed": torch.from_numpy(R.randint(0, 2**32, (n, self._count), dtype=np.int64))}

    def prepare(self, params: Params, images: Tensor) -> Params:
        """The seeds stay on the CPU."""
        return params

    def change(self, images: Tensor, prepared: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] -> the same."""
        made = torch.from_numpy(apply(self._spec, images.cpu().numpy(), prepared["seed"].numpy()))
        return send(made.clamp_(0, 1) if self.is_scaled else made, images.device)

    def describe(self, params: Params, i: int) -> str:
        """The names, and the first seed: what follows from it, they keep to themselves."""
        return f"{self.name} {int(params['seed'][i, 0]):08x}"


def apply(spec: str, images: Images, seeds: Seeds) -> Images:
    """The transforms of ``spec`` (JSON) on images [B,1,H,W] by seeds [B,k]: [B,1,H,W]."""
    count = min(workers(), len(images))
    return _pool(workers()).apply(spec, images, seeds) if count > 1 else apply_here(spec, images, seeds)


def workers() -> int:
    """Processes that this one may have, so that all processes of a run together have one a core; below 2 none."""
    if sys.platform != "linux":
        return 0
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def apply_here(spec: str, images: Images, seeds: Seeds) -> Images:
    """``apply`` by this process alone.

    Raises:
        MedclrError: what comes out is not an image of the same size.
    """
    out = np.empty_like(images)
    with _alike():
        for i, (image, row) in enumerate(zip(images, seeds, strict=True)):
            x: Any = torch.from_numpy(image.copy())
            for transform, seed in zip(build(spec), row, strict=True):
                x = transform.set_random_state(seed=int(seed))(x)
            if getattr(x, "shape", None) != image.shape:
                got = list(x.shape) if hasattr(x, "shape") else type(x).__name__
                raise MedclrError(f"views.chain: an image of {list(image.shape)} became {got}; views keep their size")
            out[i] = convert_to_tensor(x, dtype=torch.float32, track_meta=False).numpy()
    return out


@lru_cache(maxsize=16)
def build(spec: str) -> tuple[Any, ...]:
    """The transforms themselves, of one process."""
    module = importlib.import_module("monai.transforms")
    made = []
    for entry in json.loads(spec):
        name = entry.pop("name")
        made.append(getattr(module, name)(**entry))
    return tuple(made)


@contextlib.contextmanager
def _alike() -> Iterator[None]:
    """Plain tensors and one thread, as in every other process: sums are then the same to the last bit."""
    tracked, threads = get_track_meta(), torch.get_num_threads()
    set_track_meta(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        set_track_meta(tracked)
        torch.set_num_threads(threads)


class _Pool:
    """Processes that wait for images, each at the other end of a pipe; they end when it is closed."""

    def __init__(self, count: int) -> None:
        self.owner, self.count = os.getpid(), count
        self._ends: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("fork")
        for _ in range(count):
            ours, theirs = context.Pipe()
            self._ends.append(ours)
            process = context.Process(target=_serve, args=(theirs, tuple(self._ends)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def apply(self, spec: str, images: Images, seeds: Seeds) -> Images:
        """Every process takes its share, in order.

        Raises:
            MedclrError: one of them ended, or could not do it.
        """
        shares = np.linspace(0, len(images), self.count + 1).round().astype(int).tolist()
        try:
            for end, first, last in zip(self._ends, shares, shares[1:], strict=False):
                end.send((spec, images[first:last], seeds[first:last]))
            answers = [end.recv() for end in self._ends]
        except BaseException as error:  # nobody may find the answers to a question that was given up
            close()
            if isinstance(error, EOFError | OSError):
                raise MedclrError("a process that applies MONAI's transforms was killed; is memory short?") from error
            raise
        for answer in answers:
            if isinstance(answer, str):
                raise MedclrError(answer)
        return np.concatenate(answers)

    def close(self) -> None:
        """Let them end."""
        for end in self._ends:
            end.close()
        if os.getpid() == self.owner:
            for process in self._processes:
                process.join(timeout=10)


_pools: list[_Pool] = []
"""None or one."""


def _pool(count: int) -> _Pool:
    """The processes, started when they are first needed: after a fork, or for another number, new ones."""
    if _pools and (_pools[0].count != count or _pools[0].owner != os.getpid()):
        close()
    if not _pools:
        _pools.append(_Pool(count))
    return _pools[0]


@atexit.register
def close() -> None:
    """End the processes, if there are any."""
    while _pools:
        _pools.pop().close()


def _serve(end: Connection, others: tuple[Connection, ...]) -> None:
    """What a process does: answer until the pipe is closed. Ctrl-C and SIGTERM are for the one that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for other in others:  # held open here, they would keep the others from ending
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            spec, images, seeds = end.recv()
            try:
                answer: Images | str = apply_here(spec, images, seeds)
            except Exception as error:
                answer = (
                    str(error) if isinstance(error, MedclrError) else f"views.chain: {type(error).__name__}: {error}"
                )
            end.send(answer)
