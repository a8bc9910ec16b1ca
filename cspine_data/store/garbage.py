"""Finding and deleting what a store's root no longer names: replaced and removed cases, what killed runs left."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cspine_data.errors import InputError
from cspine_data.files import sync_folder
from cspine_data.store.publishing import REMOVED, TEMPORARY, UNFINISHED, locked
from cspine_data.store.records import read_root
from cspine_data.store.schema import CASES, DIGEST, RootRecord
from cspine_data.store.writer import METADATA

#: A week: longer than a training run reads the digests that it began with.
GRACE_S = 7 * 24 * 3600.0
# No case takes so long to write: what is younger may be a running one's, however short the time of grace.
_WRITING_S = 3600.0


@dataclass(frozen=True)
class Garbage:
    """A folder or file of a store that nothing names.

    Attributes
    ----------
    path : Path
        Where it lies.
    size_bytes : int
        What it takes on disk.
    unused_s : float
        Seconds since it was written, replaced, removed, or last used by a run of `prepare`.
    """

    path: Path
    size_bytes: int
    unused_s: float


def find_garbage(path: str | Path) -> list[Garbage]:
    """Find what no case of a store names, but for what may be being written.

    Raises
    ------
    StoreError
        If there is no store, or it is damaged.
    """
    path = Path(path)
    return [Garbage(place, _size(place), unused_s) for place, unused_s in _unused(path, read_root(path)).items()]


def unused_for(found: Iterable[Garbage], grace_s: float) -> list[Garbage]:
    """Return what has been unused for a time of grace, seconds.

    Raises
    ------
    InputError
        If that is negative or no number.
    """
    if not grace_s >= 0:
        raise InputError(f"grace {grace_s:g} s", "is no time", "give 0 or more")
    return [one for one in found if one.unused_s >= grace_s]


def collect_garbage(path: str | Path, *, grace_s: float = GRACE_S, delete: bool = False) -> list[Garbage]:
    """Find what no case of a store names, and delete it if told so.

    Nothing is touched that was named, written or used within the time of grace: a reader that opened the store before
    may still read it, a run of `prepare` that goes on may be about to publish it.

    Parameters
    ----------
    path : str or Path
        The store.
    grace_s : float
        The time of grace, seconds.
    delete : bool
        Delete it; else it is only listed.

    Returns
    -------
    list of Garbage
        What was deleted, or would be.

    Raises
    ------
    InputError
        If the time of grace is negative or no number.
    StoreError
        If there is no store, it is damaged, or cannot be written to.
    """
    path = Path(path)
    found = unused_for(find_garbage(path), grace_s)
    if not delete or not found:
        return found
    doomed: dict[Path, Garbage] = {}
    with locked(path):
        # Again, now that no run can publish any of it; what is set aside here can no more be found and used again.
        unused = _unused(path, read_root(path))
        for one in found:
            aside = one.path.with_name(f"{REMOVED}{uuid.uuid4().hex}")
            if unused.get(one.path, -1.0) >= grace_s:
                with suppress(FileNotFoundError):
                    one.path.rename(aside)
                    doomed[aside] = one
    # Else a power failure could bring back a part of a folder, under its old name and with its record whole.
    for folder in {aside.parent for aside in doomed}:
        sync_folder(folder)
    for aside in doomed:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    return list(doomed.values())


def _unused(path: Path, root: RootRecord) -> dict[Path, float]:
    """Return what nothing names, and for how many seconds nobody has used it; not what may be being written."""
    now = time.time()
    ages = {place: now - _last_used(place) for place in sorted(_unnamed(path, root))}
    return {
        place: unused_s
        for place, unused_s in ages.items()
        if unused_s >= (_WRITING_S if _is_being_written(place) else 0.0)
    }


def _unnamed(path: Path, root: RootRecord) -> Iterator[Path]:
    """Find what lies where cspine writes, looks like what it writes, and is not named; no links."""
    cases = path / CASES
    folders = [folder for folder in _inside(cases) if _is_folder(folder)] if _is_folder(cases) else []
    for folder in (path, cases) if folders else (path,):
        yield from (file for file in _inside(folder) if _is_hidden(file))
    for folder in folders:
        if folder.name.startswith("."):
            continue
        named = set(root.cases.get(folder.name, {}).values())
        inside = _inside(folder)
        unnamed = [file for file in inside if _is_hidden(file) or (_is_digest(file) and file.name not in named)]
        if not named and len(unnamed) == sum(file.name != METADATA for file in inside):
            yield folder
        else:
            yield from unnamed


def _last_used(place: Path) -> float:
    """Return when something was last used: a digest as its own mark says, else as its youngest file does."""
    own = [state.st_mtime for state in _states(place, deep=not _is_digest(place))]
    # What vanishes while it is looked at is in use.
    return max(own, default=time.time())


def _size(place: Path) -> int:
    return sum(state.st_blocks * 512 for state in _states(place))


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_being_written(place: Path) -> bool:
    """Tell whether something may be; of a case's folder, whether anything in it may be."""
    if not place.name.startswith("."):
        return any(map(_is_being_written, _inside(place))) if _is_folder(place) and not _is_digest(place) else False
    return place.name.startswith((UNFINISHED, TEMPORARY))


def _states(place: Path, *, deep: bool = True) -> list[os.stat_result]:
    """Return the states of a file, or of a folder and all that is in it; what vanishes meanwhile is left out."""
    states = []
    for file in (place, *(place.rglob("*") if deep and _is_folder(place) else ())):
        with suppress(FileNotFoundError):
            states.append(file.lstat())
    return states


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_digest(path: Path) -> bool:
    return bool(DIGEST.fullmatch(path.name)) and _is_folder(path)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith((UNFINISHED, TEMPORARY, REMOVED)) and not path.is_symlink()
