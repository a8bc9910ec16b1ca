"""Resampling of volumes to other voxel spacings, with one small matrix per axis.

The centre of the volume is kept, so that the grid and the resampled grid cover the same region.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.threads import one_blas_thread
from cspine_data.volumes.geometry import Triple

Size = tuple[int, int, int]
# How wide a Gaussian is at half its height, in standard deviations.
_FULL_WIDTH = 2 * math.sqrt(2 * math.log(2))
# A spacing in a file's header is rounded; a difference below this moves no voxel of any volume by a tenth of itself.
_SAME_SPACING = 1e-4
# Spacings of 0.7 and 1.4 mm are no exact half in a file's single precision: no border's tie may hang on that.
_ROUNDED_HEADER = 0.02
# What decides between label values whose shares differ by no more than a header's rounding does.
_TIE = np.float32(_ROUNDED_HEADER)


def resampled_size(size: Size, spacing_mm: Triple, new_spacing_mm: Triple) -> Size:
    """Return the size of a grid with another spacing: the integers nearest to its extent, at least 1."""
    first, second, third = (
        n if _same(mm, new_mm) else max(1, round(n * mm / new_mm))
        for n, mm, new_mm in zip(size, spacing_mm, new_spacing_mm, strict=True)
    )
    return first, second, third


def resample_image(
    image_xyz: NDArray[Any], spacing_mm: Triple, size: Size, new_spacing_mm: Triple, *, order: int = 3
) -> NDArray[np.float32]:
    """Resample an image by a spline, smoothed first along axes that lose resolution; the centre stays.

    Where voxels grow, the image is smoothed by the Gaussian that turns the old voxel's point spread into the new
    one's (Cardoso et al. 2015, "Scale factor point spread function matching"), so that nothing finer than the new
    grid comes back as a pattern. A cubic spline (`order` 3; 1 is linear) swings beyond what it runs through; what
    leaves the image's own range is put back to its ends.
    """
    image = np.asarray(image_xyz, dtype=np.float32)
    matrices = _matrices(image.shape, spacing_mm, size, new_spacing_mm, partial(_spline_matrix, order=order))
    if not any(matrix is not None for matrix in matrices):
        return image
    return np.clip(_through(image, matrices), image.min(), image.max())


def resample_label(label_xyz: NDArray[Any], spacing_mm: Triple, size: Size, new_spacing_mm: Triple) -> NDArray[Any]:
    """Resample a label map: each new voxel takes the value that fills most of it.

    Where two values fill it alike, as along every flat border at half the resolution, it takes that of the voxel
    nearest to it, always on the same side: what one border of a structure loses, the opposite one gains.
    """
    matrices = _matrices(label_xyz.shape, spacing_mm, size, new_spacing_mm, _share_matrix)
    if not any(matrix is not None for matrix in matrices):
        return label_xyz
    places = [
        np.clip(np.floor(_positions(n, mm, new_n, new_mm) + 0.5 + _ROUNDED_HEADER).astype(int), 0, n - 1)
        for n, mm, new_n, new_mm in zip(label_xyz.shape, spacing_mm, size, new_spacing_mm, strict=True)
    ]
    nearest = label_xyz[np.ix_(*places)]
    result = np.empty(size, dtype=label_xyz.dtype)
    largest = np.full(size, -1, dtype=np.float32)
    for value in np.unique(label_xyz):
        share = _through((label_xyz == value).astype(np.float32), matrices)
        share += _TIE * (nearest == value)
        more = share > largest
        result[more] = value
        np.maximum(largest, share, out=largest)
    return result


def _same(mm: float, new_mm: float) -> bool:
    return abs(mm - new_mm) <= _SAME_SPACING * mm


def _matrices(
    shape: tuple[int, ...],
    spacing_mm: Triple,
    size: Size,
    new_spacing_mm: Triple,
    matrix: Callable[[int, float, int, float], NDArray[np.float32]],
) -> list[NDArray[np.float32] | None]:
    return [
        None if n == new_n and _same(mm, new_mm) else matrix(n, mm, new_n, new_mm)
        for n, mm, new_n, new_mm in zip(shape, spacing_mm, size, new_spacing_mm, strict=True)
    ]


def _positions(n: int, mm: float, new_n: int, new_mm: float) -> NDArray[np.float64]:
    """Return the positions of new voxels, in voxels of the old grid."""
    return np.asarray((np.arange(new_n) - (new_n - 1) / 2) * (new_mm / mm) + (n - 1) / 2)


def _spline_matrix(n: int, mm: float, new_n: int, new_mm: float, order: int) -> NDArray[np.float32]:
    """Return the (new_n, n) matrix that smooths and resamples along one axis."""
    from scipy import ndimage

    voxels = np.eye(n)
    step = new_mm / mm
    if step > 1:
        voxels = ndimage.gaussian_filter1d(voxels, math.sqrt(step**2 - 1) / _FULL_WIDTH, axis=0, mode="nearest")
    places = _positions(n, mm, new_n, new_mm)
    columns = [ndimage.map_coordinates(voxel, places[None], order=order, mode="nearest") for voxel in voxels.T]
    return np.stack(columns, axis=1).astype(np.float32)


def _share_matrix(n: int, mm: float, new_n: int, new_mm: float) -> NDArray[np.float32]:
    """Return the (new_n, n) matrix of each old voxel's share of each new one; linear if voxels shrink."""
    if new_mm <= mm:
        return _spline_matrix(n, mm, new_n, new_mm, order=1)
    half = new_mm / mm / 2
    borders = np.arange(n + 1) - 0.5
    # Beyond the volume its outermost voxels go on.
    borders[0], borders[-1] = -np.inf, np.inf
    places = _positions(n, mm, new_n, new_mm)[:, None]
    shares = np.minimum(places + half, borders[None, 1:]) - np.maximum(places - half, borders[None, :-1])
    return np.asarray(np.maximum(shares, 0) / (2 * half), dtype=np.float32)


def _through(image: NDArray[np.float32], matrices: list[NDArray[np.float32] | None]) -> NDArray[np.float32]:
    # Along axes that shrink first: what follows has less to do.
    order = sorted(range(3), key=lambda a: 1.0 if (m := matrices[a]) is None else m.shape[0] / m.shape[1])
    for axis in order:
        matrix = matrices[axis]
        if matrix is not None:
            with one_blas_thread():
                moved = np.tensordot(matrix, image, axes=(1, axis))
            image = np.moveaxis(moved, 0, axis)
    return np.ascontiguousarray(image)
