"""LARS (You et al., arXiv 1708.03888) as SimCLR's reference code applies it, and its parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from medclr.errors import MedclrError

OptimizerName = Literal["lars", "adamw", "sgd"]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
"""Modules whose parameters are scales and shifts of a normalisation; _NormBase is every batch and instance norm."""


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
            for w in group["params"]:
                if w.grad is None:
                    continue
                if not self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
                v = self.state[w]["momentum"]
                g = w.grad.add(w, alpha=group["weight_decay"]) if group["weight_decay"] else w.grad
                trust = torch.ones((), dtype=w.dtype, device=w.device)
                if group["adapt"]:
                    w_norm, g_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
                    adapted = group["trust_coefficient"] * w_norm / g_norm
                    trust = torch.where((w_norm > 0) & (g_norm > 0), adapted, trust)  # a tensor: no wait for the device
                v.mul_(group["momentum"]).addcmul_(g, trust, value=group["lr"])
                w.sub_(v)
        return loss


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
