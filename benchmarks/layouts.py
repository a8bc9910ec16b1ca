"""The ways to keep slices that `streaming.py` measures: what each writes, and how it reads one slice.

All hold the same arrays, 16-bit levels and label maps, and deliver the same: levels, or the intensities that they stand
for, and a uint8 mask, in the middle of their places in a batch. Other projects' libraries are imported where they are
used, so that a process holds only the one that it measures. Those of medical imaging are in `medical_layouts.py`.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import CaseRecord, SliceDataset, open_cohort
from cspine_data.datasets.slice_reader import open_slices
from cspine_data.preprocessing.normalisation import Levels
from cspine_data.store.schema import case_path, slice_array, slice_chunks
from cspine_data.store.writer import CaseWriter

KINDS = ("image", "label")
#: Encoders halve the size five times.
STRIDE = 32


def put(
    values: NDArray[Any], label: NDArray[Any], levels: Levels | None, image: NDArray[Any], mask: NDArray[np.uint8]
) -> None:
    """Put a slice (h, w) in the middle of its place in a batch (H, W), margins its own minimum and 0.

    An image that takes intensities is given what levels stand for.
    """
    top, left = ((there - own) // 2 for there, own in zip(image.shape, values.shape, strict=True))
    inside = (slice(top, top + values.shape[0]), slice(left, left + values.shape[1]))
    as_it_is = levels is None or image.dtype == values.dtype
    padded = image if as_it_is else np.empty(image.shape, values.dtype)
    padded[inside] = values
    if values.shape != image.shape:
        fill_margins(padded, inside, values.min())
        fill_margins(mask, inside, 0)
    if levels is not None and not as_it_is:
        levels.decode(padded, image)
    np.not_equal(label, 0, out=mask[inside].view(np.bool_))


def fill_margins(plane: NDArray[Any], inside: tuple[slice, slice], value: Any) -> None:
    """Fill what of a plane lies outside a window."""
    rows, columns = inside
    plane[: rows.start] = value
    plane[rows.stop :] = value
    plane[rows, : columns.start] = value
    plane[rows, columns.stop :] = value


def along(volume_xyz: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a volume's slices along an axis, (n, H, W), in memory one after the other."""
    return np.ascontiguousarray(np.moveaxis(volume_xyz, axis, 0))


def array_folder(store: Path, record: CaseRecord, axis: int, kind: str) -> Path:
    """Return where a store keeps an array of slices."""
    return store / case_path(record.case, record.digest) / slice_array(axis, kind)


def volumes_of(store: Path, record: CaseRecord) -> tuple[NDArray[np.int16], NDArray[Any]]:
    """Return a case's levels and label map, (x, y, z), as its slices along axis 0 hold them."""
    whole = []
    for kind in KINDS:
        slices = open_slices(array_folder(store, record, 0, kind))
        whole.append(np.empty(slices.shape, slices.dtype))
        for position, out in enumerate(whole[-1]):
            slices.read_into(position, out)
    return whole[0], whole[1]


