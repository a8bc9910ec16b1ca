"""One case: its volume with its label map, read and checked, and what is wrong with it in one line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from cspine_data.errors import CspineDataError, Problem, describe_problem, printable
from cspine_data.preprocessing.tissue import tissue_threshold
from cspine_data.volumes.image_checks import usable_image
from cspine_data.volumes.io import Volume, content_digest, read_volume
from cspine_data.volumes.label_checks import (
    check_labels,
    check_not_the_image,
    label_notes,
    labelled_values,
    value_counts,
)
from cspine_data.volumes.label_maps import on_volume_grid, whole_numbers

#: A line of text beside the volumes that says what they are.
NOTE_FILE = "COHORT.txt"
_LONGEST_NOTE = 200
#: The note on a case whose label map labels nothing.
EMPTY_LABEL_MAP = "label map is empty: the case counts as unlabelled"
_FITS_A_FOLDER_NAME = re.compile(r"(?!\.)(?!__)[^/\\]+")
_LONGEST_ID_BYTES = 200


@dataclass(frozen=True)
class Case:
    """One patient's volume and, where there is one, its label map.

    Attributes
    ----------
    id : str
        The volume's file name without suffixes, or what a list of pairs calls it.
    volume : Path
        The image.
    label : Path or None
        Its label map.
    """

    id: str
    volume: Path
    label: Path | None = None


@dataclass(frozen=True)
class Listing:
    """What a source holds: cases, sorted by id, and what is wrong with the rest."""

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """A case's voxels, checked: the label map holds whole numbers on the image's grid; its file's dtype beside it.

    `notes` holds what a user should know about the two files although they can be used; see `Volume`.
    """

    case: Case
    image: Volume
    label: Volume | None
    label_dtype: str | None = None
    notes: tuple[str, ...] = ()


def is_case_id(name: str) -> bool:
    """Tell whether something can be the id of a case, and so the name of its folder on any file system."""
    fits = _FITS_A_FOLDER_NAME.fullmatch(name) and printable(name) == name
    return bool(fits) and len(name.encode()) <= _LONGEST_ID_BYTES


def cohort_note(source: str | Path) -> str | None:
    """Return the first line of a folder's `COHORT.txt`: what its data are, where they stand in for others."""
    try:
        with (Path(source) / NOTE_FILE).open(encoding="utf-8") as file:
            return file.readline(_LONGEST_NOTE).strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def load_case(case: Case, ignore_label: int | None = None, *, trust_voxels: bool = False) -> LoadedCase:
    """Read a case's files and check them; a label map in which nothing is labelled makes the case an unlabelled one.

    Parameters
    ----------
    case : Case
        What to read.
    ignore_label : int, optional
        The value of voxels of the label map that do not count.
    trust_voxels : bool
        Put a label map whose header does not say where it lies onto the volume's grid, voxel for voxel.

    Raises
    ------
    InputError
        If a file cannot be read, the image is not usable (see `usable_image`), or the label map lies on another grid,
        holds values that are no whole numbers or negative, is an image, or labels every voxel.
    """
    stored_image = read_volume(case.volume)
    image = usable_image(stored_image)
    if case.label is None:
        return LoadedCase(case, image, None, notes=image.notes)
    stored = read_volume(case.label)
    label = whole_numbers(stored, stored_image)
    counts = value_counts(label.array)
    if not labelled_values(counts, ignore_label)[0].size:
        return LoadedCase(case, image, None, notes=(*image.notes, EMPTY_LABEL_MAP))
    check_labels(label.name, label.array, counts, ignore_label)
    label = on_volume_grid(label, image, trust_voxels=trust_voxels)
    check_not_the_image(label.name, label.array, image.array)
    spacing_mm = image.geometry.spacing_mm
    # A few of the voxels are enough to say how bright air is.
    first, second, third = (3 * mm for mm in spacing_mm)
    tissue = tissue_threshold(image.array[::3, ::3, ::3], (first, second, third))
    found = label_notes(label.array, image.array, counts, tissue, math.prod(spacing_mm) / 1e3, ignore_label)
    notes = [note for note in (*label.notes, *found) if note not in image.notes]
    notes = [*image.notes, *(f"label map: {note}" for note in notes)]
    return LoadedCase(case, image, label, stored.array.dtype.name, tuple(notes))


def copy_problem(case: Case, other: str, *, only_in_store: bool = False) -> Problem:
    """Say that a case's volume is another case's under a second name: one patient in two parts of a split."""
    if only_in_store:
        told = f"is what the store holds as case {other!r}; give it that name again, or make a new store"
    else:
        told = f"holds the same volume as case {other!r}, and one patient must not be two cases; keep one of them"
    return Problem(case.id, f"{case.volume}: {told}")


@dataclass(frozen=True)
class ScannedCase:
    """A case that can be prepared: id, size, spacing, orientation, labels found, label map's name; and its notes."""

    row: tuple[str, ...]
    notes: tuple[str, ...] = ()
    labelled: bool = False


def scan_case(
    case: Case, seen: dict[str, str], ignore_label: int | None = None, *, trust_voxels: bool = False
) -> ScannedCase | Problem:
    """Read and check a case, and describe it.

    Parameters
    ----------
    case : Case
        What to read.
    seen : dict
        The case of each digest of a volume that was scanned before; this case's is added.
    ignore_label : int, optional
        The value of voxels of label maps that do not count.
    trust_voxels : bool
        See `load_case`.

    Returns
    -------
    ScannedCase or Problem
        The description, or the one line that says why the case cannot be used.
    """
    try:
        loaded = load_case(case, ignore_label, trust_voxels=trust_voxels)
        first = seen.setdefault(content_digest(case.volume), case.id)
        if first != case.id:
            return copy_problem(case, first)
    except (CspineDataError, OSError, MemoryError) as error:
        return describe_problem(case.id, error)
    geometry = loaded.image.geometry
    orientation = geometry.orientation_code + (" (assumed)" if loaded.image.assumed_orientation else "")
    found = value_counts(loaded.label.array)[0].tolist() if loaded.label else []
    labels = " ".join(f"{value}{' (ignored)' * (value == ignore_label)}" for value in found if value)
    row = (
        case.id,
        " x ".join(map(str, geometry.size)),
        " x ".join(f"{mm:.3g}" for mm in geometry.spacing_mm),
        orientation,
        labels or "-",
        case.label.name if case.label and loaded.label else f"{'empty' if case.label else 'none'}: for prediction only",
    )
    return ScannedCase(row, loaded.notes, loaded.label is not None)
