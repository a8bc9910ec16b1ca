"""Command-line options generated from the fields of `RunSettings`."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    RunSettings,
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


def settings_of(**options: Any) -> RunSettings:
    """Return the settings of a command's options; a `click.UsageError` for values that are invalid or contradict."""
    return record_of(RunSettings, **options)


def record_of(model: type[Model], /, **options: Any) -> Model:
    """Return a record of options; a `click.UsageError` for values that are invalid or contradict."""
    try:
        return model(**options)
    except ValidationError as error:
        raise click.UsageError(problem_of(error, model)) from None
