"""How reliable probabilities are: the reliability diagram and the expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Names of a lower probability are uncertain.
CERTAIN = 0.9
#: Number of bins of equal width, as in Guo 2017.
BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers whose probabilities lie in one bin.

    Attributes
    ----------
    number : int
        Number of answers, at least one.
    probability : float
        Their mean probability.
    right : float
        Share of them that is right.
    """

    number: int
    probability: float
    right: float


def reliability_bins(probabilities: Sequence[float], right: Sequence[bool]) -> tuple[ReliabilityBin | None, ...]:
    """Sort answers into `BINS` bins by their probability; a bin without answers is None.

    Parameters
    ----------
    probabilities : sequence of float
        Probability of each answer, from 0 to 1. A bin includes its upper limit; the first one includes 0.
    right : sequence of bool
        Whether each answer is right.
    """
    if len(probabilities) != len(right):
        raise ValueError(f"{len(probabilities)} probabilities cannot belong to {len(right)} answers")
    limits = np.arange(1, BINS) / BINS
    own = np.searchsorted(limits, probabilities)
    numbers, sums, sums_right = (
        np.bincount(own, weights, BINS) for weights in (None, probabilities, np.asarray(right, float))
    )
    return tuple(
        ReliabilityBin(int(number), float(total / number), float(total_right / number)) if number else None
        for number, total, total_right in zip(numbers, sums, sums_right, strict=True)
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin | None]) -> float:
    """Return the mean over answers of the distance between probability and share right of their bin (Guo 2017).

    It is 0 without answers.
    """
    used = [one for one in bins if one]
    answers = sum(one.number for one in used)
    return sum(one.number * abs(one.probability - one.right) for one in used) / max(1, answers)
