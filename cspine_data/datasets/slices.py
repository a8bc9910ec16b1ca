"""Slices and volumes of a store as map-style datasets, without PyTorch."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cspine_data.datasets.slice_reader import damage, opened_slices
from cspine_data.errors import InputError, NotInStoreError
from cspine_data.preprocessing.normalisation import Levels
from cspine_data.store import schema
from cspine_data.store.location import location
from cspine_data.store.records import read_label_xyz, read_volume_xyz
from cspine_data.store.schema import CaseRecord
from cspine_data.store.writer import METADATA
from cspine_data.volumes.geometry import Triple

Labels = Literal["binary", "stored"] | None
#: Value of ignored voxels in binary label maps, as the `ignore_index` of many losses.
IGNORE_INDEX = 255
# Maximum number of buffers; a cohort usually has slices of few sizes.
_MOST_BUFFERS = 32


@dataclass(frozen=True)
class SlicePlace:
    """Case, axis and position along the axis of an item of a `SliceDataset`."""

    case: str
    axis: int
    position: int


class SliceDataset:
    """Slices of a cohort, in order of case, axis and position; `len`, `[]`, picklable.

    Items are ``(image, label)``: float32 (C, H, W) normalised intensities, and uint8 (1, H, W), 1 where labelled and
    255 (`IGNORE_INDEX`) where voxels are ignored (or the stored values and dtype, see `ignored_values`); with
    ``labels=None`` only the image. C is 1 + 2 x context. H and W differ between cases and axes, unless `size_hw` is
    given.

    Created by `Cohort.slices`. It keeps the number of labelled voxels of each slice and one or two kilobytes per case,
    so that it is quickly sent to worker processes.

    Attributes
    ----------
    cases : tuple of str
        The case ids.
    axes : tuple of int
        The axes of the slices.
    labelled_voxels : ndarray of int32
        Number of labelled voxels of each item, without reading labels.
    """

    def __init__(
        self,
        store: Path,
        records: Iterable[CaseRecord],
        axes: tuple[int, ...],
        labels: Labels,
        only_labelled: bool,
        context: int = 0,
        size_hw: tuple[int, int] | None = None,
    ) -> None:
        self.axes = axes
        self.labels: Labels = labels
        self.context = context
        self.size_hw = size_hw
        self._cases: list[_SlicedCase] = []
        # The first item of each case and axis.
        self._first: list[int] = []
        positions, voxels = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        total = 0
        for record in records:
            self._cases.append(_SlicedCase.of(store, record, axes))
            for axis in axes:
                counts = _labelled_voxels(record, axis)
                if only_labelled:
                    positions.append(np.flatnonzero(counts).astype(np.int32))
                    counts = counts[positions[-1]]
                voxels.append(counts)
                self._first.append(total)
                total += counts.size
        self.cases: tuple[str, ...] = tuple(case.id for case in self._cases)
        self._positions = np.concatenate(positions) if only_labelled else None
        self.labelled_voxels: NDArray[np.int32] = np.concatenate(voxels)
        self.labelled_voxels.flags.writeable = False
        if size_hw:
            for case in self._cases:
                for axis in axes:
                    _check_fits(case.shapes_hw[axis], size_hw, f"case {case.id!r}")

    def __len__(self) -> int:
        return len(self.labelled_voxels)

    def __getitem__(self, item: int) -> Any:
        shape = self.size_hw or self.shape(item)
        image = np.empty((1, 2 * self.context + 1, *shape), np.float32)
        if self.labels is None:
            self.read_into([item], image)
            return image[0]
        dtype = np.dtype(np.uint8)
        if self.labels == "stored":
            case, axis, _ = self._place(item)
            dtype = opened_slices(*self._cases[case].arrays[axis, "label"]).dtype
        label = np.empty((1, 1, *shape), dtype)
        self.read_into([item], image, label)
        return image[0], label[0]

    def read_into(self, items: Sequence[int], images: NDArray[Any], labels: NDArray[Any] | None = None) -> None:
        """Decode slices straight into the arrays of a batch.

        A slice smaller than the arrays is centred, with `(H - h) // 2` rows above it. The margin is filled with the
        darkest value of an image, or 0 in a label map. A slice that several items or channels need is read once.

        Parameters
        ----------
        items : sequence of int
            Item numbers.
        images : ndarray
            Output, (N, C, H, W): float32 intensities, or the stored int16 values, which are multiplied by `scales` to
            get intensities and need half the memory on the way to a GPU.
        labels : ndarray, optional
            Output, (N, 1, H, W): uint8, or for ``labels="stored"`` a dtype that can hold the stored values.

        Raises
        ------
        InputError
            If the arrays have another shape or dtype, a slice does not fit, or there are no labels.
        DamagedStoreError
            If a slice is damaged; the arrays are then undefined.
        OSError
            If a file cannot be read.
        """
        self._check_batch(len(items), images, labels)
        places = [self._place(item) for item in items]
        decoded, levels = None, None
        # In the order on disk, in which repeated slices follow each other.
        for place, number, channel in sorted(self._slices_of(places)):
            if levels is None or place != decoded:
                decoded, levels = place, self._decoded(place, "image")
            _put_image(self._cases[place[0]].levels, levels, images[number, channel])
        if labels is not None:
            for item, place, label in zip(items, places, labels, strict=True):
                ignored = self._cases[place[0]].ignored_values
                # Slices without labels are not read.
                if self.labelled_voxels[item] or ignored:
                    self._put_label(self._decoded(place, "label"), label[0], ignored)
                else:
                    label.fill(0)

    def scales(self, items: Sequence[int]) -> NDArray[np.float32]:
        """Return the scale of each item's int16 image, float32 (N,): intensities are ``image * scale``."""
        return np.array([self._cases[self._place(item)[0]].levels.scale for item in items], np.float32)

    def ignored_values(self, item: int) -> tuple[int, ...]:
        """Return the stored label values that are ignored in an item."""
        return self._cases[self._place(item)[0]].ignored_values

    @property
    def ignores(self) -> bool:
        """Whether any case has ignored voxels."""
        return any(case.ignored_values for case in self._cases)

    def place(self, item: int) -> SlicePlace:
        """Return case, axis and position of an item."""
        case, axis, position = self._place(item)
        return SlicePlace(self.cases[case], axis, position)

    def spacing_mm(self, item: int) -> tuple[float, float]:
        """Return the pixel spacing along H and W of an item."""
        case, axis, _ = self._place(item)
        first, second = (mm for a, mm in enumerate(self._cases[case].spacing_xyz_mm) if a != axis)
        return first, second

    def shape(self, item: int) -> tuple[int, int]:
        """Return the stored H and W of an item, without reading it."""
        case, axis, _ = self._place(item)
        return self._cases[case].shapes_hw[axis]

    def case_number(self, item: int) -> int:
        """Return the index in `cases` of an item."""
        return self._place(item)[0]

    @property
    def case_numbers(self) -> NDArray[np.int32]:
        """The index in `cases` of each item, int32 (n,)."""
        lengths = np.diff(np.array([*self._first, len(self)]))
        return np.repeat(np.arange(len(lengths), dtype=np.int32) // len(self.axes), lengths)

    @property
    def shapes_hw(self) -> frozenset[tuple[int, int]]:
        """The different stored sizes of the slices."""
        return frozenset(case.shapes_hw[axis] for case in self._cases for axis in self.axes)

    def _place(self, item: int) -> _Place:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        item = int(item) % len(self)
        run = bisect_right(self._first, item) - 1
        case, axis = divmod(run, len(self.axes))
        position = item - self._first[run] if self._positions is None else int(self._positions[item])
        return case, self.axes[axis], position

    def _check_batch(self, count: int, images: NDArray[Any], labels: NDArray[Any] | None) -> None:
        expected = (count, 2 * self.context + 1)
        if images.shape[:-2] != expected or images.dtype not in (np.float32, np.int16):
            problem = f"have to be float32 or int16, {expected} x H x W"
            raise InputError("images", problem, f"these are {images.dtype}, {images.shape}")
        if labels is None:
            return
        if self.labels is None:
            raise InputError("labels=None", "reads no label maps", "ask for 'binary' or 'stored'")
        of_images = (count, 1, *images.shape[-2:])
        if labels.shape != of_images or (self.labels == "binary" and labels.dtype != np.uint8):
            dtype = "uint8" if self.labels == "binary" else "of the stored dtype"
            raise InputError("labels", f"have to be {dtype}, {of_images}", f"these are {labels.dtype}, {labels.shape}")

    def _slices_of(self, places: Sequence[_Place]) -> Iterator[tuple[_Place, int, int]]:
        """Iterate over the slices of items, with neighbours: the place of each, and its item and channel."""
        if not self.context:
            yield from ((place, number, 0) for number, place in enumerate(places))
            return
        for number, (case, axis, position) in enumerate(places):
            last = self._cases[case].size_xyz[axis] - 1
            for channel in range(2 * self.context + 1):
                yield (case, axis, min(max(position + channel - self.context, 0), last)), number, channel

    def _decoded(self, place: _Place, kind: str) -> NDArray[Any]:
        number, axis, position = place
        case = self._cases[number]
        array = opened_slices(*case.arrays[axis, kind])
        if array.shape[1:] != case.shapes_hw[axis] or array.shape[0] != case.size_xyz[axis]:
            raise damage(location(case.arrays[axis, kind][0]), "its shape is not the case's")
        if kind == "image" and array.dtype != np.int16:
            raise damage(location(case.arrays[axis, kind][0]), "it does not hold 16-bit levels")
        out = _buffers.of(case.shapes_hw[axis], array.dtype)
        array.read_into(position, out)
        return out

    def _put_label(self, label: NDArray[Any], canvas: NDArray[Any], ignored: Sequence[int]) -> None:
        window = _middle(canvas, label.shape)
        if window is not canvas:
            _fill_around(canvas, label.shape, 0)
        if self.labels == "binary":
            np.not_equal(label, 0, out=window.view(np.bool_))
            _mark_ignored(window, label, ignored)
        elif np.can_cast(label.dtype, window.dtype):
            window[...] = label
        else:
            raise InputError("labels='stored'", f"are {label.dtype}, which {window.dtype} does not hold", "give others")


_Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _SlicedCase:
    """What is needed to read a case's slices."""

    id: str
    size_xyz: tuple[int, int, int]
    spacing_xyz_mm: Triple
    levels: Levels
    # H and W of the slices along each axis.
    shapes_hw: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    ignored_values: tuple[int, ...]
    # By axis and kind: the array's folder, and the checksums of its metadata and of its shard.
    arrays: dict[tuple[int, str], tuple[str, str, str]]

    @classmethod
    def of(cls, store: Path, record: CaseRecord, axes: tuple[int, ...]) -> _SlicedCase:
        folder = f"{store}/{schema.case_path(record.case, record.digest)}"
        arrays = {}
        for axis in axes:
            if axis not in record.axes:
                raise _axis_missing(store, record, axis)
            for kind in ("image", "label") if record.labelled else ("image",):
                name = schema.slice_array(axis, kind)
                metadata, shard = (record.files.get(f"{name}/{file}", "") for file in (METADATA, "c/0/0/0"))
                arrays[axis, kind] = (f"{folder}/{name}", metadata, shard)
        x, y, z = record.sliced_size_xyz
        spacing_mm, shapes_hw = record.sliced_spacing_xyz_mm, ((y, z), (x, z), (x, y))
        return cls(record.case, (x, y, z), spacing_mm, record.levels, shapes_hw, record.ignored_values, arrays)


class _Buffers(threading.local):
    """Reusable buffers, separate for each thread, into which slices are decoded."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[tuple[int, ...], np.dtype[Any]], NDArray[Any]] = {}

    def of(self, shape_hw: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        array = self._arrays.get((shape_hw, dtype))
        if array is None:
            if len(self._arrays) == _MOST_BUFFERS:
                self._arrays.clear()
            array = self._arrays[shape_hw, dtype] = np.empty(shape_hw, dtype)
        return array


_buffers = _Buffers()


def _check_fits(shape_hw: tuple[int, ...], size_hw: tuple[int, ...], name: str) -> None:
    if any(there > room for there, room in zip(shape_hw, size_hw, strict=True)):
        there, room = (" x ".join(map(str, size)) for size in (shape_hw, size_hw))
        raise InputError(name, f"has slices of {there}, which {room} does not hold", "choose a larger size")


def _middle(canvas: NDArray[Any], shape_hw: tuple[int, ...]) -> NDArray[Any]:
    """Return the central part of an array (H, W) for a slice."""
    if canvas.shape == shape_hw:
        return canvas
    _check_fits(shape_hw, canvas.shape, "a case")
    top, left = ((room - there) // 2 for room, there in zip(canvas.shape, shape_hw, strict=True))
    return canvas[top : top + shape_hw[0], left : left + shape_hw[1]]


def _put_image(levels: Levels, slice_hw: NDArray[np.int16], canvas: NDArray[Any]) -> None:
    # Padded before conversion to float32: NumPy takes twice as long for non-contiguous rows.
    padded = canvas if canvas.dtype == np.int16 else slice_hw
    if padded.shape != canvas.shape:
        padded = _buffers.of(canvas.shape, slice_hw.dtype)
    if padded is not slice_hw:
        _middle(padded, slice_hw.shape)[...] = slice_hw
        if slice_hw.shape != canvas.shape:
            # Air.
            _fill_around(padded, slice_hw.shape, slice_hw.min())
    if padded is not canvas:
        levels.decode(padded, canvas)


def _fill_around(canvas: NDArray[Any], shape_hw: tuple[int, ...], value: float) -> None:
    """Fill the margin around the part that `_middle` returns."""
    top, left = ((room - there) // 2 for room, there in zip(canvas.shape, shape_hw, strict=True))
    bottom, right = top + shape_hw[0], left + shape_hw[1]
    for strip in (canvas[:top], canvas[bottom:], canvas[top:bottom, :left], canvas[top:bottom, right:]):
        strip.fill(value)


class VolumeDataset:
    """Whole volumes of a cohort, in order of case; `len`, `[]`, picklable.

    Items are ``(image, label)``: float32 (1, X, Y, Z) normalised intensities, and uint8 (1, X, Y, Z), 1 where labelled
    and 255 (`IGNORE_INDEX`) where voxels are ignored (or the stored values and dtype); with ``labels=None`` only the
    image. Both are on the volume's own grid, also if its slices are resampled.

    Created by `Cohort.volumes`.
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
        if self.labels == "stored":
            return image, label
        binary = (label != 0).view(np.uint8)
        _mark_ignored(binary, label, record.ignored_values)
        return image, binary


def _mark_ignored(binary: NDArray[np.uint8], label: NDArray[Any], ignored: Sequence[int]) -> None:
    for value in ignored:
        binary[label == value] = IGNORE_INDEX


def _labelled_voxels(record: CaseRecord, axis: int) -> NDArray[np.int32]:
    if record.labelled:
        return np.array(record.labelled_voxels[axis], dtype=np.int32)
    return np.zeros(record.sliced_size_xyz[axis], dtype=np.int32)


def _axis_missing(store: Path, record: CaseRecord, axis: int) -> Exception:
    if axis not in (0, 1, 2):
        return InputError(f"axis {axis}", "is not known", "choose 0 (sagittal), 1 (coronal) or 2 (axial)")
    digits = "".join(map(str, sorted({*record.axes, axis})))
    return NotInStoreError(
        f"{store}: case {record.case!r} has no slices along axis {axis}; run cspine-data prepare --axes {digits}"
    )
