"""Reading and writing volumes in all supported formats."""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError, printable
from cspine_data.files import atomic_write, make_folder
from cspine_data.volumes import dicom, nifti, nrrd
from cspine_data.volumes.bounded import grid, stored_bytes
from cspine_data.volumes.geometry import Geometry

#: 3D Slicer's segmentations.
SEGMENTATION_SUFFIX = ".seg.nrrd"
SUFFIXES = (SEGMENTATION_SUFFIX, ".nii.gz", ".nrrd", ".nhdr", ".nii")
# Okabe and Ito (2008), for colour vision deficiency.
_COLOURS = (
    "0.902 0.624 0", "0.337 0.706 0.914", "0 0.620 0.451", "0.941 0.894 0.259", "0 0.447 0.698", "0.835 0.369 0",
    "0.800 0.475 0.655",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image or label map in its file's index order, with its geometry.

    Attributes
    ----------
    array : ndarray
        Voxels, (i, j, k), in the file's dtype.
    geometry : Geometry
        The grid of `array`.
    path : Path or None
        The source file.
    assumed_orientation : bool
        True if the file does not define its orientation, so that LPS was assumed.
    notes : tuple of str
        Notes for the user on a usable file, one sentence each, without the file name.
    intensity_step : float
        Distance between neighbouring intensities if the file scales integers, such as by NIfTI's slope; else 0.
    usable : bool
        True after `usable_image` has checked it.
    """

    array: NDArray[Any]
    geometry: Geometry
    path: Path | None = None
    assumed_orientation: bool = False
    notes: tuple[str, ...] = ()
    intensity_step: float = 0.0
    usable: bool = False

    @property
    def name(self) -> str:
        """Name of the volume in messages."""
        return str(self.path) if self.path else "volume"


def volume_stem(path: Path) -> str:
    """Return a file's name without the suffixes of a volume: ``VB2_02.nii.gz`` is ``VB2_02``."""
    suffix = volume_suffix(path)
    return path.name[: len(path.name) - len(suffix)]


def volume_suffix(path: Path) -> str:
    """Return the suffix of a volume file, or an empty string."""
    lower = path.name.lower()
    return next((path.name[-len(suffix) :] for suffix in SUFFIXES if lower.endswith(suffix)), "")


def label_name(volume: Path) -> str:
    """Return the file name of a volume's label map, as `find_cases` pairs them: ``X-label.nrrd`` for ``X.nrrd``."""
    suffix = ".nrrd" if volume_suffix(volume).lower() in (".nhdr", "") else volume_suffix(volume)
    return f"{volume_stem(volume)}-label{suffix}"


def read_volume(path: str | Path) -> Volume:
    """Read a NRRD (``.nrrd``, ``.nhdr``) or NIfTI (``.nii``, ``.nii.gz``) file, or a folder of DICOM slices.

    Parameters
    ----------
    path : str or Path
        The file, or a folder with one DICOM series, one file per slice.

    Returns
    -------
    Volume
        The voxels in the file's index order and dtype, with the geometry.

    Raises
    ------
    InputError
        If the file is missing, not a 3-D scalar volume, truncated or damaged; if a folder holds no DICOM series or
        several, or slices are missing.

    Examples
    --------
    >>> volume = read_volume("data/raw/CS_01.nrrd")  # doctest: +SKIP
    >>> volume.array.shape, volume.geometry.orientation_code  # doctest: +SKIP
    ((50, 118, 128), 'LPS')
    """
    path = Path(path)
    try:
        if _is_series(path):
            array, geometry, notes = dicom.read(path)
            return Volume(array, geometry, path, notes=notes)
        path = _existing(path)
        if _is_nifti(path):
            array, header = nifti.read(path)
            return Volume(array, header.geometry, path, header.assumed_orientation, header.notes, header.intensity_step)
        nrrd_header = nrrd.read_header(path)
        array = nrrd.read_array(path, nrrd_header)
        return Volume(array, nrrd_header.geometry, path, nrrd_header.assumed_orientation, nrrd_header.notes)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "fix this and run it again") from None


