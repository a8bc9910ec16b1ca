"""Which images can be computed with, and what is made of voxels outside the field of view."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.io import Volume, label_name, read_volume, volume_stem, volume_suffix
from cspine_data.volumes.label_checks import has_few_values, looks_like_labels

# Statistics are single precision: within these, neither they nor their reciprocals overflow.
_LARGEST, _LEAST_SPAN = 1e30, 1e-30
# Longer than any patient: the unit of length is wrong, and grids of so many millimetres fill memory.
_LONGEST_MM = 5000.0
# Shorter than any vertebra with what is around it.
_SHORTEST_MM = 20.0
# A few voxels at the border are damage, and no place where a field of view ends.
_FEWEST_OUTSIDE = 8
# Air is dark, and single voxels may be darker than it.
_AIR_PERCENTILE = 1


def usable_image(image: Volume) -> Volume:
    """Return an image that can be computed with: NaN outside the field of view is taken for air, with a note.

    Registration and resampling leave NaN where a voxel lies outside the scanned field of view. Such voxels reach the
    border of the volume, are more than a few, and never fill a slice between two slices with voxels.

    Parameters
    ----------
    image : Volume
        As `read_volume` gives it.

    Returns
    -------
    Volume
        The same, or with NaN replaced by a dark intensity, and with its notes.

    Raises
    ------
    InputError
        If it holds infinity, or NaN within the field of view; if it is constant, its floats are so large or small that
        statistics overflow, it is longer than any patient, or it is a label map.
    """
    if image.usable:
        return image
    extent_mm = np.array(image.geometry.size) * np.array(image.geometry.spacing_mm)
    size = " x ".join(f"{mm:.3g}" for mm in extent_mm)
    if extent_mm.max() > _LONGEST_MM:
        raise InputError(
            image.name, f"is {size} mm large, longer than any patient",
            "correct its unit of length (NIfTI: xyzt_units, NRRD: space units), or export it anew",
        )  # fmt: skip
    image = _without_nan(image)
    lowest, highest = image.array.min(), image.array.max()
    if lowest == highest:
        raise InputError(image.name, "is constant", "fetch it again or leave it out")
    if image.array.dtype.kind == "f" and not (
        max(-lowest, highest) < _LARGEST and float(highest) - float(lowest) > _LEAST_SPAN
    ):
        raise InputError(
            image.name, f"holds intensities from {lowest:.3g} to {highest:.3g}, a range that no scanner has",
            "was it read in the wrong byte order? export it anew",
        )  # fmt: skip
    image = _checked_for_labels(image)
    if extent_mm.max() < _SHORTEST_MM:
        note = f"it is only {size} mm large (is its unit of length right?)"
        image = replace(image, notes=tuple(dict.fromkeys((*image.notes, note))))
    return replace(image, usable=True)


def _checked_for_labels(image: Volume) -> Volume:
    """Refuse a label map of few values; return an image of flat regions with a note."""
    if not looks_like_labels(image.array):
        return image
    if not has_few_values(image.array):
        # An 8-bit image that was enlarged without interpolation has flat regions too.
        note = "it has flat regions, as a label map has; is it an image?"
        return replace(image, notes=tuple(dict.fromkeys((*image.notes, note))))
    of = _volume_of(image)
    told = f" of {of.name}: same grid," if of else ":"
    name = label_name(of) if of else "X-label, as that of a volume X,"
    raise InputError(image.name, f"looks like a label map{told} few whole numbers", f"call it {name} or leave it out")


def _volume_of(label: Volume) -> Path | None:
    """Return the file on a label map's grid, of those beside it the one that is called most alike; None if it is not.

    One file is read: a folder may hold thousands.
    """
    if label.path is None or not label.path.is_file():
        return None
    stem = volume_stem(label.path)
    others = [path for path in sorted(label.path.parent.iterdir()) if volume_suffix(path) and path != label.path]
    if not others:
        return None

    def in_common(path: Path) -> tuple[int, int]:
        name = volume_stem(path)
        return SequenceMatcher(None, stem, name, autojunk=False).find_longest_match().size, -len(name)

    nearest = max(others, key=in_common)
    with suppress(InputError):
        volume = read_volume(nearest)
        if volume.geometry.same_grid(label.geometry) and not looks_like_labels(volume.array):
            return nearest
    return None


def _without_nan(image: Volume) -> Volume:
    if image.array.dtype.kind != "f":
        return image
    finite = np.isfinite(image.array)
    if finite.all():
        return image
    outside = _outside_view(np.isnan(image.array))
    inside = int(np.count_nonzero(~finite & ~outside))
    if inside or not finite.any():
        raise InputError(
            image.name, f"holds {inside or finite.size} voxels that are NaN or infinite within the field of view",
            "nothing can be said of them: export it anew, or leave it out",
        )  # fmt: skip
    array = image.array.copy(order="K")
    array[outside] = np.percentile(array[finite], _AIR_PERCENTILE, method="lower")
    note = f"{np.count_nonzero(outside)} voxels outside the field of view are NaN, and were taken for air"
    return replace(image, array=array, notes=(*image.notes, note))


def _outside_view(missing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which missing voxels lie outside the field of view."""
    from scipy import ndimage

    regions, _ = ndimage.label(missing, structure=np.ones((3, 3, 3)))
    border = [np.unique(np.take(regions, end, axis)) for axis in range(3) for end in (0, -1)]
    outside: NDArray[np.bool_] = np.isin(regions, np.setdiff1d(np.concatenate(border), 0))
    for axis in range(3):
        empty = np.asarray(missing.all(tuple(a for a in range(3) if a != axis)))
        held = np.flatnonzero(~empty)
        if held.size:
            # A slice that is lost between two others was scanned.
            lost = np.flatnonzero(empty[: held[-1]])
            np.moveaxis(outside, axis, 0)[lost[lost > held[0]]] = False
    return outside if np.count_nonzero(outside) >= _FEWEST_OUTSIDE else np.zeros_like(outside)
