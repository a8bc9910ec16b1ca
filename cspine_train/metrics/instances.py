"""How well vertebrae are separated and named: panoptic quality, and VerSe's identification and localisation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_train.metrics.overlap import Measure, diagonal_mm

#: Smallest intersection over union of matched instances (Kirillov 2019).
MATCHED_IOU = 0.5
#: An identified vertebra is nearer than this to the true one (Glocker 2012, Sekuboyina 2021).
IDENTIFIED_MM = 20.0

_Point = tuple[float, float, float]


@dataclass(frozen=True)
class PanopticQuality:
    """Quality of predicted instances, whatever their values (Kirillov 2019).

    Attributes
    ----------
    recognition : float
        TP / (TP + FP / 2 + FN / 2), where TP are matched pairs, and FP and FN the other predicted and true instances.
    segmentation : float
        Mean intersection over union of the matched pairs; 0 without any.
    """

    recognition: float
    segmentation: float

    @property
    def panoptic(self) -> float:
        """Product of both."""
        return self.recognition * self.segmentation


@dataclass(frozen=True)
class Identification:
    """Names and positions of predicted vertebrae, as VerSe defines them (Sekuboyina 2021).

    Attributes
    ----------
    distances_mm : dict
        For each true vertebra, the distance of its centroid from that of the predicted vertebra of the same name.
    identified : frozenset of int
        The identified true vertebrae, see `identification`.
    extra_mm : float
        Localisation distance if there is no true vertebra: 0 if none was predicted, else the volume's diagonal.
    """

    distances_mm: Mapping[int, float]
    identified: frozenset[int]
    extra_mm: float = 0.0

    @property
    def rate(self) -> float:
        """Share of true vertebrae that are identified. Without true ones, it is 1 if none was predicted, else 0."""
        return len(self.identified) / len(self.distances_mm) if self.distances_mm else float(not self.extra_mm)

    @property
    def distance_mm(self) -> float:
        """Mean distance over true vertebrae."""
        return mean(self.distances_mm.values()) if self.distances_mm else self.extra_mm


@dataclass(frozen=True)
class LevelAgreement:
    """Agreement of the named vertebrae of two level maps."""

    identification: Identification
    quality: PanopticQuality

    @property
    def figures(self) -> dict[str, float]:
        """Values of `LEVEL_MEASURES` by name."""
        return {measure.name: measure.compute(self) for measure in LEVEL_MEASURES}

    def figures_of(self, level: int) -> dict[str, float]:
        """Return the measures of a single true vertebra by name; empty if the level is not in the true label map."""
        named = self.identification
        if level not in named.distances_mm:
            return {}
        return {RATE.name: float(level in named.identified), DISTANCE.name: named.distances_mm[level]}


@dataclass(frozen=True)
class LevelMeasure(Measure):
    """A measure of the vertebrae of a volume."""

    compute: Callable[[LevelAgreement], float] = field(kw_only=True)


RATE = LevelMeasure("identification_rate", "identification rate", compute=lambda of: of.identification.rate)
DISTANCE = LevelMeasure(
    "localisation_distance_mm", "localisation distance", "mm", 2, (0.0, math.inf), "lower",
    compute=lambda of: of.identification.distance_mm,
)  # fmt: skip
#: Measures of volumes whose labels are levels, in the order of tables.
LEVEL_MEASURES = (
    RATE,
    DISTANCE,
    LevelMeasure("recognition_quality", "recognition quality", compute=lambda of: of.quality.recognition),
    LevelMeasure("segmentation_quality", "segmentation quality", compute=lambda of: of.quality.segmentation),
    LevelMeasure("panoptic_quality", "panoptic quality", compute=lambda of: of.quality.panoptic),
)


def level_agreement(
    found: NDArray[Any],
    truth: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    overlaps: Mapping[tuple[int, int], int],
    levels: Container[int],
) -> LevelAgreement:
    """Compare the vertebrae of two label maps.

    Parameters
    ----------
    found, truth : ndarray
        Predicted and true label maps, three axes, of one shape.
    spacing_mm : tuple of float
        Voxel spacing along each axis.
    overlaps : dict
        Their `label_overlaps`.
    levels : container of int
        The label values that are vertebrae; others are background.
    """
    of_levels = Counter[tuple[int, int]]()
    for (true, was), voxels in overlaps.items():
        of_levels[true if true in levels else 0, was if was in levels else 0] += voxels
    of_found, of_truth = (
        {value: position for value, position in label_centroids(labels, spacing_mm).items() if value in levels}
        for labels in (found, truth)
    )
    named = identification(of_found, of_truth, diagonal_mm(truth.shape, spacing_mm))
    return LevelAgreement(named, panoptic_quality(of_levels))


def label_overlaps(found: NDArray[Any], truth: NDArray[Any]) -> dict[tuple[int, int], int]:
    """Count the voxels of two label maps by (true value, predicted value), without (0, 0).

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if found.shape != truth.shape:
        raise ValueError(f"label maps of shapes {found.shape} and {truth.shape} cannot be compared")
    marked = (found != 0) | (truth != 0)
    values = np.union1d(truth[marked], found[marked])
    # Pairs as single numbers: numpy's unique rows are a hundred times slower.
    numbers = np.searchsorted(values, truth[marked]) * len(values) + np.searchsorted(values, found[marked])
    counts = np.bincount(numbers)
    pairs = ((pair, *divmod(pair, len(values))) for pair in np.flatnonzero(counts).tolist())
    return {(int(values[true]), int(values[was])): int(counts[pair]) for pair, true, was in pairs}


