"""Conversion of label maps to whole numbers on the grid of their volume, without loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError, count
from cspine_data.volumes.formats.nrrd_writer import SEGMENTATION_SUFFIX
from cspine_data.volumes.geometry import Geometry, Orientation
from cspine_data.volumes.label_checks import MOST_VALUES, value_counts
from cspine_data.volumes.label_options import DEFAULT_LABELS, LabelOptions
from cspine_data.volumes.segments import Overlap, common_values, flattened, is_named, relabelled, with_values
from cspine_data.volumes.volume import Volume

# Rounding error of whole numbers in single precision.
_ROUNDED = 1e-3
_RESAMPLE = "if it is this volume's, resample it to the volume's grid, or give --resample-labels"
_OTHER_FORM = "it lies on its volume's grid by the other form (sform or qform) of the NIfTI header"
_FARTHEST_VOXEL = 1 << 20
_MOST_OVERLAPS = 3
_MOST_CHANGES = 5


def whole_numbers(label: Volume, image: Volume) -> Volume:
    """Return a label map as whole numbers, with notes on changes; other values are refused."""
    array = label.array
    if array.dtype.kind in "iu":
        return label
    notes = label.notes
    missing = np.isnan(array)
    if missing.any() and array.shape == image.array.shape and np.isnan(image.array[missing]).all():
        array = np.where(missing, 0, array)
        notes = (*notes, "NaN outside the volume's field of view was taken for 0")
    nan = int(np.count_nonzero(np.isnan(array)))
    if nan:
        raise InputError(label.name, f"holds {nan} voxels of NaN", "set them to the background, 0")
    rounded = np.rint(array)
    off = np.abs(rounded - array)
    # With a larger step, different label values could have been stored as the same number.
    tolerance = max(label.intensity_step / 2 if label.intensity_step < 1 else 0.0, _ROUNDED)
    if not (np.isfinite(array).all() and np.abs(rounded).max() < 2**31 and off.max() <= tolerance):
        raise InputError(
            label.name, "holds values that are no whole numbers", "is it a probability map? save a label map"
        )
    if off.any():
        cause = "its header scales them" if label.intensity_step else "they are stored as floats"
        notes = (*notes, f"values were rounded to whole numbers, by at most {off.max():.2g}: {cause}")
    return replace(label, array=np.asarray(rounded, dtype=np.int32), notes=notes)


def with_structures(label: Volume, options: LabelOptions = DEFAULT_LABELS) -> Volume:
    """Return a label map of the structures to segment, in which a segment's name has the same value in all cases.

    Layers become one label map, with notes on overlaps. Values that are left out become 0.
    """
    wanted = options.label_values
    names = [one for one in wanted or () if isinstance(one, str)]
    if names and not label.segments:
        raise InputError(label.name, "names no segments", "give --label-values as numbers")
    if not label.segments and wanted is None:
        return label
    values = value_counts(label.array)[0].tolist()
    if len(values) > MOST_VALUES:
        return label
    common = common_values(label.segments, values, wanted or ())
    ignored = options.ignore_label
    if ignored is not None and common.get(ignored, ignored) != ignored:
        # The value would mean another structure, a vertebra that training then ignores.
        problem = f"has another value {ignored} in its file: names of segments make it {common[ignored]}"
        raise InputError(label.name, problem, f"give --ignore-label {common[ignored]}")
    kept = set(common.values()) if wanted is None else {one for one in wanted if isinstance(one, int)}
    kept |= {common[one.value] for one in label.segments if any(is_named(one, name) for name in names)}
    kept |= {ignored} if ignored is not None else set()
    common = {old: new for old, new in common.items() if new in kept}
    segments = with_values(label.segments, common)
    if label.layers is None:
        return replace(label, array=relabelled(label.array, common), segments=segments)
    array, overlaps = flattened(label.layers, segments)
    notes = (*label.notes, *_overlap_notes(overlaps))
    return replace(label, array=array, segments=segments, overlaps=overlaps, layers=None, notes=notes)


def _overlap_notes(overlaps: Sequence[Overlap]) -> Iterator[str]:
    for one in overlaps[:_MOST_OVERLAPS]:
        shared = count(one.voxels, "voxel")
        yield f"segments {one.first.name!r} and {one.second.name!r} share {shared}, taken for {one.second.name!r}"
    if len(overlaps) > _MOST_OVERLAPS:
        yield f"{len(overlaps) - _MOST_OVERLAPS} more pairs of segments share voxels"


def on_volume_grid(label: Volume, image: Volume, options: LabelOptions = DEFAULT_LABELS) -> Volume:
    """Return a label map on its volume's grid, with notes on changes; another grid is refused.

    Accepted are the same voxels in another order, a segmentation that 3D Slicer has cropped to its labels, and margins
    around the volume without labels. The options accept others.
    """
    ours, theirs = label.geometry, image.geometry
    if ours.same_grid(theirs):
        return replace(label, geometry=theirs)
    segmentation = bool(label.path and label.path.name.lower().endswith(SEGMENTATION_SUFFIX))
    if ours.same_place(theirs):
        note = () if segmentation else (_OTHER_FORM,)
        return replace(label, geometry=theirs, notes=(*label.notes, *note))
    fits = [fit for fit in _fits_on(label, theirs) if segmentation or fit.covers(theirs)]
    if ours.size == theirs.size:
        # At another position, one of the two headers may have none.
        fits = [fit for fit in fits if not fit.exceeds(theirs)]
    if not fits and _is_placeless(ours, theirs):
        return _trusted(label, image, options)
    if not fits and _is_placeless(theirs, ours):
        raise InputError(
            image.name, "its header does not say where it lies, and its label map's does",
            "export the volume again, or, if the voxels correspond, copy the label map's header to it",
        )  # fmt: skip
    outside = 0
    for fit in fits:
        array, outside = fit.on(theirs)
        if not outside:
            notes = (*label.notes, *_fit_notes(fit, ours, theirs))
            return replace(label, array=array, geometry=theirs, notes=notes)
    if options.resample_labels:
        return _resampled(label, image)
    problem = f"labels {count(outside, 'voxel')} outside its volume" if outside else _elsewhere(ours, theirs)
    raise InputError(label.name, problem, _RESAMPLE)


def _fit_notes(fit: _Fit, label: Geometry, image: Geometry) -> Iterator[str]:
    if fit.turned:
        order = f"{label.orientation_code}, its volume's are {image.orientation_code}"
        yield f"its voxels are stored in another order ({order}): reordered without loss"
    if fit.exceeds(image):
        yield "it extends beyond its volume and labels nothing there: cropped"


def _trusted(label: Volume, image: Volume, options: LabelOptions) -> Volume:
    """Return a label map without a position on its volume's grid, if the option says so."""
    ours, theirs = label.geometry, image.geometry
    if ours.size != theirs.size:
        problem = f"{_elsewhere(ours, theirs)}, and its header does not say where it lies"
        raise InputError(label.name, problem, "save it again with its position")
    if not options.trust_voxels:
        raise InputError(
            label.name, f"its header does not say where it lies ({_difference(ours, theirs)})",
            "if its voxels correspond to the volume's, copy the volume's header to it or give --trust-voxels",
        )  # fmt: skip
    note = "its header does not say where it lies, so it was put onto its volume's grid, voxel for voxel"
    return replace(label, geometry=theirs, notes=(*label.notes, note))


