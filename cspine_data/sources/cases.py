"""Cases of a cohort: reading and checking a volume with its label map."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cspine_data.errors import CspineDataError, Problem, describe_problem, printable
from cspine_data.preprocessing.tissue import tissue_threshold
from cspine_data.progress import Progress
from cspine_data.sources.duplicates import Fingerprint
from cspine_data.volumes.cohort_labels import LabelledCase
from cspine_data.volumes.geometry import Geometry, Orientation
from cspine_data.volumes.image_checks import usable_image
from cspine_data.volumes.instances import Instance, find_instances
from cspine_data.volumes.io import Volume, read_geometry, read_volume
from cspine_data.volumes.label_checks import (
    check_labels,
    check_no_image,
    check_not_the_image,
    label_notes,
    labelled_values,
    value_counts,
    value_notes,
)
from cspine_data.volumes.label_maps import on_volume_grid, whole_numbers, with_structures
from cspine_data.volumes.label_options import DEFAULT_LABELS, LabelOptions
from cspine_data.volumes.segments import Segment, with_neutral_names

#: A file beside the volumes with a one-line description.
NOTE_FILE = "COHORT.txt"
_LONGEST_NOTE = 200
#: The note on a case with an empty label map.
EMPTY_LABEL_MAP = "label map is empty: the case counts as unlabelled"
_FITS_A_FOLDER_NAME = re.compile(r"(?!\.)(?!__)[^/\\]+")
_LONGEST_ID_BYTES = 200
#: Letters of a patient, site or sequence.
LONGEST_NAME = 200
_SHOWN = 40
_UNLABELLED = ": for prediction only"


@dataclass(frozen=True)
class Case:
    """A volume and, where there is one, its label map.

    Attributes
    ----------
    id : str
        Unique name, from the names of file and folders or from a list of pairs.
    volume : Path
        The image.
    label : Path or None
        The label map.
    patient : str
        The patient; by default the case is the patient's only one. Data are split by patient.
    site : str or None
        The hospital or scanner, if a list of pairs names it.
    sequence : str or None
        The MRI sequence, such as T2w, if it is known.
    lowest, highest : str or None
        The level of the lowest or the highest labelled vertebra, if a list of pairs names it; for `relabel`.
    label_names : tuple of (int, str)
        Names of label values, from a table beside the label map.
    """

    id: str
    volume: Path
    label: Path | None = None
    patient: str = ""
    site: str | None = None
    sequence: str | None = None
    lowest: str | None = None
    highest: str | None = None
    label_names: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    @property
    def unusable_name(self) -> str | None:
        """The start of a patient, site or sequence that a store cannot keep, if there is one."""
        names = (self.patient, self.site or "", self.sequence or "")
        return next((name[:_SHOWN] for name in names if len(name) > LONGEST_NAME or printable(name) != name), None)


@dataclass(frozen=True)
class Listing:
    """The cases of a source.

    Attributes
    ----------
    cases : tuple of Case
        The cases, sorted by id.
    problems : tuple of Problem
        Files that cannot be used.
    notes : tuple of str
        Notes on the source: which layout it has and why, what was left out.
    """

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """The checked voxels of a case, with the label map as whole numbers on the image's grid and its original dtype.

    `notes` are the notes on both files; see `Volume`.
    """

    case: Case
    image: Volume
    label: Volume | None
    label_dtype: str | None = None
    notes: tuple[str, ...] = ()


def is_case_id(name: str) -> bool:
    """Return whether a name can be a case id, and so a folder name on any file system."""
    fits = _FITS_A_FOLDER_NAME.fullmatch(name) and printable(name) == name
    return bool(fits) and len(name.encode()) <= _LONGEST_ID_BYTES


def cohort_note(source: str | Path) -> str | None:
    """Return the first line of a folder's `COHORT.txt`, the description of stand-in data."""
    try:
        with (Path(source) / NOTE_FILE).open(encoding="utf-8") as file:
            return file.readline(_LONGEST_NOTE).strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def load_case(case: Case, options: LabelOptions = DEFAULT_LABELS, *, neutral: bool = False) -> LoadedCase:
    """Read and check the files of a case; a case with an empty label map is unlabelled.

    Parameters
    ----------
    case : Case
        The case.
    options : LabelOptions
        How the label map is read.
    neutral : bool
        Replace names of segments that could identify a patient, see `with_neutral_names`.

    Raises
    ------
    InputError
        If a file cannot be read, the image is not usable (see `usable_image`), or the label map is on another grid, has
        fractional or negative values, is an image, or labels every voxel.
    """
    stored_image = read_volume(case.volume)
    image = usable_image(stored_image)
    if case.label is None:
        return LoadedCase(case, image, None, notes=image.notes)
    file = read_volume(case.label)
    if case.label_names and not file.segments:
        file = replace(file, segments=tuple(Segment(name, value) for value, name in case.label_names))
    if neutral:
        file = replace(file, segments=with_neutral_names(file.segments, options.label_values or ()))
    whole = whole_numbers(file, stored_image)
    label = with_structures(whole, options)
    ignore_label = options.ignore_label
    counts = value_counts(label.array)
    if not labelled_values(counts, ignore_label)[0].size:
        return LoadedCase(case, image, None, notes=(*image.notes, *_empty_notes(whole, options)))
    placed = on_volume_grid(label, image, options)
    as_in_file = label.array is whole.array
    if not as_in_file:
        check_no_image(whole.name, whole.array, value_counts(whole.array))
    if placed.array is not label.array:
        # 3D Slicer crops a segmentation to what is labelled: its background is added here.
        counts = value_counts(placed.array)
    dtype = file.array.dtype if label.array.dtype == whole.array.dtype else label.array.dtype
    label = placed
    check_labels(label.name, label.array, counts, ignore_label)
    check_not_the_image(label.name, label.array, image.array)
    spacing_mm = image.geometry.spacing_mm
    # A subset of the voxels is enough for the threshold.
    first, second, third = (3 * mm for mm in spacing_mm)
    tissue = tissue_threshold(image.array[::3, ::3, ::3], (first, second, third))
    found = label_notes(label.array, image.array, counts, tissue, math.prod(spacing_mm) / 1e3, ignore_label)
    found += value_notes(label.array, counts, ignore_label) if as_in_file else ()
    notes = [note for note in (*label.notes, *found) if note not in image.notes]
    notes = [*image.notes, *(f"label map: {note}" for note in notes)]
    return LoadedCase(case, image, label, dtype.name, tuple(notes))


