"""Prediction of the label map of a volume, by one run or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cspine_data import InputError, PreparedVolume, Preprocessing, Volume, preprocess_volume, usable_image
from cspine_train.data.sizes import fixed_size, network_shape
from cspine_train.data.transforms import from_network, to_network, with_context
from cspine_train.errors import ModelError, RunError
from cspine_train.levels.naming import NamedSpine
from cspine_train.metrics.overlap import Overlap
from cspine_train.models.build import check_names, load_model, sides_of
from cspine_train.prediction.labelling import label_map, probability_of_any
from cspine_train.run.calibration import Calibration
from cspine_train.run.cohort_range import differences, looks_of
from cspine_train.run.folder import MODEL_FOLDER, RECORD_NAME, is_in_use
from cspine_train.run.label_classes import network_classes
from cspine_train.run.record import RunRecord, load_record

_BATCH = 8
# 4096 x 4096 pixels of a slice: wrong units in a header, or a tiny --pixel-mm, would need more than any memory.
_MOST_PIXELS = 1 << 24


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A trained model and its record.

    Attributes
    ----------
    path : Path
        The run folder.
    record : RunRecord
        Its record, with the preprocessing of volumes.
    network : Module
        The network, in evaluation mode, on the device that predicts.
    """

    path: Path
    record: RunRecord
    network: nn.Module

    def probabilities(
        self, image_xyz: NDArray[np.float32], spacing_mm: tuple[float, float, float]
    ) -> NDArray[np.float32]:
        """Return the probability that a voxel is vertebra, of any label, averaged over the run's axes.

        Parameters
        ----------
        image_xyz : ndarray
            A normalised image, float32 (x, y, z).
        spacing_mm : tuple of float
            Voxel spacing along x, y and z.

        Returns
        -------
        ndarray
            float32, the image's shape, from 0 to 1.
        """
        return probability_of_any(self.label_probabilities(image_xyz, spacing_mm))

    def label_probabilities(
        self, image_xyz: NDArray[np.float32], spacing_mm: tuple[float, float, float]
    ) -> NDArray[np.float32]:
        """Return the probability of each label, averaged over the run's axes: float32 (K, x, y, z).

        The labels are the record's `label_values`, or vertebra for binary labels. The background has the rest to 1.
        Parameters are those of `probabilities`.
        """
        return self._over_axes(image_xyz, np.asarray, spacing_mm)

    def on_source_grid(self, prepared: PreparedVolume, mirrored: bool = False) -> NDArray[np.float32]:
        """Return the `label_probabilities` of a prepared volume, (K, x, y, z), on the grid of its source.

        Parameters
        ----------
        prepared : PreparedVolume
            The volume.
        mirrored : bool
            Predict the volume mirrored left-right, and mirror the result back.
        """
        side = slice(None, None, -1 if mirrored else 1)
        # Slices are decoded batch by batch: all together they take twice the volume's memory.
        found = self._over_axes(prepared.levels_xyz[side], prepared.levels.decode, prepared.spacing_mm)[:, side]
        size = prepared.corrected.image_xyz.shape
        if found.shape[1:] == size and prepared.spacing_mm == prepared.corrected.spacing_mm:
            return found
        on_source = np.empty((len(found), *size), np.float32)
        for number, of_label in enumerate(found):
            on_source[number] = prepared.to_source_grid(of_label)
        return on_source

    def on_network_grid(self, prepared: PreparedVolume, part: slice = slice(None)) -> NDArray[np.float32]:
        """Return the `label_probabilities` of a prepared volume on the network's grid; `part` is a range of z."""
        return self._over_axes(prepared.levels_xyz[:, :, part], prepared.levels.decode, prepared.spacing_mm)

    def predict(self, volume: Volume) -> Volume:
        """Return the label map of a volume, on the volume's own grid; see `predict_volume`."""
        return predict_volume([self], volume)

    def _over_axes(
        self,
        image_xyz: NDArray[Any],
        decode: Callable[[NDArray[Any]], NDArray[np.float32]],
        spacing_mm: tuple[float, float, float],
    ) -> NDArray[np.float32]:
        axes = self.record.settings.axes
        total = np.zeros((max(1, len(self.record.label_values)), *image_xyz.shape), dtype=np.float32)
        for axis in axes:
            slices = np.moveaxis(image_xyz, axis, 0)
            self._add_along(slices, decode, spacing_mm, axis, np.moveaxis(total, axis + 1, 0))
        if len(axes) > 1:
            total /= np.float32(len(axes))
        return total

    def _add_along(
        self,
        slices: NDArray[Any],
        decode: Callable[[NDArray[Any]], NDArray[np.float32]],
        spacing_mm: tuple[float, float, float],
        axis: int,
        total: NDArray[np.float32],
    ) -> None:
        """Add the probabilities of the slices along an axis to `total`, slices first (n, K, H, W)."""
        first, second = (mm for a, mm in enumerate(spacing_mm) if a != axis)
        pixel_mm = self.record.settings.pixel_mm
        device = next(self.network.parameters()).device
        shape = network_shape((slices.shape[1], slices.shape[2]), (first, second), pixel_mm)
        own = fixed_size([shape], sides_of(self.network))
        # Whole slices, but no smaller than in training: pooling over a slice depends on the padding.
        height, width = (max(pair) for pair in zip(own, self.record.size_hw, strict=True))
        if height * width > _MOST_PIXELS:
            raise RunError(
                f"{self.path}: slices along axis {axis} would be {height} x {width} pixels; check the volume's "
                "spacing, or crop it"
            )
        context = self.record.settings.context
        with torch.inference_mode():
            for start in range(0, len(slices), _BATCH):
                stop = min(start + _BATCH, len(slices))
                before, after = max(0, start - context), min(stop + context, len(slices))
                seen = to_network(decode(slices[before:after]), (first, second), pixel_mm, (height, width))
                images = with_context(seen, context, start - before, stop - before)
                images = images.to(device, memory_format=torch.channels_last)
                total[start:stop] += from_network(self.network(images), slices.shape[1:], (first, second), pixel_mm)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The label map of a volume, and its confidence.

    Attributes
    ----------
    label : Volume
        The label map on the volume's own grid: uint8, 1 for vertebra; or the runs' label values, in the smallest dtype.
    expected_dice : float or None
        The Dice of the label map if all calibrated probabilities are right, from 0 to 1; None without a
        `fused_calibration`. docs/prediction.md compares it with the true Dice.
    agreement : float or None
        Mean Dice between the masks of the runs and of their mirrored predictions; None for a single mask.
    warnings : tuple of str
        Notes on the volume's file, and differences of the volume from the runs' training volumes.
    probability : Volume or None
        Probability of vertebra, of any label, float32; if requested.
    spine : NamedSpine or None
        The named vertebrae; None if the labels are not levels.
    """

    label: Volume
    expected_dice: float | None
    agreement: float | None
    warnings: tuple[str, ...]
    probability: Volume | None = None
    spine: NamedSpine | None = None


def load_run(path: str | Path) -> LoadedRun:
    """Load a trained run for prediction.

    Parameters
    ----------
    path : str or Path
        A run folder; nothing in it is unpickled.

    Raises
    ------
    RunError
        If the folder is no run, its record is damaged, or it holds a link to the outside.
    ModelError
        If the network cannot be built, or its weights are missing, damaged, or of another network.
    """
    path = Path(path)
    record = load_record(path)
    if not is_in_use(path / MODEL_FOLDER):
        raise RunError(f"{path}: has no trained model yet; run cspine-train run again to go on")
    settings, outputs = record.settings, network_classes(record.label_values)
    try:
        check_names(settings.model, settings.encoder)
    except ModelError as error:
        raise ModelError(f"{path / RECORD_NAME}: {error}") from None
    network = load_model(settings.model, settings.encoder, path / MODEL_FOLDER, settings.channels, outputs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRun(path, record, network.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


def predict_volume(
    runs: Sequence[LoadedRun], volume: Volume, weights: Sequence[float] | None = None, mirror: bool = False
) -> Volume:
    """Return the label map of a volume; parameters are those of `predict`."""
    return predict(runs, volume, weights, mirror).label


def predict(
    runs: Sequence[LoadedRun],
    volume: Volume,
    weights: Sequence[float] | None = None,
    mirror: bool = False,
    with_probability: bool = False,
    lowest: str | None = None,
    highest: str | None = None,
) -> Prediction:
    """Predict a volume: preprocess it as in training, and average the probabilities of the runs.

    `label_map` turns the averages into labels.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more runs of the same labels.
    volume : Volume
        The volume, from `read_volume`.
    weights : sequence of float, optional
        Weight of each run in the average; equal weights by default.
    mirror : bool
        Also average with the prediction of the volume mirrored left-right.
    with_probability : bool
        Return the probabilities, too.
    lowest, highest : str, optional
        Level of the lowest or highest vertebra in the volume, see `name_vertebrae`. Runs with binary labels need one of
        them to name vertebrae. For runs that were trained on levels, it overrides their probabilities.

    Raises
    ------
    RunError
        If there is no run, their labels differ, the weights do not match them, or the vertebrae cannot be named from
        `lowest` or `highest`.
    InputError
        If `lowest` or `highest` is not a level, or the spine has too few vertebrae beyond it.
    """
    check_runs(runs, weights)
    volume = usable_image(volume)
    each = [1.0] * len(runs) if weights is None else list(weights)
    sides = (False, True) if mirror else (False,)
    fused = _Fused(several=len(runs) * len(sides) > 1)
    prepared: dict[Preprocessing, PreparedVolume] = {}
    looks: dict[Preprocessing, dict[str, float]] = {}
    # Preprocessing takes most memory: it is done before there are probabilities.
    for way in dict.fromkeys(run.record.preprocessing for run in runs):
        whole = preprocess_volume(volume, way)
        looks[way], prepared[way] = looks_of(whole), whole.without_intensities()
        del whole
    for run, weight in zip(runs, each, strict=True):
        for mirrored in sides:
            found = run.on_source_grid(prepared[run.record.preprocessing], mirrored)
            fused.add(run, found, weight / len(sides))
            del found
    unlike = [
        line
        for record in (run.record for run in runs)
        for line in differences(
            record.cohort_looks, looks[record.preprocessing], robust="strong" in record.settings.augment.split("+")
        )
    ]
    first = next(iter(prepared.values()))
    back, records = first.to_file_grid, [run.record for run in runs]
    try:
        labelled = label_map(records, fused.total, each, first.corrected.geometry_xyz, lowest, highest)
    # These are about what was found in the volume, and do not name it.
    except InputError as error:
        raise InputError(volume.name, f"{error.subject} {error.problem}", error.remedy) from None
    except RunError as error:
        raise RunError(f"{volume.name}: {error}") from None
    calibration = fused_calibration(records, each)
    mask, spacing_mm = labelled.array_xyz != 0, first.corrected.spacing_mm
    return Prediction(
        back(labelled.array_xyz),
        calibration.expected_dice_of(fused.total, sum(each), mask, spacing_mm) if calibration else None,
        fused.agreement(),
        tuple(dict.fromkeys([*_file_warnings(volume, prepared), *unlike])),
        back(probability_of_any(fused.total) / np.float32(sum(each))) if with_probability else None,
        labelled.spine,
    )


def _file_warnings(volume: Volume, prepared: Mapping[Preprocessing, PreparedVolume]) -> Iterator[str]:
    if volume.assumed_orientation:
        yield "its file holds no orientation; LPS is assumed"
    yield from volume.notes
    for one in prepared.values():
        yield from one.corrected.doubts
    if any(way.revision != Preprocessing().revision for way in prepared):
        yield "the run was trained on volumes of an earlier cspine, whose preprocessing was slightly different"


class _Fused:
    """The weighted sum of probabilities, and the agreement of their masks."""

    def __init__(self, several: bool) -> None:
        self._several = several
        self._total: NDArray[np.float32] | None = None
        self._masks: list[tuple[NDArray[np.uint8], int]] = []
        self._dice: list[float] = []

    def add(self, run: LoadedRun, found: NDArray[np.float32], weight: float) -> None:
        if self._several:
            # One bit per voxel.
            mask = np.packbits(probability_of_any(found) > run.record.threshold)
            count = int(np.unpackbits(mask).sum())
            for other, others in self._masks:
                both = int(np.unpackbits(mask & other).sum())
                self._dice.append(Overlap(both, count - both, others - both).dice)
            self._masks.append((mask, count))
        if weight != 1:
            found *= np.float32(weight)
        if self._total is None:
            self._total = found
        else:
            self._total += found

    @property
    def total(self) -> NDArray[np.float32]:
        assert self._total is not None  # noqa: S101
        return self._total

    def agreement(self) -> float | None:
        return mean(self._dice) if self._dice else None


def fused_calibration(records: Sequence[RunRecord], weights: Sequence[float] | None = None) -> Calibration | None:
    """Return the calibration of the mean of the runs' probabilities; None if a run has no expected Dice.

    The mean of the runs' parameters: no patient is in the validation part of all runs of different folds.
    """
    calibrations = [one.calibration for one in records if one.calibration and not one.why_no_expected_dice()]
    return Calibration.fused(calibrations, weights) if len(calibrations) == len(records) else None


def check_runs(runs: Sequence[LoadedRun], weights: Sequence[float] | None = None) -> None:
    """Refuse, with a `RunError`, to fuse runs of different labels, no run, or weights that do not match the runs."""
    if not runs:
        raise RunError("no run given: name at least one with --run")
    if weights is not None and (len(weights) != len(runs) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise RunError(f"weights {given}: give one for each of the {len(runs)} runs, none negative, some positive")
    for run in runs[1:]:
        first, other = (", ".join(map(str, r.record.label_values)) or "vertebra or not" for r in (runs[0], run))
        if first != other:
            raise RunError(
                f"{run.path}: has other labels ({other}) than {runs[0].path} ({first}); fuse runs of the same --labels "
                "and label values"
            )
        if run.record.levels != runs[0].record.levels:
            raise RunError(
                f"{run.path}: its labels are not the same levels as those of {runs[0].path} (runs of earlier versions "
                "have none); fuse runs that name the same levels"
            )
