"""Intensity normalisation, with the statistics to repeat or undo it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cspine_data.errors import InputError
from cspine_data.extensions import NAME, NORMALISATIONS
from cspine_data.preprocessing.parameters import NYUL_PERCENTILES
from cspine_data.preprocessing.tissue import densest_core

#: Points of a normalisation: ascending intensities, and their ascending normalised values.
Points = tuple[tuple[float, ...], tuple[float, ...]]
_ENDS = (NYUL_PERCENTILES[0], NYUL_PERCENTILES[-1])
#: The percentiles of the tissue that are kept of every volume.
TISSUE_PERCENTILES = tuple(sorted({2, 10, 25, 50, 75, 90, 98, *NYUL_PERCENTILES}))
# In standard deviations of the densest part. In 19 real scans at most 0.3 % of the tissue is farther away (vessels,
# fluid). Noise amplified by a field is at 30 or more.
_OUTLIER = 12.0
# Percentiles of so many voxels are those of all to a thousandth of the spread.
_ENOUGH_VOXELS, _MANY_VOXELS = 500_000, 4_000_000
# Levels of 16 bits would grow coarse where one broken voxel is a thousand times as bright as tissue. All that networks
# see is within a few units; values beyond the limits are clipped.
_FARTHEST = 32.0
_HIGHEST_LEVEL = 32767


class Normalisation(BaseModel):
    """A piecewise linear map of intensities; the outermost lines continue beyond the points."""

    model_config = ConfigDict(frozen=True)

    method: str = Field(default="zscore", pattern=NAME)
    """Name of the normalisation that the points are from, such as `zscore`, `percentile` or `nyul`."""
    intensities: tuple[float, ...]
    """Ascending, in the units of the image."""
    values: tuple[float, ...]
    """The normalised values of these, ascending."""

    def apply(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Normalise an image of any shape; float32."""
        return _along_lines(image, self.intensities, self.values)

    def undo(self, normalised: NDArray[Any]) -> NDArray[np.float32]:
        """Give an image its own units back; float32."""
        return _along_lines(normalised, self.values, self.intensities)


