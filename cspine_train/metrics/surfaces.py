"""Distances between the surfaces of two masks, in millimetres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from cspine_train.metrics.components import common_box


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distances from each surface voxel of a mask to the nearest one of the other, in both directions.

    A surface voxel shares a face with a voxel outside the mask, or with the volume's border.

    Attributes
    ----------
    from_found_mm, from_truth_mm : ndarray
        float64, one distance for each surface voxel of the predicted and of the true mask.
    """

    from_found_mm: NDArray[np.float64]
    from_truth_mm: NDArray[np.float64]

    @property
    def hausdorff95_mm(self) -> float:
        """The larger of the 95th percentiles of both directions (after Huttenlocher 1993, who uses the maxima)."""
        return float(max(np.percentile(mm, 95) for mm in (self.from_found_mm, self.from_truth_mm)))

    @property
    def average_mm(self) -> float:
        """Average symmetric surface distance: the mean over the surface voxels of both masks (Heimann 2009)."""
        return float(np.concatenate([self.from_found_mm, self.from_truth_mm]).mean())

    def dice_within(self, tolerance_mm: float) -> float:
        """Return surface Dice: the share of surface voxels within a tolerance of the other mask's (Nikolov 2021).

        It counts surface voxels and does not estimate their areas.
        """
        # Rounding: ten voxels of 0.1 mm are a millimetre.
        near = [np.count_nonzero(mm <= tolerance_mm + 1e-6) for mm in (self.from_found_mm, self.from_truth_mm)]
        return sum(near) / (self.from_found_mm.size + self.from_truth_mm.size)


def surface_distances(
    found: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> SurfaceDistances | None:
    """Return the distances between the surfaces of two masks; None if one is empty.

    Parameters
    ----------
    found, truth : ndarray
        bool, of one shape.
    spacing_mm : tuple of float
        Voxel spacing along each axis.
    """
    box = common_box(found, truth)
    if box is None or not found.any() or not truth.any():
        return None
    # A tree of surface voxels: a distance transform would process all voxels between distant components.
    points = [np.argwhere(_surface(mask[box])) * np.asarray(spacing_mm, np.float64) for mask in (found, truth)]
    of_found, of_truth = points
    return SurfaceDistances(
        KDTree(of_truth, leafsize=32).query(of_found)[0], KDTree(of_found, leafsize=32).query(of_truth)[0]
    )


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the surface voxels of a mask; voxels beyond the volume are outside the mask."""
    surface: NDArray[np.bool_] = mask & ~ndimage.binary_erosion(mask)
    return surface
