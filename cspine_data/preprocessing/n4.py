"""N4 (Tustison et al. 2010) on a regular grid, as small matrix products.

On a regular grid the scattered-data spline fit (Lee et al. 1997) needs no loop over voxels. A cubic B-spline's weights
are products of one weight an axis, so the sums of cubed and squared weights that the fit divides are three matrix
products each, and so is evaluating the field. Sharpening the histogram (Sled et al. 1998) is one `bincount` and a few
short Fourier transforms. ITK's filter walks over every voxel and its 64 control points instead; the results agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.parameters import BiasParameters

Array = NDArray[np.float64]
Real = TypeVar("Real", np.float32, np.float64)


@dataclass(frozen=True, eq=False)
class SplineField:
    """A smooth field: cubic B-splines over the unit cube."""

    lattice: Array
    """Control points, float64; an axis of n elements has n + 3 of them."""

    def at(self, *positions: Array) -> NDArray[np.float32]:
        """Evaluate the field on a regular grid, given by its positions along each axis, from 0 to 1."""
        weights = [_weights(p, n - 3).T for p, n in zip(positions, self.lattice.shape, strict=True)]
        return _product(self.lattice.astype(np.float32), [weight.astype(np.float32) for weight in weights])

    def refined(self, elements: Sequence[int]) -> SplineField:
        """Return the field with other numbers of elements along the axes; the same field where they are multiples."""
        positions = [np.linspace(0, 1, 4 * (n + 3)) for n in elements]
        weights = [_weights(p, n - 3).T for p, n in zip(positions, self.lattice.shape, strict=True)]
        return SplineField.through(_product(self.lattice, weights), elements)

    def plus(self, slopes: NDArray[np.float64]) -> SplineField:
        """Return the field with a linear function added, given by its slope along each axis of the cube."""
        # A cubic spline whose control points lie on a line is that line.
        along = [slope * (np.arange(n) - 1) / (n - 3) for slope, n in zip(slopes, self.lattice.shape, strict=True)]
        return SplineField(self.lattice + sum(np.ix_(*along)))

    @classmethod
    def linear(cls, slopes: NDArray[np.float64]) -> SplineField:
        """Return a linear function, 0 at the cube's first corner, given by its slope along each axis."""
        return cls(np.zeros((4, 4, 4))).plus(slopes)

    @classmethod
    def through(cls, values: Array, elements: Sequence[int]) -> SplineField:
        """Return the spline nearest to the values, in least squares, on a regular grid over the unit cube."""
        weights = [_weights(np.linspace(0, 1, n), few) for n, few in zip(values.shape, elements, strict=True)]
        return cls(_product(values.astype(np.float64), [np.asarray(np.linalg.pinv(weight).T) for weight in weights]))


def fit_log_bias(
    log_image: Array, weights: NDArray[Any], extent_mm: Sequence[float], parameters: BiasParameters
) -> SplineField:
    """Estimate the logarithm of a bias field from that of the intensities.

    `weights` are the weights of the voxels in the spline fit: a mask, or a confidence of 0 or more. `extent_mm` is
    the distance between the first and the last voxel along each axis.
    """
    first = parameters.control_points - 3
    # N4 converges slowly with one cubic element, so at least two.
    finest = [max(2 * first, round(mm / parameters.spline_mm)) if parameters.spline_mm else None for mm in extent_mm]
    field = SplineField(np.zeros((parameters.control_points,) * 3))
    positions = [np.linspace(0, 1, n) for n in log_image.shape]
    observed = log_image[weights > 0].astype(np.float64)
    for level, most in enumerate(parameters.iterations):
        if level:
            doubled = first * 2**level
            field = field.refined([min(doubled, most_elements or doubled) for most_elements in finest])
        fit = _Fit(positions, field.lattice.shape, weights)
        field = _fit_level(field, observed, fit, most, parameters)
    return field


def itk_log_bias(
    image: NDArray[Any], mask: NDArray[np.bool_], spacing_mm: Sequence[float], parameters: BiasParameters
) -> NDArray[Any]:
    """Estimate with SimpleITK's filter on the image's grid; it ignores `spline_mm` and `stride`."""
    import SimpleITK as sitk  # noqa: N813

    volumes = [sitk.GetImageFromArray(np.ascontiguousarray(a.transpose())) for a in (image, mask.astype(np.uint8))]
    for volume in volumes:
        volume.SetSpacing(spacing_mm)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    # Volumes are corrected in parallel, each on one thread.
    n4.SetNumberOfThreads(1)
    n4.SetMaximumNumberOfIterations(list(parameters.iterations))
    n4.SetConvergenceThreshold(parameters.threshold)
    n4.SetNumberOfControlPoints([parameters.control_points] * 3)
    n4.SetNumberOfHistogramBins(parameters.bins)
    n4.SetBiasFieldFullWidthAtHalfMaximum(parameters.width)
    n4.SetWienerFilterNoise(parameters.noise)
    n4.Execute(*volumes)
    return np.asarray(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volumes[0])).transpose())


