"""Read a shard chunk by chunk, checking all checksums and lengths.

A store may be untrusted. Blosc trusts the header of a buffer and reads beyond the end of the buffer, so the header is
checked before decompression.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from cspine_data.store.schema import CHECKSUM_BYTES, LONGEST_RUN, chunk_grid, fits_checksum

#: Index entry of a chunk of zeros, which other programs omit.
ABSENT = 2**64 - 1
_ENTRY = struct.Struct("<QQ")
# A Blosc buffer: version, format, flags, type size, decoded bytes, block size, its own bytes.
_BLOSC_HEADER = struct.Struct("<BBBBIII")
_BLOSC_COPIED = 2


class ShardError(ValueError):
    """A shard is damaged; the message does not contain its path."""


def open_file(path: Path) -> int:
    """Open a regular file of a store, not a link, pipe or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ShardError("is a link") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ShardError("is no file")
    return descriptor


def read_index(descriptor: int, chunks: int, chunk_bytes: int) -> bytes:
    """Read the index of a shard, for `place_of`; an index that leads out of the file is refused."""
    entries = chunks * _ENTRY.size
    size = os.fstat(descriptor).st_size
    start = size - entries - CHECKSUM_BYTES
    if start < 0 or chunk_bytes > size * LONGEST_RUN:
        raise ShardError("its index is not what was written")
    content = os.pread(descriptor, entries + CHECKSUM_BYTES, start)
    if not fits_checksum(content):
        raise ShardError("its index is not what was written")
    index = np.frombuffer(content, dtype="<u8", count=2 * chunks).reshape(-1, 2)
    here = index[index[:, 0] != ABSENT]
    if (here > start).any() or (here.sum(axis=1) > start).any():
        raise ShardError("its index leads out of it")
    return content


def place_of(index: bytes, chunk: int) -> tuple[int, int]:
    """Return offset and size of a chunk, by its number in C order."""
    return _ENTRY.unpack_from(index, chunk * _ENTRY.size)


def read_chunk(descriptor: int, place: tuple[int, int], out: NDArray[Any]) -> None:
    """Read one chunk and decode it into a C-contiguous array; about 5 us more than reading and Blosc.

    Raises `ShardError` if it has another size, does not match its checksum, or does not decode to this array.
    """
    offset, size = place
    if offset == ABSENT:
        out.fill(0)
        return
    own = size - CHECKSUM_BYTES
    if not _BLOSC_HEADER.size <= own <= out.nbytes + _BLOSC_HEADER.size:
        raise ShardError("is not what was written")
    chunk = os.pread(descriptor, size, offset)
    if len(chunk) != size or not fits_checksum(chunk):
        raise ShardError("is not what was written")
    _, _, flags, item, decoded, _, compressed = _BLOSC_HEADER.unpack_from(chunk)
    copied = flags & _BLOSC_COPIED and own != out.nbytes + _BLOSC_HEADER.size
    if copied or (item, decoded, compressed) != (out.itemsize, out.nbytes, own):
        raise ShardError("is not what was written")
    try:
        blosc.decompress(chunk, out)
    except RuntimeError:
        raise ShardError("cannot be decompressed") from None


def read_whole(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...]) -> NDArray[Any]:
    """Read the whole array from its only shard."""
    descriptor = open_file(path)
    try:
        grid = chunk_grid(shape, chunks)
        index = read_index(descriptor, math.prod(grid), math.prod(chunks) * dtype.itemsize)
        if math.prod(shape) * dtype.itemsize > os.fstat(descriptor).st_size * LONGEST_RUN:
            raise ShardError("is too small for what it should hold")
        whole, part = np.empty(shape, dtype), np.empty(chunks, dtype)
        for number, place in enumerate(itertools.product(*map(range, grid))):
            read_chunk(descriptor, place_of(index, number), part)
            starts = [n * chunk for n, chunk in zip(place, chunks, strict=True)]
            window = tuple(slice(start, start + chunk) for start, chunk in zip(starts, chunks, strict=True))
            inside = whole[window]
            inside[...] = part[tuple(slice(n) for n in inside.shape)]
    finally:
        os.close(descriptor)
    return whole
