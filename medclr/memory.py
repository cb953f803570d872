"""Memory of the training process on a CPU."""

import ctypes

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
