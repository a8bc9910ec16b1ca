"""Command-line options generated from the fields of `RunSettings`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import cloup
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cspine_data import GivenSplit
from cspine_train.run.folder import RECORD_NAME
from cspine_train.run.settings import (
    DataSettings,
    ModelSettings,
    OptimisationSettings,
    PostprocessingSettings,
    RunSettings,
    option_name,
    problem_of,
    spelling_of,
)

Command = TypeVar("Command", bound=Callable[..., Any])
_PARTS: tuple[type[BaseModel], ...] = (ModelSettings, DataSettings, OptimisationSettings, PostprocessingSettings)


def setting_options(omit: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add an option for each field of `RunSettings` to a command, grouped by parts, except those in `omit`."""

    def decorate(command: Command) -> Command:
        for part in reversed(_PARTS):
            options = [_option(name, field) for name, field in part.model_fields.items() if name not in omit]
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
    try:
        return RunSettings(**options)
    except ValidationError as error:
        raise click.UsageError(problem_of(error)) from None


def with_recorded_split(options: dict[str, Any], run: Path | None) -> dict[str, Any]:
    """Return options with the split of the run that is to be resumed, if the split's file is gone."""
    if run is None or not options["split"] or Path(options["split"]).exists() or not (run / RECORD_NAME).exists():
        return options
    from cspine_train.run.record import load_record

    recorded = load_record(run).settings.split
    return options | {"split": recorded, "fold": 0} if recorded and recorded.fold == options["fold"] else options


def _fold_of_file(path: str, fold: int) -> GivenSplit:
    from cspine_data import read_splits

    folds = read_splits(path)
    if fold >= len(folds):
        raise click.UsageError(f"--fold {fold}: is none of the {len(folds)} of {path}, which are counted from 0")
    return folds[fold]


def _option(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    spelling = spelling_of(field.metadata)
    kind = _kind(field)
    option = option_name(name)
    default = field.get_default(call_default_factory=True, validated_data={})
    more: dict[str, Any] = {"help": " ".join((field.description or "").split())}
    if kind is bool:
        return cloup.option(f"{option}/--no-{option[2:]}" if name == "compile" else option, name, is_flag=True, **more)
    if spelling.choices:
        more |= {"type": click.Choice(spelling.choices), "default": _as_written(default)}
    elif spelling.metavar:
        more |= {"metavar": spelling.metavar, "multiple": spelling.multiple, "default": default or None}
    elif get_origin(kind) is Literal:
        more |= {"type": click.Choice(get_args(kind)), "default": default}
    else:
        more |= {"type": _range(kind, field), "default": default}
    return cloup.option(option, name, **more)


def _kind(field: FieldInfo) -> Any:
    """Return a field's type without ``None``."""
    if get_origin(field.annotation) is Literal:
        return field.annotation
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and NoneType in get_args(field.annotation) else field.annotation


def _range(kind: Any, field: FieldInfo) -> Any:
    named = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(item, name) for item in field.metadata for name in named if hasattr(item, name)}
    if kind not in (int, float) or not bounds:
        return kind
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if kind is int:
        return click.IntRange(low, high)
    return click.FloatRange(low, high, min_open="gt" in bounds, max_open="lt" in bounds)


def _as_written(default: Any) -> Any:
    return "".join(map(str, default)) if isinstance(default, tuple) else default
