"""The flat layout: volumes and label maps in one folder, paired by name."""

from __future__ import annotations

from pathlib import Path

from cspine_data.sources.file_names import (
    is_plain_label_name,
    is_visible_volume,
    label_maps,
    name_of,
)
from cspine_data.sources.layout import Found, Layout, Wanted, case_named, pair, volume_files


def pair_in_folder(files: list[Path]) -> tuple[dict[Path, str], dict[Path, str], list[str]]:
    """Part the files of a folder into volumes and label maps by their names.

    A label map without a name of its own, as 3D Slicer's ``Segmentation.seg.nrrd``, belongs to the only volume.

    Returns
    -------
    dict
        The name of each volume.
    dict
        The name of each label map's volume.
    list of str
        Notes.
    """
    owners = label_maps(files)
    volumes = {path: name_of(path) for path in files if path not in owners}
    plain = [path for path in (*volumes, *owners) if is_plain_label_name(name_of(path))]
    others = [path for path in volumes if path not in plain]
    if len(plain) == len(others) == 1 and len(files) == 2:
        (label,), (volume,) = plain, others
        note = f"{label.name} is taken for the label map of {volume.name}: there is no other"
        return {volume: name_of(volume)}, {label: name_of(volume)}, [note]
    return volumes, owners, []


def _recognise(folder: Path) -> str | None:
    files = [path for path in folder.iterdir() if is_visible_volume(path)]
    # Label maps alone may lie beside DICOM slices.
    return "it holds volumes" if len(label_maps(files)) < len(files) else None


def _find(folder: Path, wanted: Wanted) -> Found:
    found = Found()
    volumes, owners, found.notes = pair_in_folder(volume_files(folder, wanted, found.problems))
    for volume, label in pair(found, volumes, owners, "put {}.nrrd beside it"):
        found.cases.append(case_named(volumes[volume], volume, label))
    return found


FLAT = Layout(_recognise, _find)
