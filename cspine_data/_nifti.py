"""NIfTI-1 files: read here, 348 bytes of header and then the voxels; written by SimpleITK.

ITK's own reader opens other files beside the one it is given, takes what a truncated file still gives for the whole,
and holds the voxels three times. What a header means is what ITK makes of it; the tests hold one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data._bounded import Source, check_claim, grid, stored_bytes
from cspine_data.errors import InputError
from cspine_data.geometry import Geometry

_FETCH = "fetch it again or export it anew"
_EXPORT = "the header is wrong: export the volume anew"

# Only what is needed: the header's free text (descrip, aux_file, db_name, intent_name) is never looked at.
_LAYOUT = {
    "sizeof_hdr": (0, "i4"), "dim": (40, "(8,)i2"), "datatype": (70, "i2"), "bitpix": (72, "i2"),
    "pixdim": (76, "(8,)f4"), "vox_offset": (108, "f4"), "scl_slope": (112, "f4"), "scl_inter": (116, "f4"),
    "xyzt_units": (123, "u1"), "qform_code": (252, "i2"), "sform_code": (254, "i2"), "quatern": (256, "(3,)f4"),
    "qoffset": (268, "(3,)f4"), "srow": (280, "(3,4)f4"), "magic": (344, "S4"),
}  # fmt: skip
_HEADER_BYTES = 348
_HEADER = np.dtype(
    {
        "names": list(_LAYOUT),
        "offsets": [offset for offset, _ in _LAYOUT.values()],
        "formats": [kind for _, kind in _LAYOUT.values()],
        "itemsize": _HEADER_BYTES,
    }
)
_NIFTI_2_BYTES = 540
_LEAST_OFFSET = 352
# Between header and voxels lie extensions; whole DICOM headers are put there, and they are smaller.
_MOST_OFFSET = 1 << 26

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_MOST_PADDING = 1 << 20
_SCALED_AT_ONCE = 1 << 20
_MM = {1: 1e3, 2: 1.0, 3: 1e-3}
_SCANNER = 1
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class NiftiHeader:
    """What a NIfTI header says, checked; none of the voxels has been read."""

    geometry: Geometry
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    assumed_orientation: bool


def read(path: Path) -> tuple[NDArray[Any], NiftiHeader]:
    """Read a file, in one go from its start to its end.

    Returns
    -------
    ndarray
        Voxels (i, j, k) in the file's index order, scaled as the header says.
    NiftiHeader
        What the header says.

    Raises
    ------
    InputError
        If it is no NIfTI file, not a 3-D scalar volume, truncated or damaged.
    """
    compressed = path.suffix.lower() == ".gz"
    there = stored_bytes(path, path)
    with path.open("rb") as file:
        source = Source(path, file, "gzip" if compressed else "raw")
        header = _header(path, bytes(source.read(_HEADER_BYTES)))
        size = header.geometry.size
        wanted = size[0] * size[1] * size[2] * header.dtype.itemsize
        check_claim(path, header.offset + wanted, there, compressed=compressed)
        source.skip(header.offset - _HEADER_BYTES)
        payload = source.read(wanted)
        if compressed:
            # Some programs pad. Beyond that the file is not read to its end, and its checksum is not known.
            source.skip(_MOST_PADDING)
            if not source.ended():
                problem = f"holds far more than the {wanted} bytes of voxels its header claims"
                raise InputError(path, problem, _EXPORT)
    if len(payload) < wanted:
        raise InputError(
            path, f"holds {len(payload)} bytes of voxels where its header claims {wanted}",
            "the file is truncated or its header is wrong: fetch it again",
        )  # fmt: skip
    stored = np.frombuffer(payload, dtype=header.dtype).reshape(size, order="F")
    return _scaled(stored.astype(header.dtype.newbyteorder("="), copy=False), header), header


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
    del image
    read(path)


def _header(path: Path, content: bytes) -> NiftiHeader:
    fields = _fields(path, content)
    # What is no number is refused below; NumPy would warn of a signalling NaN before.
    with np.errstate(all="ignore"):
        geometry, assumed = _geometry(path, fields, _size(path, fields["dim"].tolist()))
    slope, intercept = _scaling(path, float(fields["scl_slope"]), float(fields["scl_inter"]))
    return NiftiHeader(
        geometry=geometry,
        dtype=_dtype(path, fields),
        offset=_offset(path, float(fields["vox_offset"])),
        slope=slope,
        intercept=intercept,
        assumed_orientation=assumed,
    )


def _fields(path: Path, content: bytes) -> Any:
    """Return the header's fields, in the byte order in which its size is right."""
    if not content:
        raise InputError(path, "is empty", "fetch it again")
    if len(content) < _HEADER_BYTES:
        raise InputError(path, "is no readable NIfTI file (it ends within its header)", _FETCH)
    for layout in (_HEADER.newbyteorder("<"), _HEADER.newbyteorder(">")):
        fields = np.frombuffer(content, dtype=layout)[0]
        if fields["sizeof_hdr"] == _NIFTI_2_BYTES:
            raise InputError(path, "is NIfTI-2, which is not understood", "save it as NIfTI-1")
        if fields["sizeof_hdr"] != _HEADER_BYTES:
            continue
        if fields["magic"] == b"ni1":
            raise InputError(path, "keeps its voxels in another file (.hdr and .img)", "save it as one .nii file")
        if fields["magic"] != b"n+1":
            problem = "does not bear NIfTI's mark (Analyze does not say how it lies in the patient)"
            raise InputError(path, problem, "save it as NIfTI-1")
        return fields
    raise InputError(path, "is no readable NIfTI file (it does not start as one)", _FETCH)


