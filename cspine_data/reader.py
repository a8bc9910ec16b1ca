"""Reading one slice: one positioned read, one checksum, one decompression, into a buffer that the caller owns.

zarr-python reads the same bytes through its event loop in a few milliseconds, and that loop does not survive a fork;
this path knows the one layout that `schema` writes, keeps no thread and no loop, and is safe in forked workers.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from cspine_data.errors import DamagedStoreError
from cspine_data.schema import CHECKSUM_BYTES, LONGEST_RUN, chunk_checksum, codecs

_MAX_OPEN = 128
_ABSENT = 2**64 - 1


class SliceArray:
    """An array of slices, (n, H, W), in one shard, one slice an inner chunk.

    Parameters
    ----------
    path : Path
        The array's folder.

    Raises
    ------
    DamagedStoreError
        If its metadata or its shard index is missing, damaged, or not of the layout that `schema` writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        try:
            metadata = json.loads((path / "zarr.json").read_bytes())
            self.shape: tuple[int, int, int] = tuple(metadata["shape"])
            self.dtype = np.dtype(metadata["data_type"])
            self._check_layout(metadata)
            self._descriptor = os.open(path / "c" / "0" / "0" / "0", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise self._damage(f"cannot be opened ({error})") from None
        self._index = self._read_index()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, position: int, out: NDArray[Any]) -> None:
        """Decode one slice into a C-contiguous array, (H, W), of the array's own dtype.

        Raises
        ------
        DamagedStoreError
            If the slice's bytes are not what was written; `out` is then undefined.
        """
        offset, size = self._index[position]
        if offset == _ABSENT:  # a slice of zeros
            out.fill(0)
            return
        chunk = os.pread(self._descriptor, int(size), int(offset))
        content, checksum = chunk[:-CHECKSUM_BYTES], chunk[-CHECKSUM_BYTES:]
        if len(chunk) != size or chunk_checksum(content) != checksum or _decoded_bytes(content) != out.nbytes:
            raise self._damage(f"slice {position} is not what was written")
        blosc.decompress(content, out)

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

    def _read_index(self) -> list[tuple[int, int]]:
        entries = self.shape[0] * 16
        size = os.fstat(self._descriptor).st_size
        start = size - entries - CHECKSUM_BYTES
        # A store may come from anybody: nothing is allocated that its file cannot hold.
        believable = start >= 0 and self.dtype.itemsize * math.prod(self.shape[1:]) <= size * LONGEST_RUN
        content = os.pread(self._descriptor, entries + CHECKSUM_BYTES, start) if believable else b""
        if not believable or chunk_checksum(content[:entries]) != content[entries:]:
            raise self._damage("its index is not what was written")
        index = np.frombuffer(content, dtype="<u8", count=2 * self.shape[0]).reshape(-1, 2)
        here = index[index[:, 0] != _ABSENT]
        if (here > start).any() or (here.sum(axis=1) > start).any():
            raise self._damage("its index leads out of it")
        return cast("list[tuple[int, int]]", list(map(tuple, index.tolist())))

    def _damage(self, problem: str) -> DamagedStoreError:
        remedy = "mend it with cspine-data verify --repair SOURCE"
        return DamagedStoreError(f"{self._path}: {problem}; {remedy}")


def _decoded_bytes(content: bytes) -> int:
    """Return how many bytes a Blosc buffer says that it decodes to."""
    return int.from_bytes(content[4:8], "little")


class _OpenArrays:
    """The arrays a process holds open, the least recently used closed first.

    An array that is being read when it is dropped stays open until that read ends: its reader still refers to it.
    """

    def __init__(self) -> None:
        self._arrays: OrderedDict[Path, SliceArray] = OrderedDict()
        self._lock = threading.Lock()
        # A fork may happen while another thread holds the lock.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def get(self, path: Path) -> SliceArray:
        with self._lock:
            array = self._arrays.get(path)
            if array is not None:
                self._arrays.move_to_end(path)
                return array
        array = SliceArray(path)
        with self._lock:
            self._arrays[path] = array
            if len(self._arrays) > _MAX_OPEN:
                self._arrays.popitem(last=False)
        return array


_open_arrays = _OpenArrays()


def slice_array(path: Path) -> SliceArray:
    """Return an array of slices, opened at most once in a process while it is in use."""
    return _open_arrays.get(path)
