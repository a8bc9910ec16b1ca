"""Volumes in subfolders: one folder per patient, or images beside labels, or both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from cspine_data.errors import count
from cspine_data.sources.cases import Case
from cspine_data.sources.file_names import (
    is_plain_image_name,
    is_visible_volume,
    label_maps,
    name_of,
    patient_and_sequence,
    without_label_ending,
)
from cspine_data.sources.flat import pair_in_folder
from cspine_data.sources.layout import Found, Layout, Wanted, folders_in, pair, volume_files

_LABELS = {
    "label", "labels", "mask", "masks", "seg", "segs", "segmentation", "segmentations", "gt", "ground_truth",
    "groundtruth", "annotations",
}  # fmt: skip
# CSpineSeg calls the folder of its images "annotation".
_IMAGES = {"image", "images", "img", "imgs", "volume", "volumes", "scan", "scans", "annotation"}
_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def _recognise(folder: Path) -> str | None:
    homes = [home.relative_to(folder) for home in folders_in(folder) if home != folder and _holds_volumes(home)]
    if not homes:
        return None
    labels = sorted({part for home in homes for part in home.parts if part.lower() in _LABELS})
    held = f"it holds volumes in {count(len(homes), 'subfolder')}"
    return f"{held}, label maps in {' and '.join(labels)}" if labels else held


def _holds_volumes(folder: Path) -> bool:
    files = [path for path in folder.iterdir() if is_visible_volume(path)]
    # Label maps alone may lie beside DICOM slices.
    return len(label_maps(files)) < len(files)


def _find(folder: Path, wanted: Wanted) -> Found:
    found = Found()
    groups: dict[tuple[str, ...], tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for home in folders_in(folder):
        files = volume_files(home, wanted, found.problems)
        parts = home.relative_to(folder).parts
        names = {part.lower() for part in parts}
        images, labels = groups[tuple(part for part in parts if part.lower() not in _LABELS | _IMAGES)]
        (labels if names & _LABELS else images).extend(files)
    alone = sum(bool(images) for images, _ in groups.values()) == 1
    for place, (images, labels) in groups.items():
        _add_group(found, place, images, labels, alone=alone)
    return found


def _add_group(found: Found, place: tuple[str, ...], images: list[Path], labels: list[Path], *, alone: bool) -> None:
    """Add the cases of one patient's folder, or of a pair of folders with images and labels.

    A folder that is alone, with volumes of several patients by their names, is no patient's.
    """
    volumes, owners, notes = pair_in_folder(images)
    names = set(volumes.values())
    for path in labels:
        name = name_of(path)
        owners[path] = name if name in names else without_label_ending(name)
    if place and len(volumes) == 1 and len(owners) == 1:
        # The only two files of a patient.
        owners = dict.fromkeys(owners, *volumes.values())
    found.notes += notes
    own = [part for part in place if part.lower() not in _PARTS]
    if alone and _name_patients(volumes.values()):
        own = []
    for volume, label in pair(found, volumes, owners, "put {} with the images"):
        patient, sequence = patient_and_sequence(volumes[volume])
        found.cases.append(
            Case(_case_id(own, volumes[volume]), volume, label, own[0] if own else patient, sequence=sequence)
        )


def _name_patients(names: Iterable[str]) -> bool:
    """Return whether names of files give several patients, and not only sequences of one."""
    given = {name: patient_and_sequence(name) for name in names}
    clear = all(
        not is_plain_image_name(name) and (sequence is None or patient != name)
        for name, (patient, sequence) in given.items()
    )
    return clear and len({patient for patient, _ in given.values()}) > 1


def _case_id(place: list[str], name: str) -> str:
    """Return a case id: the folders' names and the file's, without what it repeats or what says nothing."""
    if place and is_plain_image_name(name):
        return "_".join(place)
    while place and name.startswith(place[-1]):
        place = place[:-1]
    return "_".join([*place, name])


FOLDERS = Layout(_recognise, _find)
