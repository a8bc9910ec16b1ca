"""Headers of DICOM files: the frames they hold, classic (one a file) or enhanced (many a file)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.volumes.bounded import check_claim, stored_bytes

_MARK_AT, _MARK = 128, b"DICM"
# Without a preamble, a file starts with an element of group 2 or 8.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
# Only these fields are read, not names, dates and places. PatientID tells patients apart and is not kept.
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "PatientID", "ImageType",
    "EchoTime", "TemporalPositionIdentifier", "AcquisitionNumber", "DiffusionBValue", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated",
    "RescaleSlope", "RescaleIntercept", "PhotometricInterpretation", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_DEFLATED = "1.2.840.10008.1.2.1.99"
# The list of files (DICOMDIR) on a patient's disc.
_DIRECTORY = "1.2.840.10008.1.3.10"
# MR, enhanced MR and legacy converted MR; CT, enhanced CT and legacy converted CT.
_IMAGES = {
    f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4", "4.1", "4.4", "2", "2.1", "2.2")
}  # fmt: skip
# Segmentations, registrations, surfaces, raw data: they may hold frames with positions.
_NO_IMAGES = "1.2.840.10008.5.1.4.1.1.66"
_MOST_FRAMES = 100_000
FETCH = "fetch it again or take it out of the folder"
CONVERT = "convert the series to NIfTI or NRRD, with dcm2niix for example"


@dataclass(frozen=True, eq=False)
class Frame:
    """The header of one 2-D image.

    Attributes
    ----------
    path : Path
        Its file.
    index : int or None
        Its number in a multi-frame file.
    instance, series, patient : str
        SOPInstanceUID, SeriesInstanceUID and PatientID.
    series_number : int
        SeriesNumber; 0 if missing.
    description : str
        SeriesDescription.
    localiser : bool
        Whether ImageType contains LOCALIZER.
    columns_rows : tuple of int
        Size.
    position_mm : ndarray
        Centre of the first pixel, LPS.
    directions : ndarray
        Unit vectors along a row and along a column, (2, 3).
    spacing_mm : ndarray
        Distance of columns and of rows.
    bytes : int
        Size of the uncompressed pixels.
    scaling : tuple of float
        Slope and intercept.
    kinds : tuple
        What may differ between frames at one position: echo time in ms, image type, time point, b-value.
    """

    path: Path
    index: int | None
    instance: str
    series: str
    patient: str
    series_number: int
    description: str
    localiser: bool
    columns_rows: tuple[int, int]
    position_mm: NDArray[np.float64]
    directions: NDArray[np.float64]
    spacing_mm: NDArray[np.float64]
    bytes: int
    scaling: tuple[float, float]
    kinds: tuple[float, str, int, float]


def is_dicom(path: Path) -> bool:
    """Return whether a file starts as a DICOM file does, with or without a preamble."""
    with path.open("rb") as file:
        start = file.read(_MARK_AT + len(_MARK))
    if start[_MARK_AT:] == _MARK:
        return True
    # Group, element, then a value representation (two letters) or, if that is implicit, the length of a short value.
    letters = start[4:6].isalpha() and start[4:6].isupper()
    short = start[5:8] == b"\0\0\0"
    return len(start) > _MARK_AT and start[:2] in _FIRST_GROUPS and start[3] == 0 and (letters or short)


def frames_of(path: Path) -> list[Frame]:
    """Read the header of a file.

    Returns
    -------
    list of Frame
        Its frames; none if the file is not an image with a position, such as a report, a screenshot or a DICOMDIR.

    Raises
    ------
    InputError
        If the file is damaged, or an image that cannot be used: in colour, inverted, deflated, without a position.
    """
    length = stored_bytes(path, path)
    header = _read_header(path)
    if header is None:
        return []
    with untrusted(path, "is no readable DICOM image", FETCH):
        frames, colours = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
        columns, rows, bits = int(header.Columns), int(header.Rows), int(header.BitsAllocated)
        compressed = bool(transfer_syntax(header).is_compressed)
        inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"
        multiframe = "PerFrameFunctionalGroupsSequence" in header
    if inverted:
        raise InputError(path, "is stored inverted (MONOCHROME1)", CONVERT)
    if colours > 1:
        raise InputError(path, "is in colour", "give the images as the scanner made them")
    if frames > 1 and not multiframe:
        raise InputError(path, f"holds {frames} frames without positions", CONVERT)
    if min(columns, rows, bits, frames) < 1 or bits % 8 or frames > _MOST_FRAMES:
        raise InputError(path, "does not say what image it holds", CONVERT)
    check_claim(path, frames * columns * rows * bits // 8, length, compressed=compressed)
    with untrusted(path, "does not give its position in the patient", CONVERT):
        groups = list(header.PerFrameFunctionalGroupsSequence) if multiframe else [None]
        if len(groups) != frames:
            raise ValueError(frames)
        shared = header.get("SharedFunctionalGroupsSequence") if multiframe else None
        lookups = [_Lookup(header, group, shared[0] if shared else None) for group in groups]
        return [
            _frame(path, header, lookup, index if multiframe else None, (columns, rows), columns * rows * bits // 8)
            for index, lookup in enumerate(lookups)
        ]


def transfer_syntax(header: Any) -> Any:
    """Return the transfer syntax of a dataset; without file meta information, as pydicom recognised it."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    known = header.file_meta.get("TransferSyntaxUID")
    return known or (ImplicitVRLittleEndian if header.original_encoding[0] else ExplicitVRLittleEndian)


