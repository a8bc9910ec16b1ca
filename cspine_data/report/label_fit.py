"""How well a label map fits its image, and what the anatomy around it looks like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.tissue import average_down, working_factors
from cspine_data.volumes.geometry import Triple

Array = NDArray[np.float32]

# Voxel sizes, mm: outlines need a finer grid than the anatomy around them.
_OUTLINE_MM, _SURROUNDINGS_MM = 2.0, 8.0
# Farthest displacement that is tried.
_FARTHEST_MM = 15.0
# Blur of the gradient, and distance within which it is compared: near fat all gradients are large.
_BLUR_MM, _LOCAL_MM = 1.0, 12.0
# The surroundings of the label map's centre: voxels along x, y and z.
_SURROUNDINGS = (6, 18, 22)
# Share of the brightest tissue that is added before the logarithm, so that dark noise stays small.
_DARK = 0.05


@dataclass(frozen=True)
class LabelFit:
    """How well the outlines of a label map lie on edges of the image."""

    here: float
    """Mean edge strength on the outlines, in standard deviations above its mean over all displacements up to 15 mm."""
    gain: float
    """How much higher the fit is at the best displacement."""
    displacement_mm: Triple
    """The best displacement, along x, y and z."""


def label_fit(image_xyz: NDArray[Any], labelled_xyz: NDArray[np.bool_], spacing_mm: Triple) -> LabelFit:
    """Compare the outlines of a label map with the edges of its image.

    The edge strength is the gradient of log intensity, relative to its mean nearby. Its mean over the outlines is
    computed by FFT for all displacements of the label map up to 15 mm. Bright and dark vertebrae give the same fit. On
    26 real label maps of two cohorts, the correct position is 2.4 to 5.1 standard deviations above the mean, and the
    best displacement is at most 0.5 better.
    """
    from scipy import fft

    factors = working_factors(spacing_mm, _OUTLINE_MM)
    region = _around(labelled_xyz, spacing_mm, 2 * _FARTHEST_MM)
    image, labelled = (average_down(array[region], factors) for array in (image_xyz, labelled_xyz))
    step_mm = tuple(mm * factor for mm, factor in zip(spacing_mm, factors, strict=True))
    edges = _edges(image, step_mm)
    outline = _gradient(labelled, step_mm)
    reach = [max(1, math.floor(_FARTHEST_MM / mm)) for mm in step_mm]
    shape = [fft.next_fast_len(n + 2 * r, real=True) for n, r in zip(image.shape, reach, strict=True)]
    product = fft.rfftn(edges - edges.mean(), shape) * np.conj(fft.rfftn(outline, shape))
    near = np.ix_(*(np.arange(-r, r + 1) % n for r, n in zip(reach, shape, strict=True)))
    strength = fft.irfftn(product, shape)[near]
    strength = (strength - strength.mean()) / (strength.std() or 1.0)
    here, best = strength[tuple(reach)], np.unravel_index(strength.argmax(), strength.shape)
    x, y, z = (float((at - r) * mm) for at, r, mm in zip(best, reach, step_mm, strict=True))
    return LabelFit(float(here), float(strength.max() - here), (x, y, z))


def surroundings(image_xyz: NDArray[Any], labelled_xyz: NDArray[np.bool_], spacing_mm: Triple) -> Array:
    """Return the image around the centre of the labelled voxels: log intensity, voxels of 8 mm, (6, 18, 22).

    Slow variation is removed, the rest has mean 0 and standard deviation 1. Voxels outside the image are 0.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    factors = working_factors(spacing_mm, _OUTLINE_MM)
    image = average_down(image_xyz, factors)
    step_mm = [mm * factor for mm, factor in zip(spacing_mm, factors, strict=True)]
    image = gaussian_filter(_log(image), [_SURROUNDINGS_MM / 2 / mm for mm in step_mm])
    at = []
    for axis, (count, mm, factor) in enumerate(zip(_SURROUNDINGS, step_mm, factors, strict=True)):
        voxels = np.count_nonzero(labelled_xyz, axis=tuple(other for other in range(3) if other != axis))
        centre = (np.average(np.arange(voxels.size), weights=voxels) - (factor - 1) / 2) / factor
        at.append(centre + (np.arange(count) - (count - 1) / 2) * _SURROUNDINGS_MM / mm)
    found = map_coordinates(image, np.meshgrid(*at, indexing="ij"), order=1, cval=np.nan)
    inside = np.isfinite(found)
    if not inside.any():
        return np.zeros(_SURROUNDINGS, np.float32)
    found = found - gaussian_filter(np.where(inside, found, found[inside].mean()), 4)
    found = (found - found[inside].mean()) / (found[inside].std() or 1.0)
    return np.where(inside, found, 0).astype(np.float32)


def similarity(one: Array, other: Array) -> float:
    """Return the correlation of two `surroundings` where both are inside their images; 0 if that is hardly anywhere."""
    both = (one != 0) & (other != 0)
    if np.count_nonzero(both) < both.size / 10:
        return 0.0
    return float(np.corrcoef(one[both], other[both])[0, 1])


def _around(labelled_xyz: NDArray[np.bool_], spacing_mm: Triple, margin_mm: float) -> tuple[slice, ...]:
    """Return the region of the labelled voxels with a margin."""
    region = []
    for axis, mm in enumerate(spacing_mm):
        at = np.flatnonzero(labelled_xyz.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = math.ceil(margin_mm / mm)
        region.append(slice(max(0, int(at[0]) - margin), int(at[-1]) + margin + 1))
    return tuple(region)


def _log(image: Array) -> Array:
    dark, bright = np.percentile(image, (1, 95))
    return np.asarray(np.log(np.maximum(image - dark, 0) + _DARK * max(bright - dark, np.finfo(np.float32).tiny)))


def _edges(image: Array, step_mm: tuple[float, ...]) -> Array:
    from scipy.ndimage import gaussian_filter

    strength = gaussian_filter(_gradient(_log(image), step_mm), [_BLUR_MM / mm for mm in step_mm])
    nearby = gaussian_filter(strength, [_LOCAL_MM / mm for mm in step_mm])
    return np.asarray(strength / (nearby + 1e-3 * nearby.max() + np.finfo(np.float32).tiny))


def _gradient(image: Array, step_mm: tuple[float, ...]) -> Array:
    """Return the size of the gradient; axes of one voxel are left out."""
    squared = np.zeros_like(image)
    for axis, mm in enumerate(step_mm):
        if image.shape[axis] > 1:
            squared += np.gradient(image, mm, axis=axis) ** 2
    return np.sqrt(squared)
