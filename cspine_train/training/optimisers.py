"""How a network's weights move: optimiser, rate, and the average of weights that a run may keep."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cspine_train.run.settings import RunSettings

_WARM_UP = 0.05
_WEIGHT_DECAY = 1e-2


def optimisation(network: nn.Module, settings: RunSettings, steps: int) -> Any:
    """Return the optimiser and, where the rate moves by steps, its schedule, as Lightning takes them.

    Parameters
    ----------
    network : Module
        What is trained.
    settings : RunSettings
        What was asked.
    steps : int
        Of the whole run.
    """
    rate = settings.learning_rate
    # A fused step scales gradients itself, out of reach of whoever would shorten them.
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
    """Return which share of the largest rate a step has: it rises over the first 20th, then falls as a cosine does.

    The fall is SGDR's without restarts (Loshchilov and Hutter 2017), to zero.
    """
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def averaged(network: nn.Module, kept: float) -> AveragedModel:
    """Return a running average of a network's weights and statistics (Polyak and Juditsky 1992).

    Parameters
    ----------
    network : Module
        Copied; `update_parameters` takes its weights in.
    kept : float
        Share of the average that a step leaves as it is. Less in the beginning, or the average would be of weights
        that were drawn at random.
    """

    def take_in(averages: Any, values: Any, steps_done: Any) -> None:
        share = 1 - min(kept, (1 + float(steps_done)) / (10 + float(steps_done)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, share)
            else:
                average.copy_(value)

    average = AveragedModel(network, multi_avg_fn=take_in, use_buffers=True)
    # Or several processes would exchange gradients that it never has.
    return average.requires_grad_(False)
