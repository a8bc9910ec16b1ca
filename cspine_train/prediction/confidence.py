"""Calibration of a run's probabilities when training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import Cohort
from cspine_data.tools import count
from cspine_train.metrics.expected_dice import calibrated_logits, counted_overlap, expected_dice
from cspine_train.metrics.statistics import of_patients
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import Segmented, segment_all
from cspine_train.run.calibration import Calibration, plausible_counts

_log = logging.getLogger(__name__)
# Most cases that are predicted: more take longer and change little.
_MOST_CASES = 20


def calibrated_probabilities(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Return `calibration` for the record of a run, whose threshold and postprocessing are chosen already.

    The probabilities of all voxels of the validation volumes are calibrated together, on the grid of the source. The
    dictionary is empty without a labelled validation patient. `progress` is called with (patients done, patients, case
    id). Raises `RunError` if the store holds other data than at training.
    """
    record = loaded.record
    labelled = [case for case in record.validation if cohort.record(case, record.settings.variant).labels]
    cases = labelled[:_MOST_CASES]
    if not cases:
        return {}
    labelled_ml = max(_labelled_ml(cohort, case, record.settings.variant) for case in cases)
    counts = [_counts(one, labelled_ml) for one in segment_all(loaded, cohort, cases, progress)]
    calibration = calibration_of(counts, [record.patient(case) for case in cases], labelled_ml)
    _log.info(
        "probabilities calibrated on %s: expected Dice %.3f, true Dice %.3f",
        count(calibration.patients, "validation patient"), calibration.expected_dice, calibration.true_dice,
    )  # fmt: skip
    return {"calibration": calibration}


def calibration_of(counts: Sequence[NDArray[np.int64]], patients: Sequence[str], labelled_ml: float) -> Calibration:
    """Return the calibration on the `count_logits` of validation volumes, given the patient of each volume."""
    expected = []
    for own, patient in zip(counts, patients, strict=True):
        others = [one for one, other in zip(counts, patients, strict=True) if other != patient]
        expected.append(expected_dice(own, *calibrated_logits(np.sum(others or counts, axis=0))))
    true = [counted_overlap(one).dice for one in counts]
    means = [mean(of_patients(figures, patients).values()) for figures in (expected, true)]
    slope, intercept = calibrated_logits(np.sum(counts, axis=0))
    return Calibration(
        slope=slope, intercept=intercept, expected_dice=means[0], true_dice=means[1], patients=len(set(patients)),
        labelled_ml=labelled_ml,
    )  # fmt: skip


def _counts(segmented: Segmented, labelled_ml: float) -> NDArray[np.int64]:
    assert segmented.probability_xyz is not None  # noqa: S101
    return plausible_counts(
        segmented.probability_xyz[None], 1, segmented.found_xyz != 0, segmented.spacing_mm, labelled_ml,
        segmented.truth_xyz != 0, segmented.ignored_xyz,
    )  # fmt: skip


def _labelled_ml(cohort: Cohort, case: str, variant: str) -> float:
    stored = cohort.record(case, variant)
    label = cohort.label_xyz(case, variant)
    labelled = np.count_nonzero(label) - np.count_nonzero(np.isin(label, stored.ignored_values))
    return float(labelled * np.prod(stored.spacing_xyz_mm) / 1e3)
