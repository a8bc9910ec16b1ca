"""Vertebrae of a mask as instances, from head to feet.

Neighbouring vertebrae touch in a predicted mask. The mask is cut at its bridges, where it is much narrower than the
vertebrae on both sides. What remains of each vertebra is a seed, from which the vertebra is grown again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cspine_train.errors import RunError
from cspine_train.metrics.components import Box, common_box, largest_components

# Depth is the distance to the border of the mask, relative to the deepest voxel at similar height: lumbar bodies are
# twice as large as cervical ones. The ratios were chosen on the validation patients of one fold, see
# docs/decisions/0059-names-of-predicted-vertebrae.md.
_NEAR_MM = 80.0
# Step between the depths at which the mask is searched for bridges.
_STEP = 0.05
# A bridge has at most this share of the depth of the vertebrae on both sides.
_BRIDGE = 0.7
# A mask with more parts is noise, such as that of an untrained network; to cut and join thousands of parts would take
# hours.
_MOST_PARTS = 100
# Least depth of a vertebra: processes and fragments have less.
_SEED = 0.5
# Instances below this share of the median volume of those up to two places away are fragments.
_SMALL = 0.15
# Instances nearer than this share of the usual distance are parts of one vertebra, such as the lateral masses of C1,
# or a body and its process. The second share holds for parts that look like two levels. The usual distance is the
# median of those up to two places away: lumbar vertebrae are twice as far apart as cervical ones.
_CLOSE, _CLOSE_UNLIKE, _AROUND = 0.6, 0.3, 2


def vertebra_instances(
    mask_xyz: NDArray[np.bool_], spacing_mm: tuple[float, float, float], levels: Sequence[NDArray[np.float32]] = ()
) -> NDArray[np.uint8]:
    """Split a mask into vertebrae.

    Parameters
    ----------
    mask_xyz : ndarray
        bool, (x, y, z), z from feet to head.
    spacing_mm : tuple of float
        Voxel spacing along x, y and z.
    levels : sequence of ndarray
        Probability of each level, (x, y, z), if known.

    Returns
    -------
    ndarray
        uint8, the mask's shape: 1 for the highest vertebra, 2 for the next, and so on; 0 for background and fragments.

    Raises
    ------
    RunError
        If the mask has far more parts than a spine has vertebrae.
    """
    whole = np.zeros(mask_xyz.shape, np.uint8)
    box = common_box(mask_xyz)
    if box is None:
        return whole
    mask = mask_xyz[box]
    # Voxels beyond the volume count as background.
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    # Far from all vertebrae, speckles would be compared with each other.
    depth /= ndimage.maximum_filter1d(depth.max((0, 1)), 2 * round(_NEAR_MM / spacing_mm[2]) + 1).clip(
        min=depth.max() / 2
    )
    numbers = _grown(_seeds(depth), mask)
    whole[box] = _in_order(numbers, spacing_mm[2], [level[box] for level in levels])
    return whole


def _seeds(depth: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return the seeds of vertebrae, numbered from 1: the mask is cut until no part has a bridge."""
    seeds = np.zeros(depth.shape, np.int32)
    found = 0
    parts = list(_components(depth > 0, (slice(None),) * 3))
    while parts:
        box, part = parts.pop()
        inside = np.where(part, depth[box], 0)
        if inside.max() < _SEED:
            continue
        if pieces := _cut(inside, box):
            parts += pieces
        else:
            found += 1
            if found > _MOST_PARTS:
                raise RunError(f"the mask has more than {_MOST_PARTS} parts, but a spine has 25 vertebrae")
            seeds[box][inside > inside.max() / 2] = found
    return seeds


def _cut(inside: NDArray[np.float64], box: Box) -> list[tuple[Box, NDArray[np.bool_]]]:
    """Cut a part of the mask at its narrowest bridge; return the pieces with their boxes, or nothing without one."""
    for threshold in np.arange(_STEP, _BRIDGE * inside.max(), _STEP):
        pieces = [
            (outer, piece)
            for outer, piece in _components(inside > threshold, box)
            if (peak := inside[_within(outer, box)][piece].max()) >= _SEED and threshold <= _BRIDGE * peak
        ]
        if len(pieces) > 1:
            return pieces
    return []


