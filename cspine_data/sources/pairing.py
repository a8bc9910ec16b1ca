"""Find the cases of a cohort: volumes and label maps, paired by name, by folder or by a list."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from cspine_data.errors import InputError, Problem
from cspine_data.names import normalised, on_disk
from cspine_data.sources.cases import Case, Listing, is_case_id
from cspine_data.volumes.io import SEGMENTATION_SUFFIX, volume_stem, volume_suffix

# Only the first group is unambiguous: "T2_seg" may be a sequence, "AB_GT" a patient.
_LABEL_ENDING = re.compile(r"(?P<volume>.+)[-_](?:(?P<sure>labels?)|seg|segmentation|masks?|gt)", re.IGNORECASE)
_NNUNET_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def find_cases(source: str | Path, pairs: str | Path | None = None) -> Listing:
    """List the cases of a folder.

    Supported are ``X.nrrd`` with ``XS-label``, ``X-label`` or ``X.seg.nrrd`` (also ``.nhdr``, ``.nii``, ``.nii.gz``, in
    any combination, and the endings ``seg``, ``segmentation``, ``mask`` and ``gt`` after ``-`` or ``_``), nnU-Net's
    ``imagesTr/X_0000`` with ``labelsTr/X`` (and ``imagesTs``), and any other names with a list of pairs. Files are not
    opened. Names are compared, and become case ids, in Unicode's composed form (NFC).

    Parameters
    ----------
    source : str or Path
        The folder.
    pairs : str or Path, optional
        A CSV file with the columns ``case,volume,label``; paths are relative to the list; a label may be empty.

    Returns
    -------
    Listing
        The cases and problems.

    Raises
    ------
    InputError
        If the source or the list is missing, or there is no volume.
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
    """Return the volumes in a folder by their names, sorted, without label maps as in `find_cases`.

    In an nnU-Net folder, these are the volumes in ``imagesTr`` and ``imagesTs``.
    """
    folder = Path(folder)
    found: list[Path] = []
    for home in [folder / name for name in ("imagesTr", "imagesTs") if (folder / name).is_dir()] or [folder]:
        named = [path for path in sorted(home.iterdir()) if volume_suffix(path) and path.name[0] != "."]
        owners = _label_maps(named)
        found += [path for path in named if path not in owners]
    return found


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
    """Return the volumes in a folder by their names, and problems with entries that are no files."""
    named = sorted(path for path in folder.iterdir() if volume_suffix(path) and not path.name.startswith("."))
    problem = "is called like a volume and is no file; fetch the file behind it, or remove it"
    return (
        [path for path in named if path.is_file()],
        [Problem(_name(path), f"{path}: {problem}") for path in named if not path.is_file()],
    )


def _name(path: Path) -> str:
    """Return a file name for comparison: without suffixes, normalised."""
    return normalised(volume_stem(path))


def _label_maps(files: Iterable[Path]) -> dict[Path, str]:
    """Return the label maps in a folder by their names, with the names of their volumes.

    ``X.seg.nrrd`` and ``X-label`` always are label maps; ``X_seg``, ``X_mask`` and ``X_gt`` are if X exists.
    """
    endings = {path: _LABEL_ENDING.fullmatch(_name(path)) for path in files}
    sure = {
        path for path, ending in endings.items()
        if path.name.lower().endswith(SEGMENTATION_SUFFIX) or (ending and ending["sure"])
    }  # fmt: skip
    volumes = {_name(path) for path in endings if path not in sure}
    found = {}
    for path, ending in endings.items():
        name = ending["volume"] if ending else _name(path)
        # Names of the reference study: X.nrrd and XS-label.nrrd.
        if ending and name not in volumes and name[-1:] in ("S", "s"):
            name = name[:-1]
        if path in sure or (ending and name in volumes):
            found[path] = name
    return found


def _cases_beside_labels(folder: Path) -> Found:
    files, problems = _volume_files(folder)
    owners = _label_maps(files)
    volumes = {path: _name(path) for path in files if path not in owners}
    labels: dict[str, list[Path]] = {}
    for path, name in owners.items():
        if name in volumes.values():
            labels.setdefault(name, []).append(path)
        else:
            problems.append(Problem(name, f"{path}: is a label map without a volume; put {name}.nrrd beside it"))
    found: list[tuple[str, Path, Path | None]] = []
    for path, name in volumes.items():
        claims = labels.get(name, [])
        if len(claims) > 1:
            both = " and ".join(str(claim) for claim in claims)
            problems.append(Problem(name, f"{both}: are both label maps of {name!r}; keep one of them"))
        else:
            found.append((name, path, claims[0] if claims else None))
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
                label_files.setdefault(_name(path), []).append(path)
        if not (folder / images).is_dir():
            continue
        files, odd = _volume_files(folder / images)
        problems += odd
        for path in files:
            match = _NNUNET_CHANNEL.match(_name(path))
            if match is None:
                message = f"{path}: has no channel number; name it {_name(path)}_0000"
                problems.append(Problem(_name(path), message))
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

    def home(name: str) -> Path:
        return on_disk(path.parent / name)

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
                    found.append((normalised(case_id), home(volume), home(label) if label else None))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"is no readable CSV file ({error})", "save it as CSV in UTF-8") from None
    return found, problems
