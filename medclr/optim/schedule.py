"""The learning rate: how it grows with the batch, and how it runs over the training (arXiv 2002.05709, section 2.2)."""

import math
from typing import Literal

from medclr.errors import MedclrError

ScalingRule = Literal["linear", "sqrt", "none"]


def scaled_lr(base: float, batch: int, rule: ScalingRule) -> float:
    """The peak learning rate for a global ``batch`` of images (not views).

    'linear': base * batch / 256 (base 0.3 for large batches); 'sqrt': base * sqrt(batch) (base 0.075 for small ones);
    'none': base.

    Raises:
        MedclrError: the rule is none of these.
    """
    if rule == "linear":
        return base * batch / 256
    if rule == "sqrt":
        return base * math.sqrt(batch)
    if rule == "none":
        return base
    raise MedclrError(f"lr_scaling: {rule!r} is unknown; use linear, sqrt or none")


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor in [0,1] on the peak learning rate at ``step`` (from 0).

    Linear from 0 to 1 over ``warmup`` steps, then cosine to 0 at ``total`` and after it.
    """
    if step < warmup:
        return step / warmup
    if step >= total:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
