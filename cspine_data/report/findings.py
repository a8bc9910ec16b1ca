"""Find the suspicious cases of a cohort, and order them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cspine_data.report.case_summary import CaseSummary, LabelSummary
from cspine_data.report.label_fit import LabelFit, similarity
from cspine_data.sources.duplicates import look_alikes
from cspine_data.volumes.cohort_labels import cohort_labels

#: Fewest cases that show what is usual.
FEWEST_CASES = 8
# Distance from the median, in robust standard deviations, above which a value is an outlier.
_OUTLIER = 5.0
# The median absolute deviation times this is the standard deviation of a normal distribution.
_TO_DEVIATION = 1.4826
# 26 real label maps fit by 2.4 or more, and gain at most 0.5 elsewhere. Displaced by 6 to 8 mm along y or z they gain
# 1.2 or more; those of other patients fit by 1.4 at most.
_POOR_FIT, _MOST_GAIN, _GOOD_FIT = 2.0, 1.0, 3.0
# In cohorts of 14, 12 and 60, each case is more like the others than its mirror images along y and z, by 0.07 or more.
_FLIP_MARGIN, _LEAST_SIMILARITY = 0.05, 0.4
# Strengths of findings that have none of their own: clear evidence comes before weak outliers.
_ONE_PATIENT, _DOUBT = 3.0, 2.0
_DIRECTIONS = ("left-right", "anterior-posterior", "inferior-superior")
_FLIPS = {
    "anterior-posterior": (1,),
    "inferior-superior": (2,),
    "anterior-posterior and inferior-superior": (1, 2),
}


@dataclass(frozen=True)
class Finding:
    """A sign that a case is faulty."""

    case: str
    problem: str
    strength: float
    """A value relative to its limit; 1 is at the limit."""
    kind: str = "case"
    """Decides the remedy: ``patient`` for two cases of one patient, ``file`` for a file that cannot be used, ``field``
    for a bias field, ``case`` for all others."""


@dataclass(frozen=True)
class Measure:
    """A number of each case that is compared within the cohort.

    `tolerance` is the smallest robust standard deviation, so that small differences in a uniform cohort do not count.
    """

    title: str
    unit: str
    of: Callable[[CaseSummary], float | None]
    tolerance: float
    logarithmic: bool = True
    only_low: bool = False
    kind: str = "case"

    def values(self, cases: Sequence[CaseSummary]) -> tuple[list[CaseSummary], NDArray[np.float64]]:
        """Return the cases that have a value, and their values."""
        found = [(case, value) for case in cases if (value := self.of(case)) is not None]
        if self.logarithmic:
            found = [(case, value) for case, value in found if value > 0]
        return [case for case, _ in found], np.array([value for _, value in found], dtype=np.float64)

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:,.0f} {self.unit}".rstrip() if value >= 1000 else f"{value:.3g} {self.unit}".rstrip()

    def distances(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distance of each value from the median; outliers exceed 1 or -1. 0 if there are too few cases."""
        if values.size < FEWEST_CASES:
            return np.zeros(values.size)
        centred = np.log(values) if self.logarithmic else values
        centred = centred - np.median(centred)
        deviation = max(_TO_DEVIATION * float(np.median(np.abs(centred))), self.tolerance)
        return np.asarray(np.minimum(centred, 0) if self.only_low else centred) / (_OUTLIER * deviation)


def _along(axis: int, attribute: str, case: CaseSummary) -> float:
    return float(getattr(case, attribute)[axis])


def measures() -> tuple[Measure, ...]:
    """Return the measures, in the order of the page."""
    grid = [
        Measure(f"{title}, {direction}", "mm", partial(_along, axis, attribute), 0.1)
        for title, attribute in (("field of view", "field_of_view_mm"), ("voxel size", "spacing_mm"))
        for axis, direction in enumerate(_DIRECTIONS)
    ]
    return (
        *grid,
        Measure("median tissue intensity", "", lambda case: case.intensity, 0.4),
        Measure("labelled volume", "ml", _of_label(lambda label: sum(label.volumes_ml.values())), 0.15),
        Measure("number of labels", "", _of_label(lambda label: len(label.volumes_ml)), 0.5, logarithmic=False),
        Measure("fit of the label map", "SD", _of_label(lambda label: label.fit.here), 0.6, False, only_low=True),
        Measure(
            "log bias field, standard deviation", "", lambda case: case.log_bias_deviation, 0.05, False, kind="field"
        ),
    )


