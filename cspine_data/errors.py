"""What can go wrong, as a user meets it: which file, what is wrong, what to do."""

from __future__ import annotations

import errno
import unicodedata
from pathlib import Path

# Control, direction and half characters, unassigned ones, and those that end a line.
_NOT_PRINTED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_REMEDIES = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some space and run it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and run it again",
    errno.ENFILE: "close other programs and run it again",
    errno.EACCES: "make it readable and writable for you, or choose another place",
    errno.EPERM: "make it readable and writable for you, or choose another place",
    errno.EROFS: "choose a place that can be written to",
}


def describe_os_error(error: OSError) -> str:
    """Say in one line what the operating system refused, of which file, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    return printable(
        f"{where}{error.strerror or error}; {_REMEDIES.get(error.errno or 0, 'mend that and run it again')}"
    )


def printable(text: str) -> str:
    """Return a text that is one line and does nothing to a terminal: a file's name may hold any character."""
    return "".join("?" if unicodedata.category(letter) in _NOT_PRINTED else letter for letter in text)


class CspineDataError(Exception):
    """Base of every error that `cspine_data` raises on purpose.

    The message is one line: what it is about, what is wrong, what to do.
    """


class InputError(CspineDataError, ValueError):
    """A file, a folder or a value that a user gave cannot be used.

    Parameters
    ----------
    subject : Path or str
        The file, folder or option that is at fault.
    problem : str
        What is wrong with it.
    remedy : str
        What the user can do about it.
    """

    def __init__(self, subject: Path | str, problem: str, remedy: str) -> None:
        super().__init__(printable(f"{subject}: {problem}; {remedy}"))
        self.subject = subject
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[Path | str, str, str]]:
        """Rebuild from the three parts, so that the error crosses process borders."""
        return type(self), (self.subject, self.problem, self.remedy)


class StoreError(CspineDataError):
    """A store cannot be used as it is, or not in the way that was asked."""


class NewerSchemaError(StoreError):
    """The store was written by a newer version of cspine."""


class DamagedStoreError(StoreError, OSError):
    """Bytes of the store are not what was written: reading stops here."""


class NotInStoreError(StoreError, KeyError):
    """A case, variant, axis or split that the store does not hold."""

    def __str__(self) -> str:
        """Return the message as it is: `KeyError` would quote it."""
        return str(self.args[0])
