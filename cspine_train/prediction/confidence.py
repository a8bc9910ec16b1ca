"""Calibration of a run's probabilities when training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import mean
from typing import Any

import numpy as np

from cspine_data import Cohort
from cspine_data.tools import count
from cspine_train.metrics.expected_dice import calibrated_logits, counted_overlap, expected_dice
from cspine_train.metrics.statistics import of_patients
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import segment_all
from cspine_train.run.calibration import Calibration

_log = logging.getLogger(__name__)
# Most cases that are predicted: more take longer and change little.
_MOST_CASES = 20


def calibrated_probabilities(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Return `calibration` for the record of a run, whose threshold and postprocessing are chosen already.

    The probabilities of all voxels of the validation volumes are calibrated together, on the grid of the source.
    `progress` is called with (patients done, patients, case id). Raises `RunError` if the store holds other data than
    at training.
    """
    cases = loaded.record.validation[:_MOST_CASES]
    counts = [one.logit_counts for one in segment_all(loaded, cohort, cases, progress) if one.logit_counts is not None]
    patients = [loaded.record.patient(case) for case in cases]
    expected = []
    for own, patient in zip(counts, patients, strict=True):
        others = [one for one, other in zip(counts, patients, strict=True) if other != patient]
        expected.append(expected_dice(own, *calibrated_logits(np.sum(others or counts, axis=0))))
    true = [counted_overlap(one).dice for one in counts]
    means = [mean(of_patients(figures, patients).values()) for figures in (expected, true)]
    slope, intercept = calibrated_logits(np.sum(counts, axis=0))
    _log.info(
        "probabilities calibrated on %s: expected Dice %.3f, true Dice %.3f",
        count(len(set(patients)), "validation patient"), *means,
    )  # fmt: skip
    calibration = Calibration(
        slope=slope, intercept=intercept, expected_dice=means[0], true_dice=means[1], patients=len(set(patients))
    )
    return {"calibration": calibration}
