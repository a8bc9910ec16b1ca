"""Read one slice: one positioned read, one checksum, one decompression, into the caller's buffer.

zarr-python takes fifteen to forty times as long, because of its event loop. This reader supports only the layout of
`schema`, has no threads, and is safe in forked workers. Other layouts, and stores at URLs, are read by zarr-python.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import DamagedStoreError
from cspine_data.store.location import is_local, location
from cspine_data.store.records import MALFORMED, REPLACED, read_array_metadata, repair_hint
from cspine_data.store.schema import DTYPES, is_own_layout, slice_chunks
from cspine_data.store.shards import ShardError, open_file, place_of, read_chunk, read_index

# Cohorts have thousands of arrays, but a process may open only about a thousand files.
_MAX_OPEN = 128


class SliceArray(Protocol):
    """Slices along one axis, (n, H, W), read one by one."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    def read_into(self, position: int, out: NDArray[Any]) -> None:
        """Read one slice into a C-contiguous array, (H, W), of the slices' own dtype.

        Raises `DamagedStoreError` if the slice is damaged; `out` is then undefined.
        """


class DirectSlices:
    """Slices in the layout of `schema`: an array is one shard, a slice one inner chunk."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path = path
        self._descriptor = -1
        self.shape: tuple[int, int, int] = tuple(metadata["shape"])
        self.dtype = DTYPES[metadata["data_type"]]
        self._descriptor = open_file(path / "c" / "0" / "0" / "0")
        self._index = read_index(self._descriptor, self.shape[0], math.prod(self.shape[1:]) * self.dtype.itemsize)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, position: int, out: NDArray[Any]) -> None:
        """Decode one slice; see `SliceArray`."""
        try:
            read_chunk(self._descriptor, place_of(self._index, position), out)
        except ShardError as error:
            raise damage(self._path, f"slice {position} {error}") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


class ForeignSlices:
    """Slices in another layout, or at a URL; see `ForeignArray`."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        from cspine_data.store.zarr_fallback import ForeignArray

        self._path = path
        self._array = ForeignArray(path, metadata)
        self.shape: tuple[int, int, int] = tuple(metadata["shape"])
        self.dtype = self._array.dtype

    def read_into(self, position: int, out: NDArray[Any]) -> None:
        """Read one slice; see `SliceArray`."""
        try:
            out[...] = self._array.read(position)
        except ShardError as error:
            raise damage(self._path, f"slice {position} {error}") from None


def open_slices(path: Path, metadata_sha256: str | None = None) -> SliceArray:
    """Open an array of slices, whose metadata have the checksum in the case's record; damage raises an error."""
    try:
        metadata = read_array_metadata(path, metadata_sha256)
        shape = metadata["shape"]
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError("it holds no slices")
        own = is_local(path) and is_own_layout(metadata, slice_chunks(tuple(shape)))
        try:
            return DirectSlices(path, metadata) if own else ForeignSlices(path, metadata)
        except ShardError as error:
            raise damage(path, str(error)) from None
    except (FileNotFoundError, NotADirectoryError) as error:
        # Other errors, such as too many open files, are not damage.
        raise damage(path, f"cannot be opened ({error.strerror or error})") from None
    except MALFORMED as error:
        raise damage(path, f"cannot be opened ({error})") from None


def damage(path: Path, problem: str) -> DamagedStoreError:
    """Return the error for a damaged array of slices."""
    # After a repair it must be opened again.
    _open_arrays.drop(path)
    if is_local(path) and not path.parents[1].is_dir():
        return DamagedStoreError(f"{path}: is missing; it {REPLACED}")
    return DamagedStoreError(f"{path}: {problem}; {repair_hint(path.parents[4])}")


_Opened = tuple[str, str | None, str | None]


class _OpenArrays:
    """The open arrays of a process; the least recently used is closed first.

    An array that is dropped while it is read stays open until the read ends, because its reader refers to it.
    """

    def __init__(self) -> None:
        self._arrays: OrderedDict[_Opened, SliceArray] = OrderedDict()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._reset_after_fork)

    def _reset_after_fork(self) -> None:
        # Another thread may have held the lock, and the thread of zarr-python's event loop is gone.
        self._lock = threading.Lock()
        self._arrays = OrderedDict(pair for pair in self._arrays.items() if isinstance(pair[1], DirectSlices))

    def drop(self, path: Path) -> None:
        with self._lock:
            for opened in [opened for opened in self._arrays if opened[0] == str(path)]:
                del self._arrays[opened]

    def get(self, path: str, metadata_sha256: str | None = None, shard_sha256: str | None = None) -> SliceArray:
        # A repaired case may have other bytes at the same path.
        opened = (path, metadata_sha256, shard_sha256)
        with self._lock:
            array = self._arrays.get(opened)
            if array is not None:
                self._arrays.move_to_end(opened)
                return array
        array = open_slices(location(path), metadata_sha256)
        with self._lock:
            self._arrays[opened] = array
            if len(self._arrays) > _MAX_OPEN:
                self._arrays.popitem(last=False)
        return array


_open_arrays = _OpenArrays()
#: Returns an open array of slices from the cache of this process; see `open_slices`.
opened_slices = _open_arrays.get
