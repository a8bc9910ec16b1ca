"""Reading NRRD files that nobody vouches for: the header field by field, the payload within bounds.

pynrrd's own reader follows a detached header to any path, inflates whatever it finds, and quotes a header's text in
its errors; here it only parses vectors. The data file must lie in the header's folder, no more is read than the
header's sizes account for, and fields that are not needed (comments, names, dates) are passed over unread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.names import on_disk
from cspine_data.volumes.bounded import Source, check_claim, grid, stored_bytes
from cspine_data.volumes.geometry import Geometry

_MAX_HEADER_BYTES = 1 << 20
_LONGEST_VALUE = 2000
# A payload may start with another format's header ("byte skip: -1"); more than this before it is no header.
_MAX_SKIPPED_BYTES = 1 << 16
_TEXT_PIECE = 1 << 16
_LONGEST_NUMBER = 1000

_FETCH = "fetch it again or export it anew"
_MAGIC = tuple(f"NRRD000{version}".encode() for version in range(1, 6))
_FIELDS = (
    "type", "dimension", "sizes", "encoding", "endian", "data file", "line skip", "byte skip", "kinds",
    "space", "space directions", "space origin", "spacings", "space units", "units",
)  # fmt: skip
_OTHER_SPELLINGS = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
# "LIST", "LIST 2", and a pattern of printf with its range.
_SEVERAL = re.compile(r"LIST(\s|$)|.*%[0-9]*[du]")

_ENCODINGS = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2",
    "ascii": "text", "text": "text", "txt": "text",
}  # fmt: skip
_SPATIAL = ("domain", "space", "none", "???")
# Words of the format that are not understood. A message quotes these, and never what else may stand in their place.
_WORDS = (
    "block", "hex", "zrl", "time", "list", "point", "vector", "covariant-vector", "normal", "complex", "3-vector",
    "rgb-color", "rgba-color", "3-color", "4-color", "quaternion", "3d-symmetric-matrix", "3d-matrix",
)  # fmt: skip

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

# Signs that turn a named NRRD space into LPS.
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
# Millimetres, by the words that programs write. Where a word says nothing of a unit, the format's habit is millimetres.
_UNITS_MM = {
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1e3),
    **dict.fromkeys(("um", "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m", "micron", "microns"), 1e-3),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 1e-3),
    **dict.fromkeys(("", "???", "none", "unknown"), 1.0),
}
_UNIT = re.compile(r'"([^"]*)"')


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
    notes: tuple[str, ...]


def read_header(path: Path) -> NrrdHeader:
    """Read and check a header, attached or detached.

    Raises
    ------
    InputError
        If it is no NRRD header, is not a 3-D scalar volume, or points out of its folder.
    """
    with path.open("rb") as file:
        fields = _fields(path, file)
        offset = file.tell()
    dimension = _whole(path, fields, "dimension")
    if dimension != 3:
        raise InputError(path, f"is {dimension}-D", "give one 3-D volume a file")
    kinds = fields.get("kinds", "").lower().split()
    if any(kind not in _SPATIAL for kind in kinds):
        named = ", ".join(kind if kind in (*_SPATIAL, *_WORDS) else "unknown" for kind in kinds[:3])
        raise InputError(path, f"has axes of kind {named}", "give one 3-D volume of scalar voxels")
    geometry, assumed, notes = _geometry(path, fields)
    encoding = _encoding(path, fields)
    detached = fields.get("data file")
    return NrrdHeader(
        geometry=geometry,
        dtype=_dtype(path, fields, encoding),
        encoding=encoding,
        data_file=path if detached is None else _beside(path, detached),
        data_offset=offset if detached is None else 0,
        line_skip=_skip(path, fields, "line skip", lowest=0),
        # Counting back from the end means nothing where voxels have no fixed length.
        byte_skip=_skip(path, fields, "byte skip", lowest=0 if encoding == "text" else -1),
        assumed_orientation=assumed,
        notes=notes,
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
    size = header.geometry.size
    voxels = size[0] * size[1] * size[2]
    # As text a voxel takes a digit and what parts it from the next.
    wanted = voxels * header.dtype.itemsize if header.encoding != "text" else 2 * voxels - 1
    there = max(0, stored_bytes(path, header.data_file) - header.data_offset)
    check_claim(path, wanted, there, compressed=header.encoding in ("gzip", "bzip2"))
    with header.data_file.open("rb") as file:
        file.seek(header.data_offset)
        _skip_lines(path, file, header.line_skip)
        if header.encoding == "text":
            return _from_text(path, header, Source(path, file, "raw"), voxels)
        payload = _payload(path, header, file, wanted)
    flat = np.frombuffer(payload, dtype=header.dtype)
    return flat.reshape(size, order="F").astype(header.dtype.newbyteorder("="), copy=False)


def _fields(path: Path, file: BinaryIO) -> dict[str, str]:
    """Return the fields that are needed, as text, and leave the file where its header ends."""
    magic = file.readline(_LONGEST_VALUE)
    if not magic:
        raise InputError(path, "is empty", "fetch it again")
    if magic.rstrip() not in _MAGIC:
        raise InputError(path, "is no readable NRRD file (it does not start as one)", _FETCH)
    fields: dict[str, str] = {}
    # A header ends with an empty line, or, detached, with its file.
    while (line := file.readline(_MAX_HEADER_BYTES)).strip():
        if file.tell() > _MAX_HEADER_BYTES:
            raise InputError(path, "is no readable NRRD file (the header is longer than a megabyte)", _FETCH)
        name, colon, value = line.partition(b":")
        if line.startswith(b"#") or value.startswith(b"="):
            continue
        if not colon:
            raise InputError(path, "is no readable NRRD file (a line of its header is no field)", _FETCH)
        field = name.strip().lower().decode("ascii", "replace")
        field = _OTHER_SPELLINGS.get(field, field)
        if field not in _FIELDS:
            continue
        if field in fields:
            raise InputError(path, f"gives the field {field!r} twice", "leave one of them or export it anew")
        fields[field] = _text(path, field, value)
    for field in ("type", "dimension", "sizes", "encoding"):
        if field not in fields:
            raise InputError(path, f"is no readable NRRD file (it lacks the field {field!r})", _FETCH)
    return fields


def _text(path: Path, field: str, value: bytes) -> str:
    try:
        text = value.strip().decode()
    except UnicodeDecodeError:
        raise _unreadable(path, field) from None
    if len(text) > _LONGEST_VALUE:
        raise _unreadable(path, field)
    return text


def _unreadable(path: Path, field: str) -> InputError:
    # What stands there is not quoted: it may be anything, a name too.
    return InputError(path, f"is no readable NRRD file (its field {field!r} cannot be understood)", _FETCH)


def _whole(path: Path, fields: dict[str, str], field: str, default: str = "") -> int:
    text = fields.get(field, default)
    if not _WHOLE.fullmatch(text):
        raise _unreadable(path, field)
    return int(text)


def _numbers(path: Path, fields: dict[str, str], field: str) -> NDArray[Any]:
    """Return a field of vectors, or of numbers."""
    import nrrd

    parsers = {
        "space directions": nrrd.parse_optional_matrix,
        "space origin": lambda text: nrrd.parse_vector(text, float),
        "spacings": lambda text: nrrd.parse_number_list(text, float),
    }
    try:
        return np.asarray(parsers[field](fields[field]), dtype=float)
    # pynrrd raises whatever the broken value provokes; each means the same to the user.
    except Exception:  # noqa: BLE001
        raise _unreadable(path, field) from None


def _geometry(path: Path, fields: dict[str, str]) -> tuple[Geometry, bool, tuple[str, ...]]:
    """Return the grid, whether the file leaves open how it lies, and notes."""
    words = fields["sizes"].split()
    if len(words) != 3:
        raise InputError(path, f"claims {len(words)} sizes", "the header is wrong: export the volume anew")
    if not all(_WHOLE.fullmatch(word) for word in words):
        raise _unreadable(path, "sizes")
    size = (int(words[0]), int(words[1]), int(words[2]))
    if min(size) < 1:
        raise InputError(path, f"claims sizes {size}", "the header is wrong: export the volume anew")
    signs = _TO_LPS.get(fields.get("space", "").lower())
    if "space directions" not in fields:
        spacings = _numbers(path, fields, "spacings") if "spacings" in fields else np.ones(3)
        # NaN is how the format says that a spacing is not known.
        known = ~np.isnan(spacings)
        if spacings.shape != (3,):
            raise InputError(path, "has no usable space directions", "export the volume anew with its geometry")
        unit_mm, notes = _millimetres(fields, "units")
        spacings = np.where(known, spacings * unit_mm, 1.0)
        return grid(path, size, np.diag(spacings), np.zeros(3), units_field="units"), True, notes
    turn = np.array(signs or (1, 1, 1), dtype=float)
    vectors = _numbers(path, fields, "space directions")
    origin = _numbers(path, fields, "space origin") if "space origin" in fields else np.zeros(3)
    if vectors.shape != (3, 3) or origin.shape != (3,):
        raise InputError(path, "has no usable space directions", "export the volume anew with its geometry")
    # The units are of the axes of space, not of the array's.
    unit_mm, notes = _millimetres(fields, "space units")
    scale = turn * unit_mm
    geometry = grid(path, size, vectors.T * scale[:, None], origin * scale, units_field="space units")
    return geometry, signs is None, notes


def _millimetres(fields: dict[str, str], field: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return how many millimetres the unit of each axis is, and a note where the header's words name no unit."""
    words = [word.strip().lower() for word in _UNIT.findall(fields.get(field, ""))]
    if not words or (len(words) == 3 and _UNITS_MM.keys() >= set(words)):
        return np.array([_UNITS_MM[word] for word in words or ("mm",) * 3]), ()
    return np.ones(3), (f"its unit of length ({field}) is not known, and was taken for millimetres",)


