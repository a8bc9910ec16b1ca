"""Reading and writing NIfTI-1 files within bounds.

ITK's reader opens other files in the folder, accepts truncated files, and holds the voxels three times. Its writer
stores one position in both forms of a header, and makes axes orthogonal. nibabel prefers the sform to the qform, where
ITK does not, and accepts most broken headers (docs/decisions/0046). The interpretation is ITK's; tests compare them.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cspine_data.errors import InputError
from cspine_data.volumes.bounded import GZIP, RESAMPLE, Source, check_claim, check_read, grid, stored_bytes
from cspine_data.volumes.geometry import MOST_SKEW, Geometry, NiftiForms, rotation, skew
from cspine_data.volumes.volume import Volume

_FETCH = "fetch it again or export it again"
_EXPORT = "the header is wrong: export the volume again"

# Only needed fields: free text (descrip, aux_file, db_name, intent_name) may contain names.
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
# Extensions before the voxels, such as whole DICOM headers, are smaller.
_MOST_OFFSET = 1 << 26

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_MOST_PADDING = 1 << 20
_SCALED_AT_ONCE = 1 << 20
_MM = {1: 1e3, 2: 1.0, 3: 1e-3}
_MILLIMETRE = 2
_UNITS = {1: "metres", 2: "millimetres", 3: "micrometres"}
_SCANNER = 1
# In voxels: with a smaller difference a mask is on the same voxels in both forms. Rounding of a quaternion alone moves
# a corner by up to 0.2 mm.
_APART = 0.5
_LONGEST_AXIS = 2**15 - 1
_COMPRESSION = 4
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class NiftiHeader:
    """A checked NIfTI header; no voxels have been read."""

    geometry: Geometry
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    assumed_orientation: bool
    notes: tuple[str, ...]

    @property
    def intensity_step(self) -> float:
        """Distance between neighbouring intensities if integers are scaled; else 0."""
        scaled = (self.slope, self.intercept) != (1.0, 0.0) and self.dtype.kind in "iu"
        return abs(self.slope) if scaled else 0.0


def read(path: Path) -> Volume:
    """Read a volume in one pass; its intensities are scaled by slope and intercept."""
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
            # Some programs add padding. A longer file is refused, since its checksum would not be reached.
            source.skip(_MOST_PADDING)
            if not source.ended():
                problem = f"holds far more than the {wanted} bytes of voxels its header claims"
                raise InputError(path, problem, _EXPORT)
    check_read(path, len(payload), wanted)
    stored = np.frombuffer(payload, dtype=header.dtype).reshape(size, order="F")
    array = _scaled(stored.astype(header.dtype.newbyteorder("="), copy=False), header)
    return Volume(array, header.geometry, path, header.assumed_orientation, header.notes, header.intensity_step)


def _read_header(path: Path) -> NiftiHeader:
    with path.open("rb") as file:
        source = Source(path, file, "gzip" if path.suffix.lower() == ".gz" else "raw")
        return _header(path, bytes(source.read(_HEADER_BYTES)))


def read_geometry(path: Path) -> Geometry:
    """Read the grid from the header."""
    return _read_header(path).geometry


def write(path: Path, volume: Volume, _segments: Mapping[int, str]) -> None:
    """Write a volume, compressed if the name ends in ``.gz``.

    The header keeps both forms of the header that the grid was read from.
    """
    array_ijk, geometry = volume.array, volume.geometry
    kind = array_ijk.dtype.newbyteorder("=").str[1:]
    code = next((code for code, name in _DTYPES.items() if name == kind), None)
    if code is None:
        raise InputError(path, f"cannot hold voxels of {array_ijk.dtype}", "convert them to an integer or float type")
    if max(geometry.size) > _LONGEST_AXIS:
        raise InputError(path, f"cannot hold more than {_LONGEST_AXIS} voxels along an axis", "write .nrrd")
    header = np.zeros((), _HEADER.newbyteorder("<"))
    values = {
        "sizeof_hdr": _HEADER_BYTES, "dim": (3, *geometry.size, 1, 1, 1, 1), "datatype": code,
        "bitpix": 8 * array_ijk.dtype.itemsize, "vox_offset": _LEAST_OFFSET, "scl_slope": 1, "xyzt_units": _MILLIMETRE,
        "magic": b"n+1",
    }  # fmt: skip
    for name, value in values.items():
        header[name] = value
    if geometry.nifti is None or not _put_forms(path, header, geometry, geometry.nifti):
        _put(header, geometry, _plain_forms(geometry))
    voxels = np.ascontiguousarray(array_ijk.transpose(), dtype=np.dtype(kind).newbyteorder("<"))
    with path.open("wb") as file:
        # Without name and date, so that equal volumes give equal files.
        packed = gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) if path.suffix.lower() == ".gz" else file
        packed.write(header.tobytes() + bytes(_LEAST_OFFSET - _HEADER_BYTES))
        packed.write(voxels.data.cast("B"))
        if packed is not file:
            packed.close()
    if not _read_header(path).geometry.same_grid(geometry):
        raise InputError(path, "cannot represent the position: its numbers are rounded too far", "write .nrrd")


def _put_forms(path: Path, header: NDArray[Any], geometry: Geometry, forms: NiftiForms) -> bool:
    """Write forms to a header; return whether they describe the grid, which may be a crop of theirs."""
    _put(header, geometry, forms)
    try:
        return _geometry(path, header, geometry.size)[0].same_grid(geometry)
    except InputError:
        return False


def _put(header: NDArray[Any], geometry: Geometry, forms: NiftiForms) -> None:
    header["qform_code"], header["sform_code"] = forms.qform_code, forms.sform_code
    header["pixdim"] = (forms.qfac, *geometry.spacing_mm, 0, 0, 0, 0)
    header["quatern"], header["qoffset"], header["srow"] = forms.quaternion, forms.qoffset_mm, forms.srow_mm


def _plain_forms(geometry: Geometry) -> NiftiForms:
    """Return forms that both describe a grid."""
    from scipy.spatial.transform import Rotation

    directions, origin = geometry.direction_matrix * _RAS_TO_LPS[:, None], np.array(geometry.origin_mm) * _RAS_TO_LPS
    qfac = -1.0 if np.linalg.det(directions) < 0 else 1.0
    b, c, d, _ = Rotation.from_matrix(directions * (1.0, 1.0, qfac)).as_quat(canonical=True).tolist()
    first, second, third = np.column_stack([directions * geometry.spacing_mm, origin]).tolist()
    return NiftiForms(
        qform_code=_SCANNER,
        sform_code=_SCANNER,
        quaternion=(b, c, d),
        qfac=qfac,
        qoffset_mm=tuple(origin.tolist()),
        srow_mm=(tuple(first), tuple(second), tuple(third)),
    )


def _header(path: Path, content: bytes) -> NiftiHeader:
    fields = _fields(path, content)
    # NaN is refused below; NumPy would warn of a signalling NaN before.
    with np.errstate(all="ignore"):
        geometry, assumed, notes = _geometry(path, fields, _size(path, fields["dim"].tolist()))
    slope, intercept = _scaling(path, float(fields["scl_slope"]), float(fields["scl_inter"]))
    return NiftiHeader(
        geometry=geometry,
        dtype=_dtype(path, fields),
        offset=_offset(path, float(fields["vox_offset"])),
        slope=slope,
        intercept=intercept,
        assumed_orientation=assumed,
        notes=notes,
    )


def _fields(path: Path, content: bytes) -> Any:
    """Return the header's fields, in the byte order that gives the right header size."""
    if not content:
        raise InputError(path, "is empty", "fetch it again")
    if content.startswith(GZIP):
        raise InputError(path, "is compressed", f"call it {path.name}.gz")
    if len(content) < _HEADER_BYTES:
        raise InputError(path, "is no readable NIfTI file (it ends within its header)", _FETCH)
    for layout in (_HEADER.newbyteorder("<"), _HEADER.newbyteorder(">")):
        fields = np.frombuffer(content, dtype=layout)[0]
        if fields["sizeof_hdr"] == _NIFTI_2_BYTES:
            raise InputError(path, "is NIfTI-2, which is not supported", "save it as NIfTI-1")
        if fields["sizeof_hdr"] != _HEADER_BYTES:
            continue
        if fields["magic"] == b"ni1":
            raise InputError(path, "keeps its voxels in another file (.hdr and .img)", "save it as one .nii file")
        if fields["magic"] != b"n+1":
            problem = "does not have NIfTI's magic number (Analyze files have no orientation)"
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
        raise InputError(path, problem, f"it must be {_LEAST_OFFSET} to {_MOST_OFFSET}: export the volume again")
    return int(offset)


