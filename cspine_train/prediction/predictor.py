"""From a volume to a label map, through one run or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cspine_data import PreparedVolume, Preprocessing, Volume, preprocess_volume, usable_image
from cspine_train.data.sizes import fixed_size, network_shape
from cspine_train.data.transforms import from_network, to_network, with_context
from cspine_train.errors import ModelError, RunError
from cspine_train.metrics.components import tidied
from cspine_train.metrics.overlap import Overlap
from cspine_train.models.build import check_names, load_model, sides_of
from cspine_train.run.cohort_range import differences, looks_of
from cspine_train.run.folder import MODEL_FOLDER, RECORD_NAME, is_in_use
from cspine_train.run.label_classes import network_classes, stored_values
from cspine_train.run.record import RunRecord, load_record

_BATCH = 8
# Of a slice, 4096 x 4096: a header with wrong units, or a tiny --pixel-mm, asks for more than memory holds.
_MOST_PIXELS = 1 << 24


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A trained model with everything it takes to feed it.

    Attributes
    ----------
    path : Path
        The run folder.
    record : RunRecord
        What was trained, and how volumes are prepared for it.
    network : Module
        In evaluation mode, on the device where it predicts.
    """

    path: Path
    record: RunRecord
    network: nn.Module

    def probabilities(
        self, image_xyz: NDArray[np.float32], spacing_mm: tuple[float, float, float]
    ) -> NDArray[np.float32]:
        """Return how likely each voxel is vertebra, of whatever label, averaged over the run's axes.

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
        return _of_any(self.label_probabilities(image_xyz, spacing_mm))

    def label_probabilities(
        self, image_xyz: NDArray[np.float32], spacing_mm: tuple[float, float, float]
    ) -> NDArray[np.float32]:
        """Return how likely each voxel has each label, averaged over the run's axes: float32 (K, x, y, z).

        One for each of the record's `label_values`; one alone for binary labels. What is left to 1 is the
        background's. The parameters are those of `probabilities`.
        """
        return self._over_axes(image_xyz, np.asarray, spacing_mm)

    def on_source_grid(self, prepared: PreparedVolume, mirrored: bool = False) -> NDArray[np.float32]:
        """Return the `label_probabilities` of a prepared volume, (K, x, y, z), on the grid of its source.

        Parameters
        ----------
        prepared : PreparedVolume
            The volume.
        mirrored : bool
            Show the network the volume with left and right exchanged; what it finds is given where it belongs.
        """
        side = slice(None, None, -1 if mirrored else 1)
        # A batch's slices are decoded when they are looked at: all at once they are twice the volume.
        found = self._over_axes(prepared.levels_xyz[side], prepared.levels.decode, prepared.spacing_mm)[:, side]
        size = prepared.corrected.image_xyz.shape
        if found.shape[1:] == size and prepared.spacing_mm == prepared.corrected.spacing_mm:
            return found
        on_source = np.empty((len(found), *size), np.float32)
        for number, of_label in enumerate(found):
            on_source[number] = prepared.to_source_grid(of_label)
        return on_source

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
        """Add, to slices first (n, K, H, W), what the network finds in the slices along an axis."""
        first, second = (mm for a, mm in enumerate(spacing_mm) if a != axis)
        pixel_mm = self.record.settings.pixel_mm
        device = next(self.network.parameters()).device
        shape = network_shape((slices.shape[1], slices.shape[2]), (first, second), pixel_mm)
        own = fixed_size([shape], sides_of(self.network))
        # Whole slices, of whatever size training saw; no smaller than there, as pooling over a slice sees the margin.
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
    """What was found in a volume, and how sure that is.

    Attributes
    ----------
    label : Volume
        The label map, on the volume's own grid: uint8, 1 where vertebra; or, where the runs tell label values apart,
        these, in the smallest dtype that holds them.
    expected_dice : float
        The Dice that the label map has with the truth if every probability is right: 2 sum(p m) / (sum(p) + sum(m)) of
        probabilities p and mask m (Borges 2024, "Soft Dice Confidence"). From 0 to 1; how it follows the true Dice is
        in docs/prediction.md.
    agreement : float or None
        Mean Dice of the masks of each run, and each mirrored, with each other; None of one alone.
    warnings : tuple of str
        Notes on the volume's file, and in what the volume is unlike those that the runs were trained on.
    probability : Volume or None
        How likely each voxel is vertebra, of whatever label, float32, where it was asked for.
    """

    label: Volume
    expected_dice: float
    agreement: float | None
    warnings: tuple[str, ...]
    probability: Volume | None = None


def load_run(path: str | Path) -> LoadedRun:
    """Load a trained run, to predict with it.

    Parameters
    ----------
    path : str or Path
        A run folder; nothing in it is unpickled.

    Raises
    ------
    RunError
        If it is no run folder, its record is damaged, or a file of it lies elsewhere.
    ModelError
        If this version cannot build its network, or its weights are missing, damaged, or of another network.
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
    """Return the label map of a volume that is in no store; see `predict`, whose parameters these are."""
    return predict(runs, volume, weights, mirror).label


