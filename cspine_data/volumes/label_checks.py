"""Checks of the values of label maps, and notes on suspicious ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError, count
from cspine_data.volumes.levels import T13

#: The largest published label schemes have about 120 structures.
MOST_VALUES = 255
_FEW_VALUES = 32
_MOSTLY_BACKGROUND = 0.95
# Smaller arrays always have few values.
_FEWEST_VOXELS = 1000
# Share of equal neighbours, without pairs of background voxels. In 40 public label maps it is 0.47 (thin vessels) to
# 0.92; in 35 real volumes at most 0.44 (a volume rescaled to 8 bits, with two values for air).
_FLAT_OF_FEW, _FLAT_OF_MANY = 0.5, 0.65
# Vertebrae fill a twentieth of a sagittal volume and at most a third of a tight crop.
_LARGE_SHARE = 0.5
# A cervical vertebra has about 8 ml.
_TINY_ML = 0.05
_MOSTLY_AIR = 0.9
# Three vertebrae and two discs in a scheme of 100 structures span eleven times their number.
_GAPPY = 12
_COUNTED_VALUES, _COUNTED_AT_ONCE = 2**16, 2**13
# Neighbours are compared within slices, and a few slices are enough.
_SLICES = 8

#: The values of an array, ascending, and their counts.
CountedValues = tuple[NDArray[Any], NDArray[np.int64]]


def value_counts(array: NDArray[Any]) -> CountedValues:
    """Return the values of an array, ascending, and their counts; faster than `np.unique`, which sorts."""
    # Differences of unsigned 64-bit values overflow.
    if array.dtype.kind not in "iu" or array.dtype == np.uint64 or not array.size:
        return np.unique(array, return_counts=True)
    lowest, highest = int(array.min()), int(array.max())
    if highest - lowest > _COUNTED_VALUES:
        return np.unique(array, return_counts=True)
    counts = np.zeros(highest - lowest + 1, np.int64)
    in_order = array.ravel(order="K")
    # In parts: `bincount` converts to 64 bits, and most parts of a label map have one value.
    for start in range(0, in_order.size, _COUNTED_AT_ONCE):
        part = in_order[start : start + _COUNTED_AT_ONCE]
        if (part == part[0]).all():
            counts[int(part[0]) - lowest] += part.size
        else:
            counts += np.bincount(part.astype(np.int64) - lowest, minlength=counts.size)
    found = np.flatnonzero(counts)
    return (found + lowest).astype(array.dtype), counts[found]


def labelled_values(counted_values: CountedValues, ignore_label: int | None = None) -> CountedValues:
    """Return the values and counts of a label map's structures, without background and ignored voxels."""
    values, counts = counted_values
    structures = (values != 0) & (values != (0 if ignore_label is None else ignore_label))
    return values[structures], counts[structures]


def looks_like_labels(array: NDArray[Any]) -> bool:
    """Return whether an array contains labels rather than intensities: few whole numbers in flat regions."""
    if array.size < _FEWEST_VOXELS:
        return False
    if array.dtype.kind == "f":
        # The first slice is enough to recognise most images.
        for part in (array[:1], array):
            if not np.isfinite(part).all() or (np.rint(part) != part).any():
                return False
    # A few slices are enough to find many values in most images; otherwise all are counted.
    counted_values = value_counts(_few_slices(array))
    if counted_values[0].size <= _FEW_VALUES:
        counted_values = value_counts(array)
    return _are_labels(array, counted_values)


def has_few_values(array: NDArray[Any]) -> bool:
    """Tell whether an array holds no more values than a label map of vertebrae."""
    return value_counts(array)[0].size <= _FEW_VALUES


def check_labels(
    name: Path | str, labels: NDArray[Any], counted_values: CountedValues, ignore_label: int | None = None
) -> None:
    """Refuse values that cannot be labels: an image's, negative ones that are not ignored, or no background."""
    values, _ = counted_values
    counted = values != (0 if ignore_label is None else ignore_label)
    lowest = int(values[counted].min(initial=0)) if ignore_label is not None else int(values.min())
    check_no_image(name, labels, counted_values)
    if lowest < 0:
        remedy = f"give --ignore-label {lowest} if it marks voxels that must not count, else give them a positive value"
        raise InputError(name, f"holds the negative value {lowest}", remedy)
    if not (values == 0).any():
        problem = "labels every voxel" if ignore_label is None else "labels every voxel that counts"
        raise InputError(name, problem, "is its background another value? make that 0")


