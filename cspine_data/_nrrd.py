"""Reading NRRD files that nobody vouches for: the header by pynrrd, the payload within bounds.

pynrrd's own payload reader follows a detached header to any path and inflates whatever it finds; here the data
file must lie in the header's folder, and no more is read than the header's sizes account for.

Any field may hold a patient's name, and messages are passed on; so none repeats what a header says but numbers and
the format's own words.
"""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.geometry import Geometry, as_rows

_CHUNK = 1 << 22
_MAX_HEADER_BYTES = 1 << 20
# A payload may start with another format's header ("byte skip: -1"); more than this before it is no header.
_MAX_SKIPPED_BYTES = 1 << 16
_LONGEST_RUN = {"raw": 1, "gzip": 1100, "bzip2": 50_000, "text": 1}

_ENCODINGS = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2",
    "ascii": "text", "text": "text", "txt": "text",
}  # fmt: skip

_C_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: np.dtype(code) for code, names in _C_TYPES.items() for name in names}

# Words of the format that are not understood here.
_OTHER_ENCODINGS = ("hex", "zrl")
_OTHER_TYPES = ("block",)
_OTHER_KINDS = (
    "time", "list", "point", "vector", "covariant-vector", "normal", "stub", "scalar", "complex", "2-vector", "3-color",
    "rgb-color", "hsv-color", "xyz-color", "4-color", "rgba-color", "3-vector", "3-gradient", "3-normal", "4-vector",
    "quaternion", "2d-symmetric-matrix", "2d-masked-symmetric-matrix", "2d-matrix", "2d-masked-matrix",
    "3d-symmetric-matrix", "3d-masked-symmetric-matrix", "3d-matrix", "3d-masked-matrix",
)  # fmt: skip
_KINDS = ("domain", "space", "none", "???")

# Signs that turn a named NRRD space into LPS.
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class NrrdHeader:
    """What a NRRD header says of its payload, checked; nothing of the payload has been read."""

    geometry: Geometry
    dtype: np.dtype[Any]
    encoding: str
    data_file: Path
    data_offset: int
    line_skip: int
    byte_skip: int
    assumed_orientation: bool


def read_header(path: Path) -> NrrdHeader:
    """Read and check a header, attached or detached.

    Raises
    ------
    InputError
        If it is no NRRD header, is not a 3-D scalar volume, or points out of its folder.
    """
    fields, offset = _parse(path)
    dimension = fields.get("dimension")
    if dimension != 3:
        raise InputError(path, f"is {dimension}-D", "give one 3-D volume a file")
    kinds = fields.get("kinds", [])
    if any(kind not in _KINDS for kind in kinds):
        told = ", ".join(_word(kind, (*_KINDS, *_OTHER_KINDS)) for kind in kinds)
        raise InputError(path, f"has axes of kind {told}", "give one 3-D volume of scalar voxels")
    detached = str(fields.get("data file", fields.get("datafile", "")))
    geometry, assumed = _geometry(path, fields)
    return NrrdHeader(
        geometry=geometry,
        dtype=_dtype(path, fields),
        encoding=_encoding(path, fields),
        data_file=_beside(path, detached) if detached else path,
        data_offset=0 if detached else offset,
        line_skip=_skip(path, fields, "line", lowest=0),
        byte_skip=_skip(path, fields, "byte", lowest=-1),
        assumed_orientation=assumed,
    )


