"""Writer of DICOM segmentations (SEG): label maps of DICOM images, written with highdicom.

A segmentation contains the patient and study data of its source, as the standard demands. highdicom needs attributes
that anonymised files lack, and exactly consistent geometry. So the headers of the source are completed in memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cspine_data.errors import InputError, printable
from cspine_data.extras import install_hint
from cspine_data.volumes.formats import dicom
from cspine_data.volumes.formats.dicom_frames import FETCH, Frame, untrusted
from cspine_data.volumes.geometry import Geometry
from cspine_data.volumes.volume import Volume

_OTHER_FORMAT = "choose another output format"
_REPEATED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
# Attributes that may be empty, but not missing.
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_LEVEL = re.compile(r"[CTL]\d{1,2}", re.IGNORECASE)
_LONGEST_LABEL = 64
_MOST_SEGMENTS = 65_535
# Series of segmentations come after those of the scanner.
_FIRST_SERIES_NUMBER = 1000


@dataclass(frozen=True, eq=False)
class SegmentationSource:
    """The images that a DICOM segmentation refers to; see `segmentation_source`.

    Attributes
    ----------
    path : Path
        The folder or file.
    geometry : Geometry
        The grid of the volume.
    frames : tuple of Frame
        The slices, in the order of the grid.
    headers : tuple
        A header for each slice, or one header of a multi-frame file, reduced to these slices; without pixels, but with
        all attributes that highdicom needs.
    """

    path: Path
    geometry: Geometry
    frames: tuple[Frame, ...]
    headers: tuple[Any, ...]


def segmentation_source(path: str | Path) -> SegmentationSource:
    """Read the headers of a DICOM volume, for segmentations of it.

    Parameters
    ----------
    path : str or Path
        A folder of slices or a multi-frame file; ``path#2`` is the second of several volumes.

    Raises
    ------
    InputError
        If it is not a DICOM volume, lacks an attribute that a segmentation needs, or highdicom is not installed.
    """
    path = Path(path)
    try:
        import highdicom  # noqa: F401
    except ModuleNotFoundError as error:
        problem, _, remedy = (install_hint(error) or str(error)).partition("; ")
        raise InputError("DICOM segmentation", problem, remedy or _OTHER_FORMAT) from None
    import pydicom

    if not dicom.exists(path):
        raise InputError(path, "is no DICOM volume, so that no DICOM segmentation can refer to it", _OTHER_FORMAT)
    frames, geometry = dicom.stacked(path, dicom.chosen(path)[0].frames)
    files = list(dict.fromkeys(frame.path for frame in frames))
    if frames[0].index is not None and len(files) > 1:
        raise InputError(path, "is spread over several multi-frame files", _OTHER_FORMAT)
    headers = []
    for file in files:
        with untrusted(file, "is no readable DICOM image", FETCH):
            header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
            missing = [name for name in _REPEATED if not header.get(name)]
            if missing:
                problem = f"lacks {missing[0]}, which a DICOM segmentation needs"
                raise InputError(file, problem, _OTHER_FORMAT)
            _complete(header, frames, geometry)
            headers.append(header)
    return SegmentationSource(path, geometry, tuple(frames), tuple(headers))


def write(path: Path, label: Volume, source: SegmentationSource, segments: Mapping[int, str]) -> None:
    """Write a label map as a binary segmentation with a segment for each label value.

    Parameters
    ----------
    path : Path
        The file.
    label : Volume
        The label map, on the grid of the source.
    source : SegmentationSource
        The images.
    segments : dict
        Names of label values; other values are named by their number. Levels, such as ``C3``, are coded in SNOMED.

    Raises
    ------
    InputError
        If the label map is on another grid or has no label, or highdicom cannot refer to the source.
    """
    from highdicom import UID
    from highdicom.seg import Segmentation

    if label.array.dtype.kind not in "iu" or not label.geometry.same_grid(source.geometry):
        raise InputError(path, f"is no label map on the grid of {source.path}", "predict this volume")
    values = sorted({*segments, *np.unique(label.array).tolist()} - {0})
    if not 0 < len(values) < _MOST_SEGMENTS:
        raise InputError(path, f"would have {len(values)} segments", _OTHER_FORMAT)
    numbers = np.zeros(label.array.shape, np.uint8 if len(values) <= 255 else np.uint16)
    for number, value in enumerate(values, start=1):
        numbers[label.array == value] = number
    try:
        # highdicom warns of empty label maps and unusual names of patients.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = Segmentation(
                source_images=source.headers,
                pixel_array=np.ascontiguousarray(numbers.transpose(2, 1, 0)),
                segmentation_type="BINARY",
                segment_descriptions=_descriptions(values, segments),
                series_instance_uid=UID(),
                series_number=_FIRST_SERIES_NUMBER + source.frames[0].series_number,
                sop_instance_uid=UID(),
                instance_number=1,
                manufacturer="cspine",
                manufacturer_model_name="cspine",
                software_versions=version("cspine"),
                device_serial_number="0",
                content_label="SEGMENTATION",
                series_description="Segmentation",
                omit_empty_frames=bool(numbers.any()),
                specific_character_set="ISO_IR 192",
            )
            _refer_to_frames(written, source.frames)
            written.save_as(path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Its text may quote the header: the patient's name or date of birth.
        problem = f"has headers that highdicom refuses ({type(error).__name__})"
        raise InputError(source.path, problem, _OTHER_FORMAT) from None


def _descriptions(values: Sequence[int], segments: Mapping[int, str]) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    algorithm = AlgorithmIdentificationSequence("cspine", codes.DCM.ArtificialIntelligence, version("cspine"))
    descriptions = []
    for number, value in enumerate(values, start=1):
        name = printable(" ".join(segments.get(value, "").split()))[:_LONGEST_LABEL] or f"label {value}"
        description = SegmentDescription(
            number, name, codes.SCT.AnatomicalStructure, _structure(name), "AUTOMATIC", algorithm
        )
        description.SegmentDescription = f"label value {value}"
        descriptions.append(description)
    return descriptions


def _structure(name: str) -> Any:
    """Return the SNOMED code of a segment's name: a level, ``vertebra`` or ``sacrum``; for others the spine's."""
    from pydicom.sr.codedict import codes

    if _LEVEL.fullmatch(name):
        # There are no codes for rare levels, such as L6.
        return getattr(codes.SCT, f"{name.upper()}Vertebra", codes.SCT.Vertebra)
    return {"vertebra": codes.SCT.Vertebra, "sacrum": codes.SCT.Sacrum}.get(name.lower(), codes.SCT.Spine)


def _complete(header: Any, frames: Sequence[Frame], geometry: Geometry) -> None:
    """Give a header the geometry of the volume and all attributes that highdicom needs."""
    import pydicom

    first = frames[0]
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, None)
    if not header.get("FrameOfReferenceUID"):
        # Unique to this series.
        header.FrameOfReferenceUID = pydicom.uid.generate_uid(entropy_srcs=[first.series])
    measures, orientation = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing = _decimals(first.spacing_mm[::-1])
    (gap,) = _decimals(geometry.spacing_mm[2:])
    measures.SliceThickness = measures.SpacingBetweenSlices = gap
    orientation.ImageOrientationPatient = _decimals(first.directions.ravel())
    if first.index is None:
        header.update(measures)
        header.update(orientation)
        return
    shared = header.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    groups = header.PerFrameFunctionalGroupsSequence
    header.PerFrameFunctionalGroupsSequence = [groups[frame.index] for frame in frames]
    header.NumberOfFrames = len(frames)


def _decimals(numbers: Iterable[float]) -> list[Any]:
    """Return numbers rounded to the sixteen characters of a DICOM decimal string."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(number), auto_format=True) for number in numbers]


def _refer_to_frames(written: Any, frames: Sequence[Frame]) -> None:
    """Set the frame numbers of a multi-frame source to those in its file; highdicom counts the sorted slices."""
    if frames[0].index is None:
        return
    images = {
        # Segments share the items.
        id(image): image
        for group in written.PerFrameFunctionalGroupsSequence
        for derivation in group.DerivationImageSequence
        for image in derivation.SourceImageSequence
    }
    for image in images.values():
        index = frames[int(image.ReferencedFrameNumber) - 1].index
        assert index is not None  # noqa: S101
        image.ReferencedFrameNumber = index + 1
