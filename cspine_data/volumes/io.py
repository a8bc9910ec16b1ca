"""Reading and writing volumes in all supported formats.

A format is a module, or any object, with the function ``read(path) -> Volume``; and, if it has them,
``read_geometry(path)``, ``write(path, volume, segments)``, and ``files(path)`` for the files of a volume that is more
than one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cspine_data.errors import InputError
from cspine_data.extensions import FORMATS
from cspine_data.files import atomic_write, make_folder
from cspine_data.volumes.bounded import grid, stored_bytes
from cspine_data.volumes.formats import dicom
from cspine_data.volumes.formats.nrrd_writer import SEGMENTATION_SUFFIX as SEGMENTATION_SUFFIX
from cspine_data.volumes.geometry import Geometry
from cspine_data.volumes.volume import Volume as Volume

if TYPE_CHECKING:
    from cspine_data.volumes.formats.dicom_segmentation import SegmentationSource


def volume_stem(path: Path) -> str:
    """Return a file's name without the suffixes of a volume: ``VB2_02.nii.gz`` is ``VB2_02``."""
    return path.name[: len(path.name) - len(volume_suffix(path))]


def volume_suffix(path: Path) -> str:
    """Return the suffix of a volume file, or an empty string."""
    name = path.name.lower()
    suffix = _longest(name, FORMATS.built_in) or _longest(name, FORMATS.names())
    return path.name[len(name) - len(suffix) :]


def _longest(name: str, suffixes: Iterable[str]) -> str:
    return max((f".{suffix}" for suffix in suffixes if name.endswith(f".{suffix}")), key=len, default="")


def label_name(volume: Path) -> str:
    """Return the file name of a volume's label map, as `find_cases` pairs them: ``X-label.nrrd`` for ``X.nrrd``."""
    suffix = volume_suffix(volume)
    return f"{volume_stem(volume)}-label{suffix if _writer(suffix) else '.nrrd'}"


def read_volume(path: str | Path) -> Volume:
    """Read a NRRD, NIfTI, MetaImage or multi-frame DICOM file, or a folder of DICOM slices.

    Parameters
    ----------
    path : str or Path
        The file, or the folder. ``path#2`` is the second of several DICOM volumes. Plug-ins may add other suffixes.

    Returns
    -------
    Volume
        The voxels in the file's index order and dtype, with the geometry.

    Raises
    ------
    InputError
        If the file is missing, not a 3-D scalar volume, truncated or damaged; if there is no DICOM volume or several,
        or slices are missing.

    Examples
    --------
    >>> volume = read_volume("data/raw/CS_01.nrrd")  # doctest: +SKIP
    >>> volume.array.shape, volume.geometry.orientation_code  # doctest: +SKIP
    ((50, 118, 128), 'LPS')
    """
    path = Path(path)
    with _readable(path):
        volume: Volume = _format(path).read(path)
    return volume


def read_geometry(path: str | Path) -> Geometry:
    """Read the grid of a volume, from its header alone where the format can do that.

    Raises
    ------
    InputError
        As `read_volume`; damage of the voxels is not noticed.
    """
    path = Path(path)
    with _readable(path):
        form = _format(path)
        reads = getattr(form, "read_geometry", None)
        geometry: Geometry = reads(path) if reads else form.read(path).geometry
    return geometry


def write_volume(path: str | Path, volume: Volume, segments: Mapping[int, str] | None = None) -> None:
    """Write a volume as NRRD, NIfTI or MetaImage, depending on the suffix; an existing file is replaced in one step.

    Only geometry and voxels are written, without names, dates or comments.

    Parameters
    ----------
    path : str or Path
        File name with suffix ``.nrrd``, ``.nii``, ``.nii.gz`` or ``.mha``, or, for a label map, ``.seg.nrrd``, which 3D
        Slicer opens as named, coloured segments.
    volume : Volume
        The volume.
    segments : dict, optional
        For ``.seg.nrrd``: names of label values; by default those of the volume's segments, or a number.

    Raises
    ------
    InputError
        If the suffix is another one, the file cannot be written, the volume is no label map (for segments), or the
        format cannot represent the voxels or their position.
    """
    path = Path(path)
    write = _writer(volume_suffix(path))
    if write is None:
        raise InputError(path, "is no name for a volume", "end it with .nrrd, .nii, .nii.gz, .mha or .seg.nrrd")
    geometry = volume.geometry
    # Volumes that would be refused when read are not written.
    steps_mm = geometry.direction_matrix * geometry.spacing_mm
    grid(path, geometry.size, steps_mm, np.array(geometry.origin_mm), np.array(geometry.spacing_mm))
    with _replacing(path) as temporary:
        write(temporary, volume, segments or {one.value: one.name for one in volume.segments})


