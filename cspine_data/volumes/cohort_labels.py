"""What label values mean in a cohort: levels, instances or neither, by their positions along the spine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cspine_data.errors import some_of
from cspine_data.volumes.geometry import Triple
from cspine_data.volumes.instances import (
    Instance,
    order_problems,
    ordered_levels,
    out_of_order,
    unordered_labels,
)
from cspine_data.volumes.levels import LEVEL_NAMES, SPINE, level_value, levels_text

# Share of cases that may contradict the order of levels: a few wrong label maps do not turn levels into instances.
_MOST_CONTRADICTING = 0.2
# Cervical neighbours are 13 to 20 mm apart in adults, lumbar ones 30 to 40 mm.
_CERVICAL_MM = 25.0
_MOST_NAMED = 3


@dataclass(frozen=True)
class LabelledCase:
    """The labels of a case.

    Attributes
    ----------
    case : str
        The case id.
    centroids_mm : dict
        Centroid of each label value, see `label_centroids_mm`.
    names : dict
        Names of label values, if the file has them.
    """

    case: str
    centroids_mm: Mapping[int, Triple] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, case: str, instances: Sequence[Instance], names: Mapping[int, str]) -> LabelledCase:
        """Return the labels of a case, given its instances."""
        return cls(case, {one.value: one.centroid_mm for one in instances}, names)

    @property
    def levels_mm(self) -> dict[int, Triple]:
        """Centroids of the values that may be levels, from head to feet: those that have no other name."""
        others = {value for value, name in self.names.items() if level_value(name) != value}
        return {value: self.centroids_mm[value] for value in SPINE if value in self.centroids_mm.keys() - others}


@dataclass(frozen=True)
class CohortLabels:
    """What the label values of a cohort mean.

    Attributes
    ----------
    levels : tuple of int
        The values that are levels, from head to feet.
    unordered : tuple of int
        Three values that are instances, see `unordered_labels`; empty if there are levels.
    contradicting : tuple of str
        Ids of the cases that contradict the order of the levels.
    text : str
        The same as one line for the user; empty if there are too few values to tell.
    """

    levels: tuple[int, ...] = ()
    unordered: tuple[int, ...] = ()
    contradicting: tuple[str, ...] = ()
    text: str = ""

    def problems(self, case: LabelledCase, instances: Sequence[Instance]) -> list[str]:
        """Return the problems of the vertebrae of a case: wrong order, gaps, unusual distances, fragments."""
        if self.unordered:
            return order_problems(instances)
        # A single value that is no level of the cohort may be any structure.
        alone = len(case.levels_mm) == 1 and not case.levels_mm.keys() <= set(self.levels)
        heights = case.levels_mm if self.levels and not alone else {}
        wrong = out_of_order(heights)
        # In a wrong order, distances mean nothing.
        if len(wrong) > 1 and not out_of_order(heights, SPINE[::-1]):
            return [f"{levels_text(heights)} are in reverse order: is the volume or its label map upside down?"]
        if wrong:
            return [_order_problem(one, other, heights) for one, other in wrong[:_MOST_NAMED]]
        of_value = {one.value: one for one in instances}
        return order_problems([of_value[value] for value in heights], levels=True)


def cohort_labels(cases: Sequence[LabelledCase]) -> CohortLabels:
    """Return what the label values of a cohort mean.

    Values are levels if each is clearly above the next in all cases, or in all but a few. Positions alone cannot
    distinguish C1, C2, C3, ... from other vertebrae that are numbered 1, 2, 3, ... from head to feet. The text says
    which levels are assumed.
    """
    # A single value has no order.
    labelled = [case for case in cases if len(case.levels_mm) > 1]
    contradicting = tuple(case.case for case in labelled if out_of_order(case.levels_mm))
    if len(contradicting) <= _MOST_CONTRADICTING * len(labelled):
        agreeing = [case for case in labelled if case.case not in contradicting]
        levels = ordered_levels(case.levels_mm for case in agreeing)
        if levels:
            text = _levels_text(levels, agreeing, contradicting)
            return CohortLabels(levels, contradicting=contradicting, text=text)
    unordered = unordered_labels(case.centroids_mm for case in cases)
    if unordered:
        first, second, _ = unordered
        text = (
            f"label {first} is above label {second} in some cases and below it in others: label values are instances, "
            "not levels; order and name them with cspine-data relabel"
        )
        return CohortLabels(unordered=unordered, text=text)
    return CohortLabels(text=_other_text(cases))


def _order_problem(one: int, other: int, centroids: Mapping[int, Triple]) -> str:
    above_mm = centroids[one][2] - centroids[other][2]
    first, second = LEVEL_NAMES[one], LEVEL_NAMES[other]
    if above_mm < 0:
        return f"{second} is above {first}: are label values {one} and {other} swapped?"
    return f"{first} is only {above_mm:.0f} mm above {second}: are they levels of vertebrae?"


def _levels_text(levels: Sequence[int], cases: Sequence[LabelledCase], contradicting: Sequence[str]) -> str:
    span = f"levels {LEVEL_NAMES[levels[0]]} to {LEVEL_NAMES[levels[-1]]}"
    own = [tuple(case.levels_mm) for case in cases]
    if all(case.levels_mm.keys() <= case.names.keys() for case in cases):
        text = f"labels are {span}, by their names"
    else:
        text = f"label values {levels[0]} to {levels[-1]} are read as {span}"
        far = _distance_text(cases)
        if far or all(values == tuple(range(1, len(values) + 1)) for values in own):
            text += f"{far}; if they are other vertebrae, name them with cspine-data relabel"
    if contradicting:
        text += f"; {some_of(contradicting)} contradict this order: correct them, or training will use no levels"
    return text


def _distance_text(cases: Sequence[LabelledCase]) -> str:
    """Return a remark on cervical levels that are too far apart; empty if they are not."""
    necks = [[mm for value, mm in case.levels_mm.items() if LEVEL_NAMES[value][0] == "C"] for case in cases]
    distances = [np.linalg.norm(np.subtract(one, other)) for neck in necks for one, other in pairwise(neck)]
    distance = float(np.median(distances)) if distances else 0.0
    return f", but they are {distance:.0f} mm apart, too far for a neck" if distance > _CERVICAL_MM else ""


def _other_text(cases: Sequence[LabelledCase]) -> str:
    values = sorted({value for case in cases for value in case.centroids_mm})
    if len(values) < 3:
        return ""
    several = [case.levels_mm for case in cases if len(case.levels_mm) > 1]
    if several and not any(out_of_order(one, sorted(one, reverse=True)) for one in several):
        return "label values are numbered from feet to head, so they are not levels; name them with cspine-data relabel"
    return f"by their positions, label values {some_of(values)} are neither levels nor instances of vertebrae"
