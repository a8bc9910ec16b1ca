"""What can go wrong in training and prediction, as a user meets it."""

from __future__ import annotations


class CspineTrainError(Exception):
    """Base of every error that `cspine_train` raises on purpose: one line, what is wrong and what to do."""


class RunError(CspineTrainError):
    """A run folder cannot be used as it is, or not in the way that was asked."""


class ModelError(CspineTrainError, ValueError):
    """A model, an encoder or its weights cannot be had."""
