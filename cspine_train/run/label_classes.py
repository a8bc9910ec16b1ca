"""Label values of a network's classes, and conversion between label values and class numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import IGNORE_INDEX, Cohort, Split
from cspine_train.errors import RunError
from cspine_train.run.settings import DataSettings

#: Class numbers are bytes: 0 is unlabelled, and the last number is for ignored voxels.
MOST_LABELS = IGNORE_INDEX - 1
_DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32)
_MOST_NAMED = 3


def label_values(cohort: Cohort, split: Split, settings: DataSettings) -> tuple[int, ...]:
    """Return the label values of a run's classes: the sorted values of its training cases; empty for binary labels.

    Raises `RunError` if there are more than 254, or one exceeds 32 bits.
    """
    if settings.labels == "binary":
        return ()
    trained = [case for case in split.train if settings.weight_of(case) > 0]
    values = {value for case in trained for value in cohort.record(case, settings.variant).labels}
    limits = np.iinfo(np.int32)
    too_wide = [value for value in values if not limits.min <= value <= limits.max]
    if too_wide or len(values) > MOST_LABELS:
        problem = f"the label value {too_wide[0]}" if too_wide else f"{len(values)} different label values"
        raise RunError(
            f"{cohort.path}: its training cases have {problem}; at most {MOST_LABELS} values of 32 bits are possible: "
            "renumber them, or train with --labels binary"
        )
    return tuple(sorted(values))


def label_meaning(values: Sequence[int]) -> dict[int, str]:
    """Return the meaning of each value of predicted label maps."""
    return {0: "background", **({value: f"label {value} of the training data" for value in values} or {1: "vertebra"})}


def unknown_labels(
    cohort: Cohort, split: Split, settings: DataSettings, values: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return the label values of validation and test cases that no training case has, by case; none if binary."""
    if settings.labels == "binary":
        return {}
    unknown = {
        case: tuple(sorted(set(cohort.record(case, settings.variant).labels) - set(values)))
        for case in (*split.validation, *split.test)
    }
    return {case: others for case, others in unknown.items() if others}


def unknown_labels_note(unknown: Mapping[str, Iterable[int]]) -> str:
    """Return a line about labels that the network cannot learn."""
    named = [f"{case} has {', '.join(map(str, values))}" for case, values in unknown.items()]
    more = f"; {len(named) - _MOST_NAMED} more cases" if len(named) > _MOST_NAMED else ""
    return (
        f"labels that no training case has count as missed ({'; '.join(named[:_MOST_NAMED])}"
        f"{more}); to learn them, change case weights, split or label values"
    )


def network_classes(values: Sequence[int]) -> int:
    """Return the number of output channels: 1 for a single label, else one for each label and the background."""
    return 1 + len(values) if len(values) > 1 else 1


def class_numbers(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.uint8]:
    """Convert label values, any shape, to class numbers: 1 for the first of `values`, 0 for values not listed."""
    numbers = np.zeros(labels.shape, np.uint8)
    for number, value in enumerate(values, start=1):
        numbers[labels == value] = number
    return numbers


def stored_values(numbers: NDArray[np.uint8], values: Sequence[int]) -> NDArray[Any]:
    """Convert class numbers to label values, in the smallest dtype; without `values`, 0 and 1 stay."""
    table = [0, *(values or (1,))]
    dtype = next(d for d in _DTYPES if np.iinfo(d).min <= min(table) and max(table) <= np.iinfo(d).max)
    return np.array(table, dtype)[numbers]
