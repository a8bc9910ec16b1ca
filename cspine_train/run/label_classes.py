"""Label values of a network's classes, and conversion between label values and class numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import IGNORE_INDEX, Cohort, Split, labels_of_records
from cspine_data.tools import count
from cspine_train.errors import RunError
from cspine_train.run.settings import DataSettings

#: Class numbers are bytes: 0 is unlabelled, and the last number is for ignored voxels.
MOST_LABELS = IGNORE_INDEX - 1
_DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32)
_MOST_NAMED = 3


@dataclass(frozen=True)
class RunLabels:
    """The labels of a run; empty for binary labels.

    Attributes
    ----------
    values : tuple of int
        Label values of the run's classes: the sorted values of its training cases.
    names : dict
        Names of label values, see `label_names`.
    levels : tuple of int
        The `values` that are levels of vertebrae, from head to feet.
    text : str
        What the label values mean, for the user, see `CohortLabels`.
    """

    values: tuple[int, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    levels: tuple[int, ...] = ()
    text: str = ""


def label_values(cohort: Cohort, split: Split, settings: DataSettings) -> tuple[int, ...]:
    """Return the label values of a run's classes, see `labels_of_run`."""
    return labels_of_run(cohort, split, settings).values


def labels_of_run(cohort: Cohort, split: Split, settings: DataSettings) -> RunLabels:
    """Return the labels of a run.

    Raises `RunError` if there are more than 254 values, one exceeds 32 bits, segments overlap, values are unordered
    instances, or a segment's name has different values.
    """
    if settings.labels == "binary":
        return RunLabels()
    _check_overlaps(cohort, split, settings)
    meaning = labels_of_records(cohort.record(case, settings.variant) for case in _cases(split, settings))
    if meaning.unordered:
        # Different vertebrae in different cases: a network cannot learn them as classes.
        raise RunError(f"{cohort.path}: {meaning.text}; or train with --labels binary")
    names = label_names(cohort, split, settings)
    values = _trained_values(cohort, split, settings)
    # A single case with other vertebrae under these values would teach wrong names.
    levels = () if meaning.contradicting else tuple(level for level in meaning.levels if level in values)
    return RunLabels(values, names, levels, meaning.text)


def _trained_values(cohort: Cohort, split: Split, settings: DataSettings) -> tuple[int, ...]:
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


def label_names(cohort: Cohort, split: Split, settings: DataSettings) -> dict[int, str]:
    """Return the name of each label value that a segment of a run's cases names.

    Raises `RunError` if a name has different values, or a value different names: that would mix the classes.
    """
    names: dict[int, tuple[str, str]] = {}
    values: dict[str, tuple[int, str]] = {}
    for case in _cases(split, settings):
        for value, name in cohort.record(case, settings.variant).segments.items():
            other_name, named_in = names.setdefault(value, (name, case))
            other_value, valued_in = values.setdefault(name.casefold(), (value, case))
            if other_value != value:
                problem = f"segment {name!r} is label {other_value} in {valued_in} and {value} in {case}"
            elif other_name.casefold() != name.casefold():
                problem = f"label {value} is segment {other_name!r} in {named_in} and {name!r} in {case}"
            else:
                continue
            raise RunError(
                f"{cohort.path}: {problem}; prepare with --label-values and the names to segment, which gives each "
                "name one value, or train with --labels binary"
            )
    return {value: name for value, (name, _) in names.items()}


def _cases(split: Split, settings: DataSettings) -> Iterator[str]:
    """Iterate over the cases that train, validate or test."""
    yield from (case for case in split.train if settings.weight_of(case) > 0)
    yield from (*split.validation, *split.test)


def _check_overlaps(cohort: Cohort, split: Split, settings: DataSettings) -> None:
    """Refuse overlapping segments: a common voxel would count for one of them only."""
    for case in _cases(split, settings):
        record = cohort.record(case, settings.variant)
        for pair in record.overlaps:
            first, second = (repr(record.segments.get(value, f"label {value}")) for value in pair)
            raise RunError(
                f"{cohort.path}: segments {first} and {second} of {case} overlap, but a voxel has one label; separate "
                "them in 3D Slicer, prepare with --label-values and the names to segment, or train with --labels binary"
            )


def label_meaning(values: Sequence[int], names: Mapping[int, str]) -> dict[int, str]:
    """Return the meaning of each value of predicted label maps."""
    meaning = {value: names.get(value, f"label {value} of the training data") for value in values}
    return {0: "background", **(meaning or {1: "vertebra"})}


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


def unnamed_note(cohort: Cohort, split: Split, settings: DataSettings) -> str:
    """Return a line about cases without names of segments, if other cases have them; empty if there are none."""
    cases = list(_cases(split, settings)) if settings.labels == "stored" else []
    unnamed = [case for case in cases if not cohort.record(case, settings.variant).segments]
    if len(unnamed) in (0, len(cases)):
        return ""
    return (
        f"{count(len(unnamed), 'case')} without names of segments ({', '.join(unnamed[:_MOST_NAMED])}): their label "
        "values are taken to mean the same as in the other cases; compare them with cspine-data info"
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
