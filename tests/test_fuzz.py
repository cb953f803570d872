"""A short run of the fuzzer, and that it sees what goes wrong. The long one is ``make fuzz``."""

import os
import time
import warnings
from pathlib import Path

import numpy as np

from tests.fuzz import fuzz, report
from tests.mutants import mutant
from tests.originals import originals


def test_damaged_files_become_scans_or_are_refused() -> None:
    outcomes = fuzz(range(150), seed=3)
    failed = [outcome for outcome in outcomes if outcome.kind.startswith("FAIL")]
    assert not failed, f"see them with `python -m tests.fuzz --seed 3 --only NUMBER`: {failed[:5]}"
    assert sorted(outcome.number for outcome in outcomes) == list(range(150))
    assert {outcome.kind for outcome in outcomes} == {"scan", "refused"}
    assert {outcome.format for outcome in outcomes} == {original.format for original in originals()}


def faulty(path: Path) -> str:
    """A reader with a fault for each format; the others are sound."""
    kind = path.suffix
    if kind == ".png":
        raise KeyError("a dictionary's own")
    if kind == ".tiff":
        os.abort()
    if kind == ".jpeg":
        time.sleep(60)
    if kind == ".hdr":
        warnings.warn("something odd", stacklevel=1)
    if kind == ".nii":
        np.ones(150_000_000, np.uint8)
    return "scan"


def test_the_fuzzer_sees_each_kind_of_failure() -> None:
    formats = sorted({original.format for original in originals()})
    wanted = {
        "PNG": "FAIL KeyError",
        "TIFF": "FAIL died (-6)",
        "JPEG": "FAIL time",
        "NIfTI pair": "FAIL UserWarning",
        "NIfTI RGB .nii": "FAIL memory",
        "DICOM RLE": "scan",
    }
    numbers = [formats.index(name) for name in wanted]
    by_format = {outcome.format: outcome for outcome in fuzz(numbers, 0, road=faulty, limit_s=3, limit_mb=100)}
    seen = {name: by_format[name].kind for name in wanted}
    if mutant(originals(), 0, formats.index("NIfTI pair")).files[0][0].endswith(".gz"):
        wanted["NIfTI pair"] = "scan"
    assert seen == wanted
    table = report(list(by_format.values()))
    assert table.row_count == len(wanted) + 1


def test_a_mutant_is_the_same_each_time_and_is_none_of_the_others() -> None:
    pool = originals()
    first, again = (tuple(mutant(pool, 0, number) for number in range(100)) for _ in range(2))
    assert first == again
    assert len({made.files for made in first}) > 95
    assert all(made.files != sound.files for made in first[:20] for sound in pool if made.format == sound.format)
    assert mutant(pool, 1, 0) != first[0]
