"""Bias field estimation with N4: above air, within tissue, at a working resolution.

All functions depend only on the image and need no label map, so that prediction corrects a volume as training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.n4 import SplineField, fit_log_bias, itk_log_bias
from cspine_data.preprocessing.parameters import BiasParameters
from cspine_data.preprocessing.tissue import (
    TISSUE_MM,
    average_down,
    noise_floor,
    tissue_threshold,
    working_factors,
)
from cspine_data.volumes.geometry import Triple

# Where the signal of median tissue is this many standard deviations of the noise, the gain is halved. Below 1, since
# networks average neighbours; docs/bias-field.md has the Dice for 1, 0.5 and 0.25.
_LEAST_SNR = 0.5
# Voxel size at which a field is stored: it has no detail finer than this.
_FIELD_MM = 8.0


@dataclass(frozen=True, eq=False)
class BiasEstimate:
    """A volume's bias field and related estimates."""

    log_bias_xyz: NDArray[np.float32]
    """Natural logarithm of the field, float32, (x, y, z), mean zero over the tissue."""
    corrected_xyz: NDArray[np.float32]
    """The corrected image, float32, (x, y, z); see `correct`."""
    tissue_xyz: NDArray[np.bool_]
    """Tissue mask: above `tissue_threshold` after correction, and above the noise before it."""
    air_level: float
    """Intensity of air. The field applies to intensities above it."""
    tissue_threshold: float
    """Threshold in the corrected image."""
    noise_ratio: float
    """Standard deviation of the noise before correction, divided by the median of corrected tissue above air. It bounds
    the gain of `correct`."""
    noise_share: float
    """Share of the voxels above `tissue_threshold` that are not above the noise, and so no tissue."""


def estimate_bias(image_xyz: NDArray[Any], spacing_mm: Triple, parameters: BiasParameters) -> BiasEstimate:
    """Estimate a volume's bias field by N4 (Tustison et al. 2010); no label map is needed.

    The intensity of air is subtracted first, since the field multiplies only the signal. Where the field is weak,
    tissue is below a global threshold, so the tissue mask is updated a few times on the image corrected by a
    coarser estimate. Voxels that are not above the noise before correction are excluded: far from a weak coil the
    correction makes noise as bright as tissue.
    """
    factors = working_factors(spacing_mm, min(TISSUE_MM, parameters.resolution_mm))
    averaged = average_down(image_xyz, factors)
    averaged_mm = _times(spacing_mm, factors)
    first_threshold = threshold = tissue_threshold(averaged, averaged_mm)
    noise = noise_floor(image_xyz, averaged, factors, threshold)
    # Air of 8-bit images is one or two grey values. Voxels at this level are not corrected, and compress well.
    air = float(round(noise.level)) if image_xyz.dtype.kind in "iu" else noise.level
    # Tissue before any correction remains tissue.
    clear = noise.above_noise(averaged, averaged_mm) | (averaged > first_threshold)
    signal = averaged - np.float32(air)
    corrected = positive = np.maximum(signal, 0)
    for _ in range(parameters.mask_passes):
        tissue = clear & (corrected > threshold - air)
        log_bias = _estimate(signal, tissue, averaged_mm, parameters.coarser).on_grid(signal.shape)
        log_bias -= _mean(log_bias, tissue)
        ratio = _noise_ratio(noise.averaged_deviation, positive, log_bias, tissue)
        corrected = correct(positive, log_bias, noise_ratio=ratio)
        threshold = tissue_threshold(corrected, averaged_mm) + air
    tissue = clear & (corrected > threshold - air)
    estimate = _estimate(signal, tissue, averaged_mm, parameters)
    # N4 does not determine the mean of the field, but the threshold refers to an image with a fixed mean.
    log_bias_averaged = estimate.on_grid(signal.shape)
    level = _mean(log_bias_averaged, tissue)
    log_bias = estimate.on_grid(image_xyz.shape, finer=factors)
    log_bias -= level
    ratio = _noise_ratio(noise.deviation, positive, log_bias_averaged - level, tissue)
    corrected = correct(image_xyz, log_bias, air, ratio)
    bright = corrected > threshold
    in_tissue = bright & (image_xyz > min(noise.clear_level, first_threshold))
    level = _mean(log_bias, in_tissue)
    found, kept = np.count_nonzero(bright), np.count_nonzero(in_tissue)
    # Apply the change of the mean to the corrected image.
    log_bias -= level
    for plane in corrected:
        plane -= np.float32(air)
        np.multiply(plane, np.exp(level), out=plane, where=plane > 0)
        plane += np.float32(air)
    threshold = air + (threshold - air) * (float(np.exp(level)) if threshold > air else 1.0)
    return BiasEstimate(
        log_bias_xyz=log_bias,
        corrected_xyz=corrected,
        tissue_xyz=in_tissue,
        air_level=air,
        tissue_threshold=threshold,
        noise_ratio=ratio * float(np.exp(-level)),
        noise_share=1 - kept / found if found else 0.0,
    )


