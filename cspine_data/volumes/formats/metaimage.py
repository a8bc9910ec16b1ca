"""MetaImage files, as ITK, elastix and SPIDER have them: ``.mha``, and, for reading, ``.mhd`` with its data file."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.bounded import Source, check_claim, check_read, grid, stored_bytes
from cspine_data.volumes.geometry import Geometry
from cspine_data.volumes.volume import Volume

_DTYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
# MET_LONG has four bytes or eight, depending on the system.
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items() if kind not in ("MET_LONG", "MET_ULONG")}
_COMPRESSION = 4
# A field has several names.
_SPACING = ("ElementSpacing", "ElementSize")
_ORIGIN = ("Offset", "Position", "Origin")
_DIRECTIONS = ("TransformMatrix", "Rotation", "Orientation")
_BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_LAST_FIELD = "ElementDataFile"
_LONGEST_HEADER = 1 << 16
_EXPORT = "export it again as one .mha, .nii.gz or .nrrd file"


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    geometry: Geometry
    compressed: bool
    data_file: Path
    data_start: int
    assumed_orientation: bool


def read(path: Path) -> Volume:
    """Read a volume.

    Parameters
    ----------
    path : Path
        The ``.mha`` or ``.mhd`` file.

    Returns
    -------
    Volume
        The voxels, (i, j, k), with the grid. MetaImage has no units; millimetres are assumed, as in ITK.

    Raises
    ------
    InputError
        If it is not a 3-D scalar image, its header is damaged, it has more or fewer voxels than the header claims, or
        its data file is in another folder.
    """
    header = _read_header(path)
    there = stored_bytes(path, header.data_file) - header.data_start
    count = int(np.prod(header.size, dtype=np.int64)) * header.dtype.itemsize
    check_claim(path, count, there, compressed=header.compressed)
    with header.data_file.open("rb") as file:
        file.seek(header.data_start)
        source = Source(path, file, "zlib" if header.compressed else "raw")
        content = source.read(count)
        if not source.ended():
            problem = f"holds more than the {count} bytes its header claims"
            raise InputError(path, problem, "its header is wrong: export it again")
    check_read(path, len(content), count)
    array: NDArray[np.generic] = np.frombuffer(content, header.dtype).reshape(header.size, order="F")
    array = array.astype(header.dtype.newbyteorder("="), copy=False)
    return Volume(array, header.geometry, path, header.assumed_orientation)


def read_geometry(path: Path) -> Geometry:
    """Read the grid from the header."""
    return _read_header(path).geometry


def write(path: Path, volume: Volume, _segments: Mapping[int, str]) -> None:
    """Write a volume as one compressed ``.mha`` file."""
    geometry = volume.geometry
    kind = _KINDS.get(volume.array.dtype.str[1:])
    if kind is None:
        problem = f"cannot hold voxels of {volume.array.dtype}"
        raise InputError(path, problem, "convert them to an integer or float type")
    voxels = np.ascontiguousarray(volume.array.transpose(), dtype=volume.array.dtype.newbyteorder("<"))
    packed = zlib.compress(voxels.data.cast("B"), _COMPRESSION)
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": True,
        "CompressedDataSize": len(packed),
        "TransformMatrix": _text(geometry.direction_matrix.T.ravel()),
        "Offset": _text(geometry.origin_mm),
        "ElementSpacing": _text(geometry.spacing_mm),
        "DimSize": _text(geometry.size),
        "ElementType": kind,
        _LAST_FIELD: "LOCAL",
    }
    with path.open("wb") as file:
        file.write("".join(f"{name} = {value}\n" for name, value in fields.items()).encode("ascii"))
        file.write(packed)


def _text(numbers: Iterable[float]) -> str:
    """Return numbers with all their digits."""
    return " ".join(repr(number) for number in np.asarray(numbers).tolist())


def files(path: Path) -> list[Path]:
    """Return the files of a volume: the header and its data file, if this is another file."""
    data_file = _read_header(path).data_file
    return [path] if data_file == path else [path, data_file]


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        content = file.read(_LONGEST_HEADER)
    fields, start = _fields(path, content)
    try:
        dimensions, channels = int(fields.get("NDims", "0")), int(fields.get("ElementNumberOfChannels", "1"))
        size = [int(word) for word in fields["DimSize"].split()]
        spacing = _numbers(fields, _SPACING, [1.0] * 3)
        origin = _numbers(fields, _ORIGIN, [0.0] * 3)
        directions = _numbers(fields, _DIRECTIONS, np.eye(3).ravel().tolist())
    except (KeyError, ValueError):
        raise InputError(path, "has a damaged header", _EXPORT) from None
    if dimensions != 3 or channels != 1:
        what = f"{dimensions}-D" if dimensions != 3 else f"an image of {channels} channels"
        raise InputError(path, f"is {what}", "give one 3-D volume with one channel a file")
    kind = fields.get("ElementType", "")
    if kind not in _DTYPES:
        raise InputError(path, "has voxels of an unsupported type", _EXPORT)
    if len(size) != 3 or min(size) < 1 or fields.get("BinaryData", "True").lower() != "true":
        raise InputError(path, "has a damaged header" if min(size, default=0) < 1 else "is stored as text", _EXPORT)
    order = ">" if any(fields.get(name, "").lower() == "true" for name in _BIG_ENDIAN) else "<"
    skip = int(fields["HeaderSize"]) if fields.get("HeaderSize", "").isdecimal() else 0
    local = fields[_LAST_FIELD] == "LOCAL"
    # Each row of TransformMatrix is the direction of an index axis.
    steps = directions.reshape(3, 3).T * spacing
    first, second, third = size
    return _Header(
        size=(first, second, third),
        dtype=np.dtype(order + _DTYPES[kind]),
        geometry=grid(path, (first, second, third), steps, origin, spacing, "ElementSpacing"),
        compressed=fields.get("CompressedData", "").lower() == "true",
        data_file=path if local else _data_file(path, fields[_LAST_FIELD]),
        data_start=start if local else skip,
        assumed_orientation=not any(name in fields for name in _DIRECTIONS),
    )


def _fields(path: Path, content: bytes) -> tuple[dict[str, str], int]:
    """Return the fields of a header and its length."""
    fields: dict[str, str] = {}
    start = 0
    while _LAST_FIELD not in fields:
        end = content.find(b"\n", start)
        name, mark, value = content[start : end if end >= 0 else None].decode("latin-1").partition("=")
        if end < 0 or not mark or name.strip() in fields:
            raise InputError(path, "is no MetaImage file, or its header is damaged", _EXPORT)
        fields[name.strip()] = value.strip()
        start = end + 1
    return fields, start


def _numbers(fields: dict[str, str], names: tuple[str, ...], default: list[float]) -> NDArray[np.float64]:
    text = next((fields[name] for name in names if name in fields), None)
    numbers = np.array(default if text is None else [float(word) for word in text.split()], np.float64)
    if len(numbers) != len(default) or not np.isfinite(numbers).all():
        raise ValueError(names[0])
    return numbers


def _data_file(path: Path, name: str) -> Path:
    """Return the data file of a header; it must be in the same folder."""
    if name.split()[:1] == ["LIST"] or "%" in name:
        raise InputError(path, "is spread over several data files", _EXPORT)
    data_file = path.with_name(Path(name).name)
    inside = Path(name).name == name and data_file.is_file() and data_file.resolve().parent == path.resolve().parent
    if not inside:
        raise InputError(path, "has no data file in its folder", "put the data file beside it")
    return data_file
