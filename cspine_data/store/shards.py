"""Reading a shard chunk by chunk: no byte is believed that does not fit its checksum, and no length that a file claims.

A store may come from anybody. Blosc's library believes a buffer's header and reads on past the buffer's end, so what a
header says of itself is held against what is there before it is decompressed.
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

#: In a shard's index: a chunk of nothing but zeros, which other programs leave out.
ABSENT = 2**64 - 1
_ENTRY = struct.Struct("<QQ")
# A Blosc buffer: version, format, flags, type size, decoded bytes, block size, its own bytes.
_BLOSC_HEADER = struct.Struct("<BBBBIII")
_BLOSC_COPIED = 2


class ShardError(ValueError):
    """A shard's bytes are not what was written; says what is wrong, not where."""


def open_file(path: Path) -> int:
    """Open a file of a store: no link, no pipe, no folder.

    Raises
    ------
    ShardError
        If it is one of these.
    OSError
        If it is not there, or cannot be opened.
    """
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
    """Read where a shard's chunks lie; `place_of` tells it of each.

    Parameters
    ----------
    descriptor : int
        The open shard.
    chunks : int
        How many there are.
    chunk_bytes : int
        What each decodes to.

    Raises
    ------
    ShardError
        If the index is not what was written, or the file cannot hold so much.
    """
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
    """Return the offset and the size of a chunk, by its number in C order."""
    return _ENTRY.unpack_from(index, chunk * _ENTRY.size)


def read_chunk(descriptor: int, place: tuple[int, int], out: NDArray[Any]) -> None:
    """Read one chunk and decode it into a C-contiguous array; some 5 us, and what reading and Blosc take.

    Parameters
    ----------
    descriptor : int
        The open shard.
    place : tuple of int
        What `place_of` gave.
    out : ndarray
        As large as the chunk.

    Raises
    ------
    ShardError
        If it is not of that size, does not fit its checksum, or does not decode to just that array.
    OSError
        If the disk does not give it.
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
    _, _, flags, item, decoded, _, told = _BLOSC_HEADER.unpack_from(chunk)
    copied = flags & _BLOSC_COPIED and own != out.nbytes + _BLOSC_HEADER.size
    if copied or (item, decoded, told) != (out.itemsize, out.nbytes, own):
        raise ShardError("is not what was written")
    try:
        blosc.decompress(chunk, out)
    except RuntimeError:
        raise ShardError("cannot be decompressed") from None


def read_whole(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...]) -> NDArray[Any]:
    """Read all of an array's only shard.

    Raises
    ------
    ShardError
        If its bytes are not what was written.
    OSError
        If it is not there, or the disk does not give it.
    """
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