class Layout:
    """Slices of a cohort along one axis, kept in one way.

    Parameters
    ----------
    store : Path
        The store that says which slices there are.
    folder : Path
        Where the files of this layout are.
    axis : int
        The axis.
    """

    name = ""
    #: Whether its files are those of the store.
    of_store = False
    #: Whether one slice can be asked for.
    by_slice = True
    #: What its images are: levels as they are stored.
    image_dtype = np.dtype(np.int16)
    #: How `DataLoader` starts workers that can read it.
    start_method = "fork"

    def __init__(self, store: Path, folder: Path, axis: int) -> None:
        self.store, self.folder, self.axis = store, folder, axis
        cohort = open_cohort(store)
        self.slices: SliceDataset = cohort.slices(axis=axis)
        self.records = [cohort.record(case) for case in self.slices.cases]
        sizes = [record.sliced_size_xyz for record in self.records]
        self.places = [(number, position) for number, size in enumerate(sizes) for position in range(size[axis])]
        shapes = [[n for a, n in enumerate(size) if a != axis] for size in sizes]
        #: Which item is the first of each case.
        self.first = np.cumsum([0, *(size[axis] for size in sizes)]).tolist()
        #: The size of a batch's slices: what holds all, and what networks can halve.
        self.size_hw = tuple(math.ceil(max(sides) / STRIDE) * STRIDE for sides in zip(*shapes, strict=True))
        self._open: dict[Any, Any] = {}
        self._process = 0

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        """Write a case for all three axes."""
        for axis, (kind, volume) in itertools.product(range(3), zip(KINDS, (levels_xyz, label_xyz), strict=True)):
            cls.write_slices(folder, f"{record.case}-{axis}-{kind}", along(volume, axis))

    @classmethod
    def write_slices(cls, folder: Path, name: str, slices: NDArray[Any]) -> None:
        """Write one array of slices."""
        raise NotImplementedError

    def begin(self) -> None:
        """Tell a library, once a process, how to work."""

    def open(self, number: int, kind: str) -> Any:
        """Open what holds a case's images or labels."""
        raise NotImplementedError

    def opened(self, number: int, kind: str) -> Any:
        """Return what `open` gave, once a process: workers open their own."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
            self.begin()
        if (number, kind) not in self._open:
            self._open[number, kind] = self.open(number, kind)
        return self._open[number, kind]

    def read(self, number: int, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a slice's levels and its label map, (h, w) each."""
        image, label = (self.opened(number, kind)[position] for kind in KINDS)
        return image, label

    def levels(self, number: int) -> Levels | None:
        """Return what the values that `read` gives stand for; None where they are intensities already."""
        return self.records[number].levels

    def read_into(self, items: Sequence[int], images: NDArray[Any], masks: NDArray[np.uint8]) -> None:
        """Read slices into a batch: images (N, 1, H, W), masks (N, 1, H, W)."""
        for item, image, mask in zip(items, images, masks, strict=True):
            number, position = self.places[item]
            put(*self.read(number, position), self.levels(number), image[0], mask[0])

    def paths(self, number: int, position: int) -> list[Path]:
        """Return the files that a slice is read from."""
        return [self.folder / self.file(number, kind) for kind in KINDS]

    def file(self, number: int, kind: str) -> str:
        """Return the name of the file that holds a case's images or labels."""
        return f"{self.records[number].case}-{self.axis}-{kind}"

    def let_go(self) -> None:
        """Unmap what is mapped: the kernel keeps mapped pages."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_process": 0}


class Ours(Layout):
    """`SliceDataset.read_into`."""

    name = "cspine"
    of_store = True

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        writer = CaseWriter(folder / record.case)
        for axis, (kind, volume) in itertools.product(range(3), zip(KINDS, (levels_xyz, label_xyz), strict=True)):
            slices = along(volume, axis)
            writer.write_array(slice_array(axis, kind), slices, slice_chunks(slices.shape), "xyz", {})
        writer.finish()

    def read_into(self, items: Sequence[int], images: NDArray[Any], masks: NDArray[np.uint8]) -> None:
        self.slices.read_into(items, images, masks)

    def folder_of(self, number: int, kind: str) -> Path:
        """Return an array's folder in the store."""
        return array_folder(self.store, self.records[number], self.axis, kind)

    def paths(self, number: int, position: int) -> list[Path]:
        return [self.folder_of(number, kind) / "c" / "0" / "0" / "0" for kind in KINDS]


class OursReadAhead(Ours):
    """The same through `BatchLoader`, as `cspine-train run` has it: a thread is two batches ahead."""

    name = "cspine read ahead"
    by_slice = False


class OursUnchecked(Ours):
    """The same with the checksum left out, which is only to show what it costs."""

    name = "cspine without checksum"

    def read_into(self, items: Sequence[int], images: NDArray[Any], masks: NDArray[np.uint8]) -> None:
        from cspine_data.store import shards

        shards.fits_checksum = lambda content: True
        super().read_into(items, images, masks)