def true_levels(overlaps: Mapping[tuple[int, int], int], levels: Container[int]) -> dict[int, int]:
    """Return the true level of each predicted vertebra: the most frequent one among its labelled voxels.

    A vertebra with less than half of its voxels labelled is left out: its true level is unknown.

    Parameters
    ----------
    overlaps : dict
        Result of `label_overlaps`.
    levels : container of int
        The label values that are levels; others count as unlabelled.
    """
    voxels = Counter[int]()
    labelled: dict[int, Counter[int]] = {}
    for (true, found), shared in overlaps.items():
        voxels[found] += shared
        if true in levels and found in levels:
            labelled.setdefault(found, Counter())[true] += shared
    return {found: own.most_common(1)[0][0] for found, own in labelled.items() if 2 * own.total() >= voxels[found]}


def panoptic_quality(overlaps: Mapping[tuple[int, int], int]) -> PanopticQuality:
    """Match predicted and true instances one to one, pairs with the highest intersection over union first.

    All qualities are 1 if there is neither a predicted nor a true instance.

    Parameters
    ----------
    overlaps : dict
        Result of `label_overlaps`.
    """
    true_voxels, found_voxels = Counter[int](), Counter[int]()
    for (true, found), voxels in overlaps.items():
        true_voxels[true] += voxels
        found_voxels[found] += voxels
    pairs = [
        (voxels / (true_voxels[true] + found_voxels[found] - voxels), true, found)
        for (true, found), voxels in overlaps.items()
        if true and found
    ]
    matched: list[float] = []
    matched_true, matched_found = set[int](), set[int]()
    for iou, true, found in sorted(pairs, reverse=True):
        if iou >= MATCHED_IOU and true not in matched_true and found not in matched_found:
            matched.append(iou)
            matched_true.add(true)
            matched_found.add(found)
    instances = sum(value != 0 for value in (*true_voxels, *found_voxels))
    if not instances:
        return PanopticQuality(1.0, 1.0)
    return PanopticQuality(2 * len(matched) / instances, mean(matched) if matched else 0.0)


def label_centroids(labels: NDArray[Any], spacing_mm: tuple[float, float, float]) -> dict[int, _Point]:
    """Return the centroid of each label value, without 0, in millimetres along the axes of the array."""
    at = np.nonzero(labels)
    values, numbers, voxels = np.unique(labels[at], return_inverse=True, return_counts=True)
    along = [np.bincount(numbers, weights=axis) / voxels * mm for axis, mm in zip(at, spacing_mm, strict=True)]
    return {int(value): (float(x), float(y), float(z)) for value, x, y, z in zip(values, *along, strict=True)}


def identification(found: Mapping[int, _Point], truth: Mapping[int, _Point], farthest_mm: float) -> Identification:
    """Compare the names and centroids of predicted vertebrae with the true ones.

    A true vertebra is identified if a predicted one has its name, is nearer than `IDENTIFIED_MM` to it, and is nearer
    to no other true vertebra.

    Parameters
    ----------
    found, truth : dict
        Centroids by level, in millimetres; see `label_centroids`.
    farthest_mm : float
        Distance assigned to missed vertebrae, for which VerSe defines none.
    """
    distances, identified = {}, set[int]()
    for level, position in truth.items():
        if level not in found:
            distances[level] = farthest_mm
            continue
        distances[level] = float(np.linalg.norm(np.subtract(found[level], position)))
        nearest = min(float(np.linalg.norm(np.subtract(found[level], other))) for other in truth.values())
        if distances[level] < IDENTIFIED_MM and distances[level] <= nearest:
            identified.add(level)
    return Identification(distances, frozenset(identified), farthest_mm if found and not truth else 0.0)
