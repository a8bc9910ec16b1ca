"""What is done to a prediction afterwards, if it does the validation patients good."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

from cspine_data import Cohort
from cspine_train.metrics.components import tidied
from cspine_train.metrics.overlap import overlap
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import segment_all

_log = logging.getLogger(__name__)
_NOTHING: tuple[int | None, bool] = (None, False)


def chosen_postprocessing(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Return what a run is to do with its predictions: the record's `kept_components` and `filled_holes`.

    Of what the settings ask for, alone and together, that which gives the validation patients the highest mean Dice on
    whole volumes; nothing where nothing is better for it.

    Parameters
    ----------
    loaded : LoadedRun
        A trained run.
    cohort : Cohort
        The store that it was trained on.
    progress : callable, optional
        Called with (patients done, patients, case id).

    Raises
    ------
    RunError
        If the store holds other data than the run was trained on.
    CspineDataError
        If the store cannot be used.
    """
    settings = loaded.record.settings
    most = [None, *([settings.largest_components] if settings.largest_components else [])]
    ways = [(one, fill) for one in most for fill in ([False, True] if settings.fill_holes else [False])]
    untouched = loaded.record.model_copy(update={"kept_components": None, "filled_holes": False})
    dice: dict[tuple[int | None, bool], list[float]] = {way: [] for way in ways}
    for segmented in segment_all(replace(loaded, record=untouched), cohort, loaded.record.validation, progress):
        found, truth = segmented.found_xyz != 0, segmented.truth_xyz != 0
        for way in ways:
            # Components and holes are those of the whole prediction, whatever of it counts.
            dice[way].append(overlap(segmented.scored(tidied(found, *way)), truth).dice)
    means = {way: mean(figures) for way, figures in dice.items()}
    # The first of equals is what does least.
    best = max(ways, key=means.__getitem__)
    for way in ways[1:]:
        told = f"{_told(*way)}: mean validation Dice on whole volumes {means[way] - means[_NOTHING]:+.4f}"
        _log.info("%s%s", told, ", so it is done" if way == best else "")
    return {"kept_components": best[0], "filled_holes": best[1]}


def _told(most: int | None, fill: bool) -> str:
    parts = [f"the {most} largest components alone"] if most else []
    return " and ".join([*parts, *(["holes filled"] if fill else [])])
