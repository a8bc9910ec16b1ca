"""Layouts of nnU-Net (``imagesTr/X_0000``) and of the Medical Segmentation Decathlon (``imagesTr/X``)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from cspine_data.errors import Problem, printable
from cspine_data.sources.file_names import is_visible_volume, name_of
from cspine_data.sources.layout import Found, Layout, Wanted, case_named, pair, volume_files

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_FIRST = "0000"
_FOLDERS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))
_LONGEST_DESCRIPTION = 1 << 20


def _with_channels(folder: Path) -> bool:
    homes = [folder / images for images, _ in _FOLDERS if (folder / images).is_dir()]
    # A case of the Decathlon may be called X_2021, but every case of nnU-Net has a first channel.
    return any(
        name_of(path).endswith(f"_{_FIRST}") for home in homes for path in home.iterdir() if is_visible_volume(path)
    )


def _recognise_nnunet(folder: Path) -> str | None:
    if (folder / "imagesTr").is_dir() and _with_channels(folder):
        return "imagesTr holds files with channel numbers"
    return None


def _recognise_msd(folder: Path) -> str | None:
    return "it holds imagesTr, without channel numbers" if (folder / "imagesTr").is_dir() else None


def _find_nnunet(folder: Path, wanted: Wanted) -> Found:
    found = Found()
    names = _channel_names(folder)
    for images, labels in _FOLDERS:
        if not (folder / images).is_dir():
            continue
        files = volume_files(folder / images, wanted, found.problems)
        matches = {path: _CHANNEL.fullmatch(name_of(path)) for path in files}
        first = {path: match["case"] for path, match in matches.items() if match and match["channel"] == _FIRST}
        label_of = {}
        owners = _label_files(found, folder / labels, wanted)
        for volume, label in pair(found, first, owners, f"put {{}}_0000 into {images}"):
            label_of[first[volume]] = label
            case = case_named(first[volume], volume, label)
            found.cases.append(replace(case, sequence=names.get(_FIRST, case.sequence)))
        for path, match in matches.items():
            if match is None:
                message = f"{path}: has no channel number; name it {name_of(path)}_0000"
                found.problems.append(Problem(name_of(path), message))
            elif match["channel"] != _FIRST and match["case"] in label_of:
                other = case_named(match["case"], path, label_of[match["case"]])
                found.others.append(replace(other, sequence=names.get(match["channel"], match["channel"])))
            elif match["channel"] != _FIRST and match["case"] not in first.values():
                message = f"{path}: is a second channel without a first one; add {match['case']}_0000"
                found.problems.append(Problem(match["case"], message))
    offered = sorted({case.sequence for case in found.others if case.sequence})
    if offered:
        found.notes.append(f"channel {_FIRST} is used; --sequence chooses another one: {', '.join(offered)}")
    return found


def _find_msd(folder: Path, wanted: Wanted) -> Found:
    found = Found()
    for images, labels in _FOLDERS:
        if not (folder / images).is_dir():
            continue
        volumes = {path: name_of(path) for path in volume_files(folder / images, wanted, found.problems)}
        owners = _label_files(found, folder / labels, wanted)
        for volume, label in pair(found, volumes, owners, f"put {{}} into {images}"):
            found.cases.append(case_named(volumes[volume], volume, label))
    return found


def _label_files(found: Found, folder: Path, wanted: Wanted) -> dict[Path, str]:
    if not folder.is_dir():
        return {}
    return {path: name_of(path) for path in volume_files(folder, wanted, found.label_problems)}


def _channel_names(folder: Path) -> dict[str, str]:
    """Return the names of channels in ``dataset.json``, by their four digits; none if it cannot be read."""
    try:
        with (folder / "dataset.json").open("rb") as file:
            description = json.loads(file.read(_LONGEST_DESCRIPTION))
        names = description.get("channel_names") or description.get("modality") or {}
        return {f"{int(number):04}": printable(str(name)) for number, name in names.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


NNUNET = Layout(_recognise_nnunet, _find_nnunet)
MSD = Layout(_recognise_msd, _find_msd)
