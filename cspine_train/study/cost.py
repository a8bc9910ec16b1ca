"""Estimate of a study's training time, from a few timed steps of each network."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from cspine_data import Cohort
from cspine_train.errors import CspineTrainError, ModelError
from cspine_train.models.build import build_model
from cspine_train.planning.run_plan import epoch_time
from cspine_train.run.label_classes import label_values, network_classes
from cspine_train.run.patient_split import split_of
from cspine_train.run.process_state import restored_process_state
from cspine_train.run.settings import RunSettings
from cspine_train.study.plan import Cell
from cspine_train.training.step_check import StepCheck


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a cell: training slices in an epoch, and seconds of all epochs without early stopping.

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
    """Estimate the cost of each cell on this machine, see `epoch_time`.

    Steps are timed once for each network, batch size and image size, with the threads of a cell's process, see
    `processes_here`. `progress` is called with (cells estimated, cells, cell name).
    """
    torch.set_num_threads(threads)
    # One network is in memory at a time; cells of a network follow each other in a plan.
    build = lru_cache(maxsize=1)(lambda *what: build_model(what[0], what[1], "none", *what[2:])[0])
    timed: dict[Hashable, tuple[float, float]] = {}
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
    cohort: Cohort,
    settings: RunSettings,
    build: Callable[..., nn.Module],
    timed: dict[Hashable, tuple[float, float]],
) -> Cost:
    split = split_of(cohort, settings)
    values = label_values(cohort, split, settings)
    network = build(settings.model, settings.encoder, settings.channels, network_classes(values))
    check = StepCheck(network, cohort, split, values)
    data = check.data_of(settings)
    try:
        time = epoch_time(check, settings, data, timed)
    except RuntimeError as error:
        message = f"{settings.model} with encoder {settings.encoder!r}: a training step fails ({error})"
        raise ModelError(" ".join(message.split())) from None
    return Cost(time.steps * data.smallest_batch, time.seconds(settings))
