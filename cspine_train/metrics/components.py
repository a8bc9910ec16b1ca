"""Connected components and holes of a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Box = tuple[slice, ...]
# Smaller components, relative to the typical one, are probably fragments.
_LEAST_SHARE = 0.1


def common_box(*masks: NDArray[np.bool_]) -> Box | None:
    """Return the bounding box of masks of one shape; None if all are empty.

    Masks are a small part of a volume: the other voxels need not be processed.
    """
    boxes = [found[0] for mask in masks if (found := ndimage.find_objects(mask.view(np.uint8)))]
    if not boxes:
        return None
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))


def largest_components(mask_xyz: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Keep the `most` largest connected components of a mask, with connectivity through faces.

    Among components of equal size, the first in the order of the axes are kept.
    """
    box = common_box(mask_xyz)
    if box is None:
        return mask_xyz
    # Within the box, as labelling takes twelve bytes per voxel.
    numbers, found = ndimage.label(mask_xyz[box])
    if found <= most:
        return mask_xyz
    voxels = np.bincount(numbers.ravel())[1:]
    kept: NDArray[np.bool_] = np.zeros(found + 1, np.bool_)
    kept[1 + np.argsort(-voxels, kind="stable")[:most]] = True
    remaining = np.zeros_like(mask_xyz)
    remaining[box] = kept[numbers]
    return remaining


def implausible_components(mask_xyz: NDArray[np.bool_], most_voxels: float) -> NDArray[np.bool_]:
    """Return the components of a mask that are probably no structure of its kind, by their size.

    They have more than `most_voxels` voxels, or less than a tenth of the typical component: the one that holds the
    median voxel of the mask when components are sorted by size.
    """
    implausible = np.zeros_like(mask_xyz)
    box = common_box(mask_xyz)
    if box is None:
        return implausible
    numbers, _ = ndimage.label(mask_xyz[box])
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0
    ascending = np.sort(sizes)
    typical = ascending[np.searchsorted(np.cumsum(ascending), sizes.sum() / 2)]
    unlike = (sizes > most_voxels) | (sizes < _LEAST_SHARE * typical)
    unlike[0] = False
    implausible[box] = unlike[numbers]
    return implausible


def filled(mask_xyz: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill the holes of a mask in 3-D, with connectivity through faces."""
    box = common_box(mask_xyz)
    if box is None:
        return mask_xyz
    whole = mask_xyz.copy()
    whole[box] = ndimage.binary_fill_holes(mask_xyz[box])
    return whole


def tidied(mask_xyz: NDArray[np.bool_], most: int | None, fill: bool) -> NDArray[np.bool_]:
    """Keep the `most` largest components, unless None, and then fill holes if `fill`."""
    kept = mask_xyz if most is None else largest_components(mask_xyz, most)
    return filled(kept) if fill else kept
