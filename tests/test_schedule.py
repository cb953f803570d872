"""Learning rates against the reference's numbers."""

import itertools
import math

import pytest

from medclr.errors import MedclrError
from medclr.optim.schedule import scaled_lr, warmup_cosine


def test_scaling_rules() -> None:
    assert scaled_lr(0.3, 4096, "linear") == pytest.approx(4.8)  # the paper's batch and rate
    assert scaled_lr(0.075, 4096, "sqrt") == pytest.approx(4.8)  # chosen by the authors to agree there
    assert scaled_lr(0.1, 1024, "sqrt") == pytest.approx(3.2)
    assert scaled_lr(0.001, 512, "none") == 0.001
    with pytest.raises(MedclrError, match="'cubic' is unknown; use linear, sqrt or none"):
        scaled_lr(0.3, 256, "cubic")  # type: ignore[arg-type]


def test_warmup_then_cosine() -> None:
    factors = [warmup_cosine(step, total=110, warmup=10) for step in range(112)]
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert factors[60] == pytest.approx(0.5)  # half of the cosine
    assert factors[35] == pytest.approx((1 + math.sqrt(0.5)) / 2)  # a quarter of it
    assert factors[110:] == [0.0, 0.0]
    assert all(a > b for a, b in itertools.pairwise(factors[10:111]))


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, total=5, warmup=0) == 1.0


def test_run_that_is_all_warmup() -> None:
    assert [warmup_cosine(step, total=3, warmup=3) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 0])
