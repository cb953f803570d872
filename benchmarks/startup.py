"""How long ``medclr --help`` and ``medclr index --help`` take, in fresh processes, and which heavy libraries they load.

    python benchmarks/startup.py [--runs 7]

Goal: at most 0.5 s each, and neither torch nor MONAI imported. Exits with 1 if a goal is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = (["--help"], ["index", "--help"])
GOAL_S = 0.5
HEAVY = ("torch", "monai")
MEDCLR = Path(sys.executable).with_name("medclr")


def seconds(words: list[str]) -> float:
    """Wall time of one run in a fresh process."""
    started = time.perf_counter()
    subprocess.run([MEDCLR, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def imported(words: list[str]) -> list[str]:
    """The heavy libraries that the command imports, by the interpreter's own account (-X importtime)."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    run = subprocess.run([MEDCLR, *words], check=True, capture_output=True, text=True, env=environment)
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    if "medclr" not in loaded:
        raise SystemExit(f"{MEDCLR} did not account for its imports")
    return [name for name in HEAVY if name in loaded]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=7, help="timed runs of each command, after one to warm the disk cache"
    )
    runs = parser.parse_args().runs
    if not MEDCLR.exists():
        raise SystemExit(f"{MEDCLR} is missing: install medclr into this environment")
    missed = False
    for words in COMMANDS:
        seconds(words)
        times = [seconds(words) for _ in range(runs)]
        median, heavy = statistics.median(times), imported(words)
        missed |= median > GOAL_S or bool(heavy)
        print(
            f"medclr {' '.join(words):<13} median {median:.3f} s, fastest {min(times):.3f} s of {runs} runs "
            f"(goal {GOAL_S} s); imports {' and '.join(heavy) or 'neither torch nor MONAI'}"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
