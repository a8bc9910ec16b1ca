"""Write the files of one case durably, with a checksum each; each array is one shard.

zarr-python writes the same arrays chunk by chunk through its event loop, in about five times the time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.files import sync_folder, write_file
from cspine_data.store import schema

METADATA = "zarr.json"


class CaseWriter:
    """Writes the groups and arrays of a new folder.

    `checksums` are the SHA-256, in hex, of every file, by path within the folder; of the data in memory, not read
    back from disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checksums: dict[str, str] = {}
        folder.mkdir(parents=True)

    def write_group(self, name: str, attributes: dict[str, Any]) -> None:
        """Write a group's metadata."""
        self._write(f"{name}/{METADATA}", [schema.group_bytes(attributes)])

    def write_array(
        self, name: str, values: NDArray[Any], chunks: tuple[int, ...], axes: str, attributes: dict[str, Any]
    ) -> None:
        """Write an array as one shard with inner chunks of this shape; `axes` has one letter per axis."""
        metadata = schema.array_metadata(values.shape, values.dtype.name, chunks, axes, attributes)
        self._write(f"{name}/{METADATA}", [json.dumps(metadata, indent=1).encode()])
        self._write("/".join((name, "c", *"0" * values.ndim)), _shard(values, chunks))

    def finish(self) -> None:
        """Synchronise the entries of all folders to disk."""
        files = [self.folder / name for name in self.checksums]
        inside = {parent for file in files for parent in file.parents if parent.is_relative_to(self.folder)}
        for folder in inside:
            sync_folder(folder)

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        self.checksums[name] = write_file(file, parts)


def _shard(values: NDArray[Any], chunks: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the compressed inner chunks of a shard with their checksums, then its index."""
    from numcodecs import blosc

    (codec, _) = schema.codecs(chunks, values.dtype.itemsize)
    settings = codec["configuration"]
    compressor, level = settings["cname"].encode(), settings["clevel"]
    shuffle = {"noshuffle": blosc.NOSHUFFLE, "bitshuffle": blosc.BITSHUFFLE}[settings["shuffle"]]
    index = []
    offset = 0
    for chunk in _chunks(values.astype(values.dtype.newbyteorder("<"), copy=False), chunks):
        content = blosc.compress(chunk, compressor, level, shuffle, settings["blocksize"])
        yield content
        yield schema.chunk_checksum(content)
        size = len(content) + schema.CHECKSUM_BYTES
        index.append((offset, size))
        offset += size
    content = np.array(index, dtype="<u8").tobytes()
    yield content
    yield schema.chunk_checksum(content)


def _chunks(values: NDArray[Any], chunks: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """Iterate over the chunks of an array in C order; chunks beyond its end are padded with zeros."""
    for place in itertools.product(*map(range, schema.chunk_grid(values.shape, chunks))):
        starts = [n * chunk for n, chunk in zip(place, chunks, strict=True)]
        part = values[tuple(slice(start, start + chunk) for start, chunk in zip(starts, chunks, strict=True))]
        if part.shape != chunks:
            part = np.pad(part, [(0, chunk - n) for chunk, n in zip(chunks, part.shape, strict=True)])
        yield np.ascontiguousarray(part)