@contextmanager
def untrusted(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Convert any exception of the parser to an input error; pydicom parses elements when they are used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception:  # noqa: BLE001
            raise InputError(path, problem, remedy) from None


def _read_header(path: Path) -> Any | None:
    """Return the header of an image; None for other objects."""
    import pydicom

    with untrusted(path, "is no readable DICOM image", FETCH):
        # The syntax first: a deflated file would be decompressed without a limit.
        with path.open("rb") as file:
            marked = file.read(_MARK_AT + len(_MARK))[_MARK_AT:] == _MARK
        meta = pydicom.filereader.read_file_meta_info(path) if marked else pydicom.Dataset()
        if meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
            return None
        if meta.get("TransferSyntaxUID") == _DEFLATED:
            raise InputError(path, "is deflated", CONVERT)
        header = pydicom.dcmread(path, force=not marked, stop_before_pixels=True, specific_tags=_TAGS)
        kind = str(header.SOPClassUID)
        placed = "ImagePositionPatient" in header or "PerFrameFunctionalGroupsSequence" in header
        if kind == _NO_IMAGES or kind.startswith(f"{_NO_IMAGES}."):
            return None
        if kind not in _IMAGES and not ("Rows" in header and placed):
            return None
    return header


@dataclass(frozen=True)
class _Lookup:
    """The attributes of a frame: from its functional groups, the shared ones, or the header of a classic file."""

    header: Any
    frame: Any
    shared: Any

    def get(self, group: str, name: str, default: Any = None) -> Any:
        for groups in (self.frame, self.shared):
            items = groups.get(group) if groups is not None else None
            if items and items[0].get(name) is not None:
                return items[0].get(name)
        value = self.header.get(name)
        return default if value is None or value == "" else value

    def numbers(self, group: str, name: str, count: int) -> NDArray[np.float64]:
        numbers = np.array([float(number) for number in self.get(group, name)], np.float64)
        if len(numbers) != count or not np.isfinite(numbers).all():
            raise ValueError(name)
        return numbers


def _frame(
    path: Path, header: Any, lookup: _Lookup, index: int | None, columns_rows: tuple[int, int], size: int
) -> Frame:
    # In DICOM the distance of rows comes first.
    spacing = lookup.numbers("PixelMeasuresSequence", "PixelSpacing", 2)[::-1]
    scaling = tuple(
        float(lookup.get("PixelValueTransformationSequence", name, default))
        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    if not np.isfinite(scaling).all() or not scaling[0]:
        raise InputError(path, "does not say what image it holds", CONVERT)
    image_type = lookup.get("MRImageFrameTypeSequence", "FrameType") or header.get("ImageType") or ()
    image_type = (image_type,) if isinstance(image_type, str) else tuple(map(str, image_type))
    time = lookup.get("FrameContentSequence", "TemporalPositionIndex")
    if time is None:
        time = header.get("TemporalPositionIdentifier") or header.get("AcquisitionNumber") or 0
    echo = lookup.get("MREchoSequence", "EffectiveEchoTime")
    return Frame(
        path=path,
        index=index,
        instance=str(header.get("SOPInstanceUID", "")),
        series=str(header.SeriesInstanceUID),
        patient=str(header.get("PatientID") or ""),
        series_number=int(header.get("SeriesNumber") or 0),
        description=str(header.get("SeriesDescription") or ""),
        localiser="LOCALIZER" in image_type,
        columns_rows=columns_rows,
        position_mm=lookup.numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        directions=lookup.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3),
        spacing_mm=spacing,
        bytes=size,
        scaling=(scaling[0], scaling[1]),
        kinds=(
            float(echo if echo is not None else header.get("EchoTime") or 0),
            "/".join(image_type),
            int(time),
            float(lookup.get("MRDiffusionSequence", "DiffusionBValue", 0)),
        ),
    )
