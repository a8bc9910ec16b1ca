"""Reading NRRD files within bounds: pynrrd parses the header's fields, this module checks them and reads the voxels.

pynrrd's own reader opens any path that a detached header names, decompresses without a limit, reads a key (``:=``) as
a field, and quotes header text in its errors. Here the data file must be in the header's folder, no more is read than
the header's sizes need, and fields that are not needed (comments, names, dates) are skipped.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.names import on_disk
from cspine_data.volumes.bounded import Source, check_claim, check_read, grid, stored_bytes
from cspine_data.volumes.formats.nrrd_segments import check_layers, parse_segments, segment_key
from cspine_data.volumes.formats.nrrd_writer import SEGMENTATION_SUFFIX
from cspine_data.volumes.formats.nrrd_writer import write as write
from cspine_data.volumes.geometry import Geometry
from cspine_data.volumes.segments import Segment, flattened
from cspine_data.volumes.volume import Volume

_MAX_HEADER_BYTES = 1 << 20
_LONGEST_VALUE = 2000
# The voxels may follow the header of another format ("byte skip: -1"), which is shorter than this.
_MAX_SKIPPED_BYTES = 1 << 16
_TEXT_PIECE = 1 << 16
_LONGEST_NUMBER = 1000

_FETCH = "fetch it again or export it again"
_EXPORT_GEOMETRY = "export the volume again with its geometry"
_MAGIC = tuple(f"NRRD000{version}".encode() for version in range(1, 6))
_FIELDS = (
    "type", "dimension", "sizes", "encoding", "endian", "data file", "line skip", "byte skip", "kinds",
    "space", "space directions", "space origin", "spacings", "space units", "units",
)  # fmt: skip
_OTHER_SPELLINGS = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
_INTEGER_FIELDS = ("dimension", "sizes", "line skip", "byte skip")
_INTEGERS = re.compile(rb"[-+0-9\s]*")
# "LIST", "LIST 2", and a printf pattern with its range.
_SEVERAL = re.compile(r"LIST(\s|$)|.*%[0-9]*[du]")

_ENCODINGS = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2",
    "ascii": "text", "text": "text", "txt": "text",
}  # fmt: skip
_SPATIAL = ("domain", "space", "none", "???")
# Words of the format that are not supported. Messages quote only these, since any other text may be a patient's name.
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

# Signs that convert a named NRRD space to LPS.
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
# Length of each unit in millimetres. Files without a unit are in millimetres by convention.
_UNITS_MM = {
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1e3),
    **dict.fromkeys(("um", "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m", "micron", "microns"), 1e-3),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 1e-3),
    **dict.fromkeys(("", "???", "none", "unknown"), 1.0),
}


@dataclass(frozen=True)
class NrrdHeader:
    """A checked NRRD header; no voxels have been read."""

    geometry: Geometry
    dtype: np.dtype[Any]
    encoding: str
    data_file: Path
    data_offset: int
    line_skip: int
    byte_skip: int
    assumed_orientation: bool
    notes: tuple[str, ...]
    segments: tuple[Segment, ...] = ()
    """The named segments of 3D Slicer's segmentations."""
    layers: int = 0
    """Number of label maps, if segments overlap; else 0."""


def read_geometry(path: Path) -> Geometry:
    """Read the grid from the header."""
    return read_header(path).geometry


def read(path: Path) -> Volume:
    """Read a volume."""
    header = read_header(path)
    array = _read_array(path, header)
    volume = Volume(array, header.geometry, path, header.assumed_orientation, header.notes, segments=header.segments)
    if not header.layers:
        return volume
    flat, overlaps = flattened(array, header.segments)
    return replace(volume, array=flat, layers=array, overlaps=overlaps)


def files(path: Path) -> list[Path]:
    """Return the file, and the data file of a detached header."""
    return list(dict.fromkeys((path, read_header(path).data_file)))


