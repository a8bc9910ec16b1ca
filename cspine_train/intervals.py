"""Means over patients, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean


@dataclass(frozen=True)
class MeanInterval:
    """A mean over patients.

    Attributes
    ----------
    mean : float
        The mean.
    low, high : float or None
        Its 95 % confidence interval, by the percentile bootstrap over patients (Efron 1979); None where there is one
        patient alone, of whom nothing is known about the next. Of fewer than ten it is too narrow.
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


def mean_interval(figures: Sequence[float]) -> MeanInterval:
    """Return the mean of figures, one a patient, and its interval; the same for the same figures each time.

    Parameters
    ----------
    figures : sequence of float
        At least one.
    """
    if len(figures) < 2:
        return MeanInterval(mean(figures), None, None)
    import numpy as np
    from scipy.stats import bootstrap

    # In batches: of ten thousand patients all resamples together are most of a gigabyte.
    batch = max(1, 2**20 // len(figures))
    found = bootstrap((figures,), np.mean, method="percentile", batch=batch, rng=np.random.default_rng(0))
    return MeanInterval(mean(figures), *map(float, found.confidence_interval))
