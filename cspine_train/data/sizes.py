"""How large the images are that a network sees: one size for the slices of all patients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cspine_data import CaseRecord
from cspine_train.data.transforms import Sides, fixed_size, network_shape
from cspine_train.errors import RunError
from cspine_train.run.settings import RunSettings

_FEWEST_PIXELS = 4


@dataclass(frozen=True)
class Steps:
    """The steps that a run will take.

    Attributes
    ----------
    read_hw, validation_hw : tuple of int
        Sizes of the images as training batches hold them, and as the network validates on them.
    train_hw : tuple of tuple of int
        Sizes that the network trains on.
    fewest : int
        Slices in the smallest training batch.
    half : bool
        Whether the arithmetic is in 16 bits.
    """

    read_hw: tuple[int, int]
    train_hw: tuple[tuple[int, int], ...]
    validation_hw: tuple[int, int]
    fewest: int
    half: bool


def check_pixels(records: Iterable[CaseRecord], settings: RunSettings) -> None:
    """Refuse a pixel size that leaves next to nothing of any patient's labelled region."""
    if settings.pixel_mm is None:
        return
    smallest = [min(r.labelled_extent_mm(a) for a in range(3) if a != axis) for r in records for axis in settings.axes]
    if 0 < max(smallest) < _FEWEST_PIXELS * settings.pixel_mm:
        raise RunError(
            f"pixel size {settings.pixel_mm} mm: leaves fewer than {_FEWEST_PIXELS} pixels across what is labelled, "
            f"at most {max(smallest):.0f} mm; choose a smaller --pixel-mm"
        )


def size_that_holds(records: Iterable[CaseRecord], settings: RunSettings, sides: Sides) -> tuple[int, int]:
    """Return the smallest size, that the network takes and that holds every slice."""
    return fixed_size([_shape(record, axis, settings) for record in records for axis in settings.axes], sides)


def size_that_holds_labels(
    records: Iterable[CaseRecord], settings: RunSettings, size_hw: tuple[int, int], sides: Sides
) -> tuple[int, int] | None:
    """Return the size of a crop that holds any training patient's labelled region and its margin."""
    if settings.crop_margin_mm is None:
        return None
    shapes = []
    for record in records:
        for axis in settings.axes:
            extents = [record.labelled_extent_mm(a) + 2 * settings.crop_margin_mm for a in range(3) if a != axis]
            pixels = [settings.pixel_mm or mm for a, mm in enumerate(record.sliced_spacing_xyz_mm) if a != axis]
            height, width = (math.ceil(extent / mm) for extent, mm in zip(extents, pixels, strict=True))
            shapes.append((height, width))
    height, width = (min(pair) for pair in zip(fixed_size(shapes, sides), size_hw, strict=True))
    return height, width


def check_size(records: Iterable[CaseRecord], settings: RunSettings, size_hw: tuple[int, int], sides: Sides) -> None:
    """Refuse a size that was asked for, where the network cannot take it or labelled voxels would be cut off.

    Parameters
    ----------
    records : iterable of CaseRecord
        The patients to train and to validate on; iterated over more than once.
    settings : RunSettings
        What was asked.
    size_hw : tuple of int
        The size that was asked for.
    sides : Sides
        What sizes the network takes.
    """
    multiple, least = sides
    if any(size % multiple or size < least for size in size_hw):
        larger = fixed_size([size_hw], sides)
        smaller = [max(size // multiple * multiple, least) for size in size_hw]
        told = " and ".join(dict.fromkeys(_told(size) for size in (smaller, larger)))
        raise RunError(
            f"size {_told(size_hw)}: {settings.model} with encoder {settings.encoder} takes multiples of {multiple}"
            f"{f' from {least} on' if least > multiple else ''}; the nearest --size is {told}"
        )
    cuts = [cut for record in records for cut in _cuts(record, settings, size_hw)]
    if cuts:
        pixels, mm, case, axis = max(cuts, key=lambda cut: cut[1])
        enough = _least(records, settings, size_hw, sides)
        raise RunError(
            f"size {_told(size_hw)}: would cut {mm:.1f} mm ({pixels} pixels) off what is labelled of {case} along "
            f"axis {axis}; the smallest --size that cuts nothing off is {_told(enough)}"
        )


def labelled_pixels(voxels: Sequence[int], size: int) -> tuple[int, int] | None:
    """Return the first and the last pixel that shows anything of a labelled voxel; None where there is none.

    Parameters
    ----------
    voxels : sequence of int
        How many labelled voxels each position has along an axis.
    size : int
        How many pixels these positions are resampled to.
    """
    labelled = np.flatnonzero(voxels)
    if not labelled.size:
        return None
    first, last = int(labelled[0]), int(labelled[-1])
    if size == len(voxels):
        return first, last
    # Interpolated, a voxel is seen from less than a voxel away, or, averaged into larger pixels, less than a pixel.
    scale = len(voxels) / size
    # And a little more, as the interpolation's own arithmetic is rounded.
    reach = max(1.0, 1 / scale) + 1e-4
    first = math.floor((first + 0.5) / scale - 0.5 - reach) + 1
    last = math.ceil((last + 0.5) / scale - 0.5 + reach) - 1
    return max(first, 0), min(last, size - 1)


def _shape(record: CaseRecord, axis: int, settings: RunSettings) -> tuple[int, int]:
    height, width = (size for a, size in enumerate(record.sliced_size_xyz) if a != axis)
    first, second = (mm for a, mm in enumerate(record.sliced_spacing_xyz_mm) if a != axis)
    return network_shape((height, width), (first, second), settings.pixel_mm)


def _labelled(record: CaseRecord, settings: RunSettings) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield, for each side of the slices along each axis, which it is, its size, and where it is labelled."""
    for sliced in settings.axes:
        in_plane = [axis for axis in range(3) if axis != sliced]
        for side, (axis, size) in enumerate(zip(in_plane, _shape(record, sliced, settings), strict=True)):
            ends = labelled_pixels(record.labelled_voxels[axis], size) if record.labelled else None
            if ends:
                yield side, axis, size, *ends


def _cuts(record: CaseRecord, settings: RunSettings, size_hw: tuple[int, int]) -> Iterator[tuple[int, float, str, int]]:
    for side, axis, size, first, last in _labelled(record, settings):
        pixels = _cut(first, last, size, size_hw[side])
        if pixels:
            mm = record.sliced_spacing_xyz_mm[axis] * record.sliced_size_xyz[axis] / size
            yield pixels, pixels * mm, record.case, axis


def _least(
    records: Iterable[CaseRecord], settings: RunSettings, size_hw: tuple[int, int], sides: Sides
) -> tuple[int, int]:
    least = list(size_hw)
    for record in records:
        for side, _, size, first, last in _labelled(record, settings):
            while _cut(first, last, size, least[side]):
                least[side] += sides.multiple
    return least[0], least[1]


def _cut(first: int, last: int, size: int, wanted: int) -> int:
    """Return how many pixels of what is labelled a crop about the centre cuts off, on both ends together."""
    begin = max(size - wanted, 0) // 2
    end = begin + min(size, wanted)
    return max(begin - first, 0) + max(last + 1 - end, 0)


def _told(size_hw: Sequence[int]) -> str:
    return ",".join(map(str, size_hw))