def _size(path: Path, dim: list[int]) -> tuple[int, int, int]:
    dimension = dim[0]
    if not 1 <= dimension <= 7:
        raise InputError(path, f"claims {dimension} dimensions", _EXPORT)
    if min(dim[1 : dimension + 1]) < 1:
        raise InputError(path, f"claims sizes {tuple(dim[1 : dimension + 1])}", _EXPORT)
    if dimension < 3 or max(dim[4 : dimension + 1], default=1) > 1:
        raise InputError(path, f"is {dimension}-D", "give one 3-D volume a file")
    return dim[1], dim[2], dim[3]


def _dtype(path: Path, fields: Any) -> np.dtype[Any]:
    code, bits = int(fields["datatype"]), int(fields["bitpix"])
    if code not in _DTYPES:
        raise InputError(path, f"has voxels of NIfTI's type {code}", "export it with integer or float voxels")
    dtype: np.dtype[Any] = np.dtype(fields.dtype["dim"].base.byteorder + _DTYPES[code])
    if bits != dtype.itemsize * 8:
        raise InputError(path, f"has voxels of NIfTI's type {code} in {bits} bits", _EXPORT)
    return dtype


def _offset(path: Path, offset: float) -> int:
    if not _LEAST_OFFSET <= offset <= _MOST_OFFSET or not offset.is_integer():
        problem = f"says that its voxels start at byte {offset:g}"
        raise InputError(path, problem, f"it must be {_LEAST_OFFSET} to {_MOST_OFFSET}: export the volume anew")
    return int(offset)


def _scaling(path: Path, slope: float, intercept: float) -> tuple[float, float]:
    """Return slope and intercept; a slope of zero or NaN is how programs say that there is none."""
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        raise InputError(path, f"is scaled by {slope:g} and {intercept:g}", _EXPORT)
    return slope, intercept


def _geometry(path: Path, fields: Any, size: tuple[int, int, int]) -> tuple[Geometry, bool]:
    """Return the grid, and whether the file leaves open how it lies.

    As ITK chooses: the sform where it stands alone or is the scanner's own, else the qform; an sform with shear
    counts only where there is no qform, and is refused then.
    """
    millimetres = _MM.get(int(fields["xyzt_units"]) & 7, 1.0)
    spacing = fields["pixdim"][1:4].astype(float) * millimetres
    q_code, s_code = int(fields["qform_code"]), int(fields["sform_code"])
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise InputError(path, "has a spacing that is no positive number", _EXPORT)
    if q_code <= 0 and s_code <= 0:
        return grid(path, size, np.diag(spacing), np.zeros(3), spacing), True
    if s_code > 0 and (q_code <= 0 or s_code == _SCANNER):
        affine = fields["srow"].astype(float)
        steps, origin = affine[:, :3] * millimetres, affine[:, 3]
        if q_code <= 0 or not _sheared(steps):
            _check_sform(path, steps, spacing)
            return _lps_grid(path, size, steps, origin * millimetres, spacing), False
    steps = _rotation(path, fields["quatern"].astype(float)) * spacing
    if fields["pixdim"][0] < 0:
        steps[:, 2] *= -1
    return _lps_grid(path, size, steps, fields["qoffset"].astype(float) * millimetres, spacing), False


def _lps_grid(
    path: Path, size: tuple[int, int, int], steps: NDArray[Any], origin: NDArray[Any], spacing: NDArray[Any]
) -> Geometry:
    return grid(path, size, steps * _RAS_TO_LPS[:, None], origin * _RAS_TO_LPS, spacing)


def _sheared(steps: NDArray[Any]) -> bool:
    """Whether axes do not stand at right angles, or are no axes at all."""
    unit = steps / np.linalg.norm(steps, axis=0)
    return not bool((np.abs(unit @ unit.T - np.eye(3)) <= 1e-4).all())


def _check_sform(path: Path, steps: NDArray[Any], spacing: NDArray[Any]) -> None:
    if _sheared(steps):
        raise InputError(path, "has an sform whose axes are not at right angles", "export it anew with its geometry")
    lengths = np.linalg.norm(steps, axis=0)
    if (np.abs(lengths - spacing) > 0.01 * spacing).any():
        both = " and ".join(" x ".join(f"{mm:.4g}" for mm in values) for values in (lengths, spacing))
        raise InputError(path, f"gives two spacings, {both} mm", "export it anew with its geometry")


def _rotation(path: Path, quaternion: NDArray[Any]) -> NDArray[Any]:
    """Return the rotation of a unit quaternion of which the file keeps the last three parts."""
    squares = float(quaternion @ quaternion)
    if not squares <= 1.01:
        raise InputError(path, "has a qform that is no rotation", "export it anew with its geometry")
    # Rounding may leave a little more than one.
    b, c, d = quaternion / max(1.0, squares**0.5)
    a = max(0.0, 1.0 - squares) ** 0.5
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def _scaled(stored: NDArray[Any], header: NiftiHeader) -> NDArray[Any]:
    if (header.slope, header.intercept) == (1.0, 0.0):
        return stored
    # As ITK does it: integers become single precision, the product is formed in double.
    scaled = stored.astype(np.float32 if stored.dtype.kind in "iu" else stored.dtype, order="F")
    flat = scaled.reshape(-1, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        # In pieces, since a plane may be the whole volume.
        for start in range(0, flat.size, _SCALED_AT_ONCE):
            piece = flat[start : start + _SCALED_AT_ONCE]
            piece[...] = piece.astype(np.float64) * header.slope + header.intercept
    return scaled


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