def _resampled(label: Volume, image: Volume) -> Volume:
    """Return a label map on its volume's grid by nearest neighbour, with a note on the change of each volume."""
    from scipy import ndimage

    ours, theirs = label.geometry, image.geometry
    steps = ours.direction_matrix * np.array(ours.spacing_mm)
    matrix = np.linalg.solve(steps, theirs.direction_matrix * np.array(theirs.spacing_mm))
    offset = np.linalg.solve(steps, np.array(theirs.origin_mm) - np.array(ours.origin_mm))
    array = ndimage.affine_transform(label.array, matrix, offset, theirs.size, order=0, mode="grid-constant")
    before, after = (dict(zip(*map(np.ndarray.tolist, value_counts(one)), strict=True)) for one in (label.array, array))
    voxel_ratio = math.prod(theirs.spacing_mm) / math.prod(ours.spacing_mm)
    changes = {value: after.get(value, 0) * voxel_ratio / n - 1 for value, n in before.items() if value}
    if not array.any():
        raise InputError(label.name, f"{_elsewhere(ours, theirs)} and labels nothing there", "is it this volume's?")
    largest = sorted(changes.items(), key=lambda item: -abs(item[1]))[:_MOST_CHANGES]
    named = ", ".join(f"{change:+.1%} ({value})" for value, change in largest)
    note = f"it was resampled to its volume's grid ({_difference(ours, theirs)}); volumes of its labels change by "
    more = f" and less ({len(changes) - len(largest)} others)" if len(changes) > len(largest) else ""
    return replace(label, array=array, geometry=theirs, notes=(*label.notes, f"{note}{named}{more}"))


