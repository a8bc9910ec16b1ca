"""From a volume to a label map, through one run or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
        """Return how likely each voxel is vertebra, averaged over the run's axes.

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
        axes = self.record.settings.axes
        total = np.zeros(image_xyz.shape, dtype=np.float32)
        for axis in axes:
            total += np.moveaxis(self._along(image_xyz, spacing_mm, axis), 0, axis)
        return total / np.float32(len(axes))

    def on_source_grid(self, prepared: PreparedVolume) -> NDArray[np.float32]:
        """Return how likely each voxel of a prepared volume is vertebra, (x, y, z), on the grid of its source."""
        return prepared.to_source_grid(self.probabilities(prepared.normalised_xyz(), prepared.spacing_mm))

    def predict(self, volume: Volume) -> Volume:
        """Return the label map of a volume, uint8, 1 where vertebra, on the volume's own grid."""
        return predict_volume([self], volume)

    def _along(
        self, image_xyz: NDArray[np.float32], spacing_mm: tuple[float, float, float], axis: int
    ) -> NDArray[np.float32]:
        slices = np.moveaxis(image_xyz, axis, 0)
        first, second = (mm for a, mm in enumerate(spacing_mm) if a != axis)
        pixel_mm = self.record.settings.pixel_mm
        device = next(self.network.parameters()).device
        shape = network_shape((slices.shape[1], slices.shape[2]), (first, second), pixel_mm)
        own = fixed_size([shape], sides_of(self.network))
        # Whole slices, of whatever size training saw; no smaller than there, as pooling over a slice sees the margin.
        height, width = (max(pair) for pair in zip(own, self.record.size_hw, strict=True))
        context = self.record.settings.context
        parts = []
        with torch.inference_mode():
            for start in range(0, len(slices), _BATCH):
                stop = min(start + _BATCH, len(slices))
                before, after = max(0, start - context), min(stop + context, len(slices))
                seen = to_network(slices[before:after], (first, second), pixel_mm, (height, width))
                images = with_context(seen, context, start - before, stop - before)
                images = images.to(device, memory_format=torch.channels_last)
                parts.append(from_network(self.network(images), slices.shape[1:], (first, second), pixel_mm))
        return np.concatenate(parts)


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
    settings = record.settings
    network = load_model(settings.model, settings.encoder, path / MODEL_FOLDER, settings.channels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRun(path, record, network.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


def predict_volume(runs: Sequence[LoadedRun], volume: Volume) -> Volume:
    """Predict a volume that is in no store: prepared as in training, probabilities averaged over the runs.

    The average is compared with the average of the runs' thresholds.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more.
    volume : Volume
        As `read_volume` gives it.

    Returns
    -------
    Volume
        uint8, 1 where vertebra, on the volume's own grid.
    """
    total: NDArray[np.float32] | None = None
    ways = {run.record.preprocessing for run in runs}
    prepared = {way: preprocess_volume(volume, way) for way in ways}
    for run in runs:
        image = prepared[run.record.preprocessing]
        found = run.on_source_grid(image)
        total = found if total is None else total + found
    if total is None:
        raise RunError("no run given: name at least one with --run")
    mask = (total > sum(run.record.threshold for run in runs)).astype(np.uint8)
    return image.to_file_grid(mask)


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
        If two volumes would be written to one file, or `output` is no name for what is predicted. A file that is there
        is left alone, and named as the reason.
    """
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
        # PyTorch tells of missing memory by a RuntimeError.
        except (CspineDataError, RunError, OSError, MemoryError, RuntimeError) as error:
            yield volume, error
        else:
            yield volume, target