def _of_label(value: Callable[[LabelSummary], float]) -> Callable[[CaseSummary], float | None]:
    return lambda case: value(case.label) if case.label else None


def find_outliers(cases: Sequence[CaseSummary]) -> tuple[Finding, ...]:
    """Return the findings in a cohort, the strongest first.

    Each label map is compared with its image. The order and the distances of its vertebrae are checked. Each case is
    compared with the others of its sequence, if there are eight or more.
    """
    found = [
        *_two_of_one_patient(cases), *_poor_fits(cases), *_suspicious_vertebrae(cases), *_doubts(cases),
        *_outlying(cases), *_flipped(cases),
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda finding: (-finding.strength, finding.case)))


def outliers_of(measure: Measure, cases: Sequence[CaseSummary]) -> Iterator[tuple[CaseSummary, float, Finding]]:
    """Iterate over the outliers of a measure, with value and finding; cases are compared within their sequence."""
    for group in _by_sequence(cases):
        having, values = measure.values(group)
        for case, value, distance in zip(having, values.tolist(), measure.distances(values).tolist(), strict=True):
            if abs(distance) > 1:
                median = measure.text(float(np.median(values)))
                problem = f"{measure.title} is {measure.text(value)}; the cohort's median is {median}"
                yield case, value, Finding(case.case, problem, abs(distance), measure.kind)


def _by_sequence(cases: Sequence[CaseSummary]) -> Iterable[list[CaseSummary]]:
    groups: dict[str | None, list[CaseSummary]] = defaultdict(list)
    for case in cases:
        groups[case.identity.sequence].append(case)
    return groups.values()


def _outlying(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    for measure in measures():
        yield from (finding for _, _, finding in outliers_of(measure, cases))


def _fits(fit: LabelFit) -> bool:
    return fit.here >= _POOR_FIT and fit.gain <= _MOST_GAIN


def _poor_fits(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    for case in cases:
        fit = case.label.fit if case.label else None
        if fit and not _fits(fit):
            strength = 1 + max(0.0, _POOR_FIT - fit.here) + max(0.0, fit.gain - _MOST_GAIN)
            yield Finding(case.case, _fit_problem(fit), strength)


def _suspicious_vertebrae(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    labels = cohort_labels([case.labels for case in cases])
    for case in cases:
        for problem in labels.problems(case.labels, case.label.instances) if case.label else ():
            yield Finding(case.case, problem, _DOUBT)


def _doubts(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    for case in cases:
        for doubt in case.doubts:
            yield Finding(case.case, doubt, _DOUBT, "field")


def _fit_problem(fit: LabelFit) -> str:
    size = math.hypot(*fit.displacement_mm)
    if fit.here + fit.gain < _GOOD_FIT:
        return "the label map does not fit its image, even if moved by up to 15 mm; does it belong to another volume?"
    return f"the label map fits its image better if moved by {size:.0f} mm; is it displaced, or is the volume flipped?"


def _flipped(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    """Compare the surroundings of each fitting label map with the mean of the others, as they are and flipped."""
    for group in _by_sequence(cases):
        yield from _flipped_in_group(group)


def _flipped_in_group(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    known = [(case, case.label.surroundings) for case in cases if case.label and _fits(case.label.fit)]
    if len(known) < FEWEST_CASES:
        return
    total = np.sum([around for _, around in known], axis=0)
    for case, around in known:
        others = (total - around) / (len(known) - 1)
        as_is = similarity(around, others)
        flipped = {name: similarity(np.flip(around, axes), others) for name, axes in _FLIPS.items()}
        name, best = max(flipped.items(), key=lambda item: item[1])
        if best > max(as_is + _FLIP_MARGIN, _LEAST_SIMILARITY):
            problem = (
                f"looks flipped along {name}: correlation with the cohort's mean {as_is:.2f}, {best:.2f} if flipped"
            )
            yield Finding(case.case, problem, 1 + 4 * (best - as_is))


def _two_of_one_patient(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    for pair in look_alikes(case.fingerprint for case in cases):
        for case, twin in ((pair.first, pair.second), (pair.second, pair.first)):
            problem = f"looks like the same patient as {twin} (correlation of their voxels {pair.correlation:.2f})"
            yield Finding(case, problem, _ONE_PATIENT, "patient")
