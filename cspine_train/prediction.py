"""From a volume to a label map, through one run or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cspine_data import (
    CspineDataError,
    PreparedVolume,
    Volume,
    label_name,
    preprocess_volume,
    read_volume,
    volume_suffix,
    write_volume,
)
from cspine_train.classes import network_classes, stored_values
from cspine_train.components import tidied
from cspine_train.errors import RunError
from cspine_train.models import load_model, sides_of
from cspine_train.run_folder import MODEL_FOLDER
from cspine_train.settings import RunRecord, load_record
from cspine_train.transforms import fixed_size, from_network, network_shape, to_network, with_context

_BATCH = 8


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
        return np.asarray(self.label_probabilities(image_xyz, spacing_mm).sum(0))

    def label_probabilities(
        self, image_xyz: NDArray[np.float32], spacing_mm: tuple[float, float, float]
    ) -> NDArray[np.float32]:
        """Return how likely each voxel has each label, averaged over the run's axes: float32 (K, x, y, z).

        One for each of the record's `label_values`; one alone for binary labels. What is left to 1 is the
        background's. The parameters are those of `probabilities`.
        """
        axes = self.record.settings.axes
        total = np.zeros((max(1, len(self.record.label_values)), *image_xyz.shape), dtype=np.float32)
        for axis in axes:
            self._add_along(image_xyz, spacing_mm, axis, np.moveaxis(total, axis + 1, 0))
        total /= np.float32(len(axes))
        return total

    def on_source_grid(self, prepared: PreparedVolume) -> NDArray[np.float32]:
        """Return the `label_probabilities` of a prepared volume, (K, x, y, z), on the grid of its source."""
        found = self.label_probabilities(prepared.normalised_xyz(), prepared.spacing_mm)
        first = prepared.to_source_grid(found[0])
        # In place: with many labels, a list of them beside their stack is most of the memory there is.
        on_source = np.empty((len(found), *first.shape), np.float32)
        on_source[0] = first
        for number in range(1, len(found)):
            on_source[number] = prepared.to_source_grid(found[number])
        return on_source

    def predict(self, volume: Volume) -> Volume:
        """Return the label map of a volume, on the volume's own grid; see `predict_volume`."""
        return predict_volume([self], volume)

    def _add_along(
        self,
        image_xyz: NDArray[np.float32],
        spacing_mm: tuple[float, float, float],
        axis: int,
        total: NDArray[np.float32],
    ) -> None:
        """Add, to slices first (n, K, H, W), what the network finds in the slices along an axis."""
        slices = np.moveaxis(image_xyz, axis, 0)
        first, second = (mm for a, mm in enumerate(spacing_mm) if a != axis)
        pixel_mm = self.record.settings.pixel_mm
        device = next(self.network.parameters()).device
        shape = network_shape((slices.shape[1], slices.shape[2]), (first, second), pixel_mm)
        own = fixed_size([shape], sides_of(self.network))
        # Whole slices, of whatever size training saw; no smaller than there, as pooling over a slice sees the margin.
        height, width = (max(pair) for pair in zip(own, self.record.size_hw, strict=True))
        context = self.record.settings.context
        with torch.inference_mode():
            for start in range(0, len(slices), _BATCH):
                stop = min(start + _BATCH, len(slices))
                before, after = max(0, start - context), min(stop + context, len(slices))
                seen = to_network(slices[before:after], (first, second), pixel_mm, (height, width))
                images = with_context(seen, context, start - before, stop - before)
                images = images.to(device, memory_format=torch.channels_last)
                total[start:stop] += from_network(self.network(images), slices.shape[1:], (first, second), pixel_mm)


