"""Which label values a run tells apart, and how voxels come from values to numbers of classes and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import IGNORE_INDEX, Cohort, Split
from cspine_train.errors import RunError
from cspine_train.run.settings import RunSettings

#: Numbers of classes are a byte: 0 is what has no label, the last what does not count.
MOST_LABELS = IGNORE_INDEX - 1
_DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32)
_TOLD = 3


def label_values(cohort: Cohort, split: Split, settings: RunSettings) -> tuple[int, ...]:
    """Return the label values that a run tells apart, in order: those of the cases it trains on.

    Empty for ``labels="binary"``.

    Raises
    ------
    RunError
        If there are more than 254, or one that 32 bits do not hold.
    """
    if settings.labels == "binary":
        return ()
    trained = [case for case in split.train if settings.weight_of(case) > 0]
    values = {value for case in trained for value in cohort.record(case, settings.variant).labels}
    limits = np.iinfo(np.int32)
    too_wide = [value for value in values if not limits.min <= value <= limits.max]
    if too_wide or len(values) > MOST_LABELS:
        told = f"the label value {too_wide[0]}" if too_wide else f"{len(values)} different label values"
        raise RunError(
            f"{cohort.path}: its training cases have {told}; at most {MOST_LABELS} values, of 32 bits, can be told "
            "apart: renumber them, or train with --labels binary"
        )
    return tuple(sorted(values))


def label_meaning(values: Sequence[int]) -> dict[int, str]:
    """Return what the values of a label map mean that a run predicts which tells these apart."""
    return {0: "background", **({value: f"label {value} of the training data" for value in values} or {1: "vertebra"})}


def unknown_labels(
    cohort: Cohort, split: Split, settings: RunSettings, values: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return which label values of validation and test cases no training case has, by case; empty for binary labels."""
    if settings.labels == "binary":
        return {}
    unknown = {
        case: tuple(sorted(set(cohort.record(case, settings.variant).labels) - set(values)))
        for case in (*split.validation, *split.test)
    }
    return {case: others for case, others in unknown.items() if others}


def unknown_told(unknown: Mapping[str, Iterable[int]]) -> str:
    """Return one line on labels that cannot be learnt."""
    named = [f"{case} has {', '.join(map(str, values))}" for case, values in unknown.items()]
    more = f"; {len(named) - _TOLD} more cases" if len(named) > _TOLD else ""
    return (
        f"labels that no training case has count as missed ({'; '.join(named[:_TOLD])}"
        f"{more}); weigh, split or renumber the cases otherwise to learn them"
    )


def network_classes(values: Sequence[int]) -> int:
    """Return how many channels a network's output has: one for one label, else one a label and the background's."""
    return 1 + len(values) if len(values) > 1 else 1


def class_numbers(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.uint8]:
    """Give the voxels of a label map, any shape, numbers: 1 for the first of `values`, 0 for what is none of them."""
    numbers = np.zeros(labels.shape, np.uint8)
    for number, value in enumerate(values, start=1):
        numbers[labels == value] = number
    return numbers


def stored_values(numbers: NDArray[np.uint8], values: Sequence[int]) -> NDArray[Any]:
    """Undo `class_numbers`, in the smallest dtype that holds the values; without `values` numbers stay 0 and 1."""
    table = [0, *(values or (1,))]
    dtype = next(d for d in _DTYPES if np.iinfo(d).min <= min(table) and max(table) <= np.iinfo(d).max)
    return np.array(table, dtype)[numbers]
