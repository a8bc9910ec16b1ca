"""The layout of DICOM exports: folders of series, any depth, with label maps beside them."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from cspine_data.errors import InputError, Problem, count
from cspine_data.sources.cases import Case
from cspine_data.sources.file_names import name_of, patient_and_sequence, without_label_ending
from cspine_data.sources.layout import Found, Layout, Wanted, folders_in, pair, volume_files
from cspine_data.volumes.formats import dicom
from cspine_data.volumes.formats.dicom_frames import is_dicom

# Files of a folder that are looked at before it is taken for one without DICOM.
_FIRST_FILES = 5
# Opening thousands of these takes seconds.
_OTHERS = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".json")


def _recognise(folder: Path) -> str | None:
    homes = sum(map(_holds_dicom, folders_in(folder)))
    return f"it holds DICOM files in {count(homes, 'folder')}" if homes else None


def _holds_dicom(folder: Path) -> bool:
    files = (
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and not path.name.lower().endswith(_OTHERS) and path.is_file()
    )
    return any(map(is_dicom, islice(files, _FIRST_FILES)))


def _find(folder: Path, wanted: Wanted) -> Found:
    found = Found()
    owners: dict[Path, str] = {}
    cases: list[Case] = []
    for home in folders_in(folder):
        files = volume_files(home, wanted, found.problems)
        parts = home.relative_to(folder).parts
        place = "_".join(parts) or home.resolve().name
        # A label map beside a folder has its name; one within it belongs to its only series.
        owners |= {path: "_".join([*parts, without_label_ending(name_of(path))]) for path in files}
        if not _holds_dicom(home):
            continue
        try:
            volumes, notes = dicom.volumes_at(home)
        except (InputError, OSError) as error:
            found.problems.append(Problem(place, str(error)))
            continue
        found.notes += [f"{home}: {note}" for note in notes]
        if len(volumes) == 1 and len(files) == 1:
            owners[files[0]] = place
        many = len(volumes) > 1
        for number, volume in enumerate(volumes, start=1):
            path = home.with_name(f"{home.name}{dicom.NUMBER_MARK}{number}") if many else home
            _, sequence = patient_and_sequence(volume.frames[0].description)
            cases.append(
                Case(
                    f"{place}-{number}" if many else place,
                    path,
                    patient=parts[0] if parts else place,
                    sequence=sequence,
                )
            )
            if many:
                found.notes.append(f"{cases[-1].id} is {volume.description}")
    by_volume = {case.volume: case for case in cases}
    pairs = pair(found, {case.volume: case.id for case in cases}, owners, "name it as a series: {}")
    found.cases += [replace(by_volume[volume], label=label) for volume, label in pairs]
    return found


DICOM = Layout(_recognise, _find)