def write_segmentation(
    path: str | Path, label: Volume, source: SegmentationSource, segments: Mapping[int, str] | None = None
) -> None:
    """Write a label map as a DICOM segmentation of the images it was made from; an existing file is replaced.

    Parameters
    ----------
    path : str or Path
        File name, usually with suffix ``.dcm``.
    label : Volume
        The label map, on the grid of the source.
    source : SegmentationSource
        The images, from `segmentation_source`. The file repeats their patient and study.
    segments : dict, optional
        Names of label values; levels, such as ``C3``, are coded in SNOMED.

    Raises
    ------
    InputError
        If the file cannot be written, the label map is on another grid or has no label, or the images lack an attribute
        that a segmentation must have.

    Examples
    --------
    >>> source = segmentation_source("exam")  # doctest: +SKIP
    >>> write_segmentation("exam-label.dcm", label, source, {1: "vertebra"})  # doctest: +SKIP
    """
    from cspine_data.volumes.formats import dicom_segmentation

    with _replacing(Path(path)) as temporary:
        dicom_segmentation.write(temporary, label, source, segments or {})


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces a file; errors name the file."""
    with ExitStack() as files:
        try:
            make_folder(path.parent)
            temporary = files.enter_context(atomic_write(path))
        except OSError as error:
            raise InputError(path, f"cannot be written ({error.strerror})", "choose another place") from None
        try:
            yield temporary
        except InputError as error:
            raise InputError(
                path if error.subject == temporary else error.subject, error.problem, error.remedy
            ) from None


def content_digest(path: Path) -> str:
    """Return the SHA-256, in hex, of a volume's file, its detached data file included, or of a volume's DICOM files."""
    digest = hashlib.sha256()
    if _is_series(path):
        parts, number = dicom.files_of(path)
        # Several volumes may be in one file.
        digest.update(f"#{number}".encode() if number else b"")
    else:
        parts = _parts(path)
    for part in parts:
        stored_bytes(path, part)
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Return the size of a volume's file, or of all files in its DICOM folder."""
    return sum(file.stat().st_size for file in (source_files(path) if _is_series(path) else [path]))


def source_files(path: Path) -> list[Path]:
    """Return the files of a volume; of a folder of DICOM slices all files in it."""
    if _is_series(path):
        base, _ = dicom.split_number(path)
        return sorted(file for file in base.iterdir() if file.is_file()) if base.is_dir() else [base]
    return _parts(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "fix this and run it again") from None


def _format(path: Path) -> Any:
    """Return the format of an existing file, or of a folder."""
    if _is_series(path):
        return dicom
    if not path.is_file():
        raise InputError(path, "is no file", "check the path")
    suffix = volume_suffix(path).lower()
    if not suffix:
        known = ", ".join(f".{one}" for one in FORMATS.names())
        raise InputError(path, "is no volume by its name", f"give one of {known}")
    return FORMATS.load(suffix[1:])


def _parts(path: Path) -> list[Path]:
    form = _format(path)
    return form.files(path) if hasattr(form, "files") else [path]


def _writer(suffix: str) -> Callable[[Path, Volume, Mapping[int, str]], None] | None:
    """Return what writes files with a suffix, if anything does; ``.nhdr`` and ``.mhd`` would be two files."""
    name = suffix.lower().removeprefix(".")
    return getattr(FORMATS.load(name), "write", None) if name not in ("", "nhdr", "mhd") else None


def _is_series(path: Path) -> bool:
    """Return whether a path names DICOM: a folder or a file, or one volume of it; none with a volume's suffix."""
    return not volume_suffix(path) and dicom.exists(path)