def _empty_notes(label: Volume, options: LabelOptions) -> tuple[str, ...]:
    """Return the notes on a label map without labels to segment; an image is refused."""
    counts = value_counts(label.array)
    values = labelled_values(counts, options.ignore_label)[0].tolist()
    if not values:
        return (EMPTY_LABEL_MAP,)
    check_no_image(label.name, label.array, counts)
    names = {one.value: one.name for one in label.segments}
    return EMPTY_LABEL_MAP, f"label map: none of its labels ({describe_labels(values, names)}) is to be segmented"


def describe_labels(values: Sequence[int], names: Mapping[int, str], ignored: Collection[int] = ()) -> str:
    """Return label values with their names: ``3 (C3) 4 (C4) 9 (ignored)``."""
    said = {**names, **dict.fromkeys(ignored, "ignored")}
    return " ".join(f"{value} ({said[value]})" if value in said else str(value) for value in values)


def copy_problem(case: Case, other: str, *, only_in_store: bool = False) -> Problem:
    """Return the problem of a case whose volume is also that of another case: one patient would be in two parts."""
    if only_in_store:
        problem = f"is what the store holds as case {other!r}; give it that name again, or make a new store"
    else:
        problem = f"holds the same volume as case {other!r}, and one patient must not be two cases; keep one of them"
    return Problem(case.id, f"{case.volume}: {problem}", copy_of=other)


