"""Conversion of label maps to whole numbers on the grid of their volume, without loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.formats.nrrd_writer import SEGMENTATION_SUFFIX
from cspine_data.volumes.geometry import Geometry
from cspine_data.volumes.volume import Volume

# Rounding error of whole numbers in single precision.
_ROUNDED = 1e-3
_RESAMPLE = "resample it to the volume"


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


def on_volume_grid(label: Volume, image: Volume, *, trust_voxels: bool = False) -> Volume:
    """Return a label map on its volume's grid, with notes on changes; another grid is refused.

    With `trust_voxels`, one without a position in its header is taken to be on the volume's grid, voxel for voxel.
    """
    values, notes = label.array, label.notes
    if label.path and label.path.name.lower().endswith(SEGMENTATION_SUFFIX):
        values = _pasted(label, values, image.geometry)
    elif not label.geometry.same_grid(image.geometry):
        notes = (*notes, _placed(label, image, trust_voxels))
    return replace(label, array=values, geometry=image.geometry, notes=notes)


def _placed(label: Volume, image: Volume, trust_voxels: bool) -> str:
    """Return a note why a label map with another grid in its header is on its volume's grid."""
    ours, theirs = label.geometry, image.geometry
    if ours.same_place(theirs):
        return "it lies on its volume's grid by the other form (sform or qform) of the NIfTI header"
    if ours.size == theirs.size and _is_placeless(ours, theirs):
        if trust_voxels:
            return "its header does not say where it lies, so it was put onto its volume's grid, voxel for voxel"
        raise InputError(
            label.name, f"its header does not say where it lies ({_difference(ours, theirs)})",
            "if its voxels correspond to the volume's, copy the volume's header to it or give --trust-voxels",
        )  # fmt: skip
    if ours.size == theirs.size and _is_placeless(theirs, ours):
        raise InputError(
            image.name, "its header does not say where it lies, and its label map's does",
            "export the volume again, or, if the voxels correspond, copy the label map's header to it",
        )  # fmt: skip
    raise InputError(label.name, _elsewhere(ours, theirs), _RESAMPLE)


def _is_placeless(geometry: Geometry, other: Geometry) -> bool:
    """Return whether a grid has no position: it is at the origin, along the axes.

    Its spacing is 1 mm, or that of the other grid.
    """
    along_axes = np.allclose(np.abs(geometry.direction_matrix), np.eye(3), atol=1e-6)
    spacing = np.array(geometry.spacing_mm)
    default_spacing = np.allclose(spacing, 1) or np.allclose(spacing, other.spacing_mm, rtol=1e-2)
    return bool(along_axes and default_spacing and np.allclose(geometry.origin_mm, 0, atol=1e-6))


def _pasted(label: Volume, values: NDArray[Any], grid: Geometry) -> NDArray[Any]:
    """Return a segmentation that was cropped to its labels on the volume's grid."""
    if label.geometry.same_place(grid):
        return values
    for place in grid.places():
        start = _start_within(label.geometry, place)
        if start is not None:
            whole = np.zeros(grid.size, dtype=values.dtype)
            whole[tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))] = values
            return whole
    raise InputError(label.name, _elsewhere(label.geometry, grid), _RESAMPLE)


def _start_within(part: Geometry, grid: Geometry) -> list[int] | None:
    """Return the position of a grid's first voxel in another grid; None if it is not part of it."""
    steps = grid.direction_matrix * np.array(grid.spacing_mm)
    shift = np.array(part.origin_mm) - np.array(grid.origin_mm)
    start = np.rint(np.linalg.solve(steps, shift)).astype(int)
    window = Geometry(
        size=part.size,
        spacing_mm=grid.spacing_mm,
        directions=grid.directions,
        origin_mm=tuple(grid.positions_mm(start[None])[0].tolist()),
    )
    inside = bool((start >= 0).all() and (start + np.array(part.size) <= np.array(grid.size)).all())
    return start.tolist() if inside and part.same_grid(window) else None


def _elsewhere(label: Geometry, image: Geometry) -> str:
    return f"does not lie on its volume's grid ({_difference(label, image)})"


def _difference(label: Geometry, image: Geometry) -> str:
    def described(geometry: Geometry) -> str:
        size = " x ".join(map(str, geometry.size))
        spacing = " x ".join(f"{mm:.3g}" for mm in geometry.spacing_mm)
        return f"{size} voxels of {spacing} mm, {geometry.orientation_code}"

    same = described(label) == described(image)
    return "same size, another place or angle" if same else f"{described(label)} against {described(image)}"