class Levels(BaseModel):
    """16-bit integers for normalised intensities: ``level * scale``."""

    model_config = ConfigDict(frozen=True)

    scale: float
    """Size of one level; the rounding error is at most half of it."""

    @classmethod
    def spanning(cls, normalised: NDArray[np.float32]) -> Levels:
        """Return levels for the range of an image, at most from -32 to 32."""
        farthest = max(-float(normalised.min()), float(normalised.max()))
        return cls(scale=min(max(farthest, 1e-6), _FARTHEST) / _HIGHEST_LEVEL)

    def encode(self, normalised: NDArray[np.float32]) -> NDArray[np.int16]:
        """Return the level nearest to each value."""
        levels = np.empty(normalised.shape, np.int16)
        # Plane by plane: a large volume is there once more in single precision otherwise.
        for plane, out in zip(np.atleast_2d(normalised), np.atleast_2d(levels), strict=True):
            with np.errstate(over="ignore"):
                exact = plane * np.float32(1 / self.scale)
            np.rint(exact, out=exact)
            out[...] = np.clip(exact, -_HIGHEST_LEVEL, _HIGHEST_LEVEL, out=exact)
        return levels

    def decode(self, levels: NDArray[np.int16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the values of levels, float32, in `out` if given."""
        values = np.empty(levels.shape, np.float32) if out is None else out
        # In two passes: one that converts and multiplies goes through NumPy's small buffers, and takes longer.
        values[...] = levels
        values *= np.float32(self.scale)
        return values


class TissueStatistics(BaseModel):
    """Intensity statistics of a volume's tissue, without outliers."""

    model_config = ConfigDict(frozen=True)

    fraction: float
    """Share of the volume's voxels that are tissue, outliers included."""
    mean: float
    deviation: float
    """Mean and standard deviation, in the units of the image."""
    percentiles: tuple[float, ...]
    """The percentiles `TISSUE_PERCENTILES`, in the units of the image."""

    @classmethod
    def of(cls, image: NDArray[Any], tissue: NDArray[np.bool_]) -> TissueStatistics:
        """Return the statistics of the voxels of an image that are tissue.

        Voxels twelve deviations away from the densest part are outliers: a mask of which half is wrong changes
        little.
        """
        fraction = np.count_nonzero(tissue) / max(tissue.size, 1)
        if image.ndim == 3 and image.size > _MANY_VOXELS:
            # Every other voxel along each axis: an eighth of the time, and the same to a thousandth of a deviation.
            image, tissue = image[::2, ::2, ::2], tissue[::2, ::2, ::2]
        found = image[tissue]
        if not found.size:
            return cls(fraction=fraction, mean=0.0, deviation=0.0, percentiles=(0.0,) * len(TISSUE_PERCENTILES))
        low, high = _inlying(found)
        if found.min() < low or found.max() > high:
            found = found[(found >= low) & (found <= high)]
        some = found[:: max(1, found.size // _ENOUGH_VOXELS)]
        return cls(
            fraction=fraction,
            mean=float(found.mean(dtype=np.float64)),
            deviation=float(found.std(dtype=np.float64)),
            percentiles=tuple(np.percentile(some, TISSUE_PERCENTILES).tolist()),
        )

    def at(self, percentiles: tuple[int, ...]) -> tuple[float, ...]:
        """Return some of the kept percentiles, in the units of the image."""
        return tuple(self.percentiles[TISSUE_PERCENTILES.index(one)] for one in percentiles)

    @property
    def landmarks(self) -> tuple[float, ...]:
        """Nyul's percentiles, scaled so that the 1st is 0 and the 99th is 1; empty without contrast."""
        found = np.array(self.at(NYUL_PERCENTILES))
        span = found[-1] - found[0]
        return tuple(((found - found[0]) / span).tolist()) if span > 0 else ()


def _inlying(values: NDArray[Any]) -> tuple[float, float]:
    """Return the range without outliers, which are excluded step by step."""
    values = values[:: max(1, values.size // _ENOUGH_VOXELS)]
    low, high = -np.inf, np.inf
    while True:
        centre, deviation = densest_core(values)
        # Two fifths of the voxels have one value: nothing says how far away an outlier is.
        if not deviation:
            return low, high
        low, high = centre - _OUTLIER * deviation, centre + _OUTLIER * deviation
        inlying = (values >= low) & (values <= high)
        if inlying.all():
            return low, high
        values = values[inlying]


def normalisation_of(
    tissue: TissueStatistics, method: str, standard: tuple[float, ...] | None, name: str
) -> Normalisation:
    """Return the normalisation of an image from the intensity statistics of its tissue.

    For ``nyul``, `standard` are the `standard_landmarks` of a cohort. `name` is that of the image, for messages.

    Raises `InputError` if the tissue has no contrast, there is no such method, or ``nyul`` has no standard.
    """
    intensities, values = NORMALISATIONS.load(method)(tissue, standard)
    # The lines are single precision, and less than its smallest step makes them steeper than it can say.
    if not intensities[-1] - intensities[0] > float(np.finfo(np.float32).tiny):
        raise InputError(name, "has no contrast within its tissue", "is it a mask or a label map? leave it out")
    if not values:
        raise InputError(name, "cannot be matched without a cohort's landmarks", "prepare it with its cohort")
    intensities, values = _distinct(intensities, values)
    return Normalisation(method=method, intensities=intensities, values=values)


def zscore(tissue: TissueStatistics, _standard: tuple[float, ...] | None) -> Points:
    """Return the points where the mean of the tissue becomes 0 and its standard deviation 1."""
    return (tissue.mean, tissue.mean + tissue.deviation), (0.0, 1.0)


def percentile(tissue: TissueStatistics, _standard: tuple[float, ...] | None) -> Points:
    """Return the points where the tissue's 1st percentile becomes 0 and its 99th 1; outliers do not move them."""
    return tissue.at(_ENDS), (0.0, 1.0)


def nyul(tissue: TissueStatistics, standard: tuple[float, ...] | None) -> Points:
    """Return the points where the percentiles of the tissue become a cohort's (Nyul and Udupa 1999)."""
    return tissue.at(NYUL_PERCENTILES), standard or ()


def standard_landmarks(of_images: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Return the standard of Nyul's method: the mean of a cohort's landmarks."""
    mean = np.mean(np.array([one for one in of_images if one], dtype=np.float64), axis=0)
    return tuple(round(float(value), 6) for value in mean)


def _distinct(intensities: tuple[float, ...], values: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Remove repeated points, since images with few grey values have equal percentiles."""
    points = [(intensities[0], values[0])]
    for intensity, value in zip(intensities[1:], values[1:], strict=True):
        if intensity > points[-1][0] and value > points[-1][1]:
            points.append((intensity, value))
    return tuple(point[0] for point in points), tuple(point[1] for point in points)


def _along_lines(image: NDArray[Any], start: tuple[float, ...], end: tuple[float, ...]) -> NDArray[np.float32]:
    places, values = np.array(start, dtype=np.float64), np.array(end, dtype=np.float64)
    slopes = (np.diff(values) / np.diff(places)).astype(np.float32)
    if slopes.size == 1:
        line: NDArray[np.float32] = np.subtract(image, np.float32(start[0]), dtype=np.float32)
        # An outlier may lie so many deviations away that it becomes infinite; levels end at 32 deviations anyway.
        with np.errstate(over="ignore"):
            line *= slopes[0]
        line += np.float32(end[0])
        return line
    result = np.empty(image.shape, dtype=np.float32)
    first_places, first_values = places.astype(np.float32), values.astype(np.float32)
    # Plane by plane: which line a voxel is on takes twice the room of its value.
    for plane, out in zip(np.atleast_2d(image), np.atleast_2d(result), strict=True):
        line = np.searchsorted(first_places[1:-1], plane, side="right")
        with np.errstate(over="ignore"):
            out[...] = (plane - first_places[line]) * slopes[line] + first_values[line]
    return result
