"""Means over patients, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

#: No interval, test or ranking over fewer patients. With five, the signed-rank test cannot reach 5 %, and an interval
#: of the mean is wider than the patients' own scatter; see docs/decisions/0033-minimum-number-of-patients.md.
FEWEST_PATIENTS = 6


@dataclass(frozen=True)
class MeanInterval:
    """A mean over patients.

    Attributes
    ----------
    mean : float
        The mean.
    low, high : float or None
        Its 95 % confidence interval, by Student's t; None of fewer than `FEWEST_PATIENTS` patients.
    """

    mean: float
    low: float | None
    high: float | None

    def less(self, figure: float) -> MeanInterval:
        """Return the mean's difference from a figure that is known exactly."""
        ends = (None if end is None else end - figure for end in (self.low, self.high))
        return MeanInterval(self.mean - figure, *ends)

    def between(self, digits: int = 4, sign: bool = False) -> str:
        """Return the interval: ``[0.9050, 0.9340]``, of a difference with its sign; nothing where there is none."""
        if self.low is None or self.high is None:
            return ""
        shown = f"{'+' if sign else ''}.{digits}f"
        return f"[{self.low:{shown}}, {self.high:{shown}}]"

    def told(self, digits: int = 4, sign: bool = False) -> str:
        """Return both: ``0.9210 [0.9050, 0.9340]``."""
        return f"{self.mean:{'+' if sign else ''}.{digits}f} {self.between(digits, sign)}".rstrip()


def mean_interval(figures: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)) -> MeanInterval:
    """Return the mean of figures, one a patient, and its interval.

    Parameters
    ----------
    figures : sequence of float
        At least one.
    within : tuple of float
        The smallest and the largest value that a figure can have. The interval ends there.
    """
    middle = mean(figures)
    if len(figures) < FEWEST_PATIENTS:
        return MeanInterval(middle, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(figures) - 1, 0.975)) * stdev(figures) / math.sqrt(len(figures))
    return MeanInterval(middle, max(middle - half, within[0]), min(middle + half, within[1]))


def too_few(patients: int, which: str = "") -> str | None:
    """Return why patients have no interval, test or ranking: there are fewer than `FEWEST_PATIENTS`; else None."""
    if patients >= FEWEST_PATIENTS:
        return None
    who = f"{patients} {which} patient".replace("  ", " ") + ("" if patients == 1 else "s")
    return f"{who}: too few for an interval, a test or a ranking, which take at least {FEWEST_PATIENTS}"
