"""The connected pieces of a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_pieces(mask_xyz: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Keep at most so many pieces of a mask, those of most voxels; voxels are connected through their faces.

    Of pieces of equal size those are kept that come first in the order of the axes.
    """
    numbers, found = ndimage.label(mask_xyz)
    if found <= most:
        return mask_xyz
    voxels = np.bincount(numbers.ravel())[1:]
    kept: NDArray[np.bool_] = np.zeros(found + 1, np.bool_)
    kept[1 + np.argsort(-voxels, kind="stable")[:most]] = True
    return np.asarray(kept[numbers])
