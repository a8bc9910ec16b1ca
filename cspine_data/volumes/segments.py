"""Named segments of a label map, as 3D Slicer writes them: how layers are merged, and names converted to values."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.volumes.levels import T13, level_value

#: Added to label values of other structures beside levels.
BEYOND_LEVELS = 100


@dataclass(frozen=True)
class Segment:
    """A named structure of a label map.

    Attributes
    ----------
    name : str
        Its name.
    value : int
        Its value in the label map.
    layer, layer_value : int
        Its layer in a file of overlapping segments, and its value in that layer.
    """

    name: str
    value: int
    layer: int = 0
    layer_value: int = 0


@dataclass(frozen=True)
class Overlap:
    """Two overlapping segments, and the number of common voxels. These have the value of the second one."""

    first: Segment
    second: Segment
    voxels: int


def is_named(segment: Segment, name: str) -> bool:
    """Return whether a name is a segment's, or means the same level; upper and lower case are equal."""
    level = level_value(name)
    return segment.name.casefold() == name.casefold() or (level is not None and level == level_value(segment.name))


def with_neutral_names(segments: Sequence[Segment], wanted: Sequence[int | str] = ()) -> tuple[Segment, ...]:
    """Return segments with codes as names, except for levels and names in `wanted`; equal names have equal codes."""

    def neutral(name: str) -> str:
        known = level_value(name) is not None or name.casefold() in {str(one).casefold() for one in wanted}
        return name if known else f"segment {hashlib.sha256(name.casefold().encode()).hexdigest()[:8]}"

    return tuple(replace(one, name=neutral(one.name)) for one in segments)


def common_values(
    segments: Sequence[Segment], values: Collection[int], wanted: Sequence[int | str] = ()
) -> dict[int, int]:
    """Return the new value of each value of a label map, so that a name has the same value in all cases.

    A level gets VerSe's value, another name in `wanted` its position there. Without such names, no value changes.

    Parameters
    ----------
    segments : sequence of Segment
        The named segments.
    values : collection of int
        The values of the label map.
    wanted : sequence of int or str
        The values or names to segment, if chosen.
    """
    names = [one for one in wanted if isinstance(one, str)]
    has_levels = len(names) < len(wanted) or any(level_value(name) for name in names)
    common: dict[int, int] = {}
    for segment in segments:
        position = next((n for n, name in enumerate(names, start=1) if is_named(segment, name)), None)
        level = level_value(segment.name)
        if level is not None:
            common[segment.value] = level
        elif position is not None:
            common[segment.value] = position + BEYOND_LEVELS * has_levels
    taken, named = set(common.values()), bool(common)
    for value in sorted({*values, *(segment.value for segment in segments)} - common.keys() - {0}):
        # Other values must not equal any level's, even if this case lacks that level.
        new = value + BEYOND_LEVELS if named and 0 < value <= T13 else value
        while new in taken:
            new += BEYOND_LEVELS
        taken.add(new)
        common[value] = new
    return common


def relabelled(array: NDArray[Any], values: dict[int, int]) -> NDArray[Any]:
    """Return a label map with other values; those that are not listed become 0."""
    if all(old == new for old, new in values.items()) and np.isin(array, [0, *values]).all():
        return array
    dtype = np.promote_types(array.dtype, np.min_scalar_type(max(values.values(), default=0)))
    new = np.zeros(array.shape, dtype if dtype.kind in "iu" else np.int64)
    for old, value in values.items():
        new[array == old] = value
    return new


def flattened(layers: NDArray[Any], segments: Sequence[Segment]) -> tuple[NDArray[Any], tuple[Overlap, ...]]:
    """Return one label map of segments in several layers, and their overlaps.

    Parameters
    ----------
    layers : ndarray
        Label maps, (layers, i, j, k).
    segments : sequence of Segment
        The segments. Where they overlap, the last one wins.
    """
    from scipy import ndimage

    if not segments:
        return np.zeros(layers.shape[1:], np.uint8), ()
    # Copied, since a file holds the layers of a voxel side by side, and reading in steps is slow.
    own = [layer.copy(order="K") for layer in layers]
    largest = max(segment.layer_value for segment in segments)
    boxes = [ndimage.find_objects(layer, largest) for layer in own]
    array = np.zeros_like(own[0], np.min_scalar_type(max(segment.value for segment in segments)))
    there: list[tuple[Segment, tuple[slice, ...]]] = []
    for segment in segments:
        box = boxes[segment.layer][segment.layer_value - 1]
        if box is not None:
            array[box][own[segment.layer][box] == segment.layer_value] = segment.value
            there.append((segment, box))
    overlaps = []
    for (first, one), (second, other) in itertools.combinations(there, 2):
        common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
        # A voxel has one value in each layer.
        apart = first.layer == second.layer or any(part.start >= part.stop for part in common)
        if apart or first.value == second.value:
            continue
        both = (own[first.layer][common] == first.layer_value) & (own[second.layer][common] == second.layer_value)
        if both.any():
            overlaps.append(Overlap(first, second, int(np.count_nonzero(both))))
    return array, tuple(overlaps)


def with_values(segments: Sequence[Segment], values: dict[int, int]) -> tuple[Segment, ...]:
    """Return segments with other values in the label map; those that have none are left out."""
    return tuple(replace(one, value=values[one.value]) for one in segments if one.value in values)