def load_run(path: str | Path) -> LoadedRun:
    """Load a trained run, to predict with it.

    Parameters
    ----------
    path : str or Path
        A run folder; nothing in it is unpickled.

    Raises
    ------
    RunError
        If it is no run folder or its record is damaged.
    ModelError
        If its weights are missing, damaged, or of another network.
    """
    path = Path(path)
    record = load_record(path)
    if not (path / MODEL_FOLDER).is_dir():
        raise RunError(f"{path}: has no trained model yet; run cspine-train run again to go on")
    settings, outputs = record.settings, network_classes(record.label_values)
    network = load_model(settings.model, settings.encoder, path / MODEL_FOLDER, settings.channels, outputs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRun(path, record, network.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


def predict_volume(runs: Sequence[LoadedRun], volume: Volume) -> Volume:
    """Predict a volume that is in no store: prepared as in training, probabilities averaged over the runs.

    The average is compared with the average of the runs' thresholds; of several labels the likeliest is taken. Where
    all runs do the same with connected components and holes, it is done, else nothing.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more, which tell the same labels apart.
    volume : Volume
        As `read_volume` gives it.

    Returns
    -------
    Volume
        On its own grid: uint8, 1 where vertebra; or, where the runs tell label values apart, these, in the smallest
        dtype that holds them.

    Raises
    ------
    RunError
        If there is no run, or they tell different labels apart.
    """
    check_labels(runs)
    total: NDArray[np.float32] | None = None
    ways = {run.record.preprocessing for run in runs}
    prepared = {way: preprocess_volume(volume, way) for way in ways}
    for run in runs:
        image = prepared[run.record.preprocessing]
        found = run.on_source_grid(image)
        total = found if total is None else total + found
    if total is None:
        raise RunError("no run given: name at least one with --run")
    return image.to_file_grid(label_map(runs, total))


def label_map(runs: Sequence[LoadedRun], total: NDArray[np.float32]) -> NDArray[Any]:
    """Return the label map that runs make together, (x, y, z), of the sum of their probabilities, (K, x, y, z)."""
    if len(total) == 1:
        mask = total[0] > sum(run.record.threshold for run in runs)
        ways = {(run.record.kept_components, run.record.filled_holes) for run in runs}
        # Runs that do not agree leave it as it is.
        mask = tidied(mask, *(ways.pop() if len(ways) == 1 else (None, False)))
        return stored_values(mask.astype(np.uint8), runs[0].record.label_values)
    highest = len(runs) - total.sum(0)
    numbers = np.zeros(highest.shape, np.uint8)
    for number, of_label in enumerate(total, start=1):
        numbers[of_label > highest] = number
        np.maximum(highest, of_label, out=highest)
    return stored_values(numbers, runs[0].record.label_values)


def check_labels(runs: Sequence[LoadedRun]) -> None:
    """Refuse to fuse runs that tell different labels apart.

    Raises
    ------
    RunError
        If they do.
    """
    for run in runs[1:]:
        first, other = (", ".join(map(str, r.record.label_values)) or "vertebra or not" for r in (runs[0], run))
        if first != other:
            raise RunError(
                f"{run.path}: tells other labels apart ({other}) than {runs[0].path} ({first}); fuse runs of the same "
                "--labels and the same values"
            )


def predict_files(
    runs: Sequence[LoadedRun], volumes: Sequence[Path], output: Path
) -> Iterator[tuple[Path, Path | Exception]]:
    """Predict files one after the other; one that fails does not stop the rest.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more, fused.
    volumes : sequence of Path
        NRRD or NIfTI files.
    output : Path
        A file for one volume; for several a folder, in which each label map has its volume's name with ``-label``.

    Yields
    ------
    volume : Path
        The file that was predicted.
    outcome : Path or Exception
        The label map that was written, or why there is none.

    Raises
    ------
    RunError
        If the runs tell different labels apart, two volumes would be written to one file, or `output` is no name for
        what is predicted. A file that is there is left alone, and named as the reason.
    """
    check_labels(runs)
    if len(volumes) > 1 and (volume_suffix(output) or output.is_file()):
        raise RunError(f"{output}: cannot hold what is predicted; give a folder for several volumes")
    if len(volumes) == 1 and output.suffix and not volume_suffix(output) and not output.is_dir():
        wanted = "a name that ends in .nrrd, .nii or .nii.gz, or a folder that exists"
        raise RunError(f"{output}: cannot hold what is predicted; give {wanted}")
    to_file = len(volumes) == 1 and bool(volume_suffix(output))
    targets = [output if to_file else output / label_name(volume) for volume in volumes]
    if len(set(targets)) < len(targets):
        raise RunError(f"{output}: two of the volumes have the same name; predict them into two folders")
    for volume, target in zip(volumes, targets, strict=True):
        try:
            if target.exists():
                raise RunError(f"{target}: is there already; remove it or choose another -o")
            write_volume(target, predict_volume(runs, read_volume(volume)))
        # PyTorch tells of missing memory by a RuntimeError; networks of one size assert it.
        except (CspineDataError, RunError, OSError, MemoryError, RuntimeError, AssertionError) as error:
            yield volume, error
        else:
            yield volume, target
