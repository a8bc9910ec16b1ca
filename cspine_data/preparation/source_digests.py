"""What source files hold, by SHA-256; a file is hashed again only when its size or times have changed.

The rule is git's: a file with the same size, times and inode as when it was hashed is taken for unchanged. A file that
was written shortly before it was hashed could change once more without changing its times, so it is hashed each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cspine_data.files import replace_file
from cspine_data.store.schema import record_checksum
from cspine_data.volumes.io import content_digest, source_files

# The coarsest times of any file system (FAT); those of others are at most 10 ms late.
_COARSEST_NS = 2_000_000_000
_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Digested:
    """What a source held when it was hashed.

    Attributes
    ----------
    sha256 : str
        Of its bytes, see `content_digest`.
    state : str or None
        Of its files' names, sizes, times and inodes. None where these could stay the same when the bytes change.
    in_one_file : bool
        Whether it is a single file: no folder, and no header with a data file beside it.
    """

    sha256: str
    state: str | None
    in_one_file: bool = False

    def is_still(self, path: Path) -> bool:
        """Return whether a source holds the same bytes; they are read only where its state does not tell.

        Raises
        ------
        InputError, OSError
            If it cannot be read.
        """
        return self.state == _state(source_files(path)) or self.sha256 == content_digest(path)


def digest_source(path: Path) -> Digested:
    """Hash everything that a volume is read from.

    Parameters
    ----------
    path : Path
        A file, or a folder of DICOM slices.

    Raises
    ------
    InputError
        If it is no volume, or too long.
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
    """A file that remembers the digests of sources, by digests of their paths: a path may name a patient.

    Parameters
    ----------
    file : Path
        Where it lies; readable by its owner only. What cannot be read or written there costs time and nothing else.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = _read(file)
        self._new: dict[str, list[Any]] = {}

    def find(self, path: Path) -> Digested | None:
        """Return what a source was when it was hashed, if it has not changed since."""
        try:
            known = Digested(*self._entries[_key(path)])
            unchanged = known.state == _state([path] if known.in_one_file else source_files(path))
        except (KeyError, TypeError, ValueError, OSError):
            return None
        return known if unchanged else None

    def add(self, path: Path, digested: Digested) -> None:
        """Remember a source, if a later change would show."""
        if digested.state is not None:
            self._new[_key(path)] = [digested.sha256, digested.state, digested.in_one_file]

    def save(self) -> None:
        """Write what was added, beside what another process has added meanwhile."""
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
    # The time of the last change of any kind and the inode tell of a file that replaces one of the same size and age.
    facts = [
        (os.fsencode(file.name), one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino)
        for file in files
        for one in [file.stat()]
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
