"""Reading a folder of DICOM slices as one volume.

pydicom parses the files, without native code unless voxels are compressed. This module checks that the slices form one
volume: a slice may be missing, duplicated, or from another series.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.bounded import RESAMPLE, check_claim, grid, stored_bytes
from cspine_data.volumes.geometry import MOST_SKEW, Geometry, skew

_MARK_AT, _MARK = 128, b"DICM"
# Only these header fields are read, not names, dates and places.
_TAGS = [
    "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "RescaleSlope", "RescaleIntercept",
    "PhotometricInterpretation",
]  # fmt: skip
_DEFLATED = "1.2.840.10008.1.2.1.99"
# The list of files (DICOMDIR) on a patient's disc.
_DIRECTORY = "1.2.840.10008.1.3.10"
# Positions are rounded; a missing slice doubles a gap.
_UNEVEN = 0.1
_TILT_MM = 0.1
_MOST_FILES = 20_000
_FETCH = "fetch it again or take it out of the folder"
_CONVERT = "convert the series to NIfTI or NRRD, with dcm2niix for example"


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    series: str
    columns_rows: tuple[int, int]
    position_mm: NDArray[np.float64]
    directions: NDArray[np.float64]
    spacing_mm: NDArray[np.float64]
    bytes: int
    scaling: tuple[float, float]


def read(folder: Path) -> tuple[NDArray[Any], Geometry]:
    """Read the single series in a folder; other files are ignored.

    Parameters
    ----------
    folder : Path
        The folder; subfolders are not searched.

    Returns
    -------
    ndarray
        Voxels: columns, rows, slices, scaled by the headers' slope and intercept.
    Geometry
        The grid.

    Raises
    ------
    InputError
        If there is no series or several, slices are missing, duplicated, multi-frame or not parallel, or a file is
        damaged.
    """
    slices = [one for path in files(folder) if (one := _header(path))]
    if not slices:
        remedy = "give the folder with the files; its subfolders are not searched"
        raise InputError(folder, "holds no NRRD, NIfTI or DICOM file", remedy)
    series = Counter(one.series for one in slices)
    if len(series) > 1:
        counts = ", ".join(map(str, sorted(series.values(), reverse=True)))
        raise InputError(folder, f"holds {len(series)} DICOM series ({counts} files)", "put each into its own folder")
    slices, geometry = _stacked(folder, slices)
    there = sum(one.path.stat().st_size for one in slices)
    check_claim(folder, sum(one.bytes for one in slices), there, compressed=True)
    array: NDArray[Any] | None = None
    for number, one in enumerate(slices):
        pixels = _pixels(one)
        if array is None:
            array = np.empty(geometry.size, pixels.dtype, order="F")
        elif pixels.dtype != array.dtype:
            # If slices have different scales, some may be integers.
            array = array.astype(np.result_type(array, pixels), order="F")
        array[..., number] = pixels
    assert array is not None  # noqa: S101
    return array, geometry


def files(folder: Path) -> Iterator[Path]:
    """Iterate over the DICOM files of a folder, by name."""
    home = folder.resolve()
    paths = sorted(folder.iterdir())
    if len(paths) > _MOST_FILES:
        raise InputError(folder, f"holds {len(paths)} files", f"a series has at most {_MOST_FILES}: sort them first")
    for path in paths:
        # Links to files outside the folder are ignored.
        if path.is_file() and path.resolve().is_relative_to(home):
            with path.open("rb") as file:
                if file.read(_MARK_AT + len(_MARK))[_MARK_AT:] == _MARK:
                    yield path


@contextmanager
def _untrusted(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Convert any exception of the parser to an input error; pydicom parses elements when they are used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception:  # noqa: BLE001
            raise InputError(path, problem, remedy) from None


def _header(path: Path) -> _Slice | None:
    """Return the header of a slice; None for a DICOMDIR."""
    import pydicom

    length = stored_bytes(path, path)
    with _untrusted(path, "is no readable DICOM image", _FETCH):
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
            return None
        if meta.TransferSyntaxUID == _DEFLATED:
            # It would be decompressed without a limit.
            raise InputError(path, "is deflated", _CONVERT)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        frames, colours = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
        columns, rows, bits = int(header.Columns), int(header.Rows), int(header.BitsAllocated)
        scaling = float(header.get("RescaleSlope") or 1), float(header.get("RescaleIntercept") or 0)
        series = str(header.SeriesInstanceUID)
        compressed = bool(header.file_meta.TransferSyntaxUID.is_compressed)
        inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"
    if inverted:
        raise InputError(path, "is stored inverted (MONOCHROME1)", _CONVERT)
    if frames > 1:
        raise InputError(path, f"holds {frames} frames", _CONVERT)
    if colours > 1:
        raise InputError(path, "is in colour", "give the images as the scanner made them")
    if min(columns, rows, bits) < 1 or bits % 8 or not np.isfinite(scaling).all():
        raise InputError(path, "does not say what image it holds", _CONVERT)
    claimed = columns * rows * bits // 8
    check_claim(path, claimed, length, compressed=compressed)
    with _untrusted(path, "does not give its position in the patient", _CONVERT):
        position, directions, spacing = (
            _numbers(header, *named)
            for named in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
        )
    # In DICOM the distance of rows comes first.
    return _Slice(path, series, (columns, rows), position, directions.reshape(2, 3), spacing[::-1], claimed, scaling)


def _numbers(header: Any, name: str, count: int) -> NDArray[np.float64]:
    numbers = np.array([float(number) for number in header[name].value], np.float64)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(name)
    return numbers


def _stacked(folder: Path, slices: list[_Slice]) -> tuple[list[_Slice], Geometry]:
    """Sort slices along their normal, and check that they are evenly spaced."""
    first = slices[0]
    for one in slices:
        alike = np.allclose(one.directions, first.directions, atol=1e-3) and np.allclose(
            one.spacing_mm, first.spacing_mm, rtol=1e-3
        )
        if not alike or one.columns_rows != first.columns_rows:
            raise InputError(
                one.path, f"is of another grid than {first.path.name}", "take localisers out of the folder"
            )
    if len(slices) == 1:
        raise InputError(folder, "holds a single DICOM slice", "give the folder with the whole series")
    normal = np.cross(*first.directions)
    slices = sorted(slices, key=lambda one: float(one.position_mm @ normal))
    positions = np.array([one.position_mm for one in slices])
    gaps = np.diff(positions @ normal)
    gap = float(np.median(gaps))
    twice = int(np.count_nonzero(gaps < 1e-3))
    if twice or gap <= 0:
        raise InputError(
            folder, f"holds {twice} slices at places where there is another", "give one echo or time point a folder"
        )
    if (np.abs(gaps - gap) > _UNEVEN * gap).any():
        raise InputError(
            folder, f"misses slices (they are {gaps.min():.3g} to {gaps.max():.3g} mm apart)", "fetch the whole series"
        )
    shifts = positions - positions[0]
    along = shifts[-1] / np.linalg.norm(shifts[-1])
    lean = skew(np.stack([*first.directions, along], axis=1))
    # A sheared stack, as with a tilted gantry, is a grid whose axes are not at right angles. For a few thin slices the
    # rounding of positions alone can exceed the limit.
    if lean > MOST_SKEW and lean * np.linalg.norm(shifts[-1]) > _TILT_MM:
        angle = np.degrees(np.arcsin(lean))
        raise InputError(folder, f"has axes that are not at right angles ({angle:.2g} degrees off)", RESAMPLE)
    if np.abs(shifts - np.outer(shifts @ along, along)).max() > _TILT_MM:
        raise InputError(folder, "holds slices that are shifted against each other", "resample the series first")
    # The mean gap, since single positions are rounded.
    spacing = np.array([*first.spacing_mm, gaps.mean()])
    steps = np.stack([*first.directions, normal], axis=1) * spacing
    size = (*first.columns_rows, len(slices))
    return slices, grid(folder, size, steps, positions[0], spacing, "PixelSpacing")


def _pixels(one: _Slice) -> NDArray[Any]:
    """Return the voxels of a slice: columns, rows."""
    import pydicom

    with _untrusted(one.path, "is no readable DICOM image", _FETCH):
        dataset = pydicom.dcmread(one.path)
        compressed = bool(dataset.file_meta.TransferSyntaxUID.is_compressed)
    remedy = f"pip install 'cspine[dicom]' brings codecs, or {_CONVERT}" if compressed else _FETCH
    with _untrusted(one.path, "cannot be decoded", remedy):
        pixels: NDArray[Any] = np.asarray(dataset.pixel_array)
    if pixels.shape != one.columns_rows[::-1]:
        raise InputError(one.path, "holds other voxels than its header claims", _FETCH)
    if one.scaling != (1.0, 0.0):
        pixels = (pixels * one.scaling[0] + one.scaling[1]).astype(np.float32)
    return pixels.T
