"""Reading and writing NIfTI through SimpleITK, after the header's claims were held against the file."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.geometry import Geometry, as_rows

# Deflate stores at most about 1032 bytes in one.
_LONGEST_RUN = 1100
_CHUNK = 1 << 22
# The header and the four bytes that say whether extensions follow; extensions may hold anything.
_EARLIEST_VOXEL = 352
_BYTES_OF_DATATYPE = {
    "2": 1, "256": 1, "4": 2, "512": 2, "8": 4, "768": 4, "16": 4, "1024": 8, "1280": 8, "64": 8,
}  # fmt: skip


def read_header(path: Path) -> tuple[Geometry, np.dtype[Any]]:
    """Read a NIfTI header.

    Raises
    ------
    InputError
        If it is no NIfTI file, not a 3-D scalar volume, or claims more voxels than the file can hold.
    """
    reader = _reader(path)
    dimension, components = reader.GetDimension(), reader.GetNumberOfComponents()
    if dimension != 3:
        raise InputError(path, f"is {dimension}-D", "give one 3-D volume a file")
    if components != 1:
        raise InputError(path, f"has {components} components a voxel", "give one 3-D volume of scalar voxels")
    geometry = Geometry(
        size=reader.GetSize(),
        spacing_mm=reader.GetSpacing(),
        directions=as_rows(np.array(reader.GetDirection()).reshape(3, 3)),
        origin_mm=reader.GetOrigin(),
    )
    dtype = _dtype(path, reader.GetPixelID())
    if 0 < _offset(reader) < _EARLIEST_VOXEL:
        raise InputError(path, "claims that its voxels start within its header", "the header is wrong: export it anew")
    claimed = _claimed_bytes(reader, dtype)
    there = path.stat().st_size * (_LONGEST_RUN if _is_compressed(path) else 1)
    if claimed > there:
        raise InputError(
            path, f"is too small for the {claimed} bytes its header claims",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip
    return geometry, dtype


def read_array(path: Path) -> NDArray[Any]:
    """Read the voxels, (i, j, k) in the file's index order, scaled as the header says.

    Raises
    ------
    InputError
        If the voxels cannot be read.
    """
    import SimpleITK as sitk  # noqa: N813

    if _is_compressed(path):
        _check_compressed(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError(path, f"cannot be read ({_last_line(error)})", "the file is damaged: fetch it again") from None
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).transpose())


def write(path: Path, array_ijk: NDArray[Any], geometry: Geometry) -> None:
    """Write a volume (i, j, k); the name's ending decides whether it is compressed.

    Raises
    ------
    InputError
        If it cannot be written whole.
    """
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.ascontiguousarray(array_ijk.transpose()))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction_matrix.ravel().tolist())
    try:
        sitk.WriteImage(image, str(path))
    except RuntimeError as error:
        raise InputError(path, f"cannot be written ({_last_line(error)})", "is the disk full?") from None
    # ITK does not always tell of a write that was cut short.
    read_header(path)
    if _is_compressed(path):
        _check_compressed(path)


def _reader(path: Path) -> Any:
    import SimpleITK as sitk  # noqa: N813

    if path.stat().st_size == 0:
        raise InputError(path, "is empty", "fetch it again")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NiftiImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        problem = f"is no readable NIfTI file ({_last_line(error)})"
        raise InputError(path, problem, "fetch it again or export it anew") from None
    return reader


def _dtype(path: Path, pixel_id: int) -> np.dtype[Any]:
    import SimpleITK as sitk  # noqa: N813

    known = {
        sitk.sitkUInt8: "u1", sitk.sitkInt8: "i1", sitk.sitkUInt16: "u2", sitk.sitkInt16: "i2",
        sitk.sitkUInt32: "u4", sitk.sitkInt32: "i4", sitk.sitkUInt64: "u8", sitk.sitkInt64: "i8",
        sitk.sitkFloat32: "f4", sitk.sitkFloat64: "f8",
    }  # fmt: skip
    if pixel_id not in known:
        name = sitk.GetPixelIDValueAsString(pixel_id)
        raise InputError(path, f"has voxels of type {name!r}", "export it with integer or float voxels")
    return np.dtype(known[pixel_id])


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _check_compressed(path: Path) -> None:
    """Decompress once to the end and forget it: ITK takes what a truncated file still gives for the whole."""
    reader = _reader(path)
    claimed = _claimed_bytes(reader, _dtype(path, reader.GetPixelID()))
    held = 0
    try:
        with gzip.open(path) as stream:
            while held <= claimed and (chunk := stream.read(_CHUNK)):
                held += len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(path, f"cannot be decompressed ({error})", "the file is damaged: fetch it again") from None
    if held < claimed:
        raise InputError(
            path, f"holds {held} bytes where its header claims {claimed}",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip


def _claimed_bytes(reader: Any, dtype: np.dtype[Any]) -> int:
    """Return how many bytes the header says the file, decompressed, has at least."""
    return int(np.prod(reader.GetSize(), dtype=object)) * _stored_bytes(reader, dtype) + _offset(reader)


def _offset(reader: Any) -> int:
    """Return where the voxels start."""
    text = reader.GetMetaData("vox_offset") if reader.HasMetaDataKey("vox_offset") else ""
    try:
        return max(0, int(float(text)))
    except (ValueError, OverflowError):
        return 0


def _stored_bytes(reader: Any, dtype: np.dtype[Any]) -> int:
    """Return the bytes a voxel takes in the file: a scaled integer is read as a wider float.

    By its type, as ITK reads it; the header's `bitpix` says it once more, and may say anything.
    """
    code = reader.GetMetaData("datatype") if reader.HasMetaDataKey("datatype") else ""
    return _BYTES_OF_DATATYPE.get(code, dtype.itemsize)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
