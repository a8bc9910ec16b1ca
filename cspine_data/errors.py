"""Exceptions and one-line messages: which file, what is wrong, what to do."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_LONG_NUMBER = re.compile(r"\d{30,}")
# Unicode categories of control, format, surrogate, private and unassigned characters, and of line separators.
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
    """Return a one-line message for an error of the operating system: the file, the cause and the remedy."""
    where = f"{error.filename}: " if error.filename else ""
    return printable(
        f"{where}{error.strerror or error}; {_REMEDIES.get(error.errno or 0, 'fix this and run it again')}"
    )


def printable(text: str) -> str:
    """Replace control characters and line breaks by ``?``, since a file name may contain any character."""
    return "".join("?" if unicodedata.category(letter) in _NOT_PRINTED else letter for letter in text)


class CspineDataError(Exception):
    """Base class of all errors that `cspine_data` raises.

    The message is one line: the subject, the problem and the remedy.
    """


class InputError(CspineDataError, ValueError):
    """A file, folder or value given by the user cannot be used.

    Parameters
    ----------
    subject : Path or str
        The file, folder or option with the problem.
    problem : str
        What is wrong with it.
    remedy : str
        What the user can do about it.
    """

    def __init__(self, subject: Path | str, problem: str, remedy: str) -> None:
        # A damaged header may claim a number of thousands of digits.
        problem = _LONG_NUMBER.sub(lambda number: f"{number[0][:6]}...", problem)
        super().__init__(printable(f"{subject}: {problem}; {remedy}"))
        self.subject = subject
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[Path | str, str, str]]:
        """Pickle the three parts, so that the error can be sent between processes."""
        return type(self), (self.subject, self.problem, self.remedy)


class StoreError(CspineDataError):
    """A store cannot be used, or not in the requested way."""


class NewerSchemaError(StoreError):
    """The store was written by a newer version of cspine."""


class DamagedStoreError(StoreError, OSError):
    """Bytes of the store do not match their checksums."""


class NotInStoreError(StoreError, KeyError):
    """The store does not contain the requested case, variant, axis or split."""

    def __str__(self) -> str:
        """Return the message without the quotes that `KeyError` adds."""
        return str(self.args[0])


@dataclass(frozen=True)
class Problem:
    """A file or case that cannot be used, with a one-line message."""

    case: str
    message: str
    copy_of: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some_of(things: Sequence[object], most: int = 3) -> str:
    """Return the first of some things as text, with dots if there are more."""
    return ", ".join(map(str, things[:most])) + ", ..." * (len(things) > most)


def meant(name: str, known: Iterable[str]) -> str:
    """Return a suggestion in brackets: the known name most similar to an unknown one; empty if none is similar."""
    from difflib import get_close_matches

    return "".join(f" (did you mean {one}?)" for one in get_close_matches(name, known, n=1))


def describe_problem(case_id: str, error: BaseException) -> Problem:
    """Convert an exception raised while processing a case to a one-line problem."""
    if isinstance(error, CspineDataError):
        return Problem(case_id, str(error))
    if isinstance(error, OSError):
        return Problem(case_id, describe_os_error(error))
    if isinstance(error, MemoryError):
        return Problem(case_id, f"{case_id}: memory ran out; use fewer --workers")
    return Problem(case_id, f"{case_id}: failed unexpectedly ({type(error).__name__}: {error}); please report this")


def describe_lost(case_id: str, subject: object, reason: str | Exception) -> Problem:
    """Return the problem of a task that no worker could finish: of a file or case, for a reason of `side_by_side`."""
    if isinstance(reason, Exception):
        return describe_problem(case_id, reason)
    return Problem(case_id, f"{subject}: {reason}")
