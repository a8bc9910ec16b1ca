"""Find damage in a store by checking all files against their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cspine_data.errors import StoreError
from cspine_data.progress import Progress
from cspine_data.store import schema
from cspine_data.store.publishing import refuse_links, repair_root, write_empty_group
from cspine_data.store.records import ROOT_COPY, metadata_is_intact, read_metadata, read_root, stored_record
from cspine_data.store.schema import CaseRecord, RootRecord
from cspine_data.store.writer import METADATA

#: The problem of a file that its case's record does not list.
STRAY = "does not belong there"


@dataclass(frozen=True)
class Damage:
    """A damaged file or record of a store.

    Attributes
    ----------
    case, variant : str
        The stored case; empty for the whole store, or for all variants of a case.
    where : str
        Path of the array or file within the variant's folder, or within the store.
    problem : str
        The problem.
    """

    case: str
    variant: str
    where: str
    problem: str

    def __str__(self) -> str:
        owner = f"{self.case} ({self.variant})" if self.variant else self.case or "store"
        return f"{owner}: {self.where}: {self.problem}"


def verify(path: str | Path, progress: Progress | None = None) -> list[Damage]:
    """Check every file of a store against its checksum.

    Parameters
    ----------
    path : str or Path
        The store.
    progress : callable, optional
        Called with (cases finished, cases, case id).

    Returns
    -------
    list of Damage
        Empty if the store is sound.

    Raises
    ------
    StoreError
        If there is no store, or its root is damaged.
    """
    path = Path(path)
    root = read_root(path)
    damages = list(_damaged_groups(path, root))
    published = [(case, variant, digest) for case, named in root.cases.items() for variant, digest in named.items()]
    # Hashing releases the interpreter lock, and disks serve several readers faster than one.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda one: verify_case(path, *one), published)
        try:
            for number, ((case, _, _), of_case) in enumerate(zip(published, found, strict=True), start=1):
                damages += of_case
                if progress:
                    progress(number, len(published), case)
        finally:
            pool.shutdown(cancel_futures=True)
    return damages


def repair_groups(path: Path) -> None:
    """Write damaged metadata of the root and of the groups around cases again; links are refused."""
    for damage in _damaged_groups(path, read_root(path)):
        folder = (path / damage.where).parent
        if folder == path:
            repair_root(path)
        else:
            refuse_links(path / schema.CASES, folder)
            write_empty_group(folder, overwrite=True)


def _damaged_groups(path: Path, root: RootRecord) -> Iterator[Damage]:
    """Find damage in the metadata of the root and of the groups around cases."""
    if not metadata_is_intact(path):
        yield Damage("", "", METADATA, "is not what was written")
    try:
        sound = metadata_is_intact(path, ROOT_COPY) and bool(read_root(path, ROOT_COPY))
    except FileNotFoundError:
        # A killed run may have left no copy, or an older one.
        sound = True
    except (OSError, ValueError, KeyError, TypeError, RecursionError, StoreError):
        sound = False
    if not sound:
        yield Damage("", "", ROOT_COPY, "is not what was written")
    cases = path / schema.CASES
    groups = [("", cases), *((case, cases / case) for case in root.cases)]
    for case, group in groups if root.cases else ():
        where = str((group / METADATA).relative_to(path))
        try:
            if group.is_symlink():
                yield Damage(case, "", where, "is behind a link")
            elif read_metadata(group) != schema.group_bytes({}):
                yield Damage(case, "", where, "is not what was written")
        except FileNotFoundError:
            yield Damage(case, "", where, "is missing")
        except (OSError, ValueError):
            yield Damage(case, "", where, "cannot be read")


def verify_case(path: Path, case: str, variant: str, digest: str) -> list[Damage]:
    """Check every file of one variant of a case against its checksum; see `verify`."""
    if (path / schema.case_path(case, digest)).is_symlink():
        return [Damage(case, variant, "record", "is behind a link")]
    try:
        record = stored_record(path, case, digest)
        if record is None:
            return [Damage(case, variant, "record", "missing or damaged")]
        return [Damage(case, variant, where, problem) for where, problem in _problems(path, record)]
    except OSError as error:
        return [Damage(case, variant, "record", f"cannot be read ({error.strerror})")]


def _problems(path: Path, record: CaseRecord) -> Iterator[tuple[str, str]]:
    folder = path / schema.case_path(record.case, record.digest)
    if not metadata_is_intact(folder):
        yield "record", "is not what was written"
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}
    for name, checksum in record.files.items():
        if name not in found:
            yield name, "is missing"
        elif (folder / name).is_symlink() or not (folder / name).is_file():
            yield name, "is no regular file"
        elif _sha256(folder / name) != checksum:
            yield name, "is not what was written"
    for name in sorted(found - set(record.files) - {METADATA}):
        yield name, STRAY


def _sha256(file: Path) -> str | None:
    """Return the checksum of a file; None if it cannot be read."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return None
