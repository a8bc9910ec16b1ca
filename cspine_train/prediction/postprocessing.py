"""Postprocessing of predictions, chosen on the validation patients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

from cspine_data import Cohort
from cspine_train.metrics.components import tidied
from cspine_train.metrics.overlap import overlap
from cspine_train.metrics.statistics import of_patients
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import segment_all

_log = logging.getLogger(__name__)
_NOTHING: tuple[int | None, bool] = (None, False)


def chosen_postprocessing(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Return a run's postprocessing: the record's `kept_components` and `filled_holes`.

    It is the combination of the requested steps with the highest mean Dice of the validation patients, on whole
    volumes; none if no step improves it. `progress` is called with (patients done, patients, case id). Raises
    `RunError` if the store holds other data than at training.
    """
    settings = loaded.record.settings
    most = [None, *([settings.largest_components] if settings.largest_components else [])]
    ways = [(one, fill) for one in most for fill in ([False, True] if settings.fill_holes else [False])]
    untouched = loaded.record.model_copy(update={"kept_components": None, "filled_holes": False})
    dice: dict[tuple[int | None, bool], list[float]] = {way: [] for way in ways}
    for segmented in segment_all(replace(loaded, record=untouched), cohort, loaded.record.validation, progress):
        found, truth = segmented.found_xyz != 0, segmented.truth_xyz != 0
        for way in ways:
            # Components and holes include ignored voxels.
            dice[way].append(overlap(segmented.scored(tidied(found, *way)), truth).dice)
    patients = [loaded.record.patient(case) for case in loaded.record.validation]
    means = {way: mean(of_patients(figures, patients).values()) for way, figures in dice.items()}
    # Among equals, the first does least.
    best = max(ways, key=means.__getitem__)
    for way in ways[1:]:
        text = f"{_description(*way)}: mean validation Dice on whole volumes {means[way] - means[_NOTHING]:+.4f}"
        _log.info("%s%s", text, ", applied" if way == best else "")
    return {"kept_components": best[0], "filled_holes": best[1]}


def _description(most: int | None, fill: bool) -> str:
    parts = [f"{most} largest components"] if most else []
    return " and ".join([*parts, *(["holes filled"] if fill else [])])
