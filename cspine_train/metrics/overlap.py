"""Measures of a segmentation, per patient on whole volumes.

A new measure is a function of a `MaskPair` and a line in `MEASURES`; a plug-in adds one as an entry point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from statistics import mean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cspine_train.errors import RunError
from cspine_train.extensions import METRICS
from cspine_train.metrics.surfaces import SurfaceDistances, surface_distances


@dataclass(frozen=True)
class Overlap:
    """Overlap of a predicted mask with the true one, in voxels."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN) (Dice 1945); 1 if both masks are empty."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else 1.0

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN) (Jaccard 1901); 1 if both masks are empty."""
        union = self.true_positive + self.false_positive + self.false_negative
        return self.true_positive / union if union else 1.0

    @property
    def precision(self) -> float:
        """TP / (TP + FP); if nothing was found, 1 for an empty true mask, else 0."""
        found = self.true_positive + self.false_positive
        return self.true_positive / found if found else float(not self.false_negative)

    @property
    def recall(self) -> float:
        """TP / (TP + FN); for an empty true mask, 1 if nothing was found, else 0."""
        truth = self.true_positive + self.false_negative
        return self.true_positive / truth if truth else float(not self.false_positive)


@dataclass(frozen=True, eq=False)
class MaskPair:
    """A predicted and a true mask, with intermediate results that measures share.

    Attributes
    ----------
    found, truth : ndarray
        bool, three axes, of one shape: the predicted and the true mask.
    spacing_mm : tuple of float
        Voxel spacing along each axis.
    """

    found: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]

    @cached_property
    def voxels(self) -> Overlap:
        """Numbers of true positive, false positive and false negative voxels."""
        return overlap(self.found, self.truth)

    @cached_property
    def surfaces(self) -> SurfaceDistances | None:
        """Distances between the surfaces; None if a mask is empty."""
        return surface_distances(self.found, self.truth, self.spacing_mm)

    def distance_mm(self, of: Callable[[SurfaceDistances], float]) -> float:
        """Return a distance between the surfaces.

        It is 0 if both masks are empty. If one is, it is the volume's diagonal, the largest possible distance, so that
        the mean over patients shows that a patient was missed.
        """
        if self.surfaces is not None:
            return of(self.surfaces)
        return 0.0 if self._both_empty else diagonal_mm(self.found.shape, self.spacing_mm)

    def surface_dice(self, tolerance_mm: float) -> float:
        """Return `SurfaceDistances.dice_within`; 1 if both masks are empty, 0 if one is."""
        return float(self._both_empty) if self.surfaces is None else self.surfaces.dice_within(tolerance_mm)

    @property
    def volume_difference_ml(self) -> float:
        """Predicted minus true volume."""
        return (self.voxels.false_positive - self.voxels.false_negative) * float(np.prod(self.spacing_mm)) / 1e3

    @property
    def _both_empty(self) -> bool:
        return not self.found.any() and not self.truth.any()


@dataclass(frozen=True)
class Measure:
    """Name and format of a measure.

    Attributes
    ----------
    name : str
        Column in files. The name of the entry point replaces that of a plug-in's measure.
    title : str
        Column in printed tables, without the unit.
    unit : str
        Unit, if it has one.
    digits : int
        Decimals in tables.
    within : tuple of float
        Smallest and largest possible value, the limits of confidence intervals.
    better : str
        Which values are better: ``higher``, ``lower``, or those near ``zero``.
    brief : bool
        Whether the short tables of `evaluate`, studies and model cards show it. Files and reports show all measures.
    """

    name: str
    title: str
    unit: str = ""
    digits: int = 4
    within: tuple[float, float] = (0.0, 1.0)
    better: Literal["higher", "lower", "zero"] = "higher"
    brief: bool = field(default=True, kw_only=True)

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def figure(self, value: float) -> str:
        """Return a formatted value."""
        return f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class MaskMeasure(Measure):
    """A measure of two masks.

    Attributes
    ----------
    compute : callable
        Function of a `MaskPair` that returns a finite number, also for empty masks.
    """

    compute: Callable[[MaskPair], float] = field(kw_only=True)


#: The project's own measures, in the order of tables; see `measures` for all.
MEASURES = (
    MaskMeasure("dice", "Dice", compute=lambda pair: pair.voxels.dice),
    MaskMeasure("iou", "IoU", compute=lambda pair: pair.voxels.iou),
    MaskMeasure("precision", "precision", compute=lambda pair: pair.voxels.precision, brief=False),
    MaskMeasure("recall", "recall", compute=lambda pair: pair.voxels.recall, brief=False),
    MaskMeasure(
        "volume_difference_ml", "volume difference", "ml", 2, (-math.inf, math.inf), "zero",
        compute=lambda pair: pair.volume_difference_ml, brief=False,
    ),
    MaskMeasure(
        "hausdorff95_mm", "Hausdorff 95 %", "mm", 2, (0.0, math.inf), "lower",
        compute=lambda pair: pair.distance_mm(lambda surfaces: surfaces.hausdorff95_mm),
    ),
    MaskMeasure(
        "average_surface_distance_mm", "average surface distance", "mm", 2, (0.0, math.inf), "lower",
        compute=lambda pair: pair.distance_mm(lambda surfaces: surfaces.average_mm),
    ),
    MaskMeasure("surface_dice_1mm", "surface Dice at 1 mm", compute=lambda pair: pair.surface_dice(1)),
    MaskMeasure("surface_dice_2mm", "surface Dice at 2 mm", compute=lambda pair: pair.surface_dice(2), brief=False),
)  # fmt: skip


@cache
def measures() -> tuple[MaskMeasure, ...]:
    """Return all measures, in the order of tables: `MEASURES`, then those of plug-ins.

    Raises `RunError` if a plug-in cannot be imported.
    """
    own = {measure.name for measure in MEASURES}
    return *MEASURES, *(replace(METRICS.load(name), name=name) for name in METRICS.names() if name not in own)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a predicted mask with the true one; see docs/evaluation.md.

    Attributes
    ----------
    voxels : Overlap
        Counts of voxels.
    figures : dict
        Values of `measures` by name. They are attributes, too: ``agreement.dice``.
    """

    voxels: Overlap
    figures: Mapping[str, float]

    def __getattr__(self, name: str) -> float:
        """Return a measure by its name."""
        try:
            return float(self.__dict__["figures"][name])
        except KeyError:
            raise AttributeError(f"no measure is named {name}") from None