def _noise_ratio(
    deviation: float, signal: NDArray[np.float32], log_bias: NDArray[np.float32], tissue: NDArray[np.bool_]
) -> float:
    """Return the standard deviation of noise divided by the median of corrected tissue; 0 without tissue."""
    if not deviation or not tissue.any():
        return 0.0
    return deviation / float(np.median(signal[tissue] * np.exp(-log_bias[tissue])))


def estimate_log_bias(
    image_xyz: NDArray[Any],
    tissue_xyz: NDArray[np.bool_],
    spacing_mm: Triple,
    parameters: BiasParameters,
) -> NDArray[np.float32]:
    """Return the logarithm of the bias field within a tissue mask, with mean zero over the tissue.

    The field is estimated on a grid of about the working resolution and evaluated on the image's: it is smooth, and
    most of N4's time is proportional to the number of voxels. Voxels that are not positive are left out.
    """
    inside = tissue_xyz & (image_xyz > 0)
    log_bias = _estimate(image_xyz, inside, spacing_mm, parameters).on_grid(image_xyz.shape)
    return log_bias - _mean(log_bias, inside)


def correct(
    image_xyz: NDArray[Any], log_bias_xyz: NDArray[np.float32], air: float = 0.0, noise_ratio: float = 0.0
) -> NDArray[np.float32]:
    """Divide intensities above air by the bias field, with a gain bounded by the noise; others are unchanged.

    The gain is that of a Wiener filter, ``b / (b**2 + r**2)`` of the field `b`: 1 / b where tissue is above the
    noise, half of that where the signal of median tissue is half a standard deviation of the noise, and nearly 0
    where there is only noise. A `noise_ratio` of 0 does not bound the gain.
    """
    corrected = np.empty(image_xyz.shape, dtype=np.float32)
    level = np.float32(air)
    squared = np.float32((noise_ratio * _LEAST_SNR) ** 2)
    gain, bound = np.empty((2, *image_xyz.shape[1:]), dtype=np.float32)
    # Planes fit into the processor's cache, which takes half the time of whole arrays.
    for image, log_bias, plane in zip(image_xyz, log_bias_xyz, corrected, strict=True):
        np.subtract(image, level, out=plane, casting="unsafe")
        np.negative(log_bias, out=gain)
        np.exp(gain, out=gain)
        if squared:
            np.multiply(gain, gain, out=bound)
            bound *= squared
            bound += 1
            gain /= bound
        gain *= plane
        np.copyto(plane, gain, where=plane > 0)
        plane += level
    return corrected


def uncorrect(
    corrected: NDArray[Any], log_bias: NDArray[np.float32], air: float, noise_ratio: float
) -> NDArray[np.float32]:
    """Return the intensities before `correct`; arrays of any three-dimensional shape."""
    gain = correct(np.ones_like(log_bias), log_bias, noise_ratio=noise_ratio)
    signal = corrected - np.float32(air)
    return np.where(signal > 0, signal / gain, signal) + np.float32(air)