def predict(
    runs: Sequence[LoadedRun],
    volume: Volume,
    weights: Sequence[float] | None = None,
    mirror: bool = False,
    with_probability: bool = False,
) -> Prediction:
    """Predict a volume that is in no store: prepared as in training, probabilities averaged over the runs.

    The average is compared with the average of the runs' thresholds; of several labels the likeliest is taken. Where
    all runs do the same with connected components and holes, it is done, else nothing.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more, which tell the same labels apart.
    volume : Volume
        As `read_volume` gives it.
    weights : sequence of float, optional
        What each run counts in the average; equally much by default.
    mirror : bool
        Let each run also look at the volume with left and right exchanged, and average both.
    with_probability : bool
        Return the probabilities too.

    Raises
    ------
    RunError
        If there is no run, they tell different labels apart, or the weights do not fit them.
    """
    check_runs(runs, weights)
    volume = usable_image(volume)
    each = [1.0] * len(runs) if weights is None else list(weights)
    sides = (False, True) if mirror else (False,)
    fused = _Fused(several=len(runs) * len(sides) > 1)
    prepared: dict[Preprocessing, PreparedVolume] = {}
    looks: dict[Preprocessing, dict[str, float]] = {}
    # All of them before the first probabilities: this is what takes most memory.
    for way in dict.fromkeys(run.record.preprocessing for run in runs):
        whole = preprocess_volume(volume, way)
        looks[way], prepared[way] = looks_of(whole), whole.without_intensities()
        del whole
    for run, weight in zip(runs, each, strict=True):
        for mirrored in sides:
            found = run.on_source_grid(prepared[run.record.preprocessing], mirrored)
            fused.add(run, found, weight / len(sides))
            del found
    told = ["it does not say how it lies in the patient, and was taken for LPS"] if volume.assumed_orientation else []
    told += volume.notes
    told += [line for one in prepared.values() for line in one.corrected.doubts]
    told += [line for run in runs for line in differences(run.record.cohort_looks, looks[run.record.preprocessing])]
    if any(way.revision != Preprocessing().revision for way in prepared):
        told.append("the run was trained on volumes of an earlier cspine, which prepared them a little differently")
    numbers = label_map(runs, fused.total, each)
    back = next(iter(prepared.values())).to_file_grid
    return Prediction(
        back(numbers),
        expected_dice(fused.total, sum(each), numbers != 0),
        fused.agreement(),
        tuple(dict.fromkeys(told)),
        back(_of_any(fused.total) / np.float32(sum(each))) if with_probability else None,
    )


class _Fused:
    """Probabilities that are added up, and how the masks that they are made of agree."""

    def __init__(self, several: bool) -> None:
        self._several = several
        self._total: NDArray[np.float32] | None = None
        self._masks: list[tuple[NDArray[np.uint8], int]] = []
        self._dice: list[float] = []

    def add(self, run: LoadedRun, found: NDArray[np.float32], weight: float) -> None:
        if self._several:
            # A bit a voxel.
            mask = np.packbits(_of_any(found) > run.record.threshold)
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


def _of_any(found: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how likely each voxel has any label, (x, y, z); not a copy where there is one label alone."""
    return found[0] if len(found) == 1 else np.asarray(found.sum(0))


def expected_dice(total: NDArray[np.float32], weight: float, mask: NDArray[np.bool_]) -> float:
    """Return the Dice that a mask has with the truth if every probability is right, see `Prediction`.

    Parameters
    ----------
    total : ndarray
        Probabilities of each label times the weights of runs, added up, (K, x, y, z).
    weight : float
        The sum of the weights.
    mask : ndarray
        bool (x, y, z).
    """
    probable, probable_in_mask = (
        sum(float(of_label.sum(dtype=np.float64, where=where)) for of_label in total) / weight for where in (True, mask)
    )
    marked = np.count_nonzero(mask)
    return 2 * probable_in_mask / (probable + marked) if marked else float(probable < 0.5)


def label_map(
    runs: Sequence[LoadedRun], total: NDArray[np.float32], weights: Sequence[float] | None = None
) -> NDArray[Any]:
    """Return the label map that runs make together, (x, y, z), of the weighted sum of what they found, (K, x, y, z)."""
    each = [1.0] * len(runs) if weights is None else weights
    if len(total) == 1:
        mask = total[0] > sum(weight * run.record.threshold for run, weight in zip(runs, each, strict=True))
        ways = {(run.record.kept_components, run.record.filled_holes) for run in runs}
        # Runs that do not agree leave it as it is.
        mask = tidied(mask, *(ways.pop() if len(ways) == 1 else (None, False)))
        return stored_values(mask.astype(np.uint8), runs[0].record.label_values)
    highest = np.float32(sum(each)) - total.sum(0)
    numbers = np.zeros(highest.shape, np.uint8)
    for number, of_label in enumerate(total, start=1):
        numbers[of_label > highest] = number
        np.maximum(highest, of_label, out=highest)
    return stored_values(numbers, runs[0].record.label_values)


def check_runs(runs: Sequence[LoadedRun], weights: Sequence[float] | None = None) -> None:
    """Refuse to fuse runs that tell different labels apart, and weights that do not fit.

    Raises
    ------
    RunError
        If there is no run, or they do.
    """
    if not runs:
        raise RunError("no run given: name at least one with --run")
    if weights is not None and (len(weights) != len(runs) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise RunError(f"weights {given}: give one for each of the {len(runs)} runs, none negative, some positive")
    for run in runs[1:]:
        first, other = (", ".join(map(str, r.record.label_values)) or "vertebra or not" for r in (runs[0], run))
        if first != other:
            raise RunError(
                f"{run.path}: tells other labels apart ({other}) than {runs[0].path} ({first}); fuse runs of the same "
                "--labels and the same values"
            )
