"""Labelled vertebrae as instances: their positions, their order from head to feet, and signs that it is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.volumes.geometry import Geometry, Triple
from cspine_data.volumes.levels import LEVEL_NAMES, SPINE, levels_between
from cspine_data.volumes.volume import Volume

#: Ratio of a distance of neighbours to the usual one, see `usual_distances`, above which a vertebra may be missing
#: between them. Of 132 real distances, it is 0.82 to 1.12.
GAP_RATIO = 1.5
# Below this ratio, two labels may be one vertebra.
_CLOSE = 0.55
_AROUND = 2
# Share of an instance in its largest connected component, below which it is fragmented.
_WHOLE = 0.9
# Voxels of a bounding box above which fragments are not counted: no vertebra is as large, and it would take 250 MB.
_MOST_VOXELS = 1 << 26
# Difference in height above which a vertebra is clearly above another; cervical neighbours are 15 mm apart.
_APART_MM = 8.0


@dataclass(frozen=True)
class Instance:
    """One label value of a label map.

    Attributes
    ----------
    value : int
        The label value.
    centroid_mm : tuple of float
        World coordinates, LPS.
    volume_ml : float
        Its volume.
    whole : float
        Share of its voxels in its largest connected component.
    at_edge : bool
        Whether it touches the edge of the volume, so that part of it may be outside.
    """

    value: int
    centroid_mm: Triple
    volume_ml: float
    whole: float
    at_edge: bool = False


@dataclass
class _Extent:
    """Voxels of a label value.

    Attributes
    ----------
    voxels : int
        Their number.
    sums : ndarray
        Sum of their indices along each axis.
    first, end : ndarray
        Their bounding box: the lowest index along each axis, and the highest plus one.
    """

    voxels: int
    sums: NDArray[np.float64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]


def _extents(array: NDArray[Any]) -> dict[int, _Extent]:
    """Return the extent of each label value, in ascending order. It works plane by plane, to save memory."""
    found: dict[int, _Extent] = {}
    for index, plane in enumerate(array):
        at = np.nonzero(plane)
        values, number, counts = np.unique(plane[at], return_inverse=True, return_counts=True)
        first, end = np.full((len(values), 2), plane.shape), np.zeros((len(values), 2), np.int64)
        sums = np.empty((len(values), 2))
        for axis, indices in enumerate(at):
            sums[:, axis] = np.bincount(number, indices, len(values))
            np.minimum.at(first[:, axis], number, indices)
            np.maximum.at(end[:, axis], number, indices + 1)
        for n, value in enumerate(values.tolist()):
            voxels = int(counts[n])
            of_plane = _Extent(
                voxels,
                np.array([index * voxels, *sums[n]]),
                np.array([index, *first[n]]),
                np.array([index + 1, *end[n]]),
            )
            one = found.setdefault(value, of_plane)
            if one is not of_plane:
                one.voxels += voxels
                one.sums += of_plane.sums
                np.minimum(one.first, of_plane.first, out=one.first)
                np.maximum(one.end, of_plane.end, out=one.end)
    return dict(sorted(found.items()))


def _centroids_mm(extents: Mapping[int, _Extent], geometry: Geometry) -> dict[int, Triple]:
    means = np.array([one.sums / one.voxels for one in extents.values()]).reshape(-1, 3)
    return {value: (x, y, z) for value, (x, y, z) in zip(extents, geometry.positions_mm(means).tolist(), strict=True)}


def label_centroids_mm(array: NDArray[Any], geometry: Geometry) -> dict[int, Triple]:
    """Return the centroid of each label value of an array on a grid, in world coordinates (LPS)."""
    return _centroids_mm(_extents(array), geometry)


def find_instances(label: Volume, ignore_label: int | None = None) -> tuple[Instance, ...]:
    """Return the instances of a label map from head to feet: by the height of their centroids."""
    from scipy import ndimage

    extents = {value: one for value, one in _extents(label.array).items() if value != ignore_label}
    centroids = _centroids_mm(extents, label.geometry)
    voxel_ml = math.prod(label.geometry.spacing_mm) / 1e3
    found = []
    for value, one in extents.items():
        box = label.array[tuple(map(slice, one.first, one.end))]
        largest = one.voxels
        if box.size <= _MOST_VOXELS:
            components, _ = ndimage.label(box == value, np.ones((3, 3, 3)))
            largest = int(np.bincount(components.ravel())[1:].max())
        at_edge = bool((one.first == 0).any() or (one.end == label.array.shape).any())
        found.append(Instance(value, centroids[value], one.voxels * voxel_ml, largest / one.voxels, at_edge))
    return tuple(sorted(found, key=lambda one: -one.centroid_mm[2]))


def order_problems(instances: Sequence[Instance], *, levels: bool = False) -> list[str]:
    """Return the reasons to doubt the order of instances: gaps, duplicates, fragments, or a path that turns back.

    Parameters
    ----------
    instances : sequence of Instance
        The instances from head to feet.
    levels : bool
        Whether their values are levels, which show what is missing.
    """
    texts = [LEVEL_NAMES[one.value] if levels else f"label {one.value}" for one in instances]
    problems = [
        f"{text} is in several pieces; the largest has {one.whole:.0%} of its voxels"
        for one, text in zip(instances, texts, strict=True)
        # The edge of the volume may separate a body from its processes.
        if one.whole < _WHOLE and not one.at_edge
    ]
    if len(instances) < 2:
        return problems
    centres = np.array([one.centroid_mm for one in instances])
    distances = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    missing = [levels_between(one.value, other.value) if levels else () for one, other in pairwise(instances)]
    # Per level, so that a missing vertebra does not raise the median.
    steps = distances / [len(between) + 1 for between in missing]
    ratios = (steps / usual_distances(steps)).tolist()
    neighbours = zip(pairwise(texts), distances.tolist(), ratios, missing, strict=True)
    for (one, other), distance, ratio, between in neighbours:
        problem = _neighbour_problem(distance, ratio, between, certain=len(instances) > 2)
        if problem:
            problems.append(f"{one} and {other} {problem}")
    if len(instances) > 2 and not _is_path(centres):
        problems.append(
            "the order by height is not the order along the spine: the spine turns back, or a label is misplaced"
        )
    return problems


def usual_distances(distances_mm: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the usual distance of neighbours at each distance: the median of those up to two places away.

    Distances double from C1 to L5, so that the median of a whole spine says little.
    """
    return np.array([np.median(distances_mm[max(0, n - _AROUND) : n + _AROUND + 1]) for n in range(len(distances_mm))])


