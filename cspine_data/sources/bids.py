"""The BIDS layout: ``sub-01/[ses-1/]anat/sub-01_[ses-1_]T2w.nii.gz``, with label maps in ``derivatives``.

Also with the images in ``rawdata``, and without the folder ``anat``, as VerSe has it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cspine_data.errors import count
from cspine_data.sources.cases import Case
from cspine_data.sources.file_names import name_of, patient_and_sequence
from cspine_data.sources.layout import Found, Layout, Wanted, folders_in, only_label_map, volume_files

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")
# BIDS (dseg, mask, probseg), TPTBox and VerSe (msk), Spinal Cord Toolbox (seg, label, manual).
_LABEL = re.compile(r".*[_-](dseg|mask|msk|seg|labels?)(-[A-Za-z0-9]+)*(_.*)?", re.IGNORECASE)
_OF_VERTEBRAE = re.compile(r"vert", re.IGNORECASE)
# These entities of a label map are not its image's.
_LABEL_ENTITIES = {"label", "seg", "desc", "space", "res"}


def _recognise(folder: Path) -> str | None:
    home = _raw(folder)
    subjects = [path for path in home.iterdir() if _SUBJECT.fullmatch(path.name) and path.is_dir()]
    if not subjects:
        return None
    if (folder / "dataset_description.json").is_file():
        return f"it holds dataset_description.json and {count(len(subjects), 'subject')}"
    anatomical = any((path / "anat").is_dir() or any(path.glob("ses-*/anat")) for path in subjects)
    if anatomical or (folder / "derivatives").is_dir():
        return f"it holds {count(len(subjects), 'subject')} with {'anat folders' if anatomical else 'derivatives'}"
    return None


def _find(folder: Path, wanted: Wanted) -> Found:
    found = Found()
    images: list[Path] = []
    labels: list[Path] = []
    for home in _image_folders(_raw(folder)):
        for path in volume_files(home, wanted, found.problems):
            (labels if _LABEL.fullmatch(name_of(path)) else images).append(path)
    if (folder / "derivatives").is_dir():
        for home in folders_in(folder / "derivatives"):
            files = volume_files(home, wanted, found.problems)
            labels += [path for path in files if _LABEL.fullmatch(name_of(path))]
    claims, left_out = _owners(images, labels)
    for path in images:
        name = name_of(path)
        candidates = claims[path]
        of_vertebrae = [label for label in candidates if _OF_VERTEBRAE.search(name_of(label))]
        chosen = of_vertebrae if len(of_vertebrae) == 1 else candidates
        left_out += len(candidates) - len(chosen)
        label = only_label_map(found, path, name, chosen)
        patient, _ = patient_and_sequence(name)
        sequence = name.rpartition("_")[2]
        found.cases.append(Case(name, path, label, patient, sequence=sequence))
    if left_out:
        found.notes.append(f"{count(left_out, 'label map')} left out: of other structures, or of no image here")
    return found


def _raw(folder: Path) -> Path:
    return folder / "rawdata" if (folder / "rawdata").is_dir() else folder


def _image_folders(folder: Path) -> Iterator[Path]:
    """Iterate over the folders of anatomical images: of each subject, or of each of its sessions."""
    for subject in sorted(folder.iterdir()):
        if not _SUBJECT.fullmatch(subject.name) or not subject.is_dir():
            continue
        sessions = [path for path in sorted(subject.iterdir()) if _SESSION.fullmatch(path.name) and path.is_dir()]
        for home in [subject, *sessions]:
            yield home / "anat" if (home / "anat").is_dir() else home


def _owners(images: list[Path], labels: list[Path]) -> tuple[dict[Path, list[Path]], int]:
    """Return the label maps of each image, and how many belong to none."""
    by_subject: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        by_subject[name_of(path).partition("_")[0]].append(path)
    claims: dict[Path, list[Path]] = {path: [] for path in images}
    ownerless = 0
    for label in labels:
        name = name_of(label)
        candidates = by_subject[name.partition("_")[0]]
        # A label map starts with its image's whole name, or has its entities.
        owners = [path for path in candidates if name.startswith(f"{name_of(path)}_")]
        owners = owners or [path for path in candidates if _entities(path) == _entities(label)]
        if len(owners) == 1:
            claims[owners[0]].append(label)
        else:
            ownerless += 1
    return claims, ownerless


def _entities(path: Path) -> dict[str, str]:
    """Return the entities of a file name that identify its image, such as ``ses``, ``acq`` and ``run``."""
    words = [word.partition("-") for word in name_of(path).split("_")]
    return {key: value for key, mark, value in words if mark and key not in _LABEL_ENTITIES}


BIDS = Layout(_recognise, _find)
