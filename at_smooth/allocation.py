"""Where a CPU's tensors come from."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors give back, for the tensors of the next step.

    glibc hands each large block back to the system, which gives it out again page by page, zeroed: up to a third of the
    time of an attack on large batches. It holds for the whole process, and results are the same bits. Nothing is done
    where the environment says how memory is to come (``MALLOC_…``, ``GLIBC_TUNABLES``), nor without glibc.

    Returns:
        Whether it is so now.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
