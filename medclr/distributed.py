"""Training on several processes as if on one: gather with gradient, batch norm over the global batch.

Convention: each process has its own loss, the run's loss is their mean, and DistributedDataParallel averages the
gradients. So what crosses processes in the backward pass is summed here, and one process and many take the same step.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
            axes = [0, *range(2, input.ndim)]
            count = (
                input.numel() // input.shape[1] * dist.get_world_size()
            )  # values a channel; equal batches everywhere
            mean = _AllReduce.apply(input.sum(axes) / count)  # [C]
            centred = input - mean.view(shape)  # [n,C,...]
            var = _AllReduce.apply(centred.square().sum(axes) / count)  # [C]: a second pass, so that nothing cancels
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            running_mean.lerp_(mean.detach(), self.momentum)
            running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        else:
            centred, var = input - running_mean.view(shape), running_var
        out: Tensor = centred * (var + self.eps).rsqrt().view(shape)  # [n,C,...]
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return out if self.bias is None else out + self.bias.view(shape)


@dataclass(frozen=True)
class Group:
    """The processes of one run. ``Group()`` is a single process, for which every method does nothing."""

    rank: int = 0
    """Number of this process, from 0."""

    world_size: int = 1
    """Number of processes."""

    @classmethod
    def from_environment(cls) -> "Group":
        """Join the group that ``torchrun`` describes in the environment (nccl on GPUs, else gloo), if it does."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

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

    def replicate(self, module: nn.Module) -> nn.Module:
        """``module`` with the weights of rank 0 and gradients averaged over the processes. Call it, not its methods."""
        if self.world_size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module)

    def sync_batch_norm(self, module: nn.Module) -> nn.Module:
        """``module`` with its batch norms taking their statistics over all processes; same tensors, same names."""
        if self.world_size == 1:
            return module
        if next(module.parameters()).is_cuda:
            converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            return converted
        for part in list(module.modules()):
            if isinstance(part, _BatchNorm):
                part.__class__ = _GlobalBatchNorm  # keeps its tensors, changes its forward
        return module

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1:
            dist.destroy_process_group()