def _neighbour_problem(distance: float, ratio: float, missing: Sequence[int], *, certain: bool) -> str:
    """Return the problem of two neighbours, or nothing; `ratio` is their distance, relative to the usual one."""
    if missing:
        names = ", ".join(LEVEL_NAMES[value] for value in missing)
        if certain and ratio < _CLOSE:
            return f"are {distance:.0f} mm apart, as close as neighbours, although {names} belongs between them"
        return f"are labelled, but {names} between them is not"
    if certain and ratio > GAP_RATIO:
        return f"are {distance:.0f} mm apart: is a vertebra between them missing?"
    if certain and ratio < _CLOSE:
        return f"are only {distance:.0f} mm apart: are they one vertebra?"
    return ""


def unordered_labels(cases: Iterable[Mapping[int, Triple]]) -> tuple[int, ...]:
    """Return three label values of which any two are in one order in some case, and in the other in another; or none.

    Levels have the same order in all cases, unordered instances do not. Structures along the whole spine, such as discs
    with one value, have no order: their centroids are at about the same height. One structure that may be anywhere,
    such as a lesion, changes its order with all others, but these keep theirs.

    Parameters
    ----------
    cases : iterable of dict
        For each case, the centroids of its label values.
    """
    above: set[tuple[int, int]] = set()
    for centroids in cases:
        for (one, (*_, height)), (other, (*_, lower)) in permutations(centroids.items(), 2):
            if height > lower + _APART_MM:
                above.add((one, other))
    swapped = {pair for pair in above if pair[::-1] in above}
    values = sorted({value for pair in swapped for value in pair})
    threes = combinations(values, 3)
    return next((three for three in threes if all(pair in swapped for pair in combinations(three, 2))), ())


def ordered_levels(cases: Iterable[Mapping[int, Triple]]) -> tuple[int, ...]:
    """Return the label values that are levels of vertebrae, from head to feet; none if their positions contradict this.

    Only VerSe's values can be levels. Each must be clearly above the next in every case that has both. There must be
    three or more: fewer values may as well be tissues.

    Parameters
    ----------
    cases : iterable of dict
        Centroids of the label values of each case.
    """
    present: set[int] = set()
    for centroids in cases:
        present.update(centroids)
        if out_of_order(centroids):
            return ()
    levels = tuple(value for value in SPINE if value in present)
    return levels if len(levels) > 2 else ()


def out_of_order(centroids: Mapping[int, Triple], order: Sequence[int] = SPINE) -> list[tuple[int, int]]:
    """Return the pairs of neighbours whose upper one is not clearly above the lower; `order` is from head to feet."""
    own = [value for value in order if value in centroids]
    return [(one, other) for one, other in pairwise(own) if centroids[one][2] < centroids[other][2] + _APART_MM]


def _is_path(centres: NDArray[np.float64]) -> bool:
    """Return whether each centre's nearest neighbour is one of the two beside it in the order."""
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return bool((np.abs(distances.argmin(axis=1) - np.arange(len(centres))) == 1).all())