def read_header(path: Path) -> NrrdHeader:
    """Read and check a header, attached or detached; a data file outside its folder is refused."""
    with path.open("rb") as file:
        fields = _read_fields(path, file)
        offset = file.tell()
    kinds = [kind.lower() for kind in fields.get("kinds", ())]
    layers = None
    if fields["dimension"] == len(fields["sizes"]) == 4 and kinds[:1] == ["list"] and fields["segments"]:
        layers, kinds = _without_list(path, fields), kinds[1:]
    elif fields["dimension"] != 3:
        raise InputError(path, f"is {fields['dimension']}-D", "give one 3-D volume a file")
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
        data_file=path if detached is None else _data_file(path, detached),
        data_offset=offset if detached is None else 0,
        line_skip=_skip(path, fields, "line skip", lowest=0),
        # The length of text is not known, so that it cannot be found from the end of the file.
        byte_skip=_skip(path, fields, "byte skip", lowest=0 if encoding == "text" else -1),
        assumed_orientation=assumed,
        notes=notes,
        segments=parse_segments(path, fields["segments"], layers),
        layers=layers or 0,
    )


def _without_list(path: Path, fields: dict[str, Any]) -> int:
    """Remove the first axis, the layers of a segmentation, from the fields; return the number of layers."""
    layers = check_layers(path, int(fields["sizes"][0]))
    for field in ("sizes", "space directions", "spacings", "units"):
        if len(fields.get(field, ())) == 4:
            fields[field] = fields[field][1:]
    return layers


def _read_array(path: Path, header: NrrdHeader) -> NDArray[Any]:
    """Read the voxels that a checked header describes: (i, j, k), or (layers, i, j, k), in native byte order."""
    size = (header.layers, *header.geometry.size) if header.layers else header.geometry.size
    voxels = math.prod(size)
    # In a text file a voxel takes at least a digit and a separator.
    expected = voxels * header.dtype.itemsize if header.encoding != "text" else 2 * voxels - 1
    available = max(0, stored_bytes(path, header.data_file) - header.data_offset)
    check_claim(path, expected, available, compressed=header.encoding in ("gzip", "bzip2"))
    with header.data_file.open("rb") as file:
        file.seek(header.data_offset)
        _skip_lines(path, file, header.line_skip)
        if header.encoding == "text":
            flat = _read_text(path, header, file, voxels)
        else:
            flat = np.frombuffer(_read_bytes(path, header, file, expected), dtype=header.dtype)
    return flat.reshape(size, order="F").astype(header.dtype.newbyteorder("="), copy=False)


def _read_fields(path: Path, file: BinaryIO) -> dict[str, Any]:
    """Return the fields that are needed, parsed, and leave the file at the end of its header."""
    magic = file.readline(_LONGEST_VALUE)
    if not magic:
        raise InputError(path, "is empty", "fetch it again")
    if magic.rstrip() not in _MAGIC:
        raise InputError(path, "is no readable NRRD file (it does not start as one)", _FETCH)
    segments: dict[str, str] = {}
    fields: dict[str, Any] = {"segments": segments}
    named = path.name.lower().endswith(SEGMENTATION_SUFFIX)
    # An empty line ends the header; a detached header may end with its file.
    while (line := file.readline(_MAX_HEADER_BYTES)).strip():
        if file.tell() > _MAX_HEADER_BYTES:
            raise InputError(path, "is no readable NRRD file (the header is longer than a megabyte)", _FETCH)
        name, colon, value = line.partition(b":")
        if line.startswith(b"#") or value.startswith(b"="):
            if named and (key := segment_key(name)):
                segments[key] = value[1:].strip().decode("utf-8", "replace")
            continue
        if not colon:
            raise InputError(path, "is no readable NRRD file (a line of its header is no field)", _FETCH)
        field = name.strip().lower().decode("ascii", "replace")
        field = _OTHER_SPELLINGS.get(field, field)
        if field not in _FIELDS:
            continue
        if field in fields:
            raise InputError(path, f"gives the field {field!r} twice", "leave one of them or export it again")
        parsed = _parse(field, value.strip())
        if parsed is None:
            # The value is not quoted: it may be a name.
            problem = f"is no readable NRRD file (its field {field!r} cannot be understood)"
            raise InputError(path, problem, _FETCH)
        fields[field] = parsed
    for field in ("type", "dimension", "sizes", "encoding"):
        if field not in fields:
            raise InputError(path, f"is no readable NRRD file (it lacks the field {field!r})", _FETCH)
    return fields


