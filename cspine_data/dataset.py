"""What a training loop reads of a store: slices and volumes, as map-style datasets; no PyTorch needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cspine_data import schema
from cspine_data.errors import InputError, NotInStoreError
from cspine_data.intensity import Levels
from cspine_data.reader import SliceArray, slice_array
from cspine_data.schema import CaseRecord
from cspine_data.store import read_label_xyz, read_volume_xyz
from cspine_data.writer import METADATA

Labels = Literal["binary", "stored"] | None


@dataclass(frozen=True)
class SlicePlace:
    """Which slice an item of a `SliceDataset` is: case, axis, and position along the axis."""

    case: str
    axis: int
    position: int


class SliceDataset:
    """Slices of a cohort, in order of case, axis and position; `len`, `[]`, picklable.

    Items are ``(image, label)``: float32 (C, H, W) normalised intensities, and uint8 (1, H, W), 1 where labelled (or
    the stored values and dtype); with ``labels=None`` the image alone. C is 1 + 2 x context. H and W differ
    between cases and axes.

    Made by `Cohort.slices`.
    """

    def __init__(
        self,
        store: Path,
        chosen: Sequence[CaseRecord],
        axes: tuple[int, ...],
        labels: Labels,
        only_labelled: bool,
        context: int = 0,
    ) -> None:
        self.axes = axes
        self.labels: Labels = labels
        self.context = context
        self.records = tuple(chosen)
        self._folders = tuple(store / schema.case_path(record.case, record.digest) for record in chosen)
        places, voxels = [], []
        for number, record in enumerate(chosen):
            for axis in axes:
                if axis not in record.axes:
                    raise _axis_missing(store, record, axis)
                counts = _labelled_voxels(record, axis)
                positions = np.flatnonzero(counts) if only_labelled else np.arange(counts.size)
                places.append(np.stack([np.full_like(positions, number), np.full_like(positions, axis), positions], 1))
                voxels.append(counts[positions])
        self._places = np.concatenate(places).astype(np.int32) if places else np.zeros((0, 3), np.int32)
        #: How many labelled voxels each item has, int64 (n,); no label is read for it.
        self.labelled_voxels: NDArray[np.int64] = np.concatenate(voxels) if voxels else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, item: int) -> Any:
        number, axis, position = (int(value) for value in self._places[item])
        image = self._read_with_context(number, axis, position)
        if self.labels is None:
            return image
        label = self._array(number, axis, "label").read(position)[None]
        if self.labels == "binary":
            label = (label != 0).view(np.uint8)
        return image, label

    def place(self, item: int) -> SlicePlace:
        """Return which slice an item is."""
        number, axis, position = (int(value) for value in self._places[item])
        return SlicePlace(self.records[number].case, axis, position)

    def spacing_mm(self, item: int) -> tuple[float, float]:
        """Return the pixel spacing along H and W of an item."""
        number, axis, _ = self._places[item]
        first, second = (mm for a, mm in enumerate(self.records[number].sliced_spacing_xyz_mm) if a != axis)
        return first, second

    def shape(self, item: int) -> tuple[int, int]:
        """Return H and W of an item, without reading it."""
        number, axis, _ = self._places[item]
        first, second = (size for a, size in enumerate(self.records[number].sliced_size_xyz) if a != axis)
        return first, second

    def _read_with_context(self, number: int, axis: int, position: int) -> NDArray[np.float32]:
        array = self._array(number, axis, "image")
        around = range(position - self.context, position + self.context + 1)
        beside = [min(max(wanted, 0), array.shape[0] - 1) for wanted in around]
        levels = np.empty((len(beside), *array.shape[1:]), dtype=array.dtype)
        for channel, wanted in enumerate(beside):
            if channel and wanted == beside[channel - 1]:
                levels[channel] = levels[channel - 1]
            else:
                array.read_into(wanted, levels[channel])
        return self.records[number].levels.decode(levels)

    def _array(self, number: int, axis: int, kind: str) -> SliceArray:
        name = schema.slice_array(axis, kind)
        files = self.records[number].files
        return slice_array(
            self._folders[number] / name, files.get(f"{name}/{METADATA}", ""), files.get(f"{name}/c/0/0/0", "")
        )


class VolumeDataset:
    """Whole volumes of a cohort, in order of case; `len`, `[]`, picklable.

    Items are ``(image, label)``: float32 (1, X, Y, Z) normalised intensities, and uint8 (1, X, Y, Z), 1 where labelled
    (or the stored values and dtype); with ``labels=None`` the image alone. Both lie on the volume's own grid, also
    where its slices were resampled.

    Made by `Cohort.volumes`.
    """

    def __init__(self, store: Path, chosen: Sequence[CaseRecord], labels: Labels) -> None:
        self.labels: Labels = labels
        self.records = tuple(chosen)
        self._store = store

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int) -> Any:
        record = self.records[item]
        normalised = record.normalisation.apply(read_volume_xyz(self._store, record))
        levels = Levels.spanning(normalised)
        image = levels.decode(levels.encode(normalised))[None]
        if self.labels is None:
            return image
        label = read_label_xyz(self._store, record)[None]
        return image, (label != 0).view(np.uint8) if self.labels == "binary" else label


def _labelled_voxels(record: CaseRecord, axis: int) -> NDArray[np.int64]:
    if record.labelled:
        return np.array(record.labelled_voxels[axis], dtype=np.int64)
    return np.zeros(record.sliced_size_xyz[axis], dtype=np.int64)


def _axis_missing(store: Path, record: CaseRecord, axis: int) -> Exception:
    if axis not in (0, 1, 2):
        return InputError(f"axis {axis}", "is not known", "choose 0 (sagittal), 1 (coronal) or 2 (axial)")
    digits = "".join(map(str, sorted({*record.axes, axis})))
    return NotInStoreError(
        f"{store}: case {record.case!r} has no slices along axis {axis}; run cspine-data prepare --axes {digits}"
    )