def _dtype(path: Path, fields: dict[str, str], encoding: str) -> np.dtype[Any]:
    name = fields["type"].lower()
    if name not in _DTYPES:
        named = f"type {name!r}" if name in _WORDS else "an unknown type"
        raise InputError(path, f"has voxels of {named}", "export it with integer or float voxels")
    dtype = _DTYPES[name]
    if dtype.itemsize == 1 or encoding == "text":
        return dtype
    endian = fields.get("endian", "").lower()
    if endian not in ("little", "big"):
        raise InputError(path, "does not say in which order its bytes stand (endian: little or big)", _FETCH)
    return dtype.newbyteorder(">" if endian == "big" else "<")


def _encoding(path: Path, fields: dict[str, str]) -> str:
    name = fields["encoding"].lower()
    if name not in _ENCODINGS:
        named = f"the encoding {name!r}" if name in _WORDS else "an unknown encoding"
        raise InputError(path, f"has {named}", "export it as raw or gzip")
    return _ENCODINGS[name]


def _skip(path: Path, fields: dict[str, str], field: str, lowest: int) -> int:
    skip = _whole(path, fields, field, "0")
    if not lowest <= skip <= _MAX_SKIPPED_BYTES:
        remedy = f"only {lowest} to {_MAX_SKIPPED_BYTES} is understood: export it anew"
        raise InputError(path, f"has a {field} of {skip}", remedy)
    return skip