def _parse(field: str, value: bytes) -> Any:
    """Parse the value of one field with pynrrd: a text, number, list or array; None if it is not valid."""
    import nrrd

    # pynrrd would read 6.5 as 6, and 6_0 as 60.
    valid = len(value) <= _LONGEST_VALUE and (field not in _INTEGER_FIELDS or _INTEGERS.fullmatch(value))
    try:
        return nrrd.read_header([_MAGIC[-1].decode(), f"{field}: {value.decode()}"])[field] if valid else None
    except Exception:  # noqa: BLE001 - whatever the broken value provokes
        return None


def _geometry(path: Path, fields: dict[str, Any]) -> tuple[Geometry, bool, tuple[str, ...]]:
    """Return the grid, whether its orientation was assumed, and notes."""
    sizes = fields["sizes"]
    if len(sizes) != 3:
        raise InputError(path, f"claims {len(sizes)} sizes", "the header is wrong: export the volume again")
    size = tuple(sizes.tolist())
    if min(size) < 1:
        raise InputError(path, f"claims sizes {size}", "the header is wrong: export the volume again")
    signs = _TO_LPS.get(fields.get("space", "").lower())
    if "space directions" not in fields:
        spacings = fields.get("spacings", np.ones(3))
        if spacings.shape != (3,):
            raise InputError(path, "has no usable space directions", _EXPORT_GEOMETRY)
        unit_mm, notes = _millimetres(fields, "units")
        # NaN means that a spacing is not known.
        spacings = np.where(np.isnan(spacings), 1.0, spacings * unit_mm)
        return grid(path, size, np.diag(spacings), np.zeros(3), units_field="units"), True, notes
    vectors, origin = fields["space directions"], fields.get("space origin", np.zeros(3))
    if np.shape(vectors) != (3, 3) or np.shape(origin) != (3,):
        raise InputError(path, "has no usable space directions", _EXPORT_GEOMETRY)
    # The units belong to the axes of space, not to those of the array.
    unit_mm, notes = _millimetres(fields, "space units")
    scale = np.array(signs or (1, 1, 1), dtype=float) * unit_mm
    geometry = grid(path, size, vectors.T * scale[:, None], origin * scale, units_field="space units")
    return geometry, signs is None, notes


