"""Atomic and durable files, and locks between processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# Prefix of the temporary files of `atomic_write`.
_WRITING = ".writing-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` when the block ends.

    `path` has either its old or its new content, also after a kill or a power failure. When the block ends, the
    file is on disk. If the block raises, `path` is unchanged. Several processes may write the same file; the last
    one wins. A link is replaced, not followed.

    The temporary file is empty, in the same folder, with a unique name and the last suffixes of `path` in lower
    case. The block writes to it, or moves another file there.
    """
    temporary = path.with_name(f"{_WRITING}{uuid.uuid4().hex}{''.join(path.suffixes[-2:]).lower()}")
    with _file_name_in_errors(path):
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder; links are not followed.

    The caller holds a lock that every writer of the folder takes.
    """
    if folder.is_symlink():
        return
    for left in folder.glob(f"{_WRITING}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def write_file(file: Path, parts: Iterable[bytes], mode: int = 0o666) -> str:
    """Write a new file durably; return the SHA-256, in hex, of its content."""
    digest = hashlib.sha256()
    with (
        _file_name_in_errors(file),
        os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle,
    ):
        for part in parts:
            digest.update(part)
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def replace_file(file: Path, content: bytes, temporary: Path, mode: int = 0o666) -> None:
    """Write or replace a file atomically and durably, by way of a temporary file in the same folder."""
    try:
        write_file(temporary, [content], mode)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Synchronise the entries of a folder to disk."""
    with _file_name_in_errors(folder):
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _file_name_in_errors(path: Path) -> Iterator[None]:
    """Add the file name to system errors without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def exclusive_lock(file: Path, patience_s: float = 0) -> AbstractContextManager[Any]:
    """Acquire a lock between processes and threads; leaving the returned context releases it.

    The kernel releases the lock when the process ends for any reason. The empty file remains. A thread that holds
    the lock may acquire it again.

    Raises `TimeoutError` if another process or thread still holds the lock after `patience_s` seconds: 0 does not
    wait, and ``math.inf`` waits until the lock is free.
    """
    # One lock object per file: a process cannot acquire the same file lock twice.
    lock = kept_lock(file.parent.resolve() / file.name)
    with _file_name_in_errors(file):
        held: AbstractContextManager[Any] = lock.acquire(timeout=patience_s)
    return held


@cache
def kept_lock(file: Path) -> Any:
    """Return the lock object of a file, always the same one.

    It is cached because its destructor could swallow a Ctrl-C.
    """
    from filelock import FileLock

    return FileLock(file)
