"""N4 (Tustison et al. 2010) on a regular grid, as small matrix products.

On a regular grid the scattered-data spline fit (Lee et al. 1997) needs no loop over voxels. A cubic B-spline's weights
are products of one weight an axis, so the sums of cubed and squared weights that the fit divides are three matrix
products each, and so is evaluating the field. Sharpening the histogram (Sled et al. 1998) is one `bincount` and a few
short Fourier transforms. ITK's filter walks over every voxel and its 64 control points instead; the results agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BINS = 200
_WIENER_NOISE = 0.01
_FULL_WIDTH_AT_HALF_MAXIMUM = 0.15


@dataclass(frozen=True, eq=False)
class SplineField:
    """A smooth field: cubic B-splines over the unit cube.

    Attributes
    ----------
    lattice : ndarray
        Control points, float64; an axis of n elements has n + 3 of them.
    """

    lattice: Array

    def at(self, *positions: Array) -> NDArray[np.float32]:
        """Evaluate the field on a regular grid.

        Parameters
        ----------
        *positions : ndarray
            Grid positions along each axis, from 0 to 1.

        Returns
        -------
        ndarray
            float32, one size an axis.
        """
        weights = [_weights(p, n - 3) for p, n in zip(positions, self.lattice.shape, strict=True)]
        field = self.lattice.astype(np.float32)
        for weight in weights:
            # Each product consumes the first axis and appends the new one.
            field = np.tensordot(field, weight.astype(np.float32), axes=(0, 1))
        return field

    def refined(self, axes: Sequence[bool]) -> SplineField:
        """Return the same field with twice the elements along the axes that are told."""
        lattice = self.lattice
        for axis, double in enumerate(axes):
            if double:
                lattice = np.moveaxis(_subdivided(np.moveaxis(lattice, axis, 0)), 0, axis)
        return SplineField(lattice)


def fit_log_bias(
    log_image: Array,
    mask: NDArray[np.bool_],
    extent_mm: Sequence[float],
    iterations: Sequence[int],
    threshold: float,
    spline_mm: float,
) -> SplineField:
    """Estimate the logarithm of a bias field.

    Parameters
    ----------
    log_image : ndarray
        Natural logarithm of the intensities, 3-D; looked at inside the mask only.
    mask : ndarray of bool
        Where to estimate, same shape.
    extent_mm : sequence of float
        Distance between the first and the last voxel along each axis.
    iterations : sequence of int
        Most iterations at each level. Between levels the elements are halved.
    threshold : float
        A level ends when the coefficient of variation of the field's change is less.
    spline_mm : float
        Axes whose elements are this short already are not refined; 0 refines all, as ITK does.
    """
    field = SplineField(np.zeros((4, 4, 4)))
    positions = [np.linspace(0, 1, n) for n in log_image.shape]
    observed = log_image[mask]
    current = observed
    for level, most in enumerate(iterations):
        if level:
            elements = [n - 3 for n in field.lattice.shape]
            field = field.refined([mm / n > spline_mm for mm, n in zip(extent_mm, elements, strict=True)])
        fit = _Fit(positions, field.lattice.shape, mask)
        fitted = observed - current
        for _ in range(most):
            field = SplineField(field.lattice + fit.lattice(current - _sharpened(current)))
            before, fitted = fitted, fit.values(field.lattice)
            current = observed - fitted
            change = np.exp(before - fitted)
            if change.std(ddof=1) / change.mean() <= threshold:
                break
    return field


class _Fit:
    """The spline fit of one level: its matrices depend on the mask and the number of control points only."""

    def __init__(self, positions: Sequence[Array], points: Sequence[int], mask: NDArray[np.bool_]) -> None:
        self._mask = mask
        self._weights = [_weights(p, n - 3) for p, n in zip(positions, points, strict=True)]
        squares = [weight**2 for weight in self._weights]
        # A voxel's share in a control point is its weight times the residual over the sum of its squared weights.
        self._cubes = [w**3 / s.sum(1, keepdims=True) for w, s in zip(self._weights, squares, strict=True)]
        total = _product(mask.astype(np.float64), squares)
        self._over_total = np.divide(1, total, out=np.zeros_like(total), where=total > 0)

    def lattice(self, residual: Array) -> Array:
        """Return the control points of the residual, given at the mask's voxels."""
        whole = np.zeros(self._mask.shape)
        whole[self._mask] = residual
        return np.asarray(_product(whole, self._cubes) * self._over_total)

    def values(self, lattice: Array) -> Array:
        """Return a field's values at the mask's voxels."""
        return np.asarray(_product(lattice, [weight.T for weight in self._weights])[self._mask])


def _product(array: Array, matrices: Sequence[Array]) -> Array:
    """Multiply each axis of an array (i, j, k) by a matrix (i, a), (j, b), (k, c)."""
    for matrix in matrices:
        array = np.tensordot(array, matrix, axes=(0, 0))
    return array


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


def _subdivided(lattice: Array) -> Array:
    """Halve the elements along the first axis; the spline stays the same."""
    doubled = np.empty((2 * len(lattice) - 3, *lattice.shape[1:]))
    doubled[0::2] = (lattice[:-1] + lattice[1:]) / 2
    doubled[1::2] = (lattice[:-2] + 6 * lattice[1:-1] + lattice[2:]) / 8
    return doubled


def _sharpened(values: Array) -> Array:
    """Deconvolve the histogram of log intensities by a Gaussian and map each value to what it most likely was."""
    lowest, highest = values.min(), values.max()
    slope = (highest - lowest) / (_BINS - 1)
    if slope <= 0:
        return values
    along = (values - lowest) / slope
    first = np.minimum(along.astype(int), _BINS - 2)
    share = along - first
    counts = np.bincount(first, 1 - share, _BINS) + np.bincount(first + 1, share, _BINS)

    size = 2 ** (int(np.ceil(np.log2(_BINS))) + 1)
    offset = (size - _BINS) // 2
    padded = np.zeros(size)
    padded[offset : offset + _BINS] = counts
    blur = _gaussian_spectrum(size, _FULL_WIDTH_AT_HALF_MAXIMUM / slope)
    sharp = np.maximum(np.fft.irfft(np.fft.rfft(padded) * blur / (blur**2 + _WIENER_NOISE)), 0)
    levels = lowest + (np.arange(size) - offset) * slope
    numerator, denominator = np.fft.irfft(np.fft.rfft(np.stack([levels * sharp, sharp])) * blur)
    expected = np.divide(numerator, denominator, out=np.zeros(size), where=denominator != 0)
    expected = expected[offset : offset + _BINS]
    return np.asarray(expected[first] + share * (expected[first + 1] - expected[first]))


def _gaussian_spectrum(size: int, width: float) -> Array:
    distance = np.minimum(np.arange(size), size - np.arange(size))
    gaussian = 2 * np.sqrt(np.log(2) / np.pi) / width * np.exp(-4 * np.log(2) * (distance / width) ** 2)
    # Symmetric about 0, so that its spectrum is real.
    return np.asarray(np.fft.rfft(gaussian).real)
