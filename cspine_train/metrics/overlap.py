"""How good a segmentation is, per patient on whole volumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cspine_train.metrics.surfaces import surface_distances


@dataclass(frozen=True)
class Overlap:
    """How a predicted mask and the truth overlap in one volume, counted in voxels."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN) (Dice 1945); 1 where both masks are empty."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else 1.0

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN) (Jaccard 1901); 1 where both masks are empty."""
        union = self.true_positive + self.false_positive + self.false_negative
        return self.true_positive / union if union else 1.0

    @property
    def precision(self) -> float:
        """TP / (TP + FP); where nothing was found 1 if nothing is true, else 0."""
        found = self.true_positive + self.false_positive
        return self.true_positive / found if found else float(not self.false_negative)

    @property
    def recall(self) -> float:
        """TP / (TP + FN); where nothing is true 1 if nothing was found, else 0."""
        truth = self.true_positive + self.false_negative
        return self.true_positive / truth if truth else float(not self.false_positive)


class Measure(NamedTuple):
    """What one measure is called in files and by people."""

    name: str
    told: str
    unit: str = ""
    digits: int = 4
    #: The smallest and the largest value that it can have.
    within: tuple[float, float] = (0.0, 1.0)

    @property
    def heading(self) -> str:
        """The name for people, with the unit."""
        return f"{self.told}, {self.unit}" if self.unit else self.told

    def figure(self, value: float) -> str:
        """Return a value for people."""
        return f"{value:.{self.digits}f}"


#: What an `Agreement` is told by, in the order of tables.
MEASURES = (
    Measure("dice", "Dice"),
    Measure("iou", "IoU"),
    Measure("precision", "precision"),
    Measure("recall", "recall"),
    Measure("volume_difference_ml", "volume difference", "ml", 2, (-math.inf, math.inf)),
    Measure("hausdorff95_mm", "Hausdorff 95 %", "mm", 2, (0.0, math.inf)),
    Measure("average_surface_distance_mm", "average surface distance", "mm", 2, (0.0, math.inf)),
    Measure("surface_dice_1mm", "surface Dice at 1 mm"),
    Measure("surface_dice_2mm", "surface Dice at 2 mm"),
)


@dataclass(frozen=True)
class Agreement:
    """How a segmentation agrees with the truth, in voxels and in millimetres; see docs/evaluation.md.

    Attributes
    ----------
    voxels : Overlap
        What Dice, intersection over union, precision and recall are made of.
    volume_difference_ml : float
        What was found less what is true.
    hausdorff95_mm, average_surface_distance_mm : float
        See `SurfaceDistances`. Where both masks are empty 0; where one is, the volume's diagonal, which no distance
        exceeds, so that a mean over patients tells of those in whom nothing was found.
    surface_dice_1mm, surface_dice_2mm : float
        See `SurfaceDistances.dice_within`; 1 where both masks are empty, 0 where one is.
    """

    voxels: Overlap
    volume_difference_ml: float
    hausdorff95_mm: float
    average_surface_distance_mm: float
    surface_dice_1mm: float
    surface_dice_2mm: float

    @property
    def dice(self) -> float:
        """See `Overlap`."""
        return self.voxels.dice

    @property
    def iou(self) -> float:
        """See `Overlap`."""
        return self.voxels.iou

    @property
    def precision(self) -> float:
        """See `Overlap`."""
        return self.voxels.precision

    @property
    def recall(self) -> float:
        """See `Overlap`."""
        return self.voxels.recall


def agreement(found: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> Agreement:
    """Compare a mask with the true one.

    Parameters
    ----------
    found, truth : ndarray
        bool, three axes, of one shape.
    spacing_mm : tuple of float
        Distance of voxels along each axis.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    voxels = overlap(found, truth)
    difference_ml = (voxels.false_positive - voxels.false_negative) * float(np.prod(spacing_mm)) / 1e3
    surfaces = surface_distances(found, truth, spacing_mm)
    if surfaces is not None:
        distances_mm = surfaces.hausdorff95_mm, surfaces.average_mm
        return Agreement(voxels, difference_ml, *distances_mm, surfaces.dice_within(1), surfaces.dice_within(2))
    equal = found.any() == truth.any()
    farthest_mm = 0.0 if equal else float(np.linalg.norm(np.multiply(found.shape, spacing_mm)))
    return Agreement(voxels, difference_ml, farthest_mm, farthest_mm, float(equal), float(equal))


def overlap(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Overlap:
    """Count the overlap of two masks of one shape.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {truth.shape} cannot be compared")
    both = int(np.count_nonzero(predicted & truth))
    return Overlap(both, int(np.count_nonzero(predicted)) - both, int(np.count_nonzero(truth)) - both)


def slice_overlaps(found: NDArray[np.bool_], truth: NDArray[np.bool_], axis: int) -> dict[int, Overlap]:
    """Count how two masks of a volume overlap in each slice along an axis in which either marks anything, by index."""
    across = tuple(number for number in range(3) if number != axis)
    both, all_found, all_true = (np.count_nonzero(mask, axis=across) for mask in (found & truth, found, truth))
    return {
        int(index): Overlap(int(both[index]), int((all_found - both)[index]), int((all_true - both)[index]))
        for index in np.flatnonzero(all_found + all_true)
    }


def label_agreements(
    found: NDArray[Any], truth: NDArray[Any], spacing_mm: tuple[float, float, float]
) -> dict[int, Agreement]:
    """Compare each label value that one of two label maps has, 0 left out.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    values = np.union1d(np.unique(found), np.unique(truth))
    return {int(value): agreement(found == value, truth == value, spacing_mm) for value in values if value}


def mean_over_labels(labels: Mapping[int, Agreement], measure: str) -> float:
    """Return the mean ``dice`` or ``iou`` over the labels that a patient has.

    What is found of others lowers the figures of those that it takes the place of. A patient without any label counts
    as 1 where none was found, else as 0.
    """
    own = [
        getattr(label, measure) for label in labels.values() if label.voxels.true_positive + label.voxels.false_negative
    ]
    return float(mean(own)) if own else float(not labels)


def batch_averaged_dice(slices: Sequence[Overlap], batch: int) -> float:
    """Return the mean over batches of slices of the Dice of all pixels of a batch: what the reference study published.

    It weighs slices by what else is in their batch and changes with the batch's size: it is for comparison with that
    study's figures, not to judge a model by.

    Parameters
    ----------
    slices : sequence of Overlap
        Of the slices in which anything is labelled, in order.
    batch : int
        Slices in a batch; the last may be smaller.

    Returns
    -------
    float
        1 where no slice is labelled, as that study's Dice of nothing is.
    """
    dice = []
    for start in range(0, len(slices), batch):
        counts = [(s.true_positive, s.false_positive, s.false_negative) for s in slices[start : start + batch]]
        dice.append(Overlap(*map(sum, zip(*counts, strict=True))).dice)
    return mean(dice) if dice else 1.0
