"""Checks of images, and replacement of NaN outside the field of view."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.io import label_name, read_volume, volume_stem, volume_suffix
from cspine_data.volumes.label_checks import has_few_values, looks_like_labels
from cspine_data.volumes.volume import Volume

# Within these limits, single-precision statistics and their reciprocals do not overflow.
_LARGEST, _LEAST_SPAN = 1e30, 1e-30
# Longer than any patient, which means a wrong unit of length; such grids would fill memory.
_LONGEST_MM = 5000.0
# Shorter than any vertebra with its surroundings.
_SHORTEST_MM = 20.0
# Fewer NaN at the border are damage, not the end of a field of view.
_FEWEST_OUTSIDE = 8
# A dark intensity; single voxels may be darker than air.
_AIR_PERCENTILE = 1


def usable_image(image: Volume) -> Volume:
    """Return a valid image; NaN outside the field of view is replaced by air, with a note.

    Registration and resampling leave NaN outside the scanned field of view. Such voxels are connected to the border,
    are more than a few, and never fill a slice between two valid slices.

    Parameters
    ----------
    image : Volume
        From `read_volume`.

    Returns
    -------
    Volume
        The image, with NaN replaced by a dark intensity and with notes.

    Raises
    ------
    InputError
        If it contains infinity or NaN within the field of view, is constant, has values for which statistics overflow,
        is longer than any patient, or is a label map.
    """
    if image.usable:
        return image
    extent_mm = np.array(image.geometry.size) * np.array(image.geometry.spacing_mm)
    size = " x ".join(f"{mm:.3g}" for mm in extent_mm)
    if extent_mm.max() > _LONGEST_MM:
        raise InputError(
            image.name, f"is {size} mm large, longer than any patient",
            "correct its unit of length (NIfTI: xyzt_units, NRRD: space units), or export it again",
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
            "was it read in the wrong byte order? export it again",
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
    volume = _volume_of(image)
    grid = f" of {volume.name}: same grid," if volume else ":"
    name = label_name(volume) if volume else "X-label, as that of a volume X,"
    raise InputError(image.name, f"looks like a label map{grid} few whole numbers", f"call it {name} or leave it out")


def _volume_of(label: Volume) -> Path | None:
    """Return the file with the most similar name in the folder, if it is an image on a label map's grid; else None.

    Only one file is read, since a folder may have thousands.
    """
    if label.path is None or not label.path.is_file():
        return None
    stem = volume_stem(label.path)
    others = [path for path in sorted(label.path.parent.iterdir()) if volume_suffix(path) and path != label.path]
    if not others:
        return None

    def similarity(path: Path) -> tuple[int, int]:
        name = volume_stem(path)
        return SequenceMatcher(None, stem, name, autojunk=False).find_longest_match().size, -len(name)

    nearest = max(others, key=similarity)
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
            "export it again, or leave it out",
        )  # fmt: skip
    array = image.array.copy(order="K")
    array[outside] = np.percentile(array[finite], _AIR_PERCENTILE, method="lower")
    note = f"{np.count_nonzero(outside)} voxels outside the field of view are NaN, and were taken for air"
    return replace(image, array=array, notes=(*image.notes, note))


def _outside_view(missing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which NaN voxels are outside the field of view."""
    from scipy import ndimage

    regions, _ = ndimage.label(missing, structure=np.ones((3, 3, 3)))
    border = [np.unique(np.take(regions, end, axis)) for axis in range(3) for end in (0, -1)]
    outside: NDArray[np.bool_] = np.isin(regions, np.setdiff1d(np.concatenate(border), 0))
    for axis in range(3):
        empty = np.asarray(missing.all(tuple(a for a in range(3) if a != axis)))
        held = np.flatnonzero(~empty)
        if held.size:
            # An empty slice between two valid slices was scanned.
            lost = np.flatnonzero(empty[: held[-1]])
            np.moveaxis(outside, axis, 0)[lost[lost > held[0]]] = False
    return outside if np.count_nonzero(outside) >= _FEWEST_OUTSIDE else np.zeros_like(outside)