def read_array(path: Path, header: NrrdHeader) -> NDArray[Any]:
    """Read the payload of a checked header.

    Returns
    -------
    ndarray
        Voxels (i, j, k) in the file's index order, in the machine's byte order.

    Raises
    ------
    InputError
        If the payload is missing, shorter than the header claims, or cannot be decoded.
    """
    voxels = int(np.prod(header.geometry.size, dtype=object))
    wanted = voxels * (header.dtype.itemsize if header.encoding != "text" else 1)
    there = header.data_file.stat().st_size - header.data_offset
    if wanted > there * _LONGEST_RUN[header.encoding]:
        raise InputError(
            path, f"holds {there} bytes, too few for the {wanted} its header claims",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip
    with header.data_file.open("rb") as file:
        file.seek(header.data_offset)
        for _ in range(header.line_skip):
            file.readline(_MAX_HEADER_BYTES)
        if header.encoding == "text":
            return _from_text(path, header, file.read(), voxels)
        payload = _payload(path, header, file, wanted)
    flat = np.frombuffer(payload, dtype=header.dtype)
    return flat.reshape(header.geometry.size, order="F").astype(header.dtype.newbyteorder("="), copy=False)


def _parse(path: Path) -> tuple[dict[str, Any], int]:
    import nrrd

    with path.open("rb") as file:
        lines = _HeaderLines(path, file)
        try:
            fields = nrrd.read_header(lines)
        except StopIteration:
            raise InputError(path, "is empty", "fetch it again") from None
        except InputError:
            raise
        # pynrrd raises whatever the broken value provokes, which it repeats; each means the same to the user.
        except Exception:  # noqa: BLE001
            problem = f"is no readable NRRD file (line {lines.number} of its header)"
            raise InputError(path, problem, "fetch it again or export it anew") from None
        return dict(fields), file.tell()


class _HeaderLines:
    """Iterates over the lines of a header within bounds, and knows how many there were."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.number = 0
        self._path = path
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        read = 0
        while line := self._file.readline(_MAX_HEADER_BYTES):
            self.number += 1
            read += len(line)
            if read > _MAX_HEADER_BYTES:
                problem = "is no readable NRRD file (the header is longer than a megabyte)"
                raise InputError(self._path, problem, "fetch it again or export it anew")
            yield line


def _word(text: str, known: tuple[str, ...]) -> str:
    """Return a word of a header where it is one of the format's own."""
    return text if text.lower() in known else "unknown"


def _geometry(path: Path, fields: dict[str, Any]) -> tuple[Geometry, bool]:
    size = tuple(int(n) for n in fields.get("sizes", ()))
    if len(size) != 3 or min(size) < 1:
        raise InputError(path, f"claims sizes {size}", "the header is wrong: export the volume anew")
    space = str(fields.get("space", "")).lower()
    vectors = fields.get("space directions")
    assumed = vectors is None or space not in _TO_LPS
    if vectors is None:
        spacings = np.asarray(fields.get("spacings", (1.0, 1.0, 1.0)), dtype=float)
        steps = np.diag(np.where(np.isfinite(spacings), spacings, 1.0))
        origin = np.zeros(3)
    else:
        signs = np.array(_TO_LPS.get(space, (1, 1, 1)), dtype=float)
        steps = np.asarray(vectors, dtype=float) * signs
        origin = np.asarray(fields.get("space origin", np.zeros(3)), dtype=float) * signs
    if steps.shape != (3, 3) or not np.isfinite(steps).all() or not np.isfinite(origin).all():
        raise InputError(path, "has no usable space directions", "export the volume anew with its geometry")
    spacing = np.linalg.norm(steps, axis=1)
    if spacing.min() <= 0 or abs(np.linalg.det(steps / spacing[:, None])) < 1e-3:
        raise InputError(path, "has space directions that span no volume", "export it anew with its geometry")
    return (
        Geometry(
            size=size,
            spacing_mm=tuple(spacing.tolist()),
            directions=as_rows((steps / spacing[:, None]).T),
            origin_mm=tuple(origin.tolist()),
        ),
        assumed,
    )


def _dtype(path: Path, fields: dict[str, Any]) -> np.dtype[Any]:
    name = str(fields.get("type", "")).lower()
    if name not in _DTYPES:
        told = _word(name, _OTHER_TYPES)
        raise InputError(path, f"has voxels of type {told!r}", "export it with integer or float voxels")
    dtype = _DTYPES[name]
    return dtype.newbyteorder(">") if fields.get("endian") == "big" else dtype.newbyteorder("<")


def _encoding(path: Path, fields: dict[str, Any]) -> str:
    name = str(fields.get("encoding", "")).lower()
    if name not in _ENCODINGS:
        raise InputError(path, f"has the encoding {_word(name, _OTHER_ENCODINGS)!r}", "export it as raw or gzip")
    return _ENCODINGS[name]


def _skip(path: Path, fields: dict[str, Any], unit: str, lowest: int) -> int:
    skip = int(fields.get(f"{unit} skip", fields.get(f"{unit}skip", 0)))
    if not lowest <= skip <= _MAX_SKIPPED_BYTES:
        remedy = f"only {lowest} to {_MAX_SKIPPED_BYTES} is understood: export it anew"
        raise InputError(path, f"has a {unit} skip of {skip}", remedy)
    return skip


def _beside(path: Path, name: str) -> Path:
    """Find a detached data file; only in the header's own folder, also after links are followed."""
    if name.upper().startswith("LIST") or "%" in name:
        raise InputError(path, "spreads its voxels over several files", "export it as one .nrrd file")
    folder = path.resolve().parent
    data_file = (folder / name).resolve()
    if data_file.parent != folder:
        raise InputError(path, "points to a data file outside its own folder", "put the data file beside its header")
    if not data_file.is_file():
        raise InputError(path, "points to a data file that is not there", "put it beside its header")
    return data_file


def _payload(path: Path, header: NrrdHeader, file: BinaryIO, wanted: int) -> bytearray:
    from_end = header.byte_skip == -1
    to_skip = _MAX_SKIPPED_BYTES if from_end else header.byte_skip
    stream: Any = file
    if header.encoding == "raw":
        if from_end:
            file.seek(-wanted, 2)
            to_skip = 0
    else:
        stream = gzip.GzipFile(fileobj=file) if header.encoding == "gzip" else bz2.BZ2File(file)
    limit = wanted + to_skip
    data = bytearray()
    try:
        while len(data) < limit and (chunk := stream.read(min(_CHUNK, limit - len(data)))):
            data += chunk
        # Reading on past the last byte checks a compressed stream's checksum.
        more = header.encoding != "raw" and bool(stream.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(path, f"cannot be decompressed ({error})", "the file is damaged: fetch it again") from None
    start = max(0, len(data) - wanted) if from_end else header.byte_skip
    if (more and from_end) or len(data) - start < wanted:
        raise InputError(
            path, f"holds {len(data) - start} bytes of voxels where its header claims {wanted}",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip
    del data[:start]
    del data[wanted:]
    return data


def _from_text(path: Path, header: NrrdHeader, text: bytes, voxels: int) -> NDArray[Any]:
    try:
        values = np.array(text.split(), dtype=header.dtype.newbyteorder("="))
    except (ValueError, OverflowError):
        raise InputError(path, "has voxels that are no numbers", "fetch it again or export it anew") from None
    if values.size != voxels:
        raise InputError(
            path, f"holds {values.size} voxels where its header claims {voxels}", "fetch it again or export it anew"
        )
    return cast("NDArray[Any]", values.reshape(header.geometry.size, order="F"))
