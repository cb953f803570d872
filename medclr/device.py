"""Where a network calculates, and in which order its weights lie there."""

from typing import Any

import torch
from torch import nn

from medclr.errors import MedclrError


def device_of(name: str) -> torch.device:
    """The device of a setting; MedclrError if it cannot be used here."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MedclrError(f"device: {chosen!r} cannot be used here ({reason}); choose auto, cpu or cuda") from error
    return device


def put_on(model: nn.Module, device: torch.device) -> None:
    """Move a model, its weights in the order of memory in which depthwise convolutions are 1.5 times as fast."""
    order: Any = {"memory_format": torch.channels_last}  # which the types of nn.Module.to do not know
    model.to(device, **order)
