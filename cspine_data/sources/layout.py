"""What a cohort layout is: how a folder is recognised, and how its cases are found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cspine_data.errors import Problem
from cspine_data.sources.cases import Case
from cspine_data.sources.file_names import is_visible_volume, name_of

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
        Files that cannot be used.
    others : list of Case
        Volumes that are used only if their sequence is asked for, such as nnU-Net's second channels.
    notes : list of str
        What was left out.
    """

    cases: list[Case] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
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


def volume_files(folder: Path, wanted: Wanted) -> tuple[list[Path], list[Problem]]:
    """Return the volumes in a folder by their names, and problems with entries that are no files."""
    named = sorted(path for path in folder.iterdir() if is_visible_volume(path) and wanted(path))
    problem = "is called like a volume and is no file; fetch the file behind it, or remove it"
    return (
        [path for path in named if path.is_file()],
        [Problem(name_of(path), f"{path}: {problem}") for path in named if not path.is_file()],
    )


def folders_in(folder: Path) -> Iterator[Path]:
    """Iterate over a folder and all folders below it, sorted, without hidden ones and links."""
    for home, names, _ in os.walk(folder):
        depth = len(Path(home).relative_to(folder).parts)
        names[:] = sorted(name for name in names if not name.startswith(".")) if depth < _DEEPEST else []
        yield Path(home)


def pair(
    volumes: dict[Path, str], owners: dict[Path, str], missing: str
) -> tuple[list[tuple[Path, Path | None]], list[Problem]]:
    """Pair volumes with label maps of the same name.

    Parameters
    ----------
    volumes : dict
        The name of each volume.
    owners : dict
        The name of each label map's volume.
    missing : str
        What to do about a label map without a volume; ``{}`` is its name.

    Returns
    -------
    list of tuple
        Volumes with their label maps or None.
    list of Problem
        Label maps without a volume, and volumes with several label maps.
    """
    problems: list[Problem] = []
    labels: dict[str, list[Path]] = {}
    for path, name in owners.items():
        labels.setdefault(name, []).append(path)
    names = set(volumes.values())
    for name in sorted(labels.keys() - names):
        for path in labels[name]:
            problems.append(Problem(name, f"{path}: is a label map without a volume; {missing.format(name)}"))
    pairs: list[tuple[Path, Path | None]] = []
    for path, name in volumes.items():
        claims = labels.get(name, [])
        if len(claims) > 1:
            problems.append(several_label_maps(name, claims))
        else:
            pairs.append((path, claims[0] if claims else None))
    return pairs, problems


def several_label_maps(name: str, claims: Iterable[Path]) -> Problem:
    """Return the problem of a volume with several label maps."""
    both = " and ".join(map(str, claims))
    return Problem(name, f"{both}: are all label maps of {name!r}; keep one of them, or --exclude the others")
