"""Reading one slice: one positioned read, one checksum, one decompression, into a buffer that the caller owns.

zarr-python reads the same bytes through its event loop in a few milliseconds, and that loop does not survive a fork;
this path knows the one layout that `schema` writes, keeps no thread and no loop, and is safe in forked workers.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import DamagedStoreError
from cspine_data.schema import DTYPES, codecs
from cspine_data.shards import ABSENT, ShardError, decode, open_file, read_index
from cspine_data.store import REPLACED, read_array_metadata, repair_hint

_MAX_OPEN = 128


class SliceArray:
    """An array of slices, (n, H, W), in one shard, one slice an inner chunk.

    Parameters
    ----------
    path : Path
        The array's folder.
    metadata_sha256 : str, optional
        What the case's record says of the array's metadata.

    Raises
    ------
    DamagedStoreError
        If its metadata or its shard index is missing, damaged, or not of the layout that `schema` writes.
    OSError
        If it cannot be opened for a reason that is not the store's.
    """

    def __init__(self, path: Path, metadata_sha256: str | None = None) -> None:
        self._path = path
        self._descriptor = -1
        try:
            metadata = read_array_metadata(path, metadata_sha256)
            self.shape: tuple[int, int, int] = tuple(metadata["shape"])
            self.dtype = DTYPES[metadata["data_type"]]
            self._check_layout(metadata)
            self._descriptor = open_file(path / "c" / "0" / "0" / "0")
        except (FileNotFoundError, NotADirectoryError) as error:
            # Too many open files, or a disk that fails, are not the store's fault.
            raise self._damage(f"cannot be opened ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise self._damage(f"cannot be opened ({error})") from None
        try:
            self._index = read_index(self._descriptor, self.shape[0], math.prod(self.shape[1:]) * self.dtype.itemsize)
        except ShardError as error:
            raise self._damage(str(error)) from None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, position: int, out: NDArray[Any]) -> None:
        """Decode one slice into a C-contiguous array, (H, W), of the array's own dtype.

        Raises
        ------
        DamagedStoreError
            If the slice's bytes are not what was written; `out` is then undefined.
        OSError
            If the disk does not give them.
        """
        offset, size = self._index[position]
        if offset == ABSENT:
            out.fill(0)
            return
        try:
            decode(os.pread(self._descriptor, size, offset), size, out)
        except ShardError as error:
            raise self._damage(f"slice {position} {error}") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def read(self, position: int) -> NDArray[Any]:
        """Return one slice, (H, W), as a new array."""
        out = np.empty(self.shape[1:], dtype=self.dtype)
        self.read_into(position, out)
        return out

    def _check_layout(self, metadata: dict[str, Any]) -> None:
        grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]
        names = [codec["name"] for codec in inner["codecs"]]
        expected = ["bytes"] + [codec["name"] for codec in codecs(self.dtype.itemsize)]
        layout = (tuple(grid), tuple(inner["chunk_shape"]), names, inner.get("index_location", "end"))
        sizes = all(isinstance(n, int) and n > 0 for n in self.shape) and len(self.shape) == 3
        if not sizes or layout != (self.shape, (1, *self.shape[1:]), expected, "end"):
            raise ValueError("its layout is not the store's")

    def _damage(self, problem: str) -> DamagedStoreError:
        # When it has been mended, it is to be opened again.
        _open_arrays.drop(self._path)
        if not self._path.parents[1].is_dir():
            return DamagedStoreError(f"{self._path}: is not there any more; it {REPLACED}")
        return DamagedStoreError(f"{self._path}: {problem}; {repair_hint(self._path.parents[4])}")


_Opened = tuple[Path, str | None, str | None]


class _OpenArrays:
    """The arrays a process holds open, the least recently used closed first.

    An array that is being read when it is dropped stays open until that read ends: its reader still refers to it.
    """

    def __init__(self) -> None:
        self._arrays: OrderedDict[_Opened, SliceArray] = OrderedDict()
        self._lock = threading.Lock()
        # A fork may happen while another thread holds the lock.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def drop(self, path: Path) -> None:
        with self._lock:
            for opened in [opened for opened in self._arrays if opened[0] == path]:
                del self._arrays[opened]

    def get(self, path: Path, metadata_sha256: str | None, shard_sha256: str | None) -> SliceArray:
        # A case that was mended may have other bytes in the same place.
        opened = (path, metadata_sha256, shard_sha256)
        with self._lock:
            array = self._arrays.get(opened)
            if array is not None:
                self._arrays.move_to_end(opened)
                return array
        array = SliceArray(path, metadata_sha256)
        with self._lock:
            self._arrays[opened] = array
            if len(self._arrays) > _MAX_OPEN:
                self._arrays.popitem(last=False)
        return array


_open_arrays = _OpenArrays()


def slice_array(path: Path, metadata_sha256: str | None = None, shard_sha256: str | None = None) -> SliceArray:
    """Return an array of slices, opened at most once in a process while it is in use; see `SliceArray`."""
    return _open_arrays.get(path, metadata_sha256, shard_sha256)
