"""How good a segmentation is, per patient on whole volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def label_overlaps(predicted: NDArray[Any], truth: NDArray[Any]) -> dict[int, Overlap]:
    """Count the overlap of each label value that one of two label maps has, 0 left out.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    values = np.union1d(np.unique(predicted), np.unique(truth))
    return {int(value): overlap(predicted == value, truth == value) for value in values if value}


def mean_over_labels(labels: Mapping[int, Overlap], measure: str) -> float:
    """Return the mean ``dice`` or ``iou`` over the labels that a patient has.

    What is found of others lowers the figures of those that it takes the place of. A patient without any label counts
    as 1 where none was found, else as 0.
    """
    own = [getattr(voxels, measure) for voxels in labels.values() if voxels.true_positive + voxels.false_negative]
    return float(mean(own)) if own else float(not labels)
