"""Keeping the C library from returning large blocks to the system after each use.

By default glibc maps every large tensor anew and unmaps it when it is freed; the page faults that this costs are half
of a training step on a CPU. A GPU's memory is managed by PyTorch and is not concerned.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_large_blocks() -> bool:
    """Tell glibc to take large blocks from its heap and keep them; return whether it was told.

    Where the C library is another one, nothing happens. It holds for the rest of the process, as glibc cannot be asked
    for what it was told before; so commands call it, and functions do not.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def release_free_blocks() -> None:
    """Give free memory back to the system after `keep_large_blocks`, where glibc is the C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