def agreement(found: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> Agreement:
    """Compare a predicted mask with the true one.

    Parameters
    ----------
    found, truth : ndarray
        bool, three axes, of one shape.
    spacing_mm : tuple of float
        Voxel spacing along each axis.

    Raises
    ------
    ValueError
        If the shapes differ.
    RunError
        If the measure of a plug-in fails.
    """
    pair = MaskPair(found, truth, spacing_mm)
    return Agreement(pair.voxels, {measure.name: _value(measure, pair) for measure in measures()})


def _value(measure: MaskMeasure, pair: MaskPair) -> float:
    if measure in MEASURES:
        return measure.compute(pair)
    try:
        value = float(measure.compute(pair))
    # A plug-in may raise anything.
    except Exception as error:
        raise RunError(f"measure {measure.name}: fails ({error}); correct or remove its plug-in") from error
    if not math.isfinite(value):
        raise RunError(f"measure {measure.name}: is {value}, not a finite number; correct or remove its plug-in")
    return value


def diagonal_mm(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> float:
    """Return the diagonal of a volume, the largest possible distance in it."""
    return float(np.linalg.norm(np.multiply(shape, spacing_mm)))


def overlap(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Overlap:
    """Count the overlap of two masks; a `ValueError` if their shapes differ."""
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {truth.shape} cannot be compared")
    both = int(np.count_nonzero(predicted & truth))
    return Overlap(both, int(np.count_nonzero(predicted)) - both, int(np.count_nonzero(truth)) - both)


def slice_overlaps(found: NDArray[np.bool_], truth: NDArray[np.bool_], axis: int) -> dict[int, Overlap]:
    """Count the overlap of two masks in each slice along an axis, by index; slices empty in both are omitted."""
    across = tuple(number for number in range(3) if number != axis)
    both, all_found, all_true = (np.count_nonzero(mask, axis=across) for mask in (found & truth, found, truth))
    return {
        int(index): Overlap(int(both[index]), int((all_found - both)[index]), int((all_true - both)[index]))
        for index in np.flatnonzero(all_found + all_true)
    }


def label_agreements(
    found: NDArray[Any], truth: NDArray[Any], spacing_mm: tuple[float, float, float]
) -> dict[int, Agreement]:
    """Compare two label maps of one shape for each label value of either, without 0."""
    values = np.union1d(np.unique(found), np.unique(truth))
    return {int(value): agreement(found == value, truth == value, spacing_mm) for value in values if value}


def mean_over_labels(labels: Mapping[int, Agreement], measure: str) -> float:
    """Return the mean of a measure such as ``dice`` over a patient's true labels.

    Labels that only the prediction has are left out. For a patient without labels it is 1 if none was predicted, else
    0.
    """
    own = [
        getattr(label, measure) for label in labels.values() if label.voxels.true_positive + label.voxels.false_negative
    ]
    return float(mean(own)) if own else float(not labels)


def batch_averaged_dice(slices: Sequence[Overlap], batch: int) -> float:
    """Return the Dice of all pixels of a batch of slices, averaged over batches, as in the reference study.

    It depends on the batch size and on which slices share a batch. Use it only to compare with that study.

    Parameters
    ----------
    slices : sequence of Overlap
        Overlaps of the labelled slices, in order.
    batch : int
        Slices in a batch; the last may be smaller.

    Returns
    -------
    float
        1 if no slice is labelled, as in that study.
    """
    dice = []
    for start in range(0, len(slices), batch):
        counts = [(s.true_positive, s.false_positive, s.false_negative) for s in slices[start : start + batch]]
        dice.append(Overlap(*map(sum, zip(*counts, strict=True))).dice)
    return mean(dice) if dice else 1.0