def _fit_level(field: SplineField, observed: Array, fit: _Fit, most: int, parameters: BiasParameters) -> SplineField:
    lattice, fitted = field.lattice, fit.values(field.lattice)
    change = fit.lattice(_sharpening(observed - fitted, parameters))
    stride, left = parameters.stride, float(most)
    while left > 0:
        step = min(stride, left)
        further = lattice + step * change
        values = fit.values(further)
        next_change = fit.lattice(_sharpening(observed - values, parameters))
        if step > 1 and np.vdot(next_change, change) < 0:
            stride = max(1.0, step / 2)
            continue
        left -= step
        factor = np.exp(fitted - values)
        lattice, fitted, change = further, values, next_change
        if factor.std(ddof=1) / factor.mean() <= step * parameters.threshold:
            break
    return SplineField(lattice)


class _Fit:
    """The spline fit of one level: its matrices depend on the weights and the number of control points only."""

    def __init__(self, positions: Sequence[Array], points: Sequence[int], weights: NDArray[Any]) -> None:
        self._inside = np.flatnonzero(weights > 0)
        self._weights = weights.ravel()[self._inside].astype(np.float64)
        self._whole = np.zeros(weights.shape)
        self._splines = [_weights(p, n - 3) for p, n in zip(positions, points, strict=True)]
        squares = [spline**2 for spline in self._splines]
        # A voxel's share in a control point is its weight times the residual over the sum of its squared weights.
        self._cubes = [w**3 / s.sum(1, keepdims=True) for w, s in zip(self._splines, squares, strict=True)]
        total = _product(weights.astype(np.float64), squares)
        self._over_total = np.divide(1, total, out=np.zeros_like(total), where=total > 0)

    def lattice(self, residual: Array) -> Array:
        """Return the control points of the residual, given at the voxels that count."""
        self._whole.ravel()[self._inside] = residual * self._weights
        return np.asarray(_product(self._whole, self._cubes) * self._over_total)

    def values(self, lattice: Array) -> Array:
        """Return a field's values at the voxels that count."""
        return np.asarray(_product(lattice, [spline.T for spline in self._splines]).ravel()[self._inside])


def _product(array: NDArray[Real], matrices: Sequence[NDArray[Real]]) -> NDArray[Real]:
    """Multiply each axis of an array (i, j, k) by a matrix (i, a), (j, b), (k, c)."""
    first, second, third = matrices
    return cast("NDArray[Real]", np.tensordot(first, np.matmul(second.T, array @ third), axes=(0, 0)))


def _weights(positions: Array, elements: int) -> Array:
    """Return the weight of each control point, (n, elements + 3), at positions from 0 to 1."""
    # The last position belongs to the last element, not to one beyond.
    along = np.minimum(positions * elements, elements - 1e-9 * elements)
    first = along.astype(int)
    t = along - first
    parts = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    weights = np.zeros((len(positions), elements + 3))
    rows = np.arange(len(positions))
    for offset, part in enumerate(parts):
        weights[rows, first + offset] = part / 6
    return weights


def _sharpening(values: Array, parameters: BiasParameters) -> Array:
    """Deconvolve the histogram of log intensities by a Gaussian; return how far each value is from what it was."""
    bins, noise = parameters.bins, parameters.noise
    lowest, highest = values.min(), values.max()
    slope = (highest - lowest) / (bins - 1)
    if slope <= 0:
        return np.zeros_like(values)
    along = (values - lowest) / slope
    first = along.astype(np.intp)
    share = along - first
    # A value belongs to two bins, by its distance; the highest one, and rounding, may fall into a bin beyond the last.
    upper = np.bincount(first, share, bins + 1)
    counts = np.bincount(first, minlength=bins + 1) - upper
    counts[1:] += upper[:-1]
    counts[bins - 1] += counts[bins]
    counts = counts[:bins]

    size = 2 ** (int(np.ceil(np.log2(bins))) + 1)
    offset = (size - bins) // 2
    padded = np.zeros(size)
    padded[offset : offset + bins] = counts
    blur = _gaussian_spectrum(size, parameters.width / slope)
    sharp = np.maximum(np.fft.irfft(np.fft.rfft(padded) * blur / (blur**2 + noise)), 0)
    levels = lowest + (np.arange(size) - offset) * slope
    numerator, denominator = np.fft.irfft(np.fft.rfft(np.stack([levels * sharp, sharp])) * blur)
    expected = np.divide(numerator, denominator, out=np.zeros(size), where=denominator != 0)
    expected = expected[offset : offset + bins]
    slopes = np.append(np.diff(expected), (0.0, 0.0))
    result = slopes[first]
    result *= share
    result += np.append(expected, expected[-1])[first]
    return np.asarray(values - result)


def _gaussian_spectrum(size: int, width: float) -> Array:
    distance = np.minimum(np.arange(size), size - np.arange(size))
    gaussian = 2 * np.sqrt(np.log(2) / np.pi) / width * np.exp(-4 * np.log(2) * (distance / width) ** 2)
    # Symmetric about 0, so that its spectrum is real.
    return np.asarray(np.fft.rfft(gaussian).real)