def write_volume(path: str | Path, volume: Volume, segments: Mapping[int, str] | None = None) -> None:
    """Write a volume as NRRD or NIfTI, depending on the suffix; an existing file is replaced in one step.

    Only geometry and voxels are written, without names, dates or comments.

    Parameters
    ----------
    path : str or Path
        File name with suffix ``.nrrd``, ``.nii`` or ``.nii.gz``, or, for a label map, ``.seg.nrrd``, which 3D Slicer
        opens as named, coloured segments.
    volume : Volume
        The volume.
    segments : dict, optional
        For ``.seg.nrrd``: names of label values; by default a number.

    Raises
    ------
    InputError
        If the suffix is another one, the file cannot be written, the volume is no label map (for segments), or the
        format cannot represent the voxels or their position.
    """
    path = Path(path)
    suffix = volume_suffix(path).lower()
    if suffix not in (".nrrd", ".nii", ".nii.gz", ".seg.nrrd"):
        raise InputError(path, "is no name for a volume", "end it with .nrrd, .nii, .nii.gz or .seg.nrrd")
    fields = _segment_fields(path, volume.array, segments or {}) if suffix == ".seg.nrrd" else {}
    geometry = volume.geometry
    # Volumes that would be refused when read are not written.
    steps_mm = geometry.direction_matrix * geometry.spacing_mm
    grid(path, geometry.size, steps_mm, np.array(geometry.origin_mm), np.array(geometry.spacing_mm))
    with ExitStack() as files:
        try:
            make_folder(path.parent)
            temporary = files.enter_context(atomic_write(path))
        except OSError as error:
            raise InputError(path, f"cannot be written ({error.strerror})", "choose another place") from None
        if suffix.endswith(".nrrd"):
            _write_nrrd(temporary, volume, fields)
        else:
            nifti.write(temporary, volume.array, volume.geometry)
        read = nifti.read_header if _is_nifti(path) else nrrd.read_header
        if not read(temporary).geometry.same_grid(geometry):
            raise InputError(path, "cannot represent the position: its numbers are rounded too far", "write .nrrd")


def content_digest(path: Path) -> str:
    """Return the SHA-256, in hex, of a volume's file, its detached data file included, or of a volume's DICOM files."""
    digest = hashlib.sha256()
    if _is_series(path):
        parts, number = dicom.files_of(path)
        # Several volumes may be in one file.
        digest.update(f"#{number}".encode() if number else b"")
    else:
        parts = _parts(_existing(path))
    for part in parts:
        stored_bytes(path, part)
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def source_files(path: Path) -> list[Path]:
    """Return the files of a volume; of a folder of DICOM slices all files in it.

    Raises
    ------
    InputError
        If it is not a file, or its header cannot be read.
    OSError
        If the folder cannot be read.
    """
    if _is_series(path):
        base, _ = dicom.split_number(path)
        return sorted(file for file in base.iterdir() if file.is_file()) if base.is_dir() else [base]
    return _parts(_existing(path))


def _parts(path: Path) -> list[Path]:
    if _is_nifti(path):
        return [path]
    data_file = nrrd.read_header(path).data_file
    return [path] if data_file == path else [path, data_file]


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "is no file", "check the path")
    if not volume_suffix(path):
        raise InputError(path, "is neither NRRD nor NIfTI by its name", f"give one of {', '.join(SUFFIXES[1:])}")
    return path


def _is_series(path: Path) -> bool:
    """Return whether a path names DICOM: a folder or a file, or one volume of it; none with a volume's suffix."""
    return not volume_suffix(path) and dicom.exists(path)


def _is_nifti(path: Path) -> bool:
    return volume_suffix(path).lower() in (".nii", ".nii.gz")


def _segment_fields(path: Path, array: NDArray[Any], segments: Mapping[int, str]) -> dict[str, str]:
    """Return 3D Slicer's fields for the segments of a label map, all in one layer."""
    if array.dtype.kind not in "iu":
        raise InputError(path, "would have segments, but the volume is no label map", "end it with .nrrd")
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    values = sorted({*segments, *np.unique(array).tolist()} - {0})
    for number, value in enumerate(values):
        # Names may contain any characters; a header is one line of ASCII, so accents are removed.
        name = printable(" ".join(segments.get(value, f"label {value}").split()))
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode() or f"label {value}"
        fields |= {
            f"Segment{number}_{field}": text
            for field, text in (
                ("ID", f"Segment_{value}"),
                ("Name", name),
                ("NameAutoGenerated", "0"),
                ("Color", _COLOURS[number % len(_COLOURS)]),
                ("ColorAutoGenerated", "0"),
                ("LabelValue", str(value)),
                ("Layer", "0"),
                ("Extent", " ".join(f"0 {n - 1}" for n in array.shape)),
                ("Tags", "Segmentation.Status:inprogress|"),
            )
        }
    return fields


def _write_nrrd(path: Path, volume: Volume, fields: Mapping[str, str]) -> None:
    import nrrd

    geometry = volume.geometry
    header = {
        "space": "left-posterior-superior",
        "space directions": (geometry.direction_matrix * np.array(geometry.spacing_mm)).T,
        "space origin": np.array(geometry.origin_mm),
        "kinds": ["domain"] * 3,
        "encoding": "gzip",
        **fields,
    }
    buffer = io.BytesIO()
    nrrd.write(buffer, volume.array, header, compression_level=4, index_order="F")
    buffer.seek(0)
    with path.open("wb") as file:
        # The header ends with an empty line. pynrrd's comments with the date are removed, so that equal volumes give
        # equal files.
        file.writelines(line for line in iter(buffer.readline, b"\n") if not line.startswith(b"#"))
        file.write(b"\n")
        file.write(buffer.getbuffer()[buffer.tell() :])
