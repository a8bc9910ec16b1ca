"""Errors of training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterable


class CspineTrainError(Exception):
    """Base of all errors that `cspine_train` raises on purpose: one line that names the problem and the remedy."""


class RunError(CspineTrainError):
    """A run folder, or a request about it, is unusable."""


class ModelError(CspineTrainError, ValueError):
    """A model, an encoder or its weights are unavailable.

    Attributes
    ----------
    details : tuple of str
        Further lines, such as the tensors that do not fit.
    """

    def __init__(self, message: str, details: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


def error_message(name: str, error: Exception) -> str:
    """Return any error as one line, about the file of that name."""
    from cspine_data.tools import describe_problem

    return str(error) if isinstance(error, CspineTrainError) else describe_problem(name, error).message


def reason_of(error: Exception) -> str:
    """Return the text of an error of a library as one line of at most 200 characters; its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
