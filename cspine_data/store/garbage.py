"""Find and delete unused data of a store: replaced and removed cases, and files of killed runs."""

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

#: A week: longer than a training run, which keeps reading the digests that it started with.
GRACE_S = 7 * 24 * 3600.0
# Writing a case takes less than this. Younger files may belong to a running job, even with a short grace period.
_WRITING_S = 3600.0


@dataclass(frozen=True)
class Garbage:
    """An unused folder or file of a store.

    Attributes
    ----------
    path : Path
        Its path.
    size_bytes : int
        Its size on disk.
    unused_s : float
        Seconds since it was written, replaced, removed, or last used by a run of `prepare`.
    """

    path: Path
    size_bytes: int
    unused_s: float


def find_garbage(path: str | Path) -> list[Garbage]:
    """Find unused data of a store, except for data that may just be written."""
    path = Path(path)
    return [Garbage(place, _size(place), unused_s) for place, unused_s in _unused(path, read_root(path)).items()]


def unused_for(found: Iterable[Garbage], grace_s: float) -> list[Garbage]:
    """Return the data that have been unused for a grace period in seconds."""
    if not grace_s >= 0:
        raise InputError(f"grace {grace_s:g} s", "is no valid time", "give 0 or more")
    return [one for one in found if one.unused_s >= grace_s]


def collect_garbage(path: str | Path, *, grace_s: float = GRACE_S, delete: bool = False) -> list[Garbage]:
    """Find unused data of a store, and delete them if requested.

    Data that were in use within the grace period are kept: a reader that opened the store before may still read them,
    and a run of `prepare` may be about to publish them.

    Parameters
    ----------
    path : str or Path
        The store.
    grace_s : float
        The grace period in seconds.
    delete : bool
        Delete the data; by default they are only listed.

    Returns
    -------
    list of Garbage
        The data that were deleted, or would be.

    Raises
    ------
    InputError
        If the grace period is negative or NaN.
    StoreError
        If there is no store, it is damaged, or cannot be written to.
    """
    path = Path(path)
    found = unused_for(find_garbage(path), grace_s)
    if not delete or not found:
        return found
    renamed: dict[Path, Garbage] = {}
    with locked(path):
        # Checked again under the lock, since a run may have published it; renamed data can no longer be reused.
        unused = _unused(path, read_root(path))
        for one in found:
            aside = one.path.with_name(f"{REMOVED}{uuid.uuid4().hex}")
            if unused.get(one.path, -1.0) >= grace_s:
                with suppress(FileNotFoundError):
                    one.path.rename(aside)
                    renamed[aside] = one
    # Otherwise a power failure could restore a partly deleted folder under its old name with an intact record.
    for folder in {aside.parent for aside in renamed}:
        sync_folder(folder)
    for aside in renamed:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    return list(renamed.values())


def _unused(path: Path, root: RootRecord) -> dict[Path, float]:
    """Return unused data with the seconds since their last use, except for data that may just be written."""
    now = time.time()
    ages = {place: now - _last_used(place) for place in sorted(_unlisted(path, root))}
    return {
        place: unused_s
        for place, unused_s in ages.items()
        if unused_s >= (_WRITING_S if _is_being_written(place) else 0.0)
    }


def _unlisted(path: Path, root: RootRecord) -> Iterator[Path]:
    """Find files and folders of cspine that the root does not list; links are skipped."""
    cases = path / CASES
    folders = [folder for folder in _inside(cases) if _is_folder(folder)] if _is_folder(cases) else []
    for folder in (path, cases) if folders else (path,):
        yield from (file for file in _inside(folder) if _is_hidden(file))
    for folder in folders:
        if folder.name.startswith("."):
            continue
        listed = set(root.cases.get(folder.name, {}).values())
        inside = _inside(folder)
        unlisted = [file for file in inside if _is_hidden(file) or (_is_digest(file) and file.name not in listed)]
        if not listed and len(unlisted) == sum(file.name != METADATA for file in inside):
            yield folder
        else:
            yield from unlisted


def _last_used(place: Path) -> float:
    """Return the time of last use: of a digest, the time of its folder; else that of the newest file."""
    own = [state.st_mtime for state in _states(place, deep=not _is_digest(place))]
    # A file that vanishes meanwhile is in use.
    return max(own, default=time.time())


def _size(place: Path) -> int:
    return sum(state.st_blocks * 512 for state in _states(place))


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_being_written(place: Path) -> bool:
    """Return whether a file or folder, or anything in a case's folder, may just be written."""
    if not place.name.startswith("."):
        return any(map(_is_being_written, _inside(place))) if _is_folder(place) and not _is_digest(place) else False
    return place.name.startswith((UNFINISHED, TEMPORARY))


def _states(place: Path, *, deep: bool = True) -> list[os.stat_result]:
    """Return the states of a file, or of a folder and its contents, except for files that vanish meanwhile."""
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
