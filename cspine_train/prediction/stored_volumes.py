"""Predictions of stored volumes, with their true label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import Cohort
from cspine_train.errors import RunError
from cspine_train.levels.naming import NamedSpine
from cspine_train.metrics.overlap import Overlap, slice_overlaps
from cspine_train.prediction.labelling import label_map, probability_of_any
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.reports.figures import window_of


@dataclass(frozen=True, eq=False)
class Segmented:
    """A volume with its predicted and its true label map, (x, y, z) on the grid of its source.

    Attributes
    ----------
    case : str
        Case id.
    image_xyz : ndarray
        Corrected intensities.
    spacing_mm : tuple of float
        Voxel spacing along x, y and z.
    found_xyz, truth_xyz : ndarray
        Predicted and true label values; 0 is unlabelled.
    axes : tuple of int
        The run's axes.
    ignored_xyz : ndarray of bool or None
        Ignored voxels, where `truth_xyz` is 0; None if there are none.
    spine : NamedSpine or None
        The named vertebrae of the prediction; None if the labels are not levels.
    probability_xyz : ndarray or None
        float32, the probability of any label; None if the prediction has no probabilities.
    """

    case: str
    image_xyz: NDArray[Any]
    spacing_mm: tuple[float, float, float]
    found_xyz: NDArray[Any]
    truth_xyz: NDArray[Any]
    axes: tuple[int, ...] = (0, 1, 2)
    ignored_xyz: NDArray[np.bool_] | None = None
    spine: NamedSpine | None = None
    probability_xyz: NDArray[np.float32] | None = None

    def scored(self, found_xyz: NDArray[Any]) -> NDArray[Any]:
        """Return a label map of the volume's shape with 0 for ignored voxels."""
        return found_xyz if self.ignored_xyz is None else np.where(self.ignored_xyz, 0, found_xyz)

    @cached_property
    def slices(self) -> Mapping[int, Mapping[int, Overlap]]:
        """Overlap of both in each slice, by axis and index; slices empty in both are left out."""
        found, truth = self.scored(self.found_xyz) != 0, self.truth_xyz != 0
        return {axis: slice_overlaps(found, truth, axis) for axis in self.axes}

    @cached_property
    def window(self) -> tuple[float, float]:
        """Intensities shown as black and white, see `window_of`."""
        return window_of(self.image_xyz)


def segment(loaded: LoadedRun, cohort: Cohort, case: str) -> Segmented:
    """Predict a case of a run's store, on the grid of its source.

    Raises `RunError` if the store holds other data of the case than at training.
    """
    check_trained_on(loaded, cohort, case)
    variant = loaded.record.settings.variant
    prepared = cohort.prepared(case, variant)
    corrected = prepared.corrected
    probabilities = loaded.on_source_grid(prepared)
    labelled = label_map([loaded.record], probabilities, [1.0], corrected.geometry_xyz)
    truth, axes = cohort.label_xyz(case, variant), loaded.record.settings.axes
    ignored, values = None, cohort.record(case, variant).ignored_values
    if values:
        ignored = np.isin(truth, values)
        truth = np.where(ignored, 0, truth)
    return Segmented(
        case, corrected.image_xyz, corrected.spacing_mm, labelled.array_xyz, truth, axes, ignored, labelled.spine,
        probability_of_any(probabilities),
    )  # fmt: skip


def check_trained_on(loaded: LoadedRun, cohort: Cohort, case: str) -> None:
    """Refuse, with a `RunError`, a case whose data differ from those at training."""
    stored = cohort.record(case, loaded.record.settings.variant)
    if stored.digest != loaded.record.digests.get(case):
        now, then = stored.preprocessing, loaded.record.preprocessing
        if now != then:
            raise RunError(
                f"{cohort.path}: holds {case} prepared with {now.description}, and {loaded.path} was trained on "
                f"{then.description}; prepare it that way again, or train again"
            )
        raise RunError(f"{cohort.path}: holds other data of {case} than {loaded.path} was trained with; train it again")


def segment_all(
    loaded: LoadedRun, cohort: Cohort, cases: Sequence[str], progress: Callable[[int, int, str], None] | None = None
) -> Iterator[Segmented]:
    """Segment cases one after the other; `progress` is called when the caller asks for the next."""
    for number, case in enumerate(cases, start=1):
        yield segment(loaded, cohort, case)
        if progress:
            progress(number, len(cases), case)
