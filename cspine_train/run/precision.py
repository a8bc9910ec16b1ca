"""In which numbers a run computes: 16 bits where the processor is fast with them, else 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def precision_of(asked: str) -> Any:
    """Return how Lightning calls the arithmetic that a run asks for: ``auto``, ``32`` or ``bf16``."""
    if asked == "auto":
        on_gpu = torch.cuda.is_available()
        fast = torch.cuda.is_bf16_supported() if on_gpu else "avx512_bf16" in _cpu_flags()
        return "bf16-mixed" if fast else "32-true"
    return "bf16-mixed" if asked == "bf16" else "32-true"


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