def _scaling(path: Path, slope: float, intercept: float) -> tuple[float, float]:
    """Return slope and intercept; a slope of zero or NaN means none."""
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        raise InputError(path, f"is scaled by {slope:g} and {intercept:g}", _EXPORT)
    return slope, intercept


def _geometry(path: Path, fields: Any, size: tuple[int, int, int]) -> tuple[Geometry, bool, tuple[str, ...]]:
    """Return the grid, whether its orientation was assumed, and notes.

    As in ITK, the sform is used if it is the only form or has the scanner's code, else the qform. An sform with shear
    is used only without a qform, and then refused.
    """
    unit = int(fields["xyzt_units"]) & 7
    millimetres = _MM.get(unit, 1.0)
    units_field = f"xyzt_units says {_UNITS.get(unit, 'nothing')}"
    spacing = fields["pixdim"][1:4].astype(float) * millimetres
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise InputError(path, "has a spacing that is no positive number", _EXPORT)
    forms = _forms(fields, millimetres)
    q_code, s_code = int(fields["qform_code"]), int(fields["sform_code"])
    if q_code <= 0 and s_code <= 0:
        geometry = grid(path, size, np.diag(spacing), np.zeros(3), spacing, units_field)
        return geometry.model_copy(update={"nifti": forms}), True, ()
    sform = fields["srow"].astype(float) * millimetres
    if s_code > 0 and (q_code <= 0 or (s_code == _SCANNER and skew(sform[:, :3]) <= MOST_SKEW)):
        _check_sform(path, sform[:, :3], spacing)
        matrix, used, other = sform, "sform", "qform"
    else:
        matrix, used, other = _qform(path, fields, spacing, millimetres), "qform", "sform"
    lps = matrix * _RAS_TO_LPS[:, None]
    geometry = grid(path, size, lps[:, :3], lps[:, 3], spacing, units_field)
    notes: tuple[str, ...] = ()
    if min(q_code, s_code) > 0:
        codes = {"qform": q_code, "sform": s_code}
        notes = _disagreement(size, spacing, forms, used=used, other=f"{other} (code {codes[other]})")
    if notes or (q_code, s_code) != (_SCANNER, _SCANNER):
        geometry = geometry.model_copy(update={"nifti": forms})
    return geometry, False, notes


