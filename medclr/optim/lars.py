"""LARS (You et al., arXiv 1708.03888) as SimCLR's reference code applies it, and its parameter groups."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from medclr.errors import MedclrError

OptimizerName = Literal["lars", "adamw", "sgd"]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
"""Modules whose parameters are scales and shifts of a normalisation; _NormBase is every batch and instance norm."""

BUCKET = 2**19
"""Numbers of a run of tensors on the CPU: with gradient, momentum and decayed gradient 8 MB in float32."""


def param_groups(module: nn.Module, weight_decay: float, exclude: Iterable[nn.Module] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters of ``module`` into two groups for an optimizer.

    The first is decayed and adapted. The second is neither: biases, parameters of normalisation layers, and everything
    inside the modules of ``exclude`` (the reference excludes the supervised head). Decided by what a module is, never
    by a tensor's shape.
    """
    excluded = {id(parameter) for part in exclude for parameter in part.parameters()}
    decayed: dict[int, nn.Parameter] = {}
    plain: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_plain = id(parameter) in excluded or name == "bias" or isinstance(part, NORMS)
                (plain if is_plain else decayed)[id(parameter)] = parameter
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay, "adapt": True},
        {"params": list(plain.values()), "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling. For each tensor w with gradient g::

        g' = g + weight_decay * w
        trust = trust_coefficient * |w| / |g'|      where adapt, and neither norm is 0; else 1
        v = momentum * v + lr * trust * g'
        w = w - v

    The learning rate stands inside the momentum buffer, as in the reference: a change of it acts on new gradients only.

    Args:
        params: parameters or groups; a group may hold ``adapt`` and ``weight_decay`` (see ``param_groups``).
        lr: learning rate.
        momentum: factor of the momentum buffer.
        weight_decay: added to the gradient, for groups that do not say otherwise.
        trust_coefficient: step length as a fraction of the weight's norm.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _buckets(w for w in group["params"] if w.grad is not None):
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for w in weights:
            if not self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        buffers = [self.state[w]["momentum"] for w in weights]
        gradients = [w.grad for w in weights if w.grad is not None]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        torch._foreach_mul_(buffers, group["momentum"])
        if group["adapt"]:
            w_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (weights, gradients))  # [number of tensors]
            adapted = group["trust_coefficient"] * w_norm / g_norm
            trust = torch.where((w_norm > 0) & (g_norm > 0), adapted, 1)  # never a number of ours: no wait for a device
            torch._foreach_addcmul_(buffers, gradients, (trust * group["lr"]).unbind())
        else:
            torch._foreach_add_(buffers, gradients, alpha=group["lr"])
        torch._foreach_sub_(weights, buffers)


def _buckets(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one device and kind for one pass of multi-tensor operations each.

    A GPU takes as many as there are; on a CPU a run should stay in the cache from its first operation to its last.
    """
    bucket: list[Tensor] = []
    size = 0
    for w in weights:
        full = w.device.type == "cpu" and size + w.numel() > BUCKET
        if bucket and (full or (w.device, w.dtype) != (bucket[0].device, bucket[0].dtype)):
            yield bucket
            bucket, size = [], 0
        bucket.append(w)
        size += w.numel()
    if bucket:
        yield bucket


def build_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """An optimizer over ``param_groups``; ``momentum`` is for lars and sgd.

    Raises:
        MedclrError: the name is none of lars, adamw, sgd.
    """
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    raise MedclrError(f"optimizer: {name!r} is unknown; use lars, adamw or sgd")
