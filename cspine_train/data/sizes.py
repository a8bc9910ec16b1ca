"""Sizes of a run's images: one for the slices of all patients, decided once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cspine_data import CaseRecord, Cohort, Split
from cspine_train.errors import RunError
from cspine_train.run.settings import RunSettings

_FEWEST_PIXELS = 4


def network_shape(
    shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> tuple[int, int]:
    """Return the size of a slice at the network's pixel size."""
    if pixel_mm is None:
        return shape_hw
    height, width = (max(1, round(n * mm / pixel_mm)) for n, mm in zip(shape_hw, spacing_mm, strict=True))
    return height, width


class Sides(NamedTuple):
    """Heights and widths that a network takes: multiples of a number, from a smallest one on."""

    multiple: int = 32
    least: int = 32


#: Those of most networks: their encoders halve the size five times.
USUAL_SIDES = Sides()


def fixed_size(shapes_hw: Sequence[tuple[int, int]], sides: Sides) -> tuple[int, int]:
    """Return the smallest size that a network takes and that holds slices of all sizes."""
    height, width = (
        math.ceil(max(*sizes, sides.least) / sides.multiple) * sides.multiple for sizes in zip(*shapes_hw, strict=True)
    )
    return height, width


#: Factor of the pixel size in the first steps, with `--coarse-share`.
COARSER = 1.5


