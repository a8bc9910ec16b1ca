"""Command-line options generated from the fields of `RunSettings`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import cloup
from pydantic import BaseModel, ValidationError

from cspine_data import GivenSplit
from cspine_data.typed_options import field_option
from cspine_train.run.folder import RECORD_NAME
from cspine_train.run.recipes import read_recipe, with_changes
from cspine_train.run.settings import PARTS, RunSettings, problem_of

Command = TypeVar("Command", bound=Callable[..., Any])
Model = TypeVar("Model", bound=BaseModel)


def setting_options(recipe: str = "default", omit: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add ``--recipe`` and an option for each field of `RunSettings` to a command, except those in `omit`.

    `recipe` is the default of ``--recipe``; the help shows its settings as defaults.
    """
    defaults = {} if recipe == "default" else read_recipe(recipe).settings

    def decorate(command: Command) -> Command:
        for part in reversed(PARTS):
            options = [
                field_option(part, name, **({"default": defaults[name]} if name in defaults else {}))
                for name in part.model_fields
                if name not in omit
            ]
            title = (part.__doc__ or "").strip().rstrip(".")
            command = cloup.option_group(title, *options)(command)
        names = cloup.option(
            "--recipe", default=recipe, metavar="NAME|FILE",
            help="Settings that replace the defaults below; a TOML file, or a name that cspine-train recipes lists.",
        )  # fmt: skip
        return cloup.option_group("Recipe", names)(command)

    return decorate


def settings_of(base: Mapping[str, Any], **options: Any) -> RunSettings:
    """Return the settings of a command's options; a `click.UsageError` for values that are invalid or contradict.

    The file of ``--split`` is read here, and not by `RunSettings`: the record of an untrusted run must read no file.

    Parameters
    ----------
    base : Mapping
        Settings, such as a recipe's, that replace defaults.
    **options
        Values of the command's options. Only those that the user gave count.
    """
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = {name: value for name, value in options.items() if context.get_parameter_source(name) != default}
    if isinstance(options.get("split"), str):
        given |= {"split": _fold_of_file(options["split"], options["fold"]), "fold": 0}
    return record_of(RunSettings, **with_changes(base, given))


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


def settings_of_origin(from_run: str | None, run: Path | None) -> dict[str, Any]:
    """Return the settings that a run takes over from that of ``--from``; from the run to resume, if that is gone."""
    if from_run is None:
        return {}
    from cspine_train.run.record import load_record

    origin = Path(from_run)
    if run is not None and not (origin / RECORD_NAME).exists() and (run / RECORD_NAME).exists():
        origin = run
    return load_record(origin).inherited_settings


def _fold_of_file(path: str, fold: int) -> GivenSplit:
    from cspine_data import read_splits

    folds = read_splits(path)
    if fold >= len(folds):
        raise click.UsageError(f"--fold {fold}: is none of the {len(folds)} folds of {path}, which are counted from 0")
    return folds[fold]
