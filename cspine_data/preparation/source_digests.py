"""SHA-256 of source files, in parallel and with a cache: a file is hashed again only if its size or times change.

The rule is git's: a file with the same size, times and inode is considered unchanged. A file that was written shortly
before it was hashed could change again without changing its times, so it is not cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cspine_data.errors import InputError, Problem, describe_lost, describe_problem
from cspine_data.files import replace_file
from cspine_data.parallel.workers import Workers, side_by_side, usable_cores
from cspine_data.sources.cases import Case
from cspine_data.store.schema import record_checksum
from cspine_data.volumes.io import content_digest, source_files

# The coarsest time stamps of any file system (FAT); others are at most 10 ms late.
_COARSEST_NS = 2_000_000_000
_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Digested:
    """The digest of a source and its state when it was hashed.

    Attributes
    ----------
    sha256 : str
        Digest of its bytes, see `content_digest`.
    state : str or None
        Digest of its files' names, sizes, times and inodes. None if these could stay the same when the bytes change.
    in_one_file : bool
        Whether it is a single file, not a folder or a header with a data file.
    """

    sha256: str
    state: str | None
    in_one_file: bool = False

    def is_still(self, path: Path) -> bool:
        """Return whether a source is unchanged; its bytes are read only if its state has changed.

        Raises
        ------
        InputError, OSError
            If it cannot be read.
        """
        return self.state == _state(source_files(path)) or self.sha256 == content_digest(path)


def digest_source(path: Path) -> Digested:
    """Hash all files of a volume.

    Parameters
    ----------
    path : Path
        A file, or a folder of DICOM slices.

    Raises
    ------
    InputError
        If it is not a volume, or too long.
    OSError
        If it cannot be read.
    """
    begun_ns = time.time_ns()
    files = source_files(path)
    before = _state(files)
    sha256 = content_digest(path)
    settled = max((file.stat().st_mtime_ns for file in files), default=begun_ns) < begun_ns - _COARSEST_NS
    same = settled and before == _state(source_files(path))
    return Digested(sha256, before if same else None, in_one_file=files == [path])


class DigestCache:
    """A file of the digests of sources. Paths are hashed too, since they may contain patient names.

    Parameters
    ----------
    file : Path
        The cache file, readable by its owner only. If it cannot be read or written, sources are hashed again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = _read(file)
        self._new: dict[str, list[Any]] = {}

    def find(self, path: Path) -> Digested | None:
        """Return the digest of a source if it has not changed since it was hashed."""
        try:
            known = Digested(*self._entries[_key(path)])
            unchanged = known.state == _state([path] if known.in_one_file else source_files(path))
        except (KeyError, TypeError, ValueError, OSError):
            return None
        return known if unchanged else None

    def add(self, path: Path, digested: Digested) -> None:
        """Add a source, if a later change of it could be detected."""
        if digested.state is not None:
            self._new[_key(path)] = [digested.sha256, digested.state, digested.in_one_file]

    def save(self) -> None:
        """Write the added entries, keeping those that another process has added."""
        if not self._new:
            return
        entries = _read(self._file) | self._new
        content = json.dumps({"entries": entries, "checksum": record_checksum(entries)}).encode()
        with suppress(OSError):
            replace_file(
                self._file, content, self._file.with_name(f"{self._file.name}-{uuid.uuid4().hex}"), _OWNER_ONLY
            )


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
        entries: dict[str, list[Any]] = content["entries"]
        return entries if content["checksum"] == record_checksum(entries) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()


def _state(files: Sequence[Path]) -> str:
    # The change time and the inode detect a file that was replaced by one of the same size and modification time.
    facts = [
        (os.fsencode(file.name), one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino)
        for file in files
        for one in [file.stat()]
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def files_of(case: Case) -> list[Path]:
    """Return the volume of a case, and its label map if there is one."""
    return [case.volume, case.label] if case.label else [case.volume]


def digest_file(path: Path) -> Digested | Problem:
    """Hash a volume or label map; a problem if it cannot be used."""
    try:
        return digest_source(path)
    except (InputError, OSError) as error:
        return describe_problem("", error)


def digest_files(
    cases: Iterable[Case], store: Path, workers: Workers, *, rehash: bool = False
) -> dict[Path, Digested | Problem]:
    """Return the digest of each file of the cases, or its problem; unchanged files are not read.

    The cache is a hidden file beside the store.
    """
    cache = DigestCache(store.with_name(f".{store.name}.digests.json"))
    paths = list(dict.fromkeys(path for case in cases for path in files_of(case)))
    found: dict[Path, Digested | Problem] = {}
    if not rehash:
        found |= {path: known for path in paths if (known := cache.find(path))}
    try:
        for path, digested in _hash([path for path in paths if path not in found], workers):
            found[path] = digested
            if isinstance(digested, Digested):
                cache.add(path, digested)
    finally:
        cache.save()
    return found


def _hash(paths: Sequence[Path], workers: Workers) -> Iterator[tuple[Path, Digested | Problem]]:
    """Hash files in parallel, on the workers of a scheduler or in threads."""
    if workers.scheduler is not None:

        def lost(path: Path, reason: str | Exception) -> Problem:
            return describe_lost("", path, reason)

        for finished in side_by_side(digest_file, paths, lost, workers):
            yield from finished
        return
    # Reading and hashing release the interpreter lock: threads are as fast as processes and start at once.
    pool = ThreadPoolExecutor(workers.number or usable_cores())
    try:
        yield from zip(paths, pool.map(digest_file, paths), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
