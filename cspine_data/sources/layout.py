"""What a cohort layout is: how a folder is recognised, and how its cases are found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cspine_data.errors import Problem
from cspine_data.sources.cases import Case
from cspine_data.sources.file_names import is_visible_volume, name_of, patient_and_sequence

# Folders below a cohort's folder. Deeper ones are not searched.
_DEEPEST = 8

#: Whether to use a file.
Wanted = Callable[[Path], bool]


@dataclass
class Found:
    """The result of looking through a folder.

    Attributes
    ----------
    cases : list of Case
        The cases.
    problems : list of Problem
        Volumes that cannot be used.
    label_problems : list of Problem
        Label maps that cannot be used.
    unclear : list of Path
        Volumes with several label maps; only prediction uses them.
    others : list of Case
        Volumes that are used only if their sequence is asked for, such as nnU-Net's second channels.
    notes : list of str
        What was left out.
    """

    cases: list[Case] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    label_problems: list[Problem] = field(default_factory=list)
    unclear: list[Path] = field(default_factory=list)
    others: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A way to arrange a cohort in folders.

    Attributes
    ----------
    recognise : callable
        Takes a folder; returns why it has this layout, or None.
    find : callable
        Takes a folder and a function that tells which files to use; returns the cases.
    """

    recognise: Callable[[Path], str | None]
    find: Callable[[Path, Wanted], Found]


def volume_files(folder: Path, wanted: Wanted, problems: list[Problem]) -> list[Path]:
    """Return the volumes in a folder by their names, and add problems with entries that are no files."""
    named = sorted(path for path in folder.iterdir() if is_visible_volume(path) and wanted(path))
    problem = "is called like a volume and is no file; fetch the file behind it, or remove it"
    problems += [Problem(name_of(path), f"{path}: {problem}") for path in named if not path.is_file()]
    return [path for path in named if path.is_file()]


def case_named(name: str, volume: Path, label: Path | None) -> Case:
    """Return a case whose name gives its patient and sequence."""
    patient, sequence = patient_and_sequence(name)
    return Case(name, volume, label, patient, sequence=sequence)


def folders_in(folder: Path) -> Iterator[Path]:
    """Iterate over a folder and all folders below it, sorted, without hidden ones and links."""
    for home, names, _ in os.walk(folder):
        depth = len(Path(home).relative_to(folder).parts)
        names[:] = sorted(name for name in names if not name.startswith(".")) if depth < _DEEPEST else []
        yield Path(home)


def pair(
    found: Found, volumes: dict[Path, str], owners: dict[Path, str], missing: str
) -> Iterator[tuple[Path, Path | None]]:
    """Pair volumes with label maps of the same name, and add the problems of others.

    Parameters
    ----------
    found : Found
        Problems are added to it.
    volumes : dict
        The name of each volume.
    owners : dict
        The name of each label map's volume.
    missing : str
        What to do about a label map without a volume; ``{}`` is its name.

    Yields
    ------
    tuple
        Each volume, with its label map or None.
    """
    labels: dict[str, list[Path]] = {}
    for path, name in owners.items():
        labels.setdefault(name, []).append(path)
    for name in sorted(labels.keys() - set(volumes.values())):
        for path in labels[name]:
            message = f"{path}: is a label map without a volume; {missing.format(name)}"
            found.label_problems.append(Problem(name, message))
    for path, name in volumes.items():
        yield path, only_label_map(found, path, name, labels.get(name, []))


def only_label_map(found: Found, volume: Path, name: str, claims: list[Path]) -> Path | None:
    """Return the label map of a volume; several are a problem."""
    if len(claims) > 1:
        both = " and ".join(map(str, claims))
        message = f"{both}: are all label maps of {name!r}; keep one of them, or --exclude the others"
        found.label_problems.append(Problem(name, message))
        found.unclear.append(volume)
    return claims[0] if len(claims) == 1 else None
