"""Tissue threshold, air level and noise of an image, without a label map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.volumes.geometry import Triple

#: Voxel size for separating tissue from air: fine enough for skin, coarse enough to average noise.
TISSUE_MM = 3.0
# In the logarithm of intensity air spreads out without end; this share of the intensity range stops it.
_LOG_FLOOR = 0.03
# Air is flat: on eleven real scans and four phantoms the darker half of the dark class spreads over at most 0.05 of
# the distance to the bright class where there is air (0.10 in one crop with little of it), and over 0.14 to 0.48 in
# crops that hold none.
_FLATTEST_TISSUE = 0.12
# Fat near a surface coil can be so bright that it alone is the bright class. The dark class is then split again: air
# spread over at most 0.028 of the distance between its two classes on phantoms with fat made 5 to 15 times as bright,
# what is darkest in crops that hold no air, seven of phantoms and fourteen of real scans, over 0.071 to 0.48.
_FLATTEST_WITHIN_DARK = 0.045
_FLATTEST_AIR = 0.01
_LEAST_TISSUE = 0.1
# The densest two fifths of a normal distribution are 1.049 standard deviations wide. Half of the values may be outliers
# then without more than doubling the estimate.
_CORE, _CORE_WIDTH = 0.4, 1.049
_ENOUGH_VALUES = 100_000
_NEIGHBOURHOOD_MM = 9.0
# All but one in four hundred noise voxels are within this many standard deviations of the mean.
_NOISE_DEVIATIONS = 3.0
_NOISE_ROUNDS = 10
# Air is -1000 Hounsfield units; no magnitude of MRI is negative, nor does scaling bring it that low.
_DARKEST_MRI = -500.0


def average_down(array: NDArray[Any], factors: tuple[int, ...]) -> NDArray[np.float32]:
    """Average blocks of voxels; the last block of an axis repeats the edge where the size is no multiple."""
    # Tiny voxels, or a header with wrong units, ask for blocks far larger than the image.
    factors = tuple(min(factor, size) for size, factor in zip(array.shape, factors, strict=True))
    padding = [(0, -size % factor) for size, factor in zip(array.shape, factors, strict=True)]
    padded = np.pad(array, padding, mode="edge")
    blocks: list[int] = []
    for size, factor in zip(padded.shape, factors, strict=True):
        blocks += [size // factor, factor]
    within_block = tuple(range(1, 2 * array.ndim, 2))
    return np.asarray(padded.reshape(blocks).mean(axis=within_block, dtype=np.float32))


def working_factors(spacing_mm: Triple, resolution_mm: float) -> tuple[int, int, int]:
    """Return how many voxels to average along each axis to come near a working resolution."""
    first, second, third = (max(1, round(resolution_mm / mm)) for mm in spacing_mm)
    return first, second, third


def tissue_threshold(image_xyz: NDArray[Any], spacing_mm: Triple) -> float:
    """Return the intensity above which a voxel is tissue rather than air; no label map is needed.

    Otsu's threshold (Otsu 1979) of the *logarithm* of intensity above the darkest percentile, on an image averaged
    to about 3 mm. Otsu's threshold of the intensity itself parts bright fat from everything else and leaves most
    tissue, vertebrae included, with the air; where fat is so bright that the logarithm does too, the darker class
    is parted once more. Where the darker class is not flat, as air is, the volume is a crop without air, and the
    threshold is below every voxel.
    """
    averaged = average_down(image_xyz, working_factors(spacing_mm, TISSUE_MM))
    darkest, brightest = (float(value) for value in np.percentile(averaged, (1, 99)))
    if brightest <= darkest:
        darkest, brightest = float(image_xyz.min()), float(image_xyz.max())
    if brightest <= darkest:
        return darkest - 1.0
    threshold, spread = _split_classes(averaged, darkest, brightest)
    dark = averaged[averaged <= threshold]
    if dark.size and (spread > _FLATTEST_TISSUE or dark.size > (1 - _LEAST_TISSUE) * averaged.size):
        within, spread_within = _split_classes(dark, darkest, threshold)
        # In a small patient's padded field of view only the margin is as flat, and what is brighter than it is air.
        brighter = np.count_nonzero(dark > within) / averaged.size
        padding = spread <= _FLATTEST_TISSUE and (spread_within < _FLATTEST_AIR or brighter < _LEAST_TISSUE)
        if spread_within < _FLATTEST_WITHIN_DARK and not padding:
            return within
    return threshold if spread <= _FLATTEST_TISSUE else float(image_xyz.min()) - 1.0


def _split_classes(values: NDArray[np.float32], darkest: float, brightest: float) -> tuple[float, float]:
    """Return the threshold between a dark and a bright class, and the relative spread of the dark one."""
    span = brightest - darkest
    if span < np.finfo(np.float32).tiny:
        # The two differ by less than single precision resolves.
        return brightest, 0.0
    levels = np.log(np.clip((values - darkest) / span, 0, 1) + np.float32(_LOG_FLOOR))
    threshold = darkest + (float(np.exp(_otsu(levels))) - _LOG_FLOOR) * span
    dark, bright = values[values <= threshold], values[values > threshold]
    if not dark.size or not bright.size:
        return threshold, 0.0
    low, middle = np.percentile(dark, (10, 50))
    return threshold, float((middle - low) / max(np.median(bright) - middle, np.finfo(np.float32).tiny))


def air_level(image_xyz: NDArray[Any], threshold: float) -> float:
    """Return the intensity of air, the median of voxels that are not tissue; 0 without air.

    Scanners put air near 0; a later rescaling to fewer bits often does not.
    """
    dark = image_xyz[image_xyz <= threshold]
    return float(np.median(dark)) if dark.size else 0.0


@dataclass(frozen=True)
class NoiseFloor:
    """Noise of an image where there is no signal."""

    level: float
    """Mean intensity. Noise in a magnitude image is not centred on zero (Gudbjartsson and Patz 1995)."""
    deviation: float
    """Standard deviation of one voxel. 0 where the image shows no noise: no air in view, or air set to one value."""
    averaged_deviation: float
    """Standard deviation after averaging to the grid that tissue is separated on."""

    @property
    def clear_level(self) -> float:
        """Intensity three standard deviations above the level of the noise."""
        return self.level + _NOISE_DEVIATIONS * self.deviation

    def above_noise(self, averaged_xyz: NDArray[np.float32], spacing_mm: Triple) -> NDArray[np.bool_]:
        """Return where the mean over about 9 mm of an averaged image is above the noise.

        With single voxels, only bright noise would pass where the signal is weak.
        """
        from scipy.ndimage import uniform_filter

        if not self.averaged_deviation:
            return np.ones(averaged_xyz.shape, dtype=bool)
        width = [max(1, round(_NEIGHBOURHOOD_MM / mm)) for mm in spacing_mm]
        around = uniform_filter(averaged_xyz, width, mode="nearest")
        near = np.abs(averaged_xyz - self.level) <= _NOISE_DEVIATIONS * self.averaged_deviation
        level, deviation = densest_core(around[near])
        return np.asarray(around > level + _NOISE_DEVIATIONS * deviation)


def noise_floor(
    image_xyz: NDArray[Any], averaged_xyz: NDArray[np.float32], factors: tuple[int, ...], threshold: float
) -> NoiseFloor:
    """Estimate level and deviation of the noise from the voxels that are not tissue.

    `averaged_xyz` is the image after `average_down` by `factors`. Weak tissue and artefacts are among the voxels.
    Noise is the narrow peak, so the estimate starts from the densest part and excludes outliers. Margins that a
    scanner or a program filled with one value are left out.
    """
    dark = (averaged_xyz <= threshold) & (averaged_xyz > averaged_xyz.min())
    values = averaged_xyz[dark]
    if not values.size:
        return NoiseFloor(air_level(averaged_xyz, threshold), 0.0, 0.0)
    level, deviation = densest_core(values)
    if not deviation:
        return NoiseFloor(level, 0.0, 0.0)
    for _ in range(_NOISE_ROUNDS):
        near = np.abs(values - level) <= _NOISE_DEVIATIONS * deviation
        level, deviation = float(values[near].mean(dtype=np.float64)), float(values[near].std(dtype=np.float64))
    noise = dark & (np.abs(averaged_xyz - level) <= _NOISE_DEVIATIONS * deviation)
    for axis, factor in enumerate(factors):
        noise = np.repeat(noise, factor, axis)
    full = image_xyz[noise[tuple(slice(n) for n in image_xyz.shape)]]
    return NoiseFloor(level, float(full.std(dtype=np.float64)) if full.size else 0.0, deviation)


def densest_core(values: NDArray[Any]) -> tuple[float, float]:
    """Return centre and standard deviation of the shortest interval that holds two fifths of the values.

    Up to half of the values may be outliers (compare the "shorth", half of them, of Rousseeuw and Leroy 1988). The
    deviation is that of a normal distribution with such an interval. Of very many values, every so many are looked
    at.
    """
    ordered = np.sort(values.ravel()[:: max(1, values.size // _ENOUGH_VALUES)])
    core = int(_CORE * ordered.size)
    widths = ordered[core:] - ordered[: ordered.size - core]
    first = int(widths.argmin())
    low, high = float(ordered[first]), float(ordered[first + core])
    return (low + high) / 2, (high - low) / _CORE_WIDTH


def looks_like_ct(image_xyz: NDArray[Any]) -> bool:
    """Return whether the dark voxels have the intensity of air in CT, which has no bias field."""
    return bool(image_xyz.min() < _DARKEST_MRI and np.percentile(image_xyz[::2, ::2, ::2], 5) < _DARKEST_MRI)


def _otsu(values: NDArray[Any], bins: int = 256) -> float:
    try:
        counts, edges = np.histogram(values, bins)
    except ValueError:
        # Beside one far brighter voxel all others agree to within a few steps of single precision.
        counts, edges = np.histogram(values.astype(np.float64), bins)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sum_below = np.cumsum(counts * centres)[:-1]
    total = sum_below[-1] + counts[-1] * centres[-1]
    between = below * above * (sum_below / np.maximum(below, 1) - (total - sum_below) / np.maximum(above, 1)) ** 2
    best = np.flatnonzero(between == between.max())
    return float(edges[1:-1][best].mean())