def field_factors(size_xyz: tuple[int, ...], spacing_mm: Triple) -> tuple[int, int, int]:
    """Return how many voxels of an image a voxel of its stored field averages, along x, y and z."""
    x, y, z = (min(n, size) for n, size in zip(working_factors(spacing_mm, _FIELD_MM), size_xyz, strict=True))
    return x, y, z


def field_at(
    field_xyz: NDArray[np.float32], factors: tuple[int, int, int], indices: tuple[NDArray[np.int_], ...]
) -> NDArray[np.float32]:
    """Interpolate a stored field at voxels of its image, on the grid of their indices along x, y and z."""
    from scipy.ndimage import map_coordinates

    at = [(index - (factor - 1) / 2) / factor for index, factor in zip(indices, factors, strict=True)]
    return np.asarray(map_coordinates(field_xyz, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest"))


@dataclass(frozen=True, eq=False)
class _WorkingField:
    """A field estimated on a working grid, each voxel of which averages `factors` voxels of the image's grid."""

    field: SplineField
    working_shape: tuple[int, ...]
    factors: tuple[int, ...]

    def on_grid(self, shape: tuple[int, ...], finer: tuple[int, ...] = (1, 1, 1)) -> NDArray[np.float32]:
        """Evaluate on the image's grid, or on one whose voxels were averaged, `finer` to one, to the image's."""
        positions = []
        for size, few, factor, more in zip(shape, self.working_shape, self.factors, finer, strict=True):
            # The centre of the first block lies (block - 1) / 2 voxels in; beyond the outer centres the field stays.
            block = factor * more
            in_blocks = (np.arange(size) - (block - 1) / 2) / block
            positions.append(np.clip(in_blocks / max(few - 1, 1), 0, 1))
        return self.field.at(*positions)


def _estimate(
    image: NDArray[Any], tissue: NDArray[np.bool_], spacing_mm: Triple, parameters: BiasParameters
) -> _WorkingField:
    factors = working_factors(spacing_mm, parameters.resolution_mm)
    share = average_down(tissue, factors)
    summed = average_down(np.where(tissue, image, np.float32(0)), factors)
    mask = (share > 0.5) & (summed > 0)
    if np.unique(summed[mask]).size < 2:
        return _WorkingField(SplineField(np.zeros((4, 4, 4))), share.shape, factors)
    log_image = np.log(np.divide(summed, share, out=np.ones_like(share), where=mask))
    slopes = _slopes(log_image, mask)
    trend = SplineField.linear(slopes).at(*(np.linspace(0, 1, n) for n in mask.shape))
    working_mm = _times(spacing_mm, factors)
    if parameters.engine == "itk":
        elements = (parameters.control_points - 3) * 2 ** (len(parameters.iterations) - 1)
        residual = itk_log_bias(np.exp(log_image - trend), mask, working_mm, parameters)
        field = SplineField.through(residual, (elements,) * 3)
    else:
        extent_mm = [(n - 1) * mm for n, mm in zip(mask.shape, working_mm, strict=True)]
        field = fit_log_bias(log_image - trend, mask, extent_mm, parameters)
    return _WorkingField(field.plus(slopes), mask.shape, factors)


def _slopes(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the slope along each axis, over the whole grid, of the linear function nearest to the values."""
    at = np.argwhere(mask) / np.maximum(np.array(mask.shape) - 1, 1)
    slopes, *_ = np.linalg.lstsq(at - at.mean(0), values[mask] - values[mask].mean(), rcond=None)
    return np.asarray(slopes, dtype=np.float64)


def _times(spacing_mm: Triple, factors: tuple[int, int, int]) -> Triple:
    first, second, third = (mm * factor for mm, factor in zip(spacing_mm, factors, strict=True))
    return first, second, third


def _mean(values: NDArray[np.float32], where: NDArray[np.bool_]) -> np.float32:
    return np.float32(values[where].mean(dtype=np.float64)) if where.any() else np.float32(0)
