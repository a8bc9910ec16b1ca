"""What smooth field multiplies a volume's intensities: tissue mask, N4 at a working resolution, correction.

Everything here is a pure function of the image; no label map is needed, so that a volume to predict is corrected
exactly as the volumes of training were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cspine_data.geometry import Triple

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
    resolution_mm : float
        Voxel size of the working grid. The image is averaged down to about this, never up.
    iterations : tuple of int
        Most iterations at each fitting level; each level halves the spacing of the spline's control points.
    threshold : float
        A level ends when the field's coefficient of variation changes by less than this.
    """

    model_config = ConfigDict(frozen=True)

    resolution_mm: float = Field(default=8.0, gt=0)
    iterations: tuple[int, ...] = Field(default=(50, 50, 50, 50), min_length=1)
    threshold: float = Field(default=1e-3, gt=0)


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
    averaged = average_down(image_xyz, working_factors(spacing_mm, 3.0))
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


def estimate_log_bias(
    image_xyz: NDArray[Any],
    tissue_xyz: NDArray[np.bool_],
    spacing_mm: Triple,
    parameters: BiasParameters,
) -> NDArray[np.float32]:
    """Estimate the natural logarithm of the bias field by N4 (Tustison et al. 2010), on the image's full grid.

    The field is estimated on a grid of about the working resolution and evaluated on the full one: it is smooth, and
    most of N4's time is proportional to the number of voxels.

    Parameters
    ----------
    image_xyz : ndarray
        Intensities, (x, y, z).
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
    import SimpleITK as sitk  # noqa: N813

    factors = working_factors(spacing_mm, parameters.resolution_mm)
    inside = tissue_xyz & (image_xyz > 0)
    share = average_down(inside, factors)
    working = average_down(np.where(inside, image_xyz, np.float32(0)), factors) / np.maximum(share, 1e-6)
    mask = share > 0.5
    if np.unique(working[mask]).size < 2:
        return np.zeros(image_xyz.shape, dtype=np.float32)
    offset = [(factor - 1) / 2 * mm for factor, mm in zip(factors, spacing_mm, strict=True)]
    image = _itk_image(working, [f * mm for f, mm in zip(factors, spacing_mm, strict=True)], offset)
    mask_image = _itk_image(mask.astype(np.uint8), image.GetSpacing(), offset)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(parameters.iterations))
    n4.SetConvergenceThreshold(parameters.threshold)
    n4.Execute(image, mask_image)
    full_grid = sitk.Image(list(image_xyz.shape), sitk.sitkUInt8)
    full_grid.SetSpacing(spacing_mm)
    log_bias = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(full_grid)).transpose()
    return np.asarray(log_bias - log_bias[inside].mean(dtype=np.float64), dtype=np.float32)


def correct(image_xyz: NDArray[Any], log_bias_xyz: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide an image by its bias field, given as natural logarithm; float32."""
    return np.asarray(image_xyz * np.exp(-log_bias_xyz), dtype=np.float32)


def _itk_image(array_xyz: NDArray[Any], spacing_mm: Any, origin_mm: Any) -> Any:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.ascontiguousarray(array_xyz.transpose()))
    image.SetSpacing([float(mm) for mm in spacing_mm])
    image.SetOrigin([float(mm) for mm in origin_mm])
    return image
