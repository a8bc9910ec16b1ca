"""How well probabilities are calibrated: the reliability diagram and the expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Names with a lower probability are uncertain.
CERTAIN = 0.9
#: Number of bins of equal width, as in Guo 2017.
BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """The predictions whose probabilities lie in one bin.

    Attributes
    ----------
    number : int
        Number of predictions, at least one.
    probability : float
        Their mean probability.
    accuracy : float
        Share of correct predictions.
    """

    number: int
    probability: float
    accuracy: float


def reliability_bins(probabilities: Sequence[float], correct: Sequence[bool]) -> tuple[ReliabilityBin | None, ...]:
    """Sort predictions into `BINS` bins by their probability; a bin without predictions is None.

    Parameters
    ----------
    probabilities : sequence of float
        Probability of each prediction, from 0 to 1. A bin includes its upper limit; the first one includes 0.
    correct : sequence of bool
        Whether each prediction is correct.
    """
    if len(probabilities) != len(correct):
        raise ValueError(f"{len(probabilities)} probabilities cannot belong to {len(correct)} predictions")
    limits = np.arange(1, BINS) / BINS
    own = np.searchsorted(limits, probabilities)
    numbers, sums, sums_correct = (
        np.bincount(own, weights, BINS) for weights in (None, probabilities, np.asarray(correct, float))
    )
    return tuple(
        ReliabilityBin(int(number), float(total / number), float(total_correct / number)) if number else None
        for number, total, total_correct in zip(numbers, sums, sums_correct, strict=True)
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin | None]) -> float:
    """Return the mean over predictions of the gap between mean probability and accuracy of their bin (Guo 2017).

    It is 0 without predictions.
    """
    used = [one for one in bins if one]
    predictions = sum(one.number for one in used)
    return sum(one.number * abs(one.probability - one.accuracy) for one in used) / max(1, predictions)
