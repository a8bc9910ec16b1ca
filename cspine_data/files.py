"""Writing files that survive a kill and a power failure, by one process at a time."""

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

# Prefix of the files that `atomic_write` has not finished.
_WRITING = ".writing-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` when the block ends.

    The file is at `path` whole or not at all, also after a kill or a power failure. When the block ends, it is on the
    disk. Where the block raises, `path` stays as it was. Several processes may write the same file; the last one wins.

    Parameters
    ----------
    path : Path
        The file to write, in a folder that exists. A link is replaced, not followed.

    Yields
    ------
    Path
        An empty file in the same folder, with a name of its own and the last suffixes of `path` in lower case. The
        block writes to it, or moves another file there.

    Raises
    ------
    OSError
        If the file cannot be written; it names a file.

    Examples
    --------
    >>> with atomic_write(folder / "curves.png") as temporary:
    ...     figure.savefig(temporary, format="png")
    """
    temporary = path.with_name(f"{_WRITING}{uuid.uuid4().hex}{''.join(path.suffixes[-2:]).lower()}")
    with _naming(path):
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` that killed processes left in a folder; links are not followed.

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
    """Write a new file, durably; return the SHA-256, in hex, of what was to be written."""
    digest = hashlib.sha256()
    with _naming(file), os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle:
        for part in parts:
            digest.update(part)
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def replace_file(file: Path, content: bytes, temporary: Path, mode: int = 0o666) -> None:
    """Write a file, or replace it, in one step and durably; a temporary one lies beside it meanwhile."""
    try:
        write_file(temporary, [content], mode)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that they survive a power failure."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    with _naming(folder):
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the system say of which file it is: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def exclusive_lock(file: Path, patience_s: float = 0) -> AbstractContextManager[Any]:
    """Take a lock that no other process or thread holds; the context that is returned releases it.

    The kernel frees the lock when the process ends, however it ends. The empty file stays. A thread that holds the
    lock may take it again.

    Parameters
    ----------
    file : Path
        The lock's file, in a folder that exists.
    patience_s : float
        Seconds to wait for another holder; 0 does not wait, and ``math.inf`` waits until the lock is free.

    Raises
    ------
    TimeoutError
        If another process or thread still holds the lock.
    OSError
        If the file cannot be opened.
    """
    # The same lock under all its names: the kernel refuses a process that opens its own lock a second time.
    lock = kept_lock(file.parent.resolve() / file.name)
    with _naming(file):
        held: AbstractContextManager[Any] = lock.acquire(timeout=patience_s)
    return held


@cache
def kept_lock(file: Path) -> Any:
    """Return the lock that a file stands for, always the same one.

    Kept, since dropping it runs its destructor, and Python loses a Ctrl-C that arrives within a destructor.
    """
    from filelock import FileLock

    return FileLock(file)
