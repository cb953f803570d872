"""Training on several processes as if on one: gather with gradient, batch norm over the global batch.

Convention: each process has its own loss, the run's loss is their mean, and DistributedDataParallel averages the
gradients. So what crosses processes in the backward pass is summed here, and one process and many take the same step.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medclr.errors import MedclrError

Module = TypeVar("Module", bound=nn.Module)


class _AllGather(torch.autograd.Function):
    """[n,...] of each process -> [n*W,...]; backward: every process's gradient for my rows, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()  # [n*W,...]
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _AllReduce(torch.autograd.Function):
    """Sum over the processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


class _GlobalBatchNorm(_BatchNorm):
    """Batch norm over all processes, where torch has none: on the CPU (nn.SyncBatchNorm needs CUDA)."""

    def forward(self, input: Tensor) -> Tensor:
        """[n,C,...] -> the same shape."""
        shape = [1, -1] + [1] * (input.ndim - 2)
        running_mean, running_var = self.running_mean, self.running_var  # [C]
        assert running_mean is not None  # as every batch norm of medclr's networks
        assert running_var is not None
        assert self.momentum is not None
        if self.training:
            keeps = self.track_running_stats  # unless they are held still: medclr/step.py
            axes = [0, *range(2, input.ndim)]
            count = (
                input.numel() // input.shape[1] * dist.get_world_size()
            )  # values a channel; equal batches everywhere
            mean = _AllReduce.apply(input.sum(axes) / count)  # [C]
            centred = input - mean.view(shape)  # [n,C,...]
            var = _AllReduce.apply(centred.square().sum(axes) / count)  # [C]: a second pass, so that nothing cancels
            if keeps:
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                running_mean.lerp_(mean.detach(), self.momentum)
                running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        else:
            centred, var = input - running_mean.view(shape), running_var
        out: Tensor = centred * (var + self.eps).rsqrt().view(shape)  # [n,C,...]
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return out if self.bias is None else out + self.bias.view(shape)


def _meeting_place() -> dict[str, Any]:
    """Where the processes of one start of ``torchrun`` meet, as arguments of ``init_process_group``.

    torchrun keeps one store over its restarts (torch issue 135712), in which new processes would find the addresses of
    dead ones and wait for ever; so each start gets keys of its own. The count of restarts is that of one node's agent:
    with several nodes, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for them (docs/scaling.md).
    """
    here = os.environ
    if here.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or here.get("GROUP_WORLD_SIZE") != "1":
        return {}
    rank, world_size = int(here["RANK"]), int(here["WORLD_SIZE"])
    store = dist.TCPStore(here["MASTER_ADDR"], int(here["MASTER_PORT"]), world_size, is_master=False)  # type: ignore[attr-defined]
    start = f"medclr/{here['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(start, store), "rank": rank, "world_size": world_size}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Group:
    """The processes of one run. ``Group()`` is a single process, for which every method does nothing."""

    rank: int = 0
    """Number of this process, from 0."""

    world_size: int = 1
    """Number of processes."""

    control: Any = None
    """Torch's handle for small messages between CPUs, which never wait for a GPU."""

    is_ours: bool = False
    """Whether ``close`` ends torch's process group; one that the caller has made stays his."""

    @classmethod
    def from_environment(cls, device: str = "auto") -> "Group":
        """Join the group that ``torchrun`` describes in the environment, if it does.

        Args:
            device: gloo connects CPUs, nccl GPUs; auto: GPUs where there are some.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        on_gpu = torch.cuda.is_available() and device != "cpu"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if is_ours := not dist.is_initialized():
            dist.init_process_group("nccl" if on_gpu else "gloo", **_meeting_place())
        control = dist.new_group(backend="gloo") if on_gpu else None
        return cls(dist.get_rank(), dist.get_world_size(), control, is_ours)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def all_gather(self, x: Tensor) -> Tensor:
        """[n,...] of each process -> [n*W,...] in the order of ranks; carries gradient."""
        if self.world_size == 1:
            return x
        out: Tensor = _AllGather.apply(x)
        return out

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` over the processes, without gradient: for logs."""
        if self.world_size == 1:
            return x.detach()
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.world_size

    def highest(self, value: int) -> int:
        """The highest ``value`` of all processes: agreed by all, so that they act alike."""
        if self.world_size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        return int(agreed)

    def from_first(self, content: bytes, first: int = 0) -> bytes:
        """The ``content`` of rank ``first``, in every process."""
        if self.world_size == 1:
            return content
        is_mine = self.rank == first
        length = self.highest(len(content) if is_mine else 0)
        buffer = torch.empty(length, dtype=torch.uint8)
        if is_mine and length:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, first, group=self.control)
        return buffer.numpy().tobytes()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process refuses inside, all refuse at its end; nothing inside may wait for another process.

        Raises:
            MedclrError: that of the first process that had one.
        """
        said = None
        try:
            yield
        except MedclrError as error:
            if self.world_size == 1:
                raise
            said = str(error)
        before_end = self.highest(0 if said is None else self.world_size - self.rank)
        if before_end:
            raise MedclrError(self.from_first((said or "").encode(), self.world_size - before_end).decode())

    def replicate(self, module: nn.Module) -> nn.Module:
        """``module`` with the weights of rank 0 and gradients averaged over the processes. Call it, not its methods."""
        if self.world_size == 1:
            return module
        # Running statistics are equal everywhere, as batch norm is global; to copy them would cost time at each step.
        # torch 2.13 has another name for the option, and warns of the old one.
        names = signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {option: False}
        return nn.parallel.DistributedDataParallel(module, **options)

    def unsynchronised(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inside, backward passes through the ``replicate``d module add up gradients without averaging them yet."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    def sync_batch_norm(self, module: Module) -> Module:
        """``module`` with its batch norms taking their statistics over all processes; same tensors, same names."""
        if self.world_size == 1:
            return module
        if next(module.parameters()).is_cuda:
            converted: Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            return converted
        for part in list(module.modules()):
            if isinstance(part, _BatchNorm):
                part.__class__ = _GlobalBatchNorm  # keeps its tensors, changes its forward
        return module

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the group."""
        if self.is_ours:
            dist.destroy_process_group()
