"""What smooth field multiplies a volume's intensities: air and tissue, N4 at a working resolution, correction.

Everything here is a pure function of the image; no label map is needed, so that a volume to predict is corrected
exactly as the volumes of training were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cspine_data._n4 import fit_log_bias
from cspine_data.geometry import Triple

# The grid that tissue is told from air on: fine enough for skin, coarse enough to average the noise away.
_MASK_MM = 3.0
# In the logarithm of intensity air spreads out without end; this share of the intensity range stops it.
_LOG_FLOOR = 0.03
# Air is flat: on eleven real scans and four phantoms the darker half of the dark class spreads over at most 0.05 of
# the distance to the bright class where there is air (0.10 in one crop with little of it), and over 0.14 to 0.48 in
# crops that hold none.
_FLATTEST_TISSUE = 0.12


class BiasParameters(BaseModel):
    """How N4 estimates the field; each parameter changes the result and is part of a case's digest.

    Attributes
    ----------
    engine : str
        ``separable``: N4 as matrix products on a regular grid. ``itk``: SimpleITK's filter, its slow twin,
        which takes no notice of `spline_mm`.
    resolution_mm : float
        Voxel size of the working grid. The image is averaged down to about this, never up.
    iterations : tuple of int
        Most iterations at each fitting level; each level halves the spacing of the spline's control points.
    threshold : float
        A level ends when the field's coefficient of variation changes by less than this.
    spline_mm : float
        Control points nearer than this along an axis are not halved further; 0 halves all, as ITK does.
    mask_passes : int
        How often the tissue mask is found anew on an image corrected by a shorter estimate, before the final one.
    """

    model_config = ConfigDict(frozen=True)

    engine: Literal["separable", "itk"] = "separable"
    resolution_mm: float = Field(default=6.0, gt=0)
    iterations: tuple[int, ...] = Field(default=(400, 400, 400, 400), min_length=1)
    threshold: float = Field(default=1e-6, gt=0)
    spline_mm: float = Field(default=80.0, ge=0)
    mask_passes: int = Field(default=3, ge=0)

    @property
    def shorter(self) -> BiasParameters:
        """What is enough to find the tissue mask."""
        iterations = tuple(min(most, 100) for most in self.iterations)
        update = {
            "engine": "separable",
            "resolution_mm": max(self.resolution_mm, 10.0),
            "iterations": iterations,
            "threshold": max(self.threshold, 1e-4),
        }
        return self.model_copy(update=update)


@dataclass(frozen=True, eq=False)
class BiasEstimate:
    """A volume's bias field, and what it was estimated from.

    Attributes
    ----------
    log_bias_xyz : ndarray
        Natural logarithm of the field, float32, (x, y, z), mean zero over the tissue.
    tissue_xyz : ndarray of bool
        Which voxels are tissue: above `tissue_threshold` after correction.
    air_level : float
        Intensity of air. The field multiplies what lies above it.
    tissue_threshold : float
        In the corrected image.
    """

    log_bias_xyz: NDArray[np.float32]
    tissue_xyz: NDArray[np.bool_]
    air_level: float
    tissue_threshold: float


def average_down(array: NDArray[Any], factors: tuple[int, ...]) -> NDArray[np.float32]:
    """Average blocks of voxels; the last block of an axis repeats the edge where the size is no multiple.

    Parameters
    ----------
    array : ndarray
        Any real array.
    factors : tuple of int
        Voxels to a block, along each axis.

    Returns
    -------
    ndarray
        float32, each size divided by its factor and rounded up.
    """
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
    tissue, vertebrae included, with the air. Where the darker class is not flat, as air is, the volume is a crop
    without air, and the threshold lies below every voxel.

    Parameters
    ----------
    image_xyz : ndarray
        Intensities, any real dtype, any axis order.
    spacing_mm : tuple of float
        Voxel spacing along each axis.
    """
    averaged = average_down(image_xyz, working_factors(spacing_mm, _MASK_MM))
    darkest, brightest = (float(value) for value in np.percentile(averaged, (1, 99)))
    if brightest <= darkest:
        darkest, brightest = float(image_xyz.min()), float(image_xyz.max())
    span = brightest - darkest
    levels = np.log(np.clip((averaged - darkest) / span, 0, 1) + _LOG_FLOOR)
    threshold = darkest + (float(np.exp(_otsu(levels))) - _LOG_FLOOR) * span
    dark, bright = averaged[averaged <= threshold], averaged[averaged > threshold]
    if dark.size and bright.size:
        low, middle = np.percentile(dark, (10, 50))
        if middle - low > _FLATTEST_TISSUE * (np.median(bright) - middle):
            return float(image_xyz.min()) - 1.0
    return threshold