def check_no_image(name: Path | str, labels: NDArray[Any], counted_values: CountedValues) -> None:
    """Refuse the values of an image."""
    values, _ = counted_values
    if values.size > _FEW_VALUES and not _are_labels(labels, counted_values):
        problem = f"holds {values.size} different values, as an image does and no label map"
        raise InputError(name, problem, "pair the volume with its label map, or leave this file out")


def check_not_the_image(name: Path | str, labels: NDArray[Any], image: NDArray[Any]) -> None:
    """Refuse a label map that is a copy of its volume."""
    if np.array_equal(labels, image):
        raise InputError(name, "holds the same voxels as its volume", "put the label map there, or leave this file out")


def label_notes(
    labels: NDArray[Any],
    image: NDArray[Any],
    counted_values: CountedValues,
    tissue_threshold: float,
    voxel_ml: float,
    ignore_label: int | None = None,
) -> tuple[str, ...]:
    """Return notes on suspicious properties of a valid label map on the grid of its image."""
    counts = labelled_values(counted_values, ignore_label)[1]
    voxels = int(counts.sum())
    size = labels.size - int(counted_values[1][counted_values[0] == ignore_label].sum())
    notes = []
    if voxels > _LARGE_SHARE * size:
        notes.append(f"labels {voxels / size:.0%} of the volume, more than vertebrae fill; is its background 0?")
    if voxels * voxel_ml < _TINY_ML:
        notes.append(f"labels only {count(voxels, 'voxel')}, {voxels * voxel_ml:.2g} ml")
    labelled = labels != 0
    if ignore_label is not None:
        labelled &= labels != ignore_label
    dark = np.count_nonzero(labelled & (image <= tissue_threshold)) / voxels
    if dark > _MOSTLY_AIR:
        notes.append(f"{dark:.0%} of what it labels is as dark as air; is it this volume's, and turned as it is?")
    return tuple(notes)


def value_notes(
    labels: NDArray[Any], counted_values: CountedValues, ignore_label: int | None = None
) -> tuple[str, ...]:
    """Return notes on suspicious values of a label map."""
    values, _ = labelled_values(counted_values, ignore_label)
    # TPTBox and SPIDER add 100 or 200 to a vertebra's value, for its disc and other parts.
    of_vertebrae = bool((values % 100 <= T13).all())
    # The largest value alone may mark voxels to ignore.
    if not of_vertebrae and values.size > 2 and int(values[-2]) - int(values[0]) > _GAPPY * values.size:
        gaps = f"holds {values.size} values up to {values[-1]}, with gaps between them"
        return (f"{gaps}; was it interpolated, or scaled to 8 bits?",)
    if labels.dtype.kind == "u" and values.size > 1 and values[-1] == np.iinfo(labels.dtype).max:
        remedy = f"give --ignore-label {values[-1]} if it marks voxels that must not count"
        return (f"holds {values[-1]} beside other labels; {remedy}",)
    return ()


def _few_slices(array: NDArray[Any]) -> NDArray[Any]:
    return array[:: max(1, array.shape[0] // _SLICES)]


def _are_labels(array: NDArray[Any], counted_values: CountedValues) -> bool:
    values, counts = counted_values
    if values.size > MOST_VALUES:
        return False
    few = values.size <= _FEW_VALUES
    if few and counts.max() >= _MOSTLY_BACKGROUND * array.size:
        return True
    return _flatness(_few_slices(array), values[counts.argmax()]) > (_FLAT_OF_FEW if few else _FLAT_OF_MANY)


def _flatness(array: NDArray[Any], background: Any) -> float:
    """Return the share of equal neighbours along the last two axes, without pairs of background voxels."""
    equal, pairs = 0, 0
    for first, second in ((array[:, 1:], array[:, :-1]), (array[:, :, 1:], array[:, :, :-1])):
        counted = (first != background) | (second != background)
        equal += int(np.count_nonzero((first == second) & counted))
        pairs += int(np.count_nonzero(counted))
    return equal / pairs if pairs else 0.0
