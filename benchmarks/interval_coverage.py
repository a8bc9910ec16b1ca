"""How often 95 % confidence intervals of a mean over few patients hold the true mean, for three ways to compute them.

Patients are drawn from distributions like those of scores: Dice (skewed to the left), Dice of a model that fails in one
patient of ten, surface distances in mm (skewed to the right), and differences of two models (heavy tails).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from cspine_train.metrics.statistics import FEWEST_PATIENTS

COHORTS, RESAMPLES = 2000, 1999
PATIENTS = (3, 4, 5, 6, 7, 8, 10, 12, 14, 20, 30)
Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]


def dice(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return scores of mean 0.87 and standard deviation 0.05."""
    return rng.beta(40, 6, size)


def with_failures(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return scores of which one in ten is about 0.5."""
    return np.where(rng.random(size) < 0.1, rng.beta(3, 3, size), dice(rng, size))


#: What is drawn, and its true mean.
SCORES: dict[str, tuple[Draw, float]] = {
    "Dice": (dice, 40 / 46),
    "Dice, one failure in ten": (with_failures, 0.9 * 40 / 46 + 0.1 * 0.5),
    "distance": (lambda rng, size: rng.lognormal(0.7, 0.7, size), math.exp(0.7 + 0.7**2 / 2)),
    "difference": (lambda rng, size: 0.01 + 0.02 * rng.standard_t(4, size), 0.01),
}


def students(figures: NDArray[np.float64]) -> tuple[Any, Any]:
    """Return the ends of Student's interval for each row."""
    from scipy.special import stdtrit

    half = stdtrit(figures.shape[1] - 1, 0.975) * figures.std(1, ddof=1) / math.sqrt(figures.shape[1])
    return figures.mean(1) - half, figures.mean(1) + half


def bootstrapped(figures: NDArray[np.float64], method: Any) -> tuple[Any, Any]:
    """Return the ends of SciPy's bootstrap interval for each row."""
    found = bootstrap(
        (figures,), np.mean, axis=1, method=method, n_resamples=RESAMPLES, batch=50, rng=np.random.default_rng(0)
    ).confidence_interval
    return found.low, found.high


def main() -> None:
    """Print coverage in percent, and how wide Student's interval is."""
    # BCa warns of samples that do not vary.
    warnings.simplefilter("ignore")
    print("| scores | patients | percentile | BCa | Student's t | half width of t, in standard deviations |")
    print("|---|---|---|---|---|---|")
    for name, (draw, mean) in SCORES.items():
        for patients in PATIENTS:
            figures = draw(np.random.default_rng(patients), (COHORTS, patients))
            found = []
            for low, high in (bootstrapped(figures, "percentile"), bootstrapped(figures, "BCa"), students(figures)):
                found.append(f"{100 * np.mean((low <= mean) & (mean <= high)):.1f}")
            width = np.median((high - low) / 2 / figures.std(1, ddof=1))
            few = "" if patients >= FEWEST_PATIENTS else " (not shown)"
            print(f"| {name} | {patients}{few} | {' | '.join(found)} | {width:.2f} |", flush=True)


if __name__ == "__main__":
    main()
