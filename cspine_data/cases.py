"""Which files make up a cohort: volumes, paired with their label maps by name, by folder or by a list."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cspine_data.errors import CspineDataError, InputError, describe_os_error, printable
from cspine_data.images import usable_image
from cspine_data.label_maps import SEGMENTATION_SUFFIX, fitted_label
from cspine_data.volumes import Volume, content_digest, read_volume, volume_stem, volume_suffix

#: A line of text beside the volumes that says what they are.
NOTE_FILE = "COHORT.txt"
_LONGEST_NOTE = 200
_LABEL_ENDING = "-label"
_NNUNET_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
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
class Problem:
    """A file or case that cannot be used, and why, in one line."""

    case: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))


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


def find_cases(source: str | Path, pairs: str | Path | None = None) -> Listing:
    """List the cases of a folder.

    Understood are ``X.nrrd`` with ``XS-label``, ``X-label`` or ``X.seg.nrrd`` beside it (also ``.nhdr``, ``.nii``,
    ``.nii.gz``, in any mixture), nnU-Net's ``imagesTr/X_0000`` with ``labelsTr/X`` (and ``imagesTs``), and any other
    naming by a list of pairs.

    Parameters
    ----------
    source : str or Path
        The folder.
    pairs : str or Path, optional
        A CSV file with the columns ``case,volume,label``; paths are relative to the list; a label may be empty.

    Returns
    -------
    Listing
        The cases and the problems; a problem with one file does not hide the others.

    Raises
    ------
    InputError
        If the source or the list is missing, or holds no volume at all.
    """
    if pairs is not None:
        return _listing(*_read_pairs(Path(pairs)), source=Path(pairs))
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(folder, "is no folder", "give the folder that holds the volumes")
    if (folder / "imagesTr").is_dir():
        return _listing(*_nnunet_cases(folder), source=folder)
    return _listing(*_cases_beside_labels(folder), source=folder)


def volumes_in(folder: str | Path) -> list[Path]:
    """Return what is called like a volume in a folder, by name; label maps are none, by the naming of `find_cases`."""
    folder = Path(folder)
    within = [folder / name for name in ("imagesTr", "imagesTs") if (folder / name).is_dir()] or [folder]
    named = (path for home in within for path in sorted(home.iterdir()))
    return [path for path in named if volume_suffix(path) and path.name[0] != "." and not _is_label(path)]


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


def load_case(case: Case, *, trust_voxels: bool = False) -> LoadedCase:
    """Read a case's files and check them.

    Parameters
    ----------
    case : Case
        What to read.
    trust_voxels : bool
        Put a label map whose header does not say where it lies onto the volume's grid, voxel for voxel.

    Raises
    ------
    InputError
        If a file cannot be read, or the label map lies on another grid or holds values that are no whole numbers.
    """
    image = read_volume(case.volume)
    if case.label is None:
        return LoadedCase(case, image, None, notes=image.notes)
    stored = read_volume(case.label)
    label = fitted_label(stored, image, trust_voxels=trust_voxels)
    notes = (*image.notes, *(f"label map: {note}" for note in label.notes if note not in image.notes))
    return LoadedCase(case, image, label, stored.array.dtype.name, notes)


def load_usable_case(case: Case, *, trust_voxels: bool = False) -> LoadedCase:
    """Read a case's files as `load_case` does, and its image as one that can be computed with; see `usable_image`."""
    loaded = load_case(case, trust_voxels=trust_voxels)
    image = usable_image(loaded.image)
    return replace(loaded, image=image, notes=tuple(dict.fromkeys((*image.notes, *loaded.notes))))


def _listing(found: Iterable[tuple[str, Path, Path | None]], problems: Iterable[Problem], *, source: Path) -> Listing:
    by_id: dict[str, list[Case]] = {}
    for case_id, volume, label in found:
        by_id.setdefault(case_id, []).append(Case(case_id, volume, label))
    cases, wrong = [], list(problems)
    for case_id, claims in sorted(by_id.items()):
        if len(claims) > 1:
            names = " and ".join(str(claim.volume) for claim in claims)
            wrong.append(Problem(case_id, f"{names}: claim the same case {case_id!r}; keep one of them"))
        elif not is_case_id(case_id):
            wrong.append(Problem(case_id, f"{claims[0].volume}: {case_id!r} is no usable case id; rename the file"))
        else:
            cases.append(claims[0])
    if not cases and not wrong:
        remedy = "put .nrrd or .nii.gz files there (folders in it are not searched), or give --pairs"
        raise InputError(source, "holds no volume", remedy)
    return Listing(tuple(cases), tuple(wrong))


Found = tuple[list[tuple[str, Path, Path | None]], list[Problem]]


