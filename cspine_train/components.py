"""The connected components of a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_components(mask_xyz: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Keep at most so many connected components of a mask, those of most voxels; voxels touch through their faces.

    Of components of equal size those are kept that come first in the order of the axes.
    """
    # What is marked is a small part of a volume, and numbering takes twelve bytes a voxel.
    box = ndimage.find_objects(mask_xyz.view(np.uint8))
    if not box:
        return mask_xyz
    numbers, found = ndimage.label(mask_xyz[box[0]])
    if found <= most:
        return mask_xyz
    voxels = np.bincount(numbers.ravel())[1:]
    kept: NDArray[np.bool_] = np.zeros(found + 1, np.bool_)
    kept[1 + np.argsort(-voxels, kind="stable")[:most]] = True
    remaining = np.zeros_like(mask_xyz)
    remaining[box[0]] = kept[numbers]
    return remaining