def voxels_digest(image: Volume) -> str:
    """Return a digest of the voxels in anatomical order, independent of the file format."""
    array_xyz = np.ascontiguousarray(Orientation.of(image.geometry).to_anatomical(image.array))
    digest = hashlib.sha256(f"{array_xyz.dtype.name} {array_xyz.shape}".encode())
    digest.update(array_xyz.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class ScannedCase:
    """A valid case: id, size, spacing, orientation, labels and name of the label map; and its notes."""

    row: tuple[str, ...]
    notes: tuple[str, ...] = ()
    labelled: bool = False
    fingerprint: Fingerprint | None = None
    instances: tuple[Instance, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of label values. They, the fingerprint and the instances are empty if the voxels were not read."""

    @property
    def labels(self) -> LabelledCase:
        """Its labels, for `cohort_labels`."""
        return LabelledCase.of(self.row[0], self.instances, self.names)


def scan_cases(
    listing: Listing,
    options: LabelOptions = DEFAULT_LABELS,
    *,
    quick: bool = False,
    progress: Progress | None = None,
) -> tuple[tuple[ScannedCase, ...], tuple[Problem, ...]]:
    """Read and check the cases of a listing one by one; return descriptions and problems.

    With `quick`, only headers are read; see `load_case` for the others.
    """
    cases: list[ScannedCase] = []
    problems, seen = list(listing.problems), dict[str, str]()
    for number, case in enumerate(listing.cases, start=1):
        found = scan_header(case) if quick else scan_case(case, seen, options)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            cases.append(found)
        if progress:
            progress(number, len(listing.cases), case.id)
    return tuple(cases), tuple(problems)


def scan_case(case: Case, seen: dict[str, str], options: LabelOptions = DEFAULT_LABELS) -> ScannedCase | Problem:
    """Read and check a case, and describe it.

    Parameters
    ----------
    case : Case
        The case.
    seen : dict
        The case of each scanned volume, by `voxels_digest`; this case is added.
    options : LabelOptions
        How the label map is read.

    Returns
    -------
    ScannedCase or Problem
        The description, or why the case cannot be used.
    """
    try:
        loaded = load_case(case, options)
        first = seen.setdefault(voxels_digest(loaded.image), case.id)
        if first != case.id:
            return copy_problem(case, first)
        return describe_case(loaded, options.ignore_label)
    except (CspineDataError, OSError, MemoryError) as error:
        return describe_problem(case.id, error)


def describe_case(loaded: LoadedCase, ignore_label: int | None) -> ScannedCase:
    """Describe a checked case."""
    case, geometry = loaded.case, loaded.image.geometry
    orientation = geometry.orientation_code + (" (assumed)" if loaded.image.assumed_orientation else "")
    found = value_counts(loaded.label.array)[0].tolist() if loaded.label else []
    names = {one.value: one.name for one in loaded.label.segments} if loaded.label else {}
    ignored = () if ignore_label is None else (ignore_label,)
    labels = describe_labels([value for value in found if value], names, ignored)
    label = case.label.name if case.label and loaded.label else f"{'empty' if case.label else 'none'}{_UNLABELLED}"
    row = (case.id, *_grid_cells(geometry), orientation, labels or "-", label)
    fingerprint = Fingerprint.of(case.id, case.patient, loaded.image)
    instances = find_instances(loaded.label, ignore_label) if loaded.label else ()
    return ScannedCase(row, loaded.notes, bool(found), fingerprint, instances, names)


def scan_header(case: Case) -> ScannedCase | Problem:
    """Describe a case by its headers alone; its voxels are neither read nor checked."""
    try:
        geometry = read_geometry(case.volume)
        of_label = read_geometry(case.label) if case.label else None
    except (CspineDataError, OSError, MemoryError) as error:
        return describe_problem(case.id, error)
    notes: tuple[str, ...] = ()
    if of_label is not None and not of_label.same_place(geometry):
        notes = ("the label map is on another grid; scan without --quick checks whether it can be used",)
    label = case.label.name if case.label else f"none{_UNLABELLED}"
    row = (case.id, *_grid_cells(geometry), geometry.orientation_code, "not read", label)
    return ScannedCase(row, notes, case.label is not None)


def _grid_cells(geometry: Geometry) -> tuple[str, str]:
    return " x ".join(map(str, geometry.size)), " x ".join(f"{mm:.3g}" for mm in geometry.spacing_mm)
