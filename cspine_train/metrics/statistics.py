"""Means over patients with confidence intervals, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from cspine_data.tools import count

#: No interval, test or ranking over fewer patients. With five, the signed-rank test cannot reach 5 %, and an interval
#: of the mean is wider than the patients' own scatter; see docs/decisions/0033-minimum-number-of-patients.md.
FEWEST_PATIENTS = 6
# SciPy's limit for its exact test too: above it, the normal approximation is as good.
_MOST_EXACT = 50


@dataclass(frozen=True)
class MeanInterval:
    """A mean over patients.

    Attributes
    ----------
    mean : float
        The mean.
    low, high : float or None
        Its 95 % confidence interval (Student's t); None for fewer than `FEWEST_PATIENTS` patients.
    """

    mean: float
    low: float | None
    high: float | None

    def less(self, figure: float) -> MeanInterval:
        """Subtract an exact figure from mean and interval."""
        ends = (None if end is None else end - figure for end in (self.low, self.high))
        return MeanInterval(self.mean - figure, *ends)

    def between(self, digits: int = 4, sign: bool = False) -> str:
        """Return the interval as text, ``[0.9050, 0.9340]``, with signs for a difference; empty if there is none."""
        if self.low is None or self.high is None:
            return ""
        shown = f"{'+' if sign else ''}.{digits}f"
        return f"[{self.low:{shown}}, {self.high:{shown}}]"

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """Return mean and interval as text: ``0.9210 [0.9050, 0.9340]``."""
        return f"{self.mean:{'+' if sign else ''}.{digits}f} {self.between(digits, sign)}".rstrip()


def mean_interval(figures: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)) -> MeanInterval:
    """Return the mean of figures, one a patient, and its confidence interval.

    Parameters
    ----------
    figures : sequence of float
        At least one.
    within : tuple of float
        Smallest and largest possible figure. The interval ends there.
    """
    middle = mean(figures)
    if len(figures) < FEWEST_PATIENTS:
        return MeanInterval(middle, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(figures) - 1, 0.975)) * stdev(figures) / math.sqrt(len(figures))
    return MeanInterval(middle, max(middle - half, within[0]), min(middle + half, within[1]))


def of_patients(figures: Sequence[float], patients: Sequence[str]) -> dict[str, float]:
    """Return the mean figure of each patient over its cases, in order of the first.

    Parameters
    ----------
    figures : sequence of float
        A figure of each case.
    patients : sequence of str
        The patient of each case.
    """
    by_patient: dict[str, list[float]] = {}
    for patient, figure in zip(patients, figures, strict=True):
        by_patient.setdefault(patient, []).append(figure)
    return {patient: mean(of_cases) for patient, of_cases in by_patient.items()}


def too_few(patients: int, which: str = "") -> str | None:
    """Return a note where there are fewer than `FEWEST_PATIENTS` patients; else None."""
    if patients >= FEWEST_PATIENTS:
        return None
    who = count(patients, f"{which} patient".lstrip())
    return f"{who}: too few for an interval, a test or a ranking, which take at least {FEWEST_PATIENTS}"


def paired_differences(figures: Iterable[float], others: Iterable[float]) -> list[float]:
    """Return figures minus others, pair by pair, rounded to the six digits that figures are recorded with.

    Without rounding, equal differences would differ by floating-point error and would not be tied in the test.
    """
    return [round(figure - other, 6) for figure, other in zip(figures, others, strict=True)]


def signed_rank_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test (1945); None for fewer than `FEWEST_PATIENTS`.

    Zero differences are left out; p is 1 if all are zero. Up to 50 differences the test is exact, with ties too:
    SciPy's is not, see docs/decisions/0043-exact-signed-ranks.md.
    """
    if len(differences) < FEWEST_PATIENTS:
        return None
    nonzero = [difference for difference in differences if difference]
    if not nonzero:
        return 1.0
    if len(nonzero) > _MOST_EXACT:
        from scipy.stats import wilcoxon

        return float(wilcoxon(nonzero, method="asymptotic").pvalue)
    return _exact_signed_rank_p(nonzero)


def _exact_signed_rank_p(differences: Sequence[float]) -> float:
    """Return the share of all sign patterns whose rank sum is at least as extreme."""
    import numpy as np
    from scipy.stats import rankdata

    # Ranks of ties are halves: twice the ranks are whole numbers.
    ranks = np.rint(2 * rankdata(np.abs(differences))).astype(int)
    share = np.zeros(ranks.sum() + 1)
    share[0] = 1.0
    for rank in ranks:
        share /= 2
        share[rank:] += share[:-rank].copy()
    positive = int(ranks[np.asarray(differences) > 0].sum())
    return min(1.0, 2 * float(min(share[: positive + 1].sum(), share[positive:].sum())))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p values for multiple tests, in the given order (Holm 1979); None, an absent test, stays None."""
    corrected: list[float | None] = [None] * len(p_values)
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    highest = 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = highest
    return corrected
