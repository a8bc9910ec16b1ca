"""Command-line options generated from the fields of `RunSettings`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click
import cloup
from pydantic import BaseModel, ValidationError

from cspine_data.typed_options import field_option
from cspine_train.run.settings import (
    DataSettings,
    ModelSettings,
    OptimisationSettings,
    PostprocessingSettings,
    problem_of,
)

Command = TypeVar("Command", bound=Callable[..., Any])
Model = TypeVar("Model", bound=BaseModel)
_PARTS: tuple[type[BaseModel], ...] = (ModelSettings, DataSettings, OptimisationSettings, PostprocessingSettings)


def setting_options(omit: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add an option for each field of `RunSettings` to a command, grouped by parts, except those in `omit`."""

    def decorate(command: Command) -> Command:
        for part in reversed(_PARTS):
            options = [field_option(part, name) for name in part.model_fields if name not in omit]
            title = (part.__doc__ or "").strip().rstrip(".")
            command = cloup.option_group(title, *options)(command)
        return command

    return decorate


def record_of(model: type[Model], options: Mapping[str, Any]) -> Model:
    """Return a record of those of a command's options that are its fields.

    Raises a `click.UsageError` for values that are invalid or contradict.
    """
    try:
        return model(**{name: value for name, value in options.items() if name in model.model_fields})
    except ValidationError as error:
        raise click.UsageError(problem_of(error, model)) from None