def _components(mask: NDArray[np.bool_], box: Box) -> Iterator[tuple[Box, NDArray[np.bool_]]]:
    """Iterate over the largest connected components of a mask in a `box` of a volume."""
    numbers, found = ndimage.label(mask)
    if found > _MOST_PARTS:
        numbers, _ = ndimage.label(largest_components(mask, _MOST_PARTS))
    for number, own in enumerate(ndimage.find_objects(numbers), start=1):
        outer = tuple(slice((b.start or 0) + s.start, (b.start or 0) + s.stop) for b, s in zip(box, own, strict=True))
        yield outer, numbers[own] == number


def _within(outer: Box, box: Box) -> Box:
    return tuple(slice(o.start - (b.start or 0), o.stop - (b.start or 0)) for o, b in zip(outer, box, strict=True))


def _grown(seeds: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Grow seeds voxel by voxel until they meet or fill the mask: a process goes to the body that reaches it first."""
    numbers, free = np.pad(seeds, 1), np.pad(mask & (seeds == 0), 1)
    flat, unreached = numbers.reshape(-1), free.reshape(-1)
    steps = [sign * stride // numbers.itemsize for stride in numbers.strides for sign in (1, -1)]
    front = np.flatnonzero(flat)
    while front.size:
        reached = []
        for step in steps:
            near = front + step
            near = near[unreached[near]]
            flat[near] = flat[near - step]
            unreached[near] = False
            reached.append(near)
        front = np.concatenate(reached)
    return numbers[1:-1, 1:-1, 1:-1]


def _in_order(numbers: NDArray[np.int32], mm: float, levels: Sequence[NDArray[np.float32]]) -> NDArray[np.uint8]:
    """Renumber instances from head to feet, drop fragments, and join the parts of a vertebra."""
    at = np.nonzero(numbers)
    voxels = np.bincount(numbers[at])[1:].astype(float)
    heights = mm * np.bincount(numbers[at], at[2])[1:] / voxels
    evidence = sums_of_levels(levels, numbers)
    order = np.argsort(-heights, kind="stable")
    around = (voxels[order[max(0, place - _AROUND) : place + _AROUND + 1]] for place in range(len(order)))
    least = [_SMALL * max(float(np.median(near)), _SMALL * voxels.max()) for near in around]
    groups = [[index] for index, fewest in zip(order, least, strict=True) if voxels[index] >= fewest]
    while len(groups) > 2:
        centres = np.array([np.average(heights[group], weights=voxels[group]) for group in groups])
        likely = np.array([evidence[:, group].sum(1).argmax() if levels else 0 for group in groups])
        distances = -np.diff(centres) / _joining_distances(centres, likely)
        nearest = int(distances.argmin())
        if distances[nearest] >= 1:
            break
        groups[nearest] += groups.pop(nearest + 1)
    table = np.zeros(len(voxels) + 1, np.uint8)
    for number, group in enumerate(groups, start=1):
        table[1 + np.array(group)] = number
    return table[numbers]


def sums_of_levels(levels: Sequence[NDArray[np.float32]], numbers: NDArray[Any]) -> NDArray[np.float64]:
    """Return the sum of each level's probabilities over each instance, (K, n), for instances numbered from 1."""
    # Their voxels are found once, not for each level: vertebrae are a small part of the volume.
    at = np.nonzero(numbers)
    own = numbers[at]
    return np.array([np.bincount(own, level[at])[1:] for level in levels])


def _joining_distances(centres: NDArray[np.float64], likely: NDArray[np.int_]) -> NDArray[np.float64]:
    """Return, for each pair of neighbours, the distance below which they are parts of one vertebra."""
    unlike = likely[1:] != likely[:-1]
    # Neighbours that look like the same level count as one vertebra, unless all look the same.
    runs = np.cumsum([False, *(unlike if unlike.any() else ~unlike)])
    steps = -np.diff(np.bincount(runs, centres) / np.bincount(runs))
    usual = [np.median(steps[max(0, run - _AROUND) : run + _AROUND + 1]) for run in runs[:-1]]
    # Parts at the same height would give 0 / 0.
    return np.maximum(np.where(unlike, _CLOSE_UNLIKE, _CLOSE) * usual, 1e-9)
