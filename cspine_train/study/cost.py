"""Estimate of a study's training time, from a few timed steps of each network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from cspine_data import Cohort
from cspine_train.data.datamodule import CohortSlices
from cspine_train.errors import CspineTrainError, ModelError
from cspine_train.models.build import build_model, sides_of
from cspine_train.run.label_classes import label_values, network_classes
from cspine_train.run.patient_split import split_of
from cspine_train.run.process_state import restored_process_state
from cspine_train.run.settings import RunSettings
from cspine_train.study.plan import Cell
from cspine_train.training.optimisers import precision_of
from cspine_train.training.step_check import check_steps

# The fastest step counts: the first one is slower, and other work on the machine makes steps slower.
_FEWEST_STEPS, _MOST_STEPS, _ENOUGH_S = 2, 4, 2.0


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a cell: training slices in an epoch, and seconds of all training steps without early stopping.

    `failure` says why the cell cannot be trained.
    """

    slices: int
    seconds: float
    failure: str | None = None


@restored_process_state()
def costs(
    cohort: Cohort,
    cells: Sequence[Cell],
    threads: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Cost]:
    """Estimate the cost of each cell on this machine: its minutes, or seconds per step, times steps, times epochs.

    Steps are timed once for each network, batch size and image size, with the threads of a cell's process, see
    `processes_here`. `progress` is called with (cells estimated, cells, cell name).
    """
    torch.set_num_threads(threads)
    # One network is in memory at a time; cells of a network follow each other in a plan.
    build = lru_cache(maxsize=1)(lambda *what: build_model(what[0], what[1], "none", *what[2:])[0])
    timed: dict[tuple[Any, ...], float] = {}
    found = {}
    for number, cell in enumerate(cells, start=1):
        try:
            found[cell.name] = _cost(cohort, cell.settings, build, timed)
        except CspineTrainError as error:
            found[cell.name] = Cost(0, 0.0, str(error))
        if progress:
            progress(number, len(cells), cell.name)
    return found


def _cost(
    cohort: Cohort, settings: RunSettings, build: Callable[..., nn.Module], timed: dict[tuple[Any, ...], float]
) -> Cost:
    split = split_of(cohort, settings)
    values = label_values(cohort, split, settings)
    what = settings.model, settings.encoder, settings.channels, network_classes(values)
    network = build(*what)
    data = CohortSlices(cohort, split, settings, 0, sides_of(network), values)
    shape = data.smallest_batch, settings.channels, *data.sizes.trained_hw[0]
    key = *what, settings.precision, shape
    if key not in timed:
        half = "bf16" in precision_of(settings.precision)
        check_steps(network, settings, data.sizes, data.smallest_batch, half)
        try:
            timed[key] = _step_seconds(network, shape, half)
        except RuntimeError as error:
            message = f"{settings.model} with encoder {settings.encoder!r}: a training step fails ({error})"
            raise ModelError(" ".join(message.split())) from None
    steps = len(data.train_dataloader())
    seconds = 60 * settings.minutes if settings.minutes else (settings.epochs or 0) * steps * timed[key]
    return Cost(steps * shape[0], seconds)


def _step_seconds(network: nn.Module, shape: tuple[int, ...], half: bool) -> float:
    """Return the time of a forward and a backward pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    seconds: list[float] = []
    while len(seconds) < _FEWEST_STEPS or (len(seconds) < _MOST_STEPS and sum(seconds) < _ENOUGH_S):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = network(images).float().mean()
        loss.backward()
        # Wait for the GPU.
        loss.item()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def duration(seconds: float) -> str:
    """Return a time as text: ``3 h 20 min``, ``4 min``."""
    minutes = max(1, round(seconds / 60))
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
