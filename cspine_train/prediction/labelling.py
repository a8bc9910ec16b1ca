"""From the probabilities of one or several runs to a label map."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import Geometry
from cspine_train.errors import RunError
from cspine_train.levels.naming import Evidence, NamedSpine, name_vertebrae
from cspine_train.metrics.components import tidied
from cspine_train.run.label_classes import stored_values
from cspine_train.run.record import RunRecord


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A label map, (x, y, z), with its named vertebrae; None if its labels are not levels."""

    array_xyz: NDArray[Any]
    spine: NamedSpine | None = None


def label_map(
    records: Sequence[RunRecord],
    total: NDArray[np.float32],
    weights: Sequence[float],
    geometry_xyz: Geometry,
    lowest: str | None = None,
    highest: str | None = None,
) -> LabelMap:
    """Return the label map of the weighted sum of the runs' probabilities.

    A single label is thresholded at the average of the runs' thresholds. Postprocessing is applied if it is the same
    for all runs. Of several labels, the most probable one is taken. Levels of vertebrae count as one label for this;
    `name_vertebrae` then splits it into vertebrae and names them, each level once, in order.

    Parameters
    ----------
    records : sequence of RunRecord
        The records of the runs, with the same labels, see `check_runs`.
    total : ndarray
        float32, (K, x, y, z): the sum for each label.
    weights : sequence of float
        Weight of each run.
    geometry_xyz : Geometry
        The grid of the volume in anatomical order.
    lowest, highest : str, optional
        See `name_vertebrae`. With one of them, a single label is split into vertebrae, too.

    Raises
    ------
    RunError
        If the vertebrae cannot be named from `lowest` or `highest`.
    InputError
        If `lowest` or `highest` is not a level.
    """
    record, ends = records[0], (lowest, highest)
    if len(total) == 1:
        mask = total[0] > _threshold(records, weights)
        ways = {(one.kept_components, one.filled_holes) for one in records}
        # None if the runs have different postprocessing.
        mask = tidied(mask, *(ways.pop() if len(ways) == 1 else (None, False)))
        if any(ends):
            return LabelMap(*name_vertebrae(mask, geometry_xyz, None, *ends))
        return LabelMap(stored_values(mask.astype(np.uint8), record.label_values))
    levels = record.levels
    if any(ends) and not levels:
        raise RunError("the labels of these runs are not levels of vertebrae; leave out --lowest and --highest")
    own = [record.label_values.index(level) for level in levels]
    others = [number for number in range(len(total)) if number not in own]
    array = _most_probable(total, sum(weights), others, record.label_values)
    if not levels:
        return LabelMap(array)
    vertebra = vertebra_probability(total, own) > _threshold(records, weights)
    evidence = Evidence([total[number] for number in own], levels, max(one.level_temperature for one in records))
    try:
        level_map, spine = name_vertebrae(vertebra, geometry_xyz, evidence, *ends)
    except RunError as error:
        if any(ends):
            raise
        plain = _most_probable(total, sum(weights), range(len(total)), record.label_values)
        return LabelMap(plain, NamedSpine((), f"{error}; none was named"))
    array = array.astype(np.result_type(array, level_map))
    array[vertebra] = level_map[vertebra]
    return LabelMap(array, spine)


def vertebra_probability(total: NDArray[np.float32], levels: Container[int]) -> NDArray[np.float32]:
    """Return the probability of any level, (x, y, z); 0 where another label, such as a disc, is more probable.

    Parameters
    ----------
    total : ndarray
        float32, (K, x, y, z): the probability of each label, or a multiple of it.
    levels : container of int
        Indices of the labels that are levels.
    """
    vertebra, highest_other = (np.zeros(total.shape[1:], np.float32) for _ in range(2))
    # Label by label: copying the levels takes ten times as long.
    for number, of_label in enumerate(total):
        if number in levels:
            vertebra += of_label
        else:
            np.maximum(highest_other, of_label, out=highest_other)
    vertebra[vertebra <= highest_other] = 0
    return vertebra


def _threshold(records: Sequence[RunRecord], weights: Sequence[float]) -> float:
    """Return the weighted sum of the runs' thresholds, which is the threshold of their summed probabilities."""
    return sum(weight * one.threshold for one, weight in zip(records, weights, strict=True))


def _most_probable(
    total: NDArray[np.float32], weight: float, among: Sequence[int], values: Sequence[int]
) -> NDArray[Any]:
    """Return the label value of the most probable of some labels and the background."""
    numbers = np.zeros(total.shape[1:], np.uint8)
    if not among:
        # Without the sum over the labels, which takes longer than all else here.
        return stored_values(numbers, values)
    highest = np.float32(weight) - total.sum(0)
    for number in among:
        numbers[total[number] > highest] = number + 1
        np.maximum(highest, total[number], out=highest)
    return stored_values(numbers, values)


def probability_of_any(found: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the probability of any label, (x, y, z), from those of all labels; a view if there is only one."""
    return found[0] if len(found) == 1 else np.asarray(found.sum(0))
