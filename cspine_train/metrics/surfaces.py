"""How far apart the surfaces of two masks lie, in millimetres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from cspine_train.metrics.components import common_box


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """The distance of every surface voxel of a mask to the nearest one of another, both ways.

    A surface voxel is one of the mask that shares a face with a voxel outside it, or with the volume's border.

    Attributes
    ----------
    from_found_mm, from_truth_mm : ndarray
        float64, a distance for each surface voxel of the mask that was found and of the true one.
    """

    from_found_mm: NDArray[np.float64]
    from_truth_mm: NDArray[np.float64]

    @property
    def hausdorff95_mm(self) -> float:
        """The larger of both 95th percentiles of the distances (after Huttenlocher 1993, who takes the maxima)."""
        return float(max(np.percentile(mm, 95) for mm in (self.from_found_mm, self.from_truth_mm)))

    @property
    def average_mm(self) -> float:
        """The mean over the surface voxels of both masks: the average symmetric surface distance (Heimann 2009)."""
        return float(np.concatenate([self.from_found_mm, self.from_truth_mm]).mean())

    def dice_within(self, tolerance_mm: float) -> float:
        """Return the share of both surfaces' voxels that lie no farther from the other: surface Dice (Nikolov 2021).

        Surface voxels are counted; their areas are not estimated.
        """
        # Ten voxels of 0.1 mm are a millimetre wherever they lie, which a difference of floats is not.
        near = [np.count_nonzero(mm <= tolerance_mm + 1e-6) for mm in (self.from_found_mm, self.from_truth_mm)]
        return sum(near) / (self.from_found_mm.size + self.from_truth_mm.size)


def surface_distances(
    found: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> SurfaceDistances | None:
    """Measure how far apart the surfaces of two masks lie; None where one of them is empty.

    Parameters
    ----------
    found, truth : ndarray
        bool, of one shape.
    spacing_mm : tuple of float
        Distance of voxels along each axis.
    """
    box = common_box(found, truth)
    if box is None or not found.any() or not truth.any():
        return None
    # A tree of the surfaces' voxels: a distance transform would measure every voxel between two far components.
    points = [np.argwhere(_surface(mask[box])) * np.asarray(spacing_mm, np.float64) for mask in (found, truth)]
    of_found, of_truth = points
    return SurfaceDistances(
        KDTree(of_truth, leafsize=32).query(of_found)[0], KDTree(of_found, leafsize=32).query(of_truth)[0]
    )


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the voxels of a mask that share a face with one outside; beyond the border all is outside."""
    surface: NDArray[np.bool_] = mask & ~ndimage.binary_erosion(mask)
    return surface
