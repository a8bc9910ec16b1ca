"""Read arrays of other layouts, or at URLs, with zarr-python, which is slower.

Every chunk must exist and have a checksum: zarr-python returns zeros for a missing chunk and noise for a damaged one.
Other layouts are decoded by zarr-python's codecs, without our checks.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.store.location import is_local
from cspine_data.store.schema import DTYPES
from cspine_data.store.shards import ShardError, open_file

# Codecs that do not unpickle.
_CODECS = frozenset({"bytes", "transpose", "blosc", "zstd", "crc32c"})
_INDEX_CODECS = frozenset({"bytes", "crc32c"})
_LARGEST_CHUNK_BYTES = 1 << 30
_KEYS = {"name": "default", "configuration": {"separator": "/"}}


class ForeignArray:
    """An array read by zarr-python, at a path or URL.

    Raises `ShardError` if its chunks have no checksums, zarr-python cannot open it, or its layout is not supported.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        import zarr

        self._path = path
        self.dtype = DTYPES[metadata["data_type"]]
        self._outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        self._grid = [math.ceil(n / chunk) for n, chunk in zip(metadata["shape"], self._outer, strict=True)]
        self._existing: set[tuple[int, ...]] = set()
        chunk_bytes = math.prod(_checked_chunk(metadata)) * self.dtype.itemsize
        if chunk_bytes > _LARGEST_CHUNK_BYTES or metadata["chunk_key_encoding"] != _KEYS:
            raise ShardError("cannot be opened (its layout is not one that is read)")
        try:
            self._array = zarr.open_array(str(path), mode="r", zarr_format=3)
        except Exception as error:  # noqa: BLE001 - zarr-python raises many types
            raise self._failed(error, "cannot be opened") from None

    def read(self, position: int | None = None) -> NDArray[Any]:
        """Return one slice of the array, or all of it; a damaged one raises `ShardError`."""
        self._check_chunks(position)
        try:
            return np.asarray(self._array[... if position is None else position])
        except Exception as error:  # noqa: BLE001
            raise self._failed(error, "is not what was written") from None

    def _check_chunks(self, position: int | None) -> None:
        first = range(self._grid[0]) if position is None else (position // self._outer[0],)
        for place in itertools.product(first, *map(range, self._grid[1:])):
            if place in self._existing:
                continue
            file = self._path.joinpath("c", *map(str, place))
            try:
                if is_local(file):
                    os.close(open_file(file))
                elif not file.exists():
                    raise FileNotFoundError
            except FileNotFoundError:
                raise ShardError(f"is not what was written ({file} is missing)") from None
            self._existing.add(place)

    def _failed(self, error: Exception, what: str) -> Exception:
        """Return the error to raise: damage, unless the disk or the network failed."""
        damaged = (ValueError, TypeError, KeyError, RuntimeError)
        if isinstance(error, OSError) or not (is_local(self._path) or isinstance(error, damaged)):
            number = getattr(error, "errno", None) or errno.EIO
            return OSError(number, f"cannot be read ({str(error) or type(error).__name__})", str(self._path))
        return ShardError(f"{what} ({error})")


def _checked_chunk(metadata: dict[str, Any]) -> list[int]:
    """Return the shape of an innermost chunk, if its codecs are known and include a checksum."""
    chunk, chain = metadata["chunk_grid"]["configuration"]["chunk_shape"], metadata["codecs"]
    while [codec["name"] for codec in chain] == ["sharding_indexed"]:
        inner = chain[0]["configuration"]
        if not {codec["name"] for codec in inner["index_codecs"]} <= _INDEX_CODECS:
            break
        chunk, chain = inner["chunk_shape"], inner["codecs"]
    names = {codec["name"] for codec in chain}
    if not names <= _CODECS:
        raise ShardError("cannot be opened (its layout is not one that is read)")
    if "crc32c" not in names:
        raise ShardError("cannot be opened (its chunks carry no checksums)")
    return list(chunk)
