"""Command-line options generated from the fields of `RunSettings`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
import cloup
from pydantic import BaseModel, ValidationError

from cspine_data import GivenSplit
from cspine_data.typed_options import field_option
from cspine_train.run.folder import RECORD_NAME
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
    """Return the settings of a command's options; a `click.UsageError` for values that are invalid or contradict.

    The file of ``--split`` is read here, and not by `RunSettings`: the record of an untrusted run must read no file.
    """
    if isinstance(options.get("split"), str):
        options |= {"split": _fold_of_file(options["split"], options["fold"]), "fold": 0}
    return record_of(RunSettings, **options)


def record_of(model: type[Model], /, **options: Any) -> Model:
    """Return a record of options; a `click.UsageError` for values that are invalid or contradict."""
    try:
        return model(**options)
    except ValidationError as error:
        raise click.UsageError(problem_of(error, model)) from None


def with_recorded_split(options: dict[str, Any], run: Path | None) -> dict[str, Any]:
    """Return options with the recorded split of the run to resume, if the split file is gone."""
    if run is None or not options["split"] or Path(options["split"]).exists() or not (run / RECORD_NAME).exists():
        return options
    from cspine_train.run.record import load_record

    recorded = load_record(run).settings.split
    return options | {"split": recorded, "fold": 0} if recorded and recorded.fold == options["fold"] else options


def with_settings_of_origin(options: dict[str, Any], run: Path | None) -> dict[str, Any]:
    """Return options with the settings of the run of ``--from`` for those that are not on the command line.

    If that run is gone, they are those of the run to resume.
    """
    if options["from_run"] is None:
        return options
    from cspine_train.run.record import load_record

    origin = Path(options["from_run"])
    if run is not None and not (origin / RECORD_NAME).exists() and (run / RECORD_NAME).exists():
        origin = run
    source = click.get_current_context().get_parameter_source
    given = {name for name in options if source(name) is click.core.ParameterSource.COMMANDLINE}
    inherited = load_record(origin).inherited_settings
    return options | {name: value for name, value in inherited.items() if name not in given}


def _fold_of_file(path: str, fold: int) -> GivenSplit:
    from cspine_data import read_splits

    folds = read_splits(path)
    if fold >= len(folds):
        raise click.UsageError(f"--fold {fold}: is none of the {len(folds)} folds of {path}, which are counted from 0")
    return folds[fold]