def _forms(fields: Any, millimetres: float) -> NiftiForms | None:
    """Return both forms in millimetres; None if they contain NaN or infinity."""
    rows = (fields["srow"].astype(float) * millimetres).tolist()
    try:
        return NiftiForms(
            qform_code=int(fields["qform_code"]),
            sform_code=int(fields["sform_code"]),
            quaternion=tuple(fields["quatern"].astype(float).tolist()),
            qfac=-1.0 if fields["pixdim"][0] < 0 else 1.0,
            qoffset_mm=tuple((fields["qoffset"].astype(float) * millimetres).tolist()),
            srow_mm=tuple(tuple(row) for row in rows),
        )
    except ValidationError:
        return None


def _disagreement(
    size: tuple[int, int, int], spacing: NDArray[Any], forms: NiftiForms | None, *, used: str, other: str
) -> tuple[str, ...]:
    """Return a note if the two forms of a header describe different positions.

    Records contain the notes, so that another wording would change the bytes of a store.
    """
    apart, details = np.inf, []
    if forms is not None:
        corners = np.array(list(itertools.product(*((0, n - 1) for n in size), (1,))), float)
        between = corners @ (forms.qform(spacing) - forms.sform()).T
        # The largest distance of the corners.
        apart = float(np.linalg.norm(between, axis=1).max())
        steps = forms.qform(spacing)[:, :3], forms.sform()[:, :3]
        if np.isfinite(apart):
            if np.linalg.det(steps[0]) * np.linalg.det(steps[1]) < 0:
                details.append("they are mirror images, so left and right may be exchanged")
            lengths = [np.linalg.norm(axes, axis=0) for axes in steps]
            if not np.allclose(lengths[0], lengths[1], rtol=0.01):
                sizes = " and ".join(" x ".join(f"{mm:.3g}" for mm in one) for one in lengths)
                details.append(f"their voxels are {sizes} mm")
    if apart <= _APART * spacing.min():
        return ()
    if not np.isfinite(apart):
        return (f"its {other} holds numbers that cannot be meant, so that the {used} was taken",)
    note = f"its {other} places it up to {apart:.1f} mm away from its {used}; the {used} is used, as ITK does"
    return ("; ".join([note, *details, "files written keep both"]),)


def _check_sform(path: Path, steps: NDArray[Any], spacing: NDArray[Any]) -> None:
    if not skew(steps) <= MOST_SKEW:
        raise InputError(path, "has an sform whose axes are not at right angles", RESAMPLE)
    lengths = np.linalg.norm(steps, axis=0)
    if (np.abs(lengths - spacing) > 0.01 * spacing).any():
        both = " and ".join(" x ".join(f"{mm:.4g}" for mm in values) for values in (lengths, spacing))
        raise InputError(path, f"gives two spacings, {both} mm", "export it again with its geometry")


def _qform(path: Path, fields: Any, spacing: NDArray[Any], millimetres: float) -> NDArray[np.float64]:
    quaternion = fields["quatern"].astype(float)
    if not float(quaternion @ quaternion) <= 1.01:
        raise InputError(path, "has a qform that is no rotation", "export it again with its geometry")
    steps = rotation(quaternion) * spacing * (1.0, 1.0, -1.0 if fields["pixdim"][0] < 0 else 1.0)
    return np.column_stack([steps, fields["qoffset"].astype(float) * millimetres])


def _scaled(stored: NDArray[Any], header: NiftiHeader) -> NDArray[Any]:
    if (header.slope, header.intercept) == (1.0, 0.0):
        return stored
    # As in ITK: integers become single precision, the product is computed in double precision.
    scaled = stored.astype(np.float32 if stored.dtype.kind in "iu" else stored.dtype, order="F")
    flat = scaled.reshape(-1, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        # In pieces, to limit memory.
        for start in range(0, flat.size, _SCALED_AT_ONCE):
            piece = flat[start : start + _SCALED_AT_ONCE]
            piece[...] = piece.astype(np.float64) * header.slope + header.intercept
    return scaled