def _volume_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Return the files of a folder that are volumes by their names, and what only looks like one."""
    named = sorted(path for path in folder.iterdir() if volume_suffix(path) and not path.name.startswith("."))
    problem = "is called like a volume and is no file; fetch the file behind it, or remove it"
    return (
        [path for path in named if path.is_file()],
        [Problem(volume_stem(path), f"{path}: {problem}") for path in named if not path.is_file()],
    )


def _is_label(path: Path) -> bool:
    return path.name.lower().endswith(SEGMENTATION_SUFFIX) or volume_stem(path).lower().endswith(_LABEL_ENDING)


def _cases_beside_labels(folder: Path) -> Found:
    files, problems = _volume_files(folder)
    volumes = [path for path in files if not _is_label(path)]
    names = {volume_stem(path) for path in volumes}
    labels: dict[str, list[Path]] = {}
    for path in files:
        if not _is_label(path):
            continue
        name = volume_stem(path)
        if name.lower().endswith(_LABEL_ENDING):
            name = name[: -len(_LABEL_ENDING)]
            if name not in names and name[-1:] in ("S", "s"):
                name = name[:-1]
        if name in names:
            labels.setdefault(name, []).append(path)
        else:
            problems.append(Problem(name, f"{path}: is a label map without a volume; put {name}.nrrd beside it"))
    found: list[tuple[str, Path, Path | None]] = []
    for path in volumes:
        claims = labels.get(volume_stem(path), [])
        if len(claims) > 1:
            both = " and ".join(str(claim) for claim in claims)
            problems.append(
                Problem(volume_stem(path), f"{both}: are both label maps of {volume_stem(path)!r}; keep one of them")
            )
        else:
            found.append((volume_stem(path), path, claims[0] if claims else None))
    return found, problems


def _nnunet_cases(folder: Path) -> Found:
    found: list[tuple[str, Path, Path | None]] = []
    problems: list[Problem] = []
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")):
        label_files: dict[str, list[Path]] = {}
        if (folder / labels).is_dir():
            files, odd = _volume_files(folder / labels)
            problems += odd
            for path in files:
                label_files.setdefault(volume_stem(path), []).append(path)
        if not (folder / images).is_dir():
            continue
        files, odd = _volume_files(folder / images)
        problems += odd
        for path in files:
            match = _NNUNET_CHANNEL.match(volume_stem(path))
            if match is None:
                problems.append(
                    Problem(volume_stem(path), f"{path}: has no channel number; name it {volume_stem(path)}_0000")
                )
            elif match["channel"] != "0000":
                message = f"{path}: is a second channel; one channel is used, leave it out"
                problems.append(Problem(match["case"], message))
            else:
                claims = label_files.pop(match["case"], [])
                if len(claims) > 1:
                    both = " and ".join(str(claim) for claim in claims)
                    problems.append(Problem(match["case"], f"{both}: are both its label map; keep one of them"))
                else:
                    found.append((match["case"], path, claims[0] if claims else None))
        problems += [
            Problem(name, f"{paths[0]}: is a label map without a volume; put {name}_0000 into {images}")
            for name, paths in sorted(label_files.items())
        ]
    return found, problems


def _read_pairs(path: Path) -> Found:
    if not path.is_file():
        raise InputError(path, "is no file", "give a CSV file with the columns case,volume,label")
    found: list[tuple[str, Path, Path | None]] = []
    problems = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = {"case", "volume", "label"} - set(rows.fieldnames or ())
            if missing:
                raise InputError(
                    path, f"lacks the column {', '.join(sorted(missing))}", "start it with case,volume,label"
                )
            for number, row in enumerate(rows, start=2):
                case_id, volume, label = ((row[name] or "").strip() for name in ("case", "volume", "label"))
                if not case_id or not volume:
                    problems.append(
                        Problem(case_id or f"line {number}", f"{path}: line {number} names no case or volume")
                    )
                else:
                    found.append((case_id, path.parent / volume, path.parent / label if label else None))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"is no readable CSV file ({error})", "save it as CSV in UTF-8") from None
    return found, problems


def describe_problem(case_id: str, error: BaseException) -> Problem:
    """Turn an error met while working on a case into the one line a user reads."""
    if isinstance(error, CspineDataError):
        return Problem(case_id, str(error))
    if isinstance(error, OSError):
        return Problem(case_id, describe_os_error(error))
    if isinstance(error, MemoryError):
        return Problem(case_id, f"{case_id}: memory ran out; use fewer --workers")
    return Problem(case_id, f"{case_id}: failed unexpectedly ({type(error).__name__}: {error}); please report this")


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


def scan_case(case: Case, seen: dict[str, str], *, trust_voxels: bool = False) -> ScannedCase | Problem:
    """Read and check a case, and describe it.

    Parameters
    ----------
    case : Case
        What to read.
    seen : dict
        The case of each digest of a volume that was scanned before; this case's is added.
    trust_voxels : bool
        See `load_case`.

    Returns
    -------
    ScannedCase or Problem
        The description, or the one line that says why the case cannot be used.
    """
    try:
        loaded = load_usable_case(case, trust_voxels=trust_voxels)
        first = seen.setdefault(content_digest(case.volume), case.id)
        if first != case.id:
            return copy_problem(case, first)
    except (CspineDataError, OSError, MemoryError) as error:
        return describe_problem(case.id, error)
    geometry = loaded.image.geometry
    orientation = geometry.orientation_code + (" (assumed)" if loaded.image.assumed_orientation else "")
    found = np.unique(loaded.label.array).tolist() if loaded.label else []
    row = (
        case.id,
        " x ".join(map(str, geometry.size)),
        " x ".join(f"{mm:.3g}" for mm in geometry.spacing_mm),
        orientation,
        " ".join(str(value) for value in found if value) or "-",
        case.label.name if case.label else "none: for prediction only",
    )
    return ScannedCase(row, loaded.notes)
