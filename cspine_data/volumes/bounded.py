"""Reading untrusted files within bounds: no more bytes than the header accounts for, and memory only for bytes read."""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.geometry import MOST_SKEW, Geometry, as_rows, skew

#: First bytes of a gzip file.
GZIP = b"\x1f\x8b"
# First field of a NIfTI-1 header: its length.
_NIFTI_HEADER = 348
_RAW_PIECE = 1 << 20
# Deflate expands at most 1032 times, so that a piece of this size gives at most 4 MB.
_PACKED_PIECE = 1 << 12
# An empty label map compresses to almost nothing, so this much is always accepted. Larger volumes compress less.
_MOST_FROM_LITTLE = 1 << 30
_DENSEST = 100
# The maximum size of a file.
_MOST = 1 << 34

# Plausible spacings and origins. Others come from wrong units or a broken header, and their grids would fill memory.
_SPACING_MM = (0.02, 100.0)
_FARTHEST_MM = 1e7


RESAMPLE = "resample it, and its label map alike, to a grid with right angles"


class Source:
    """The bytes of an open file from its current position, decompressed (``gzip``, ``bzip2``) on demand."""

    def __init__(self, path: Path, file: BinaryIO, encoding: str) -> None:
        self._path = path
        self._pieces = _PIECES[encoding](file)
        self._rest = memoryview(b"")

    def read(self, count: int) -> bytearray:
        """Return the next `count` bytes, or fewer at the end of the file."""
        held = bytearray()
        while len(held) < count and self._more():
            held += self._next(count - len(held))
        return held

    def skip(self, count: int) -> None:
        """Skip bytes without storing them."""
        while count > 0 and self._more():
            count -= len(self._next(count))

    def ended(self) -> bool:
        """Whether the end is reached; then the checksum of a compressed file has been checked."""
        return not self._more()

    def _next(self, most: int) -> memoryview:
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece

    def _more(self) -> bool:
        if self._rest:
            return True
        try:
            self._rest = memoryview(next(self._pieces, b""))
        except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc] # declared as an instance
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = _not_decompressed(self._path, ended=isinstance(error, EOFError))
            raise InputError(self._path, *problem) from None
        return bool(self._rest)


def _not_decompressed(path: Path, *, ended: bool) -> tuple[str, str]:
    """Return why a file cannot be decompressed, and what to do; a detached data file is not looked at."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() == ".gz" and int.from_bytes(start, "little") == _NIFTI_HEADER:
        return "is not compressed", f"call it {path.stem}"
    if path.suffix.lower() == ".gz" and not start.startswith(GZIP):
        return "is not a gzip file", "export it again"
    problem = "cannot be decompressed (it ends too early)" if ended else "cannot be decompressed"
    return problem, "the file is damaged: fetch it again"


def _raw(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_RAW_PIECE):
        yield piece


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    # gzip.GzipFile reads a file name in the header byte by byte, however long it is; zlib takes three times as long.
    member, begun = isal_zlib.decompressobj(31), False
    while held := file.read(_PACKED_PIECE):
        while held:
            if not begun:
                # As in gzip, zeros are allowed between members and after the last.
                held = held.lstrip(b"\0")
            if held:
                begun = True
                if piece := member.decompress(held):
                    yield piece
                held = member.unused_data
            if member.eof:
                member, begun = isal_zlib.decompressobj(31), False
    if begun:
        raise EOFError


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    stream = isal_zlib.decompressobj()
    while not stream.eof and (held := file.read(_PACKED_PIECE)):
        if piece := stream.decompress(held):
            yield piece
    if not stream.eof:
        raise EOFError


def _bunzipped(file: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(file) as packed:
        yield from iter(lambda: packed.read(_RAW_PIECE), b"")


_PIECES: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    "raw": _raw,
    "gzip": _gunzipped,
    "zlib": _inflated,
    "bzip2": _bunzipped,
}


def stored_bytes(path: Path, part: Path) -> int:
    """Return the size of a file, at most the maximum: a sparse file may be larger than any disk."""
    length = part.stat().st_size
    if length > _MOST:
        raise InputError(path, f"is {length} bytes long", f"at most {_MOST >> 30} GiB are read: crop it")
    return length


def check_claim(path: Path, claimed: int, there: int, *, compressed: bool) -> None:
    """Check that a file of this size can contain the bytes that its header claims."""
    if claimed > (max(_MOST_FROM_LITTLE, _DENSEST * there) if compressed else there):
        raise InputError(
            path, f"holds {there} bytes, too few for the {claimed} its header claims",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip


def check_read(path: Path, held: int, claimed: int) -> None:
    """Check that all bytes of voxels that a header claims were read.

    Raises
    ------
    InputError
        If there are fewer.
    """
    if held < claimed:
        raise InputError(
            path, f"holds {held} bytes of voxels where its header claims {claimed}",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip


def grid(
    path: Path,
    size: tuple[int, int, int],
    steps_mm: NDArray[Any],
    origin_mm: NDArray[Any],
    spacing_mm: NDArray[Any] | None = None,
    units_field: str = "units",
) -> Geometry:
    """Return the grid that a header describes, if it is plausible and its axes are at right angles.

    Column c of `steps_mm`, (3, 3), is the vector, in LPS, from a voxel to its neighbour along index axis c;
    `spacing_mm` are the lengths of the columns, if the header gives them more exactly. `units_field` is the header
    field with the unit of length, for messages.
    """
    if steps_mm.shape != (3, 3) or origin_mm.shape != (3,) or not np.isfinite([*steps_mm, origin_mm]).all():
        raise InputError(path, "has no usable space directions", "export the volume again with its geometry")
    # The length of a row that overflows is infinite, which is not plausible either.
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(steps_mm, axis=0)
    spacing = lengths if spacing_mm is None else spacing_mm
    if lengths.min() <= 0:
        raise InputError(path, "has space directions that span no volume", "export it again with its geometry")
    low, high = _SPACING_MM
    if not ((spacing >= low) & (spacing <= high)).all():
        problem = f"has voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm, a spacing that no scanner gives"
        raise InputError(path, problem, f"correct its unit of length ({units_field}), or export it again")
    if np.abs(origin_mm).max() > _FARTHEST_MM:
        raise InputError(path, "has an origin that no scanner gives", "export it again with its geometry")
    directions = steps_mm / lengths
    if abs(np.linalg.det(directions)) < 1e-3:
        raise InputError(path, "has space directions that span no volume", "export it again with its geometry")
    off = skew(directions)
    if off > MOST_SKEW:
        problem = f"has axes that are not at right angles ({np.degrees(np.arcsin(off)):.2g} degrees off)"
        raise InputError(path, problem, RESAMPLE)
    return Geometry(
        size=size,
        spacing_mm=tuple(spacing.tolist()),
        directions=as_rows(directions),
        origin_mm=tuple(origin_mm.tolist()),
    )
