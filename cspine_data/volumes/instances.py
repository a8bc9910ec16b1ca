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
from cspine_data.volumes.levels import SPINE
from cspine_data.volumes.volume import Volume

# Distance of neighbours, relative to the patient's median, above which one may be missing, or below which two labels
# may be one vertebra. Distances grow from C1 to L5 by a few percent each; 132 real ones are 0.82 to 1.12.
_GAP, _CLOSE = 1.5, 0.55
# Share of an instance in its largest connected component, below which it is fragmented.
_WHOLE = 0.9
# Difference in height above which a vertebra is clearly above another; neighbours in the neck are 15 mm apart.
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
    """

    value: int
    centroid_mm: Triple
    volume_ml: float
    whole: float


def label_centroids_mm(array: NDArray[Any], geometry: Geometry) -> dict[int, Triple]:
    """Return the centroid of each label value of an array on a grid, in world coordinates (LPS)."""
    # By value: the number of its voxels, and the sums of their indices. Plane by plane, which takes little memory.
    sums: dict[int, NDArray[np.float64]] = {}
    for index, plane in enumerate(array):
        at = np.nonzero(plane)
        values, number, counts = np.unique(plane[at], return_inverse=True, return_counts=True)
        along = (np.bincount(number, indices, len(values)) for indices in at)
        for value, *of_plane in zip(values.tolist(), counts, index * counts, *along, strict=True):
            sums[value] = sums.get(value, 0) + np.array(of_plane, np.float64)
    means = np.array([sums[value][1:] / sums[value][0] for value in sorted(sums)]).reshape(-1, 3)
    centroids = geometry.positions_mm(means).tolist()
    return {value: (x, y, z) for value, (x, y, z) in zip(sorted(sums), centroids, strict=True)}


def find_instances(label: Volume) -> tuple[Instance, ...]:
    """Return the instances of a label map from head to feet: by the height of their centroids."""
    from scipy import ndimage

    centroids = label_centroids_mm(label.array, label.geometry)
    voxel_ml = math.prod(label.geometry.spacing_mm) / 1e3
    found = []
    for value, centroid_mm in centroids.items():
        at = np.nonzero(label.array == value)
        box = tuple(slice(int(along.min()), int(along.max()) + 1) for along in at)
        components, _ = ndimage.label(label.array[box] == value, np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        found.append(Instance(value, centroid_mm, at[0].size * voxel_ml, float(sizes.max() / sizes.sum())))
    return tuple(sorted(found, key=lambda one: -one.centroid_mm[2]))


def order_problems(instances: Sequence[Instance]) -> list[str]:
    """Return the reasons to doubt the order of instances: gaps, duplicates, fragments, or a path that turns back."""
    problems = [
        f"label {one.value} is in several pieces, the largest has {one.whole:.0%} of it"
        for one in instances
        if one.whole < _WHOLE
    ]
    centres = np.array([one.centroid_mm for one in instances])
    if len(centres) < 3:
        return problems
    distances = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    usual = float(np.median(distances))
    for one, other, distance in zip(instances, instances[1:], distances.tolist(), strict=False):
        if distance > _GAP * usual:
            problems.append(
                f"labels {one.value} and {other.value} are {distance:.0f} mm apart: is a vertebra between them missing?"
            )
        elif distance < _CLOSE * usual:
            problems.append(
                f"labels {one.value} and {other.value} are only {distance:.0f} mm apart: are they one vertebra?"
            )
    if not _is_path(centres):
        problems.append(
            "the order by height is not the order along the spine: the spine turns back, or a label is misplaced"
        )
    return problems


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
    """Return the label values that are levels of vertebrae, from head to feet; none if their positions contradict it.

    Values of levels are those of VerSe's scheme. Each must be clearly above the next in every case that has both, and
    there must be three or more of them: values 1 to 3 may as well be tissues.

    Parameters
    ----------
    cases : iterable of dict
        For each case, the centroids of its label values.
    """
    present: set[int] = set()
    for centroids in cases:
        own = [value for value in SPINE if value in centroids]
        present.update(own)
        heights = [centroids[value][2] for value in own]
        if any(height < lower + _APART_MM for height, lower in pairwise(heights)):
            return ()
    return tuple(value for value in SPINE if value in present) if len(present) > 2 else ()


def _is_path(centres: NDArray[np.float64]) -> bool:
    """Return whether each centre's nearest neighbour is one of the two beside it in the order."""
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return bool((np.abs(distances.argmin(axis=1) - np.arange(len(centres))) == 1).all())
