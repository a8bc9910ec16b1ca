"""What a file that nobody vouches for truly holds: its bytes, and no more of them than its header accounts for.

Both readers stand on this. A header is a claim; memory is taken for what has been read, never for what is claimed.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.geometry import MOST_SKEW, Geometry, as_rows, skew

_RAW_PIECE = 1 << 20
# Deflate makes at most 1032 bytes of one: a piece of this many gives no more than 4 MB at once.
_PACKED_PIECE = 1 << 12
# An empty label map is almost nothing when compressed, so much is let pass; above that, a scan is denser.
_MOST_FROM_LITTLE = 1 << 30
_DENSEST = 100
# The longest file that is read at all.
_MOST = 1 << 34

# No scanner leaves these: what lies outside has wrong units or a broken header, and fills memory further on, where
# grids are made of so many millimetres.
_SPACING_MM = (0.02, 100.0)
_FARTHEST_MM = 1e7


RESAMPLE = "resample it, and its label map alike, to a grid with right angles"


class Source:
    """The bytes of an open file from where it stands, decompressed as they are asked for.

    Parameters
    ----------
    path : Path
        What to call the file in a message.
    file : binary file
        Where the bytes come from.
    encoding : str
        ``raw``, ``gzip`` or ``bzip2``.
    """

    def __init__(self, path: Path, file: BinaryIO, encoding: str) -> None:
        self._path = path
        self._pieces = _PIECES[encoding](file)
        self._rest = memoryview(b"")

    def read(self, count: int) -> bytearray:
        """Return the next bytes: `count` of them, fewer where the file ends."""
        held = bytearray()
        while len(held) < count and self._more():
            held += self._next(count - len(held))
        return held

    def skip(self, count: int) -> None:
        """Pass over bytes without holding them."""
        while count > 0 and self._more():
            count -= len(self._next(count))

    def ended(self) -> bool:
        """Whether no byte follows; where none does, a compressed file's checksum has been held against it."""
        return not self._more()

    def _next(self, most: int) -> memoryview:
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece

    def _more(self) -> bool:
        if self._rest:
            return True
        try:
            self._rest = memoryview(next(self._pieces, b""))
        except EOFError:
            problem = "cannot be decompressed (it ends too early)"
        except (OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = "cannot be decompressed (it is damaged, or compressed in another way)"
        else:
            return bool(self._rest)
        raise InputError(self._path, problem, "the file is damaged: fetch it again") from None


def _raw(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_RAW_PIECE):
        yield piece


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    # Not by gzip.GzipFile: it reads a member's name byte by byte, however long a hostile one is.
    member, begun = zlib.decompressobj(31), False
    while held := file.read(_PACKED_PIECE):
        while held:
            if not begun:
                # As gzip has it, zeros may stand between members and after the last.
                held = held.lstrip(b"\0")
            if held:
                begun = True
                if piece := member.decompress(held):
                    yield piece
                held = member.unused_data
            if member.eof:
                member, begun = zlib.decompressobj(31), False
    if begun:
        raise EOFError


def _bunzipped(file: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(file) as packed:
        yield from iter(lambda: packed.read(_RAW_PIECE), b"")


_PIECES: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {"raw": _raw, "gzip": _gunzipped, "bzip2": _bunzipped}


def stored_bytes(path: Path, part: Path) -> int:
    """Return the length of a file, or of its data file; one with a hole in it may be longer than any disk.

    Raises
    ------
    InputError
        If it is longer than what is ever read.
    """
    length = part.stat().st_size
    if length > _MOST:
        raise InputError(path, f"is {length} bytes long", f"at most {_MOST >> 30} GiB are read: crop it")
    return length


def check_claim(path: Path, claimed: int, there: int, *, compressed: bool) -> None:
    """Refuse a header that claims more bytes than a file of this length can be expected to hold.

    Raises
    ------
    InputError
        If it does.
    """
    if claimed > (max(_MOST_FROM_LITTLE, _DENSEST * there) if compressed else there):
        raise InputError(
            path, f"holds {there} bytes, too few for the {claimed} its header claims",
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
    """Return the grid that a header describes, if one can lie in a patient so.

    Parameters
    ----------
    path : Path
        What to call the file in a message.
    size : tuple of int
        Voxels along each index axis.
    steps_mm : ndarray
        (3, 3); column c is the way, in LPS, from a voxel to its neighbour along index axis c.
    origin_mm : ndarray
        LPS position of the first voxel.
    spacing_mm : ndarray, optional
        The lengths of the columns, where the header gives them more exactly.
    units_field : str
        The field of the header that gives the unit of length.

    Raises
    ------
    InputError
        If the numbers are not finite, not plausible, or span no volume; if two axes are not at right angles.
    """
    if steps_mm.shape != (3, 3) or origin_mm.shape != (3,) or not np.isfinite([*steps_mm, origin_mm]).all():
        raise InputError(path, "has no usable space directions", "export the volume anew with its geometry")
    # Of a row that overflows the length is infinite, which is no plausible spacing either.
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(steps_mm, axis=0)
    spacing = lengths if spacing_mm is None else spacing_mm
    if lengths.min() <= 0:
        raise InputError(path, "has space directions that span no volume", "export it anew with its geometry")
    low, high = _SPACING_MM
    if not ((spacing >= low) & (spacing <= high)).all():
        problem = f"has voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm, a spacing that no scanner gives"
        raise InputError(path, problem, f"correct its unit of length ({units_field}), or export it anew")
    if np.abs(origin_mm).max() > _FARTHEST_MM:
        raise InputError(path, "has an origin that no scanner gives", "export it anew with its geometry")
    directions = steps_mm / lengths
    if abs(np.linalg.det(directions)) < 1e-3:
        raise InputError(path, "has space directions that span no volume", "export it anew with its geometry")
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