def _is_placeless(geometry: Geometry, other: Geometry) -> bool:
    """Return whether a grid has no position: it is at the origin, along the axes.

    Its spacing is 1 mm, or that of the other grid. A grid of another size may have its origin there, too.
    """
    along_axes = np.allclose(np.abs(geometry.direction_matrix), np.eye(3), atol=1e-6)
    spacing = np.array(geometry.spacing_mm)
    default_spacing = np.allclose(spacing, 1) or np.allclose(spacing, other.spacing_mm, rtol=1e-2)
    at_origin = np.allclose(geometry.origin_mm, 0, atol=1e-6)
    says_so = geometry.size != other.size and np.allclose(other.origin_mm, 0, atol=1e-6)
    return bool(along_axes and default_spacing and at_origin and not says_so)


@dataclass(frozen=True, eq=False)
class _Fit:
    """A label map whose voxels are also those of another grid, in the order of that grid."""

    array: NDArray[Any]
    start: NDArray[np.int64]
    """Position of its first voxel in the other grid."""
    turned: bool
    """Whether its own order is another one."""

    def covers(self, grid: Geometry) -> bool:
        """Return whether every voxel of the grid is one of this label map's."""
        return bool((self.start <= 0).all() and (self.start + self.array.shape >= grid.size).all())

    def exceeds(self, grid: Geometry) -> bool:
        """Return whether some voxels are outside the grid."""
        return bool((self.start < 0).any() or (self.start + self.array.shape > grid.size).any())

    def on(self, grid: Geometry) -> tuple[NDArray[Any], int]:
        """Return the label map on the grid, 0 where it has no voxels; and the number of labelled voxels outside."""
        first = np.maximum(self.start, 0)
        last = np.maximum(first, np.minimum(self.start + self.array.shape, grid.size))
        there = self.array[tuple(map(slice, first - self.start, last - self.start))]
        whole = np.zeros(grid.size, dtype=self.array.dtype)
        whole[tuple(map(slice, first, last))] = there
        return whole, int(np.count_nonzero(self.array) - np.count_nonzero(there))


def _fits_on(label: Volume, grid: Geometry) -> Iterator[_Fit]:
    """Iterate over the ways in which a label map lies on a grid's voxels: one for each form of its header, or none."""
    own = label.geometry
    for place in grid.places():
        steps = place.direction_matrix * np.array(place.spacing_mm)
        turn = np.linalg.solve(steps, own.direction_matrix * np.array(own.spacing_mm))
        axes = np.abs(turn).argmax(1).tolist()
        if sorted(axes) != [0, 1, 2]:
            continue
        order = Orientation(tuple(axes), tuple((turn[range(3), axes] < 0).tolist()))
        part = order.geometry_xyz(own)
        start = np.rint(np.linalg.solve(steps, np.array(part.origin_mm) - np.array(place.origin_mm))).astype(np.int64)
        if np.abs(start).max() > _FARTHEST_VOXEL:
            continue
        origin_mm = tuple(place.positions_mm(start[None])[0].tolist())
        window = place.model_copy(update={"size": part.size, "origin_mm": origin_mm, "nifti": None})
        if part.same_grid(window):
            turned = axes != [0, 1, 2] or any(order.flips)
            yield _Fit(order.to_anatomical(label.array), start, turned)


def _elsewhere(label: Geometry, image: Geometry) -> str:
    return f"does not lie on its volume's grid ({_difference(label, image)})"


def _difference(label: Geometry, image: Geometry) -> str:
    def described(geometry: Geometry) -> str:
        size = " x ".join(map(str, geometry.size))
        spacing = " x ".join(f"{mm:.3g}" for mm in geometry.spacing_mm)
        return f"{size} voxels of {spacing} mm, {geometry.orientation_code}"

    same = described(label) == described(image)
    return "same size, another place or angle" if same else f"{described(label)} against {described(image)}"