def _millimetres(fields: dict[str, Any], field: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the unit of each axis in millimetres, and a note if the unit is unknown."""
    words = [word.strip().lower() for word in fields.get(field, ())]
    if not words or (len(words) == 3 and _UNITS_MM.keys() >= set(words)):
        return np.array([_UNITS_MM[word] for word in words or ("mm",) * 3]), ()
    return np.ones(3), (f"its unit of length ({field}) is not known, and was taken for millimetres",)


def _dtype(path: Path, fields: dict[str, Any], encoding: str) -> np.dtype[Any]:
    name = fields["type"].lower()
    if name not in _DTYPES:
        named = f"type {name!r}" if name in _WORDS else "an unknown type"
        raise InputError(path, f"has voxels of {named}", "export it with integer or float voxels")
    dtype = _DTYPES[name]
    if dtype.itemsize == 1 or encoding == "text":
        return dtype
    endian = fields.get("endian", "").lower()
    if endian not in ("little", "big"):
        raise InputError(path, "does not give its byte order (endian: little or big)", _FETCH)
    return dtype.newbyteorder(">" if endian == "big" else "<")


def _encoding(path: Path, fields: dict[str, Any]) -> str:
    name = fields["encoding"].lower()
    if name not in _ENCODINGS:
        named = f"the encoding {name!r}" if name in _WORDS else "an unknown encoding"
        raise InputError(path, f"has {named}", "export it as raw or gzip")
    return _ENCODINGS[name]


def _skip(path: Path, fields: dict[str, Any], field: str, lowest: int) -> int:
    skip: int = fields.get(field, 0)
    if not lowest <= skip <= _MAX_SKIPPED_BYTES:
        remedy = f"only {lowest} to {_MAX_SKIPPED_BYTES} is supported: export it again"
        raise InputError(path, f"has a {field} of {skip}", remedy)
    return skip


def _data_file(path: Path, name: str) -> Path:
    """Return a detached data file; it must be in the header's folder, also after links are resolved."""
    if _SEVERAL.match(name):
        raise InputError(path, "spreads its voxels over several files", "export it as one .nrrd file")
    remedy = "put the data file beside its header"
    folder = path.resolve().parent
    try:
        data_file = (on_disk(folder / name) if Path(name).name == name else folder / name).resolve()
        inside, exists = data_file.parent == folder, data_file.is_file()
    # The name is too long or contains a zero byte, or the link points to itself.
    except (OSError, RuntimeError, ValueError):
        inside, exists = True, False
    if not inside:
        raise InputError(path, "points to a data file outside its own folder", remedy)
    if not exists:
        raise InputError(path, "points to a data file that is missing, or is no file", remedy)
    return data_file


def _skip_lines(path: Path, file: BinaryIO, lines: int) -> None:
    left = _MAX_HEADER_BYTES
    for _ in range(lines):
        left -= len(file.readline(left + 1))
        if left < 0:
            raise InputError(path, "has a line skip over more than a megabyte", "export it again as raw or gzip")


def _read_bytes(path: Path, header: NrrdHeader, file: BinaryIO, expected: int) -> memoryview:
    source = Source(path, file, header.encoding)
    from_end = header.byte_skip == -1
    if from_end and header.encoding == "raw":
        file.seek(-expected, 2)
    source.skip(max(0, header.byte_skip))
    data = source.read(expected + (_MAX_SKIPPED_BYTES if from_end else 0))
    if not source.ended():
        # With wrong sizes or a missing skip the voxels would be shifted, and their checksum would not be checked.
        problem = f"holds more than the {expected} bytes its header claims"
        if from_end:
            problem = f"holds more than {_MAX_SKIPPED_BYTES} bytes before its voxels"
        raise InputError(path, problem, "its header is wrong: export it again")
    check_read(path, len(data), expected)
    return memoryview(data)[len(data) - expected :]


def _read_text(path: Path, header: NrrdHeader, file: BinaryIO, voxels: int) -> NDArray[Any]:
    source = Source(path, file, "raw")
    source.skip(header.byte_skip)
    flat = np.empty(voxels, header.dtype)
    count = 0
    # In pieces, since NumPy needs several times the length of the text.
    while text := source.read(_TEXT_PIECE):
        while not text[-1:].isspace() and len(text) < _TEXT_PIECE + _LONGEST_NUMBER and (more := source.read(1)):
            text += more
        if text.isspace():
            continue
        values = _numbers(bytes(text), header.dtype)
        if values is None:
            raise InputError(path, f"has voxels that are no numbers of type {header.dtype}", _FETCH)
        flat[count : count + values.size] = values[: max(0, voxels - count)]
        count += values.size
    if count != voxels:
        raise InputError(path, f"holds {count} voxels where its header claims {voxels}", _FETCH)
    return flat


def _numbers(text: bytes, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Parse numbers that are separated by white space; None if the text contains anything else."""
    # A smaller integer type would wrap; with 64 bits NumPy returns the limit of the type for a larger number.
    parsed: Any = np.float64 if dtype.kind == "f" else np.int64
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error", DeprecationWarning)
        try:
            values = np.fromstring(text, parsed, sep=" ")
        except (DeprecationWarning, ValueError):
            return None
        if dtype.kind != "f":
            limits, widest = np.iinfo(dtype), np.iinfo(np.int64)
            low, high = max(limits.min, widest.min + 1), min(limits.max, widest.max - 1)
            if values.min() < low or values.max() > high:
                return None
        return values.astype(dtype)
