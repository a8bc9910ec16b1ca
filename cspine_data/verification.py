"""Finding what in a store is not what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cspine_data import schema
from cspine_data.publishing import write_empty_group, write_record
from cspine_data.schema import CaseRecord, RootRecord
from cspine_data.store import is_older, metadata_is_intact, read_root, stored_record
from cspine_data.writer import METADATA

#: What is said of a file that a case does not name.
STRAY = "does not belong there"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Damage:
    """One thing in a store that is not what was written.

    Attributes
    ----------
    case, variant : str
        Whose it is; empty for what belongs to the whole store, or to all variants of a case.
    where : str
        The array or file, by its path within the variant's folder, or within the store.
    problem : str
        What is wrong with it.
    """

    case: str
    variant: str
    where: str
    problem: str

    def __str__(self) -> str:
        whose = f"{self.case} ({self.variant})" if self.variant else self.case or "store"
        return f"{whose}: {self.where}: {self.problem}"


def verify(path: str | Path, progress: Progress | None = None) -> list[Damage]:
    """Hold every file that belongs to a store against its checksum.

    Parameters
    ----------
    path : str or Path
        The store.
    progress : callable, optional
        Called with (cases finished, cases, case id).

    Returns
    -------
    list of Damage
        Empty where the store is sound.

    Raises
    ------
    StoreError
        If there is no store, or its root is damaged.
    """
    path = Path(path)
    root = read_root(path)
    damages = list(_damaged_groups(path, root))
    published = [(case, variant, digest) for case, named in root.cases.items() for variant, digest in named.items()]
    # Hashing lets other threads run, and a disk serves several readers faster than one.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda one: _verify_case(path, *one), published)
        for number, ((case, _, _), of_case) in enumerate(zip(published, found, strict=True), start=1):
            damages += of_case
            if progress:
                progress(number, len(published), case)
    return damages


def mend_groups(path: Path) -> None:
    """Write the metadata of the groups that hold no case's voxels again, where it is damaged."""
    root = read_root(path)
    for damage in _damaged_groups(path, root):
        folder = (path / damage.where).parent
        if folder == path:
            write_record(path, root)
        else:
            write_empty_group(folder, anew=True)


def _damaged_groups(path: Path, root: RootRecord) -> Iterator[Damage]:
    """Find damage around the records: in the root's file, and in the groups that hold the cases."""
    if not metadata_is_intact(path):
        yield Damage("", "", METADATA, "is not what was written")
    groups = [("", path / "cases"), *((case, path / "cases" / case) for case in root.cases)]
    for case, group in groups if root.cases else ():
        where = str((group / METADATA).relative_to(path))
        if not (group / METADATA).is_file():
            yield Damage(case, "", where, "is missing")
        elif (group / METADATA).read_bytes() != schema.group_bytes({}):
            yield Damage(case, "", where, "is not what was written")


def _verify_case(path: Path, case: str, variant: str, digest: str) -> list[Damage]:
    record = stored_record(path, case, digest)
    if record is None:
        older = is_older(path, case, digest)
        problem = "was written by an older cspine; prepare it again" if older else "missing or damaged"
        return [Damage(case, variant, "record", problem)]
    return [Damage(case, variant, where, problem) for where, problem in _problems(path, record)]


def _problems(path: Path, record: CaseRecord) -> Iterator[tuple[str, str]]:
    folder = path / schema.case_path(record.case, record.digest)
    if not metadata_is_intact(folder):
        yield "record", "is not what was written"
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}
    for name, checksum in record.files.items():
        if name not in found:
            yield name, "is missing"
        elif (folder / name).is_symlink() or not (folder / name).is_file():
            yield name, "is no file of its own"
        elif _sha256(folder / name) != checksum:
            yield name, "is not what was written"
    for name in sorted(found - set(record.files) - {METADATA}):
        yield name, STRAY


def _sha256(file: Path) -> str | None:
    """Return a file's checksum; None where the disk does not give it back."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return None