class ZarrPython(Ours):
    """zarr-python with its default codec pipeline, on our store."""

    name = "zarr-python"
    read_into = Layout.read_into

    def open(self, number: int, kind: str) -> Any:
        import zarr

        return zarr.open_array(self.folder_of(number, kind), mode="r")


class Zarrs(ZarrPython):
    """zarr-python with the codec pipeline of zarrs, on our store; an error where that would hand back to zarr-python.

    Forked workers can read one chunk at a time; several at once hang where the parent has read several (zarrs-python
    issue 171).
    """

    name = "zarr-python with zarrs"

    def begin(self) -> None:
        import zarr

        path = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
        zarr.config.set({**path, "threading.max_workers": 1})


class TensorStore(Ours):
    """TensorStore's zarr3 driver, on our store; workers that were forked from a process that has read crash."""

    name = "TensorStore"
    start_method = "spawn"
    read_into = Layout.read_into

    def open(self, number: int, kind: str) -> Any:
        import tensorstore

        one = {"limit": 1}
        context = tensorstore.Context({"data_copy_concurrency": one, "file_io_concurrency": one})
        path = str(self.folder_of(number, kind))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        return tensorstore.open(spec, context=context, read=True).result()

    def read(self, number: int, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        asked = [self.opened(number, kind)[position].read() for kind in KINDS]
        return asked[0].result(), asked[1].result()


class Hdf5(Layout):
    """HDF5: all in one file, a slice a chunk, shuffled, LZF, Fletcher's checksum; its cache of chunks is off.

    That cache, a megabyte a dataset, would answer for slices that were read a moment before, which no epoch reads.
    """

    name = "HDF5"

    @classmethod
    def write_slices(cls, folder: Path, name: str, slices: NDArray[Any]) -> None:
        import h5py

        with h5py.File(folder / "slices.h5", "a") as file:
            chunks = (1, *slices.shape[1:])
            file.create_dataset(name, data=slices, chunks=chunks, compression="lzf", shuffle=True, fletcher32=True)

    def open(self, number: int, kind: str) -> Any:
        import h5py

        if "file" not in self._open:
            self._open["file"] = h5py.File(self.folder / "slices.h5", "r", rdcc_nbytes=0)
        return self._open["file"][self.file(number, kind)]

    def paths(self, number: int, position: int) -> list[Path]:
        return [self.folder / "slices.h5"]


class Tiff(Layout):
    """TIFF as the reference study had it: normalised slices in float32 and their masks, a file each."""

    name = "TIFF"
    image_dtype = np.dtype(np.float32)

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        super().write(folder, record, record.levels.decode(levels_xyz), label_xyz)

    @classmethod
    def write_slices(cls, folder: Path, name: str, slices: NDArray[Any]) -> None:
        import tifffile

        (folder / name).mkdir()
        for position, plane in enumerate(slices):
            tifffile.imwrite(folder / name / f"{position:04d}.tif", plane)

    def read(self, number: int, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        import tifffile

        image, label = (tifffile.imread(path) for path in self.paths(number, position))
        return image, label

    def levels(self, number: int) -> Levels | None:
        return None

    def paths(self, number: int, position: int) -> list[Path]:
        return [self.folder / self.file(number, kind) / f"{position:04d}.tif" for kind in KINDS]


class MemoryMap(Layout):
    """Uncompressed arrays, slices first, mapped into memory: the limit."""

    name = "memory map"

    @classmethod
    def write_slices(cls, folder: Path, name: str, slices: NDArray[Any]) -> None:
        np.save(folder / f"{name}.npy", slices)

    def file(self, number: int, kind: str) -> str:
        return f"{super().file(number, kind)}.npy"

    def open(self, number: int, kind: str) -> Any:
        return np.load(self.folder / self.file(number, kind), mmap_mode="r")

    def let_go(self) -> None:
        for array in self._open.values():
            array._mmap.madvise(mmap.MADV_DONTNEED)
