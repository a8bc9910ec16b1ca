"""From a mask and the probabilities of levels to a level map with named vertebrae."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cspine_data import LEVEL_NAMES, Geometry, consecutive_levels
from cspine_train.levels.instances import sums_of_levels, vertebra_instances
from cspine_train.levels.sequence import LevelSequence, find_sequence, gaps_of, sequence_name
from cspine_train.metrics.calibration import CERTAIN

# Percentiles between which the height is measured, so that single voxels do not change it.
_ENDS = (5.0, 95.0)


@dataclass(frozen=True)
class FoundLevel:
    """A predicted vertebra.

    Attributes
    ----------
    value : int
        Its level, the label value in the level map.
    name : str
        Name of the level, such as ``C5``.
    probability : float
        Probability that the vertebra has this level, from 0 to 1; 1 if the user named the lowest or highest level.
    centroid_mm : tuple of float
        World coordinates, LPS.
    volume_ml : float
        Its volume.
    height_mm : float
        Its extent along the spine: the distance between the 5th and 95th percentiles of its voxels, divided by 0.9.
        For a cylinder, this is the height.
    """

    value: int
    name: str
    probability: float
    centroid_mm: tuple[float, float, float]
    volume_ml: float
    height_mm: float


@dataclass(frozen=True)
class NamedSpine:
    """The named vertebrae of a volume.

    Attributes
    ----------
    levels : tuple of FoundLevel
        The vertebrae, from head to feet; each level at most once.
    doubt : str
        Why the names may be wrong, in one line; empty if they are certain enough.
    """

    levels: tuple[FoundLevel, ...]
    doubt: str = ""

    @property
    def uncertain(self) -> tuple[int, ...]:
        """The levels whose probability is below `CERTAIN`."""
        return tuple(found.value for found in self.levels if found.probability < CERTAIN)


@dataclass(frozen=True)
class Evidence:
    """The networks' probabilities of the levels in a volume.

    Attributes
    ----------
    probabilities : sequence of ndarray
        For each level, its probability in each voxel, (x, y, z), or a multiple of that.
    levels : tuple of int
        The levels.
    temperature : float
        See `find_sequence`.
    """

    probabilities: Sequence[NDArray[np.float32]]
    levels: tuple[int, ...]
    temperature: float = 1.0


def evidence_of(probabilities: Sequence[NDArray[np.float32]], instances_xyz: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return, for each instance, the share of each level in the sum of its probabilities, (n, K)."""
    sums = sums_of_levels(probabilities, instances_xyz).T
    return np.asarray(sums / np.maximum(sums.sum(1, keepdims=True), 1e-12))


def distances_mm(centroids_mm: NDArray[np.float64]) -> list[float]:
    """Return the distances of neighbours, n - 1 for n centroids (n, 3)."""
    return [float(mm) for mm in np.linalg.norm(np.diff(centroids_mm, axis=0), axis=1)]


def name_vertebrae(
    mask_xyz: NDArray[np.bool_],
    geometry_xyz: Geometry,
    evidence: Evidence | None = None,
    lowest: str | None = None,
    highest: str | None = None,
) -> tuple[NDArray[np.uint8], NamedSpine]:
    """Split a mask into vertebrae and name them, each level once, in order.

    Parameters
    ----------
    mask_xyz : ndarray
        bool, (x, y, z): vertebra or not.
    geometry_xyz : Geometry
        The grid of the mask.
    evidence : Evidence, optional
        The probabilities of levels. Without them, give `lowest` or `highest`.
    lowest, highest : str, optional
        Name of the lowest or highest vertebra in the mask.

    Returns
    -------
    level_map : ndarray
        uint8, the mask's shape: the level of each voxel, 0 for background and fragments.
    spine : NamedSpine
        The vertebrae.

    Raises
    ------
    InputError
        If a name is not a level, or a spine has too few vertebrae above or below it.
    RunError
        If there are more vertebrae than a spine has.
    """
    instances = vertebra_instances(mask_xyz, geometry_xyz.spacing_mm, evidence.probabilities if evidence else ())
    at = np.argwhere(instances)
    numbers = instances[tuple(at.T)]
    places = [at[numbers == number] for number in range(1, instances.max() + 1)]
    if not places:
        return instances, NamedSpine((), "no vertebra was found")
    centroids = geometry_xyz.positions_mm(np.array([place.mean(0) for place in places]))
    distances = distances_mm(centroids)
    if evidence is None:
        levels = consecutive_levels(lowest, highest, len(places))
        sequence = LevelSequence(levels, (1.0,) * len(levels))
    else:
        sequence = find_sequence(
            evidence_of(evidence.probabilities, instances),
            evidence.levels,
            distances,
            evidence.temperature,
            *(None if name is None else consecutive_levels(name, None, 1)[0] for name in (lowest, highest)),
        )
    table = np.array([0, *sequence.levels], np.uint8)
    directions = _directions(centroids)
    voxel_ml = float(np.prod(geometry_xyz.spacing_mm)) / 1e3
    found = tuple(
        FoundLevel(
            level, LEVEL_NAMES[level], probability, (x, y, z), len(place) * voxel_ml,
            _height_mm(geometry_xyz.positions_mm(place) @ direction),
        )
        for level, probability, (x, y, z), place, direction in zip(
            sequence.levels, sequence.probabilities, centroids.tolist(), places, directions, strict=True
        )
    )  # fmt: skip
    return table[instances], NamedSpine(found, "; ".join(_doubts(sequence, distances)))


def _directions(centroids_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the direction of the spine at each vertebra, from neighbour to neighbour; vertical for a single one."""
    if len(centroids_mm) < 2:
        return np.array([[0.0, 0.0, 1.0]])
    along = np.gradient(centroids_mm, axis=0)
    return np.asarray(along / np.linalg.norm(along, axis=1, keepdims=True))


def _height_mm(along_mm: NDArray[np.float64]) -> float:
    low, high = np.percentile(along_mm, _ENDS)
    return float(high - low) / (_ENDS[1] - _ENDS[0]) * 100


def _doubts(sequence: LevelSequence, distances: Sequence[float]) -> list[str]:
    doubts = []
    if sequence.second and sequence.probability < CERTAIN:
        likely = {sequence.levels: sequence.probability, sequence.second: sequence.second_probability}
        both = (f"{sequence_name(levels)} (probability {probability:.2f})" for levels, probability in likely.items())
        doubts.append(f"the levels are uncertain: {' or '.join(both)}")
    if sequence.allowed < 1 - CERTAIN:
        doubts.append(
            f"the image looks like {sequence_name(sequence.unrestricted)}, and the given lowest or highest level has a "
            f"probability of {sequence.allowed:.2f}"
        )
    gaps = np.flatnonzero(gaps_of(distances))
    if gaps.size:
        names = [f"{LEVEL_NAMES[sequence.levels[n]]} and {LEVEL_NAMES[sequence.levels[n + 1]]}" for n in gaps]
        doubts.append(f"a vertebra may be missing between {', '.join(names)}")
    return doubts
