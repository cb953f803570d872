"""Memory of the training process, and of the machine."""

import ctypes
import os
import resource
import sys
from pathlib import Path

LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Where a container's limit stands, in /sys/fs/cgroup: version 2, version 1."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let the C library keep what torch frees at each step, and hand it out again at the next.

    By default glibc returns every large tensor to the kernel when it is freed, and each new one is mapped and zeroed
    page by page. Keeping them gained about 3 % with a ResNet-18 at 64 px (``benchmarks/training.py``, with and without
    ``--no-keep-freed-memory``). With another C library this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def machine_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the machine, or of the container if that may use less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in LIMITS:
        try:
            whole = min(whole, int((groups / limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return whole


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    try:  # of this program alone: what getrusage tells was inherited from the one that started it
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
