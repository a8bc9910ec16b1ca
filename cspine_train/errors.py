"""What can go wrong in training and prediction, as a user meets it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CspineTrainError(Exception):
    """Base of every error that `cspine_train` raises on purpose: one line, what is wrong and what to do."""


class RunError(CspineTrainError):
    """A run folder cannot be used as it is, or not in the way that was asked."""


class ModelError(CspineTrainError, ValueError):
    """A model, an encoder or its weights cannot be had.

    Attributes
    ----------
    details : tuple of str
        Lines of a table, where one line cannot tell all that is wrong.
    """

    def __init__(self, message: str, details: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


def error_told(name: str, error: Exception) -> str:
    """Return one line on what went wrong with something of that name, whatever was raised."""
    from cspine_data.tools import describe_problem

    return str(error) if isinstance(error, CspineTrainError) else describe_problem(name, error).message


def meant(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearest to one that is not, in brackets; nothing where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
