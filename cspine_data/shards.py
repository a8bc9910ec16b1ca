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

from cspine_data.schema import CHECKSUM_BYTES, LONGEST_RUN, chunk_checksum, chunk_grid

#: In a shard's index: a chunk of nothing but zeros, which other programs leave out.
ABSENT = 2**64 - 1
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


def read_index(descriptor: int, chunks: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """Read where a shard's chunks lie: offset and size of each, in C order.

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
    entries = chunks * 16
    size = os.fstat(descriptor).st_size
    start = size - entries - CHECKSUM_BYTES
    if start < 0 or chunk_bytes > size * LONGEST_RUN:
        raise ShardError("its index is not what was written")
    content = os.pread(descriptor, entries + CHECKSUM_BYTES, start)
    if chunk_checksum(content[:entries]) != content[entries:]:
        raise ShardError("its index is not what was written")
    index = np.frombuffer(content, dtype="<u8", count=2 * chunks).reshape(-1, 2)
    here = index[index[:, 0] != ABSENT]
    if (here > start).any() or (here.sum(axis=1) > start).any():
        raise ShardError("its index leads out of it")
    return [(offset, length) for offset, length in index.tolist()]


def decode(chunk: bytes, size: int, out: NDArray[Any]) -> None:
    """Decode one chunk, as it lies in its shard, into a C-contiguous array; some 4 us and what Blosc takes.

    Raises
    ------
    ShardError
        If it is not `size` bytes that fit their checksum, and decode to just that array.
    """
    content, checksum = chunk[:-CHECKSUM_BYTES], chunk[-CHECKSUM_BYTES:]
    if len(chunk) != size or len(content) < _BLOSC_HEADER.size or chunk_checksum(content) != checksum:
        raise ShardError("is not what was written")
    _, _, flags, item, decoded, _, own = _BLOSC_HEADER.unpack_from(content)
    copied = flags & _BLOSC_COPIED and own != decoded + _BLOSC_HEADER.size
    if copied or (item, decoded, own) != (out.itemsize, out.nbytes, len(content)):
        raise ShardError("is not what was written")
    try:
        blosc.decompress(content, out)
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
        whole, part = np.zeros(shape, dtype), np.empty(chunks, dtype)
        for place, (offset, size) in zip(itertools.product(*map(range, grid)), index, strict=True):
            if offset == ABSENT:
                continue
            decode(os.pread(descriptor, size, offset), size, part)
            starts = [n * chunk for n, chunk in zip(place, chunks, strict=True)]
            window = tuple(slice(start, start + chunk) for start, chunk in zip(starts, chunks, strict=True))
            inside = whole[window]
            inside[...] = part[tuple(slice(n) for n in inside.shape)]
    finally:
        os.close(descriptor)
    return whole
