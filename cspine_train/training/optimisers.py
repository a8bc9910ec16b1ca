"""Optimiser, learning rate schedule and numeric precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cspine_train.run.settings import OptimisationSettings

_WARM_UP = 0.05
_WEIGHT_DECAY = 1e-2


def optimisation(network: nn.Module, settings: OptimisationSettings, steps: int) -> Any:
    """Return what `LightningModule.configure_optimizers` returns: the optimiser, and its schedule if it is per step.

    `steps` is the number of steps of the whole run, or of the schedule if that follows the clock.
    """
    rate = settings.learning_rate
    # A fused step unscales gradients itself, so that they cannot be clipped before it.
    fused = settings.clip_norm is None
    if settings.schedule == "plateau":
        return torch.optim.Adam(network.parameters(), lr=rate, fused=fused)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY, fused=fused)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if settings.schedule == "onecycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_share(step, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine_share(step: int, steps: int) -> float:
    """Return a step's learning rate as a share of the largest: a linear warm-up over 5 % of the steps, then a cosine.

    The cosine falls to zero, as in SGDR without restarts (Loshchilov and Hutter 2017).
    """
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def precision_of(name: str) -> Any:
    """Return Lightning's name of a precision: ``auto``, ``32`` or ``bf16``.

    ``auto`` is bf16 if the processor has it, else 32.
    """
    half = name == "bf16"
    if name == "auto":
        half = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else "avx512_bf16" in _cpu_information()
    return "bf16-mixed" if half else "32-true"


def _cpu_information() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