def _beside(path: Path, name: str) -> Path:
    """Find a detached data file; only in the header's own folder, also after links are followed."""
    if _SEVERAL.match(name):
        raise InputError(path, "spreads its voxels over several files", "export it as one .nrrd file")
    remedy = "put the data file beside its header"
    folder = path.resolve().parent
    try:
        data_file = (on_disk(folder / name) if Path(name).name == name else folder / name).resolve()
        inside, there = data_file.parent == folder, data_file.is_file()
    # A name too long for a file, with a zero in it, or a link that leads to itself.
    except (OSError, RuntimeError, ValueError):
        inside, there = True, False
    if not inside:
        raise InputError(path, "points to a data file outside its own folder", remedy)
    if not there:
        raise InputError(path, "points to a data file that is not there, or is no file", remedy)
    return data_file


def _skip_lines(path: Path, file: BinaryIO, lines: int) -> None:
    left = _MAX_HEADER_BYTES
    for _ in range(lines):
        left -= len(file.readline(left + 1))
        if left < 0:
            raise InputError(path, "has a line skip over more than a megabyte", "export it anew as raw or gzip")


def _payload(path: Path, header: NrrdHeader, file: BinaryIO, wanted: int) -> memoryview:
    source = Source(path, file, header.encoding)
    from_end = header.byte_skip == -1
    if from_end and header.encoding == "raw":
        file.seek(-wanted, 2)
    source.skip(max(0, header.byte_skip))
    data = source.read(wanted + (_MAX_SKIPPED_BYTES if from_end else 0))
    if not source.ended():
        # Sizes that are wrong, or a skip that is missing: the voxels would be read shifted, or their checksum not.
        problem = f"holds more than the {wanted} bytes its header claims"
        if from_end:
            problem = f"holds more than {_MAX_SKIPPED_BYTES} bytes before its voxels"
        raise InputError(path, problem, "its header is wrong: export it anew")
    if len(data) < wanted:
        raise InputError(
            path, f"holds {len(data)} bytes of voxels where its header claims {wanted}",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip
    return memoryview(data)[len(data) - wanted :]


def _from_text(path: Path, header: NrrdHeader, source: Source, voxels: int) -> NDArray[Any]:
    source.skip(header.byte_skip)
    dtype = header.dtype.newbyteorder("=")
    values = np.empty(voxels, dtype)
    count = 0
    try:
        for words in _words(source):
            part = _parsed(words, dtype)
            values[count : count + len(part)] = part[: max(0, voxels - count)]
            count += len(part)
    except (ValueError, OverflowError):
        problem = f"has voxels that are no numbers of type {dtype}"
        raise InputError(path, problem, _FETCH) from None
    if count != voxels:
        raise InputError(path, f"holds {count} voxels where its header claims {voxels}", _FETCH)
    return values.reshape(header.geometry.size, order="F")


def _words(source: Source) -> Iterator[list[bytes]]:
    """Yield what stands between white space, some at a time: a list of all would hold thirty times the file."""
    cut = b""
    while piece := bytes(source.read(_TEXT_PIECE)):
        words = (cut + piece).split()
        cut = words.pop() if words and not piece[-1:].isspace() else b""
        if len(cut) > _LONGEST_NUMBER or b"_" in piece:
            raise ValueError
        yield words
    if cut:
        yield [cut]


def _parsed(words: list[bytes], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return np.array([float(word) for word in words], dtype=np.float64).astype(dtype)
    numbers = [int(word) for word in words]
    limits = np.iinfo(dtype)
    if numbers and not (limits.min <= min(numbers) and max(numbers) <= limits.max):
        raise OverflowError
    return np.array(numbers, dtype=dtype)