def _otsu(values: NDArray[Any], bins: int = 256) -> float:
    counts, edges = np.histogram(values, bins)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sum_below = np.cumsum(counts * centres)[:-1]
    total = sum_below[-1] + counts[-1] * centres[-1]
    between = below * above * (sum_below / np.maximum(below, 1) - (total - sum_below) / np.maximum(above, 1)) ** 2
    best = np.flatnonzero(between == between.max())
    return float(edges[1:-1][best].mean())


def air_level(image_xyz: NDArray[Any], threshold: float) -> float:
    """Return the intensity of air, the median of what is not tissue; 0 where there is no air.

    Scanners put air near 0; a later rescaling to fewer bits often does not.
    """
    dark = image_xyz[image_xyz <= threshold]
    return float(np.median(dark)) if dark.size else 0.0


def estimate_bias(image_xyz: NDArray[Any], spacing_mm: Triple, parameters: BiasParameters) -> BiasEstimate:
    """Estimate a volume's bias field by N4 (Tustison et al. 2010); no label map is needed.

    The intensity of air is taken off first: a field multiplies signal, and the logarithm of signal and an offset is
    no sum of logarithms. Where the field is weak, tissue falls below any one threshold; so the tissue mask is found
    again, a few times, on the image that a shorter estimate has corrected, before the field is estimated to the end.

    Parameters
    ----------
    image_xyz : ndarray
        Intensities, any real dtype, (x, y, z).
    spacing_mm : tuple of float
        Voxel spacing along x, y and z.
    parameters : BiasParameters
        How to estimate.
    """
    factors = working_factors(spacing_mm, min(_MASK_MM, parameters.resolution_mm))
    coarse = average_down(image_xyz, factors)
    first, second, third = (mm * factor for mm, factor in zip(spacing_mm, factors, strict=True))
    coarse_mm = (first, second, third)
    threshold = tissue_threshold(image_xyz, spacing_mm)
    air = air_level(coarse, threshold)
    signal = np.maximum(coarse - np.float32(air), 0)
    corrected = signal
    for _ in range(parameters.mask_passes):
        log_bias = estimate_log_bias(signal, corrected > threshold - air, coarse_mm, parameters.shorter)
        corrected = correct(signal, log_bias)
        threshold = tissue_threshold(corrected, coarse_mm) + air
    tissue = corrected > threshold - air
    log_bias = _log_bias_on_finer_grid(signal, tissue, coarse_mm, parameters, factors, image_xyz.shape)
    # N4 leaves the field's level open, and the threshold is of an image that keeps its own.
    middles = [
        np.minimum(np.arange(few) * factor + factor // 2, full - 1)
        for few, factor, full in zip(tissue.shape, factors, image_xyz.shape, strict=True)
    ]
    log_bias -= _mean(log_bias[np.ix_(*middles)], tissue)
    in_tissue = correct(image_xyz, log_bias, air) > threshold
    log_bias -= _mean(log_bias, in_tissue)
    return BiasEstimate(log_bias, in_tissue, air, threshold)


def estimate_log_bias(
    image_xyz: NDArray[Any],
    tissue_xyz: NDArray[np.bool_],
    spacing_mm: Triple,
    parameters: BiasParameters,
) -> NDArray[np.float32]:
    """Estimate the natural logarithm of the bias field within a given tissue mask, on the image's own grid.

    The field is estimated on a grid of about the working resolution and evaluated on the image's: it is smooth, and
    most of N4's time is proportional to the number of voxels.

    Parameters
    ----------
    image_xyz : ndarray
        Intensities above air, (x, y, z).
    tissue_xyz : ndarray of bool
        Where the image is tissue, same shape. Voxels that are not positive are left out.
    spacing_mm : tuple of float
        Voxel spacing along x, y and z.
    parameters : BiasParameters
        How to estimate.

    Returns
    -------
    ndarray
        float32, (x, y, z), mean zero over the tissue.
    """
    log_bias = _log_bias_on_finer_grid(image_xyz, tissue_xyz, spacing_mm, parameters, (1, 1, 1), image_xyz.shape)
    inside = tissue_xyz & (image_xyz > 0)
    return log_bias - _mean(log_bias, inside)


def _log_bias_on_finer_grid(
    image: NDArray[Any],
    tissue: NDArray[np.bool_],
    spacing_mm: Triple,
    parameters: BiasParameters,
    finer: tuple[int, int, int],
    shape: tuple[int, ...],
) -> NDArray[np.float32]:
    """Estimate on an image, and evaluate on the grid of `shape` whose voxels were averaged, `finer` to one, to it."""
    factors = working_factors(spacing_mm, parameters.resolution_mm)
    inside = tissue & (image > 0)
    share = average_down(inside, factors)
    summed = average_down(np.where(inside, image, np.float32(0)), factors)
    working = np.asarray(summed / np.maximum(share, 1e-6), dtype=np.float32)
    mask = share > 0.5
    if np.unique(working[mask]).size < 2:
        return np.zeros(shape, dtype=np.float32)
    engine = _with_itk if parameters.engine == "itk" else _with_separable_products
    whole = tuple(factor * more for factor, more in zip(factors, finer, strict=True))
    fine_mm = tuple(mm / more for mm, more in zip(spacing_mm, finer, strict=True))
    return engine(working, mask, whole, fine_mm, shape, parameters)


def _with_separable_products(
    working: NDArray[np.float32],
    mask: NDArray[np.bool_],
    factors: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    shape: tuple[int, ...],
    parameters: BiasParameters,
) -> NDArray[np.float32]:
    extent_mm = [(n - 1) * f * mm for n, f, mm in zip(working.shape, factors, spacing_mm, strict=True)]
    logarithm = np.log(np.where(mask, working, 1), dtype=np.float64)
    field = fit_log_bias(logarithm, mask, extent_mm, parameters.iterations, parameters.threshold, parameters.spline_mm)
    positions = []
    for full, few, factor in zip(shape, working.shape, factors, strict=True):
        # The centre of the first block lies (factor - 1) / 2 voxels in; beyond the outer centres the field stays.
        in_blocks = (np.arange(full) - (factor - 1) / 2) / factor
        positions.append(np.clip(in_blocks / max(few - 1, 1), 0, 1))
    return field.at(*positions)


def _with_itk(
    working: NDArray[np.float32],
    mask: NDArray[np.bool_],
    factors: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    shape: tuple[int, ...],
    parameters: BiasParameters,
) -> NDArray[np.float32]:
    import SimpleITK as sitk  # noqa: N813

    offset = [(factor - 1) / 2 * mm for factor, mm in zip(factors, spacing_mm, strict=True)]
    image = _itk_image(working, [f * mm for f, mm in zip(factors, spacing_mm, strict=True)], offset)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(parameters.iterations))
    n4.SetConvergenceThreshold(parameters.threshold)
    n4.Execute(image, _itk_image(mask.astype(np.uint8), image.GetSpacing(), offset))
    full_grid = sitk.Image(list(shape), sitk.sitkUInt8)
    full_grid.SetSpacing(spacing_mm)
    # ITK's own evaluation stretches the field from the working grid's extent to the full one's.
    log_bias = sitk.Resample(
        n4.GetLogBiasFieldAsImage(image), full_grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32, True
    )
    return np.ascontiguousarray(sitk.GetArrayFromImage(log_bias).transpose())


def correct(image_xyz: NDArray[Any], log_bias_xyz: NDArray[np.float32], air: float = 0.0) -> NDArray[np.float32]:
    """Divide what lies above air by the bias field, given as natural logarithm; float32, air stays at its level."""
    above = np.asarray(image_xyz, dtype=np.float32) - np.float32(air)
    above *= np.exp(-log_bias_xyz)
    return above + np.float32(air)


def _mean(values: NDArray[np.float32], where: NDArray[np.bool_]) -> np.float32:
    return np.float32(values[where].mean(dtype=np.float64)) if where.any() else np.float32(0)


def _itk_image(array_xyz: NDArray[Any], spacing_mm: Any, origin_mm: Any) -> Any:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.ascontiguousarray(array_xyz.transpose()))
    image.SetSpacing([float(mm) for mm in spacing_mm])
    image.SetOrigin([float(mm) for mm in origin_mm])
    return image
