"""Memory allocator settings for training on a CPU.

By default glibc maps memory for every large tensor and unmaps it when the tensor is freed. The page faults take half
of the time of a training step. PyTorch manages a GPU's memory itself.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_large_blocks() -> bool:
    """Make glibc take large blocks from its heap and keep them; return False if the C library is another one.

    This cannot be undone, as glibc does not report its settings: commands call it, functions do not.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def release_free_blocks() -> None:
    """Return free memory to the system after `keep_large_blocks`; nothing happens with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