def coarser_shape(shape_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the size of images whose pixels are larger by `COARSER`."""
    return round(shape_hw[0] / COARSER), round(shape_hw[1] / COARSER)


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of a run's images, height and width in pixels of the network.

    Attributes
    ----------
    slice_hw : tuple of int
        A training slice as a batch holds it.
    crop_hw : tuple of int or None
        The random part of it that training sees; None if training sees whole slices.
    coarse_hw : tuple of int or None
        An image of the first steps, with `--coarse-share`.
    validation_hw : tuple of int
        A slice in validation: whole, as in prediction.
    """

    slice_hw: tuple[int, int]
    crop_hw: tuple[int, int] | None
    coarse_hw: tuple[int, int] | None
    validation_hw: tuple[int, int]

    @property
    def trained_hw(self) -> tuple[tuple[int, int], ...]:
        """All sizes that the network trains on."""
        fine = self.crop_hw or self.slice_hw
        return (fine, self.coarse_hw) if self.coarse_hw else (fine,)


def image_sizes(cohort: Cohort, split: Split, settings: RunSettings, sides: Sides) -> ImageSizes:
    """Decide the sizes of a run's images.

    Parameters
    ----------
    cohort : Cohort
        The store.
    split : Split
        The cases of each part.
    settings : RunSettings
        Pixel size, requested size, crop and axes.
    sides : Sides
        Sizes that the network takes.

    Raises
    ------
    RunError
        If the pixels are too large for the labelled regions, the network does not take the requested size, or that
        size would cut off labelled voxels.
    """

    def records(*parts: Sequence[str]) -> Iterator[CaseRecord]:
        # Read again each time: forked workers copy what the training process holds.
        return (cohort.record(case, settings.variant) for part in parts for case in part)

    _check_pixels(records(split.train), settings)
    of_all = records(split.train, split.validation, split.test)
    holds_all = fixed_size([_shape(record, axis, settings) for record in of_all for axis in settings.axes], sides)
    if settings.size_hw:
        _check_size(records(split.train, split.validation), settings, settings.size_hw, sides)
    slice_hw = settings.size_hw or holds_all
    crop_hw = _size_that_holds_labels(records(split.train), settings, slice_hw, sides)
    coarse_hw = fixed_size([coarser_shape(crop_hw or slice_hw)], sides) if settings.coarse_share else None
    height, width = (max(pair) for pair in zip(slice_hw, holds_all, strict=True))
    return ImageSizes(slice_hw, crop_hw, coarse_hw, (height, width))


def _check_pixels(records: Iterable[CaseRecord], settings: RunSettings) -> None:
    """Refuse a pixel size at which every patient's labelled region is a few pixels across."""
    if settings.pixel_mm is None:
        return
    smallest = [min(r.labelled_extent_mm(a) for a in range(3) if a != axis) for r in records for axis in settings.axes]
    if 0 < max(smallest) < _FEWEST_PIXELS * settings.pixel_mm:
        raise RunError(
            f"pixel size {settings.pixel_mm} mm: labelled regions, at most {max(smallest):.0f} mm across, would have "
            f"fewer than {_FEWEST_PIXELS} pixels; choose a smaller --pixel-mm"
        )


def _size_that_holds_labels(
    records: Iterable[CaseRecord], settings: RunSettings, size_hw: tuple[int, int], sides: Sides
) -> tuple[int, int] | None:
    """Return the size of a crop that holds the labelled region of each training patient and its margin."""
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


def _check_size(records: Iterable[CaseRecord], settings: RunSettings, size_hw: tuple[int, int], sides: Sides) -> None:
    """Refuse a requested size that the network does not take or that would cut off labelled voxels."""
    multiple, least = sides
    if any(size % multiple or size < least for size in size_hw):
        larger = fixed_size([size_hw], sides)
        smaller = [max(size // multiple * multiple, least) for size in size_hw]
        nearest = " and ".join(dict.fromkeys(_text(size) for size in (smaller, larger)))
        raise RunError(
            f"size {_text(size_hw)}: {settings.model} with encoder {settings.encoder} takes multiples of {multiple}"
            f"{f' from {least} on' if least > multiple else ''}; the nearest --size is {nearest}"
        )
    cuts = []
    enough = list(size_hw)
    for record in records:
        for side, axis, size, first, last in _labelled(record, settings):
            if pixels := _cut(first, last, size, size_hw[side]):
                mm = record.sliced_spacing_xyz_mm[axis] * record.sliced_size_xyz[axis] / size
                cuts.append((pixels * mm, pixels, record.case, axis))
            while _cut(first, last, size, enough[side]):
                enough[side] += multiple
    if cuts:
        mm, pixels, case, axis = max(cuts, key=lambda cut: cut[0])
        raise RunError(
            f"size {_text(size_hw)}: would cut {mm:.1f} mm ({pixels} pixels) off the labelled region of {case} along "
            f"axis {axis}; the smallest --size that cuts nothing off is {_text(enough)}"
        )


def labelled_pixels(voxels: Sequence[int], size: int) -> tuple[int, int] | None:
    """Return the first and the last pixel that a labelled voxel contributes to; None if no voxel is labelled.

    `voxels` are the numbers of labelled voxels at each position along an axis, which is resampled to `size` pixels.
    """
    labelled = np.flatnonzero(voxels)
    if not labelled.size:
        return None
    first, last = int(labelled[0]), int(labelled[-1])
    if size == len(voxels):
        return first, last
    # An interpolated voxel reaches less than a voxel away; averaged into larger pixels, less than a pixel.
    scale = len(voxels) / size
    # A little more, as the interpolation is rounded.
    reach = max(1.0, 1 / scale) + 1e-4
    first = math.floor((first + 0.5) / scale - 0.5 - reach) + 1
    last = math.ceil((last + 0.5) / scale - 0.5 + reach) - 1
    return max(first, 0), min(last, size - 1)


def _shape(record: CaseRecord, axis: int, settings: RunSettings) -> tuple[int, int]:
    height, width = (size for a, size in enumerate(record.sliced_size_xyz) if a != axis)
    first, second = (mm for a, mm in enumerate(record.sliced_spacing_xyz_mm) if a != axis)
    return network_shape((height, width), (first, second), settings.pixel_mm)


def _labelled(record: CaseRecord, settings: RunSettings) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield side (0 height, 1 width), axis, size, first and last labelled pixel, for each side of each axis' slices."""
    for sliced in settings.axes:
        in_plane = [axis for axis in range(3) if axis != sliced]
        for side, (axis, size) in enumerate(zip(in_plane, _shape(record, sliced, settings), strict=True)):
            ends = labelled_pixels(record.labelled_voxels[axis], size) if record.labelled else None
            if ends:
                yield side, axis, size, *ends


def _cut(first: int, last: int, size: int, wanted: int) -> int:
    """Return how many labelled pixels a crop about the centre cuts off, at both ends together."""
    begin = max(size - wanted, 0) // 2
    end = begin + min(size, wanted)
    return max(begin - first, 0) + max(last + 1 - end, 0)


def _text(size_hw: Sequence[int]) -> str:
    return ",".join(map(str, size_hw))
