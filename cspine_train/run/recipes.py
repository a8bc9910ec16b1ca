"""Recipes: settings of training under a name, in TOML files, shipped or a user's."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cspine_data.tools import meant
from cspine_data.typed_options import spelling_of
from cspine_train.errors import RunError
from cspine_train.run.settings import OF_ONE_RUN, PARTS, RunSettings, problem_of

_ENDING = ".toml"
_DESCRIPTION = "description"


@dataclass(frozen=True)
class Recipe:
    """Settings of training under a name.

    Attributes
    ----------
    name : str
        Name of a shipped recipe, or the path of a file.
    description : str
        What it is for.
    settings : dict
        Fields of `RunSettings`; the others have their defaults.
    """

    name: str
    description: str
    settings: Mapping[str, Any]


def shipped_recipes() -> tuple[Recipe, ...]:
    """Return the recipes that come with the package, in the order of their names."""
    found = files("cspine_train").joinpath("recipes").iterdir()
    names = sorted(file.name.removesuffix(_ENDING) for file in found if file.name.endswith(_ENDING))
    return tuple(map(read_recipe, names))


def read_recipe(name: str) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    name : str
        Name of a shipped recipe, or path of a TOML file: its keys are the options of ``cspine-train run`` without
        dashes in front, and ``description``.

    Raises
    ------
    RunError
        If there is no such recipe, it cannot be read, or a key or value is invalid.
    """
    shipped = files("cspine_train").joinpath("recipes", f"{name}{_ENDING}")
    path = Path(name)
    try:
        if path.name == name and not name.endswith(_ENDING) and shipped.is_file():
            text = shipped.read_text(encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        if path.suffix == _ENDING:
            raise RunError(f"{name}: cannot be read ({error.strerror}); check the path of the recipe") from None
        names = [recipe.name for recipe in shipped_recipes()]
        raise RunError(
            f"unknown recipe {name!r}{meant(name, names)}; give a TOML file or one of {', '.join(names)}"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RunError(f"{name}: is not valid TOML ({error}); correct it") from None
    description = str(content.pop(_DESCRIPTION, ""))
    return Recipe(name, description, _fields(name, content))


def _fields(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `RunSettings` by their names; refuse unknown keys and invalid values."""
    known = {_option(field).removeprefix("--"): field for field in RunSettings.model_fields if field not in OF_ONE_RUN}
    for key in content:
        if key not in known:
            raise RunError(
                f"{name}: a recipe cannot set {key!r}{meant(key, known)}; its keys are the options of cspine-train "
                "run on model, data, training and postprocessing, without the dashes, except split, case weights, seed "
                "and --from"
            )
    settings = {known[key]: value for key, value in content.items()}
    try:
        RunSettings(**settings)
    except ValidationError as error:
        raise RunError(f"{name}: {problem_of(error)}; correct it") from None
    return settings


def recipe_table(recipes: Sequence[Recipe]) -> list[list[str]]:
    """Return a row for each option that a recipe sets: the option, and its value in each recipe."""
    values = [RunSettings(**recipe.settings).model_dump() | dict(recipe.settings) for recipe in recipes]
    return [
        [_option(field), *(_text(of_recipe[field]) for of_recipe in values)]
        for part in PARTS
        for field in part.model_fields
        if any(field in recipe.settings for recipe in recipes)
    ]


def _option(field: str) -> str:
    """Return the option of a setting; of a pair such as ``--compile/--no-compile``, the first."""
    return spelling_of(RunSettings.model_fields[field], field).option.partition("/")[0]


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def recipe_settings(recipe: str, **changes: Any) -> RunSettings:
    """Return the settings of a recipe with changes: what ``cspine-train run --recipe`` does with its options.

    Parameters
    ----------
    recipe : str
        See `read_recipe`, also for errors.
    **changes
        Fields of `RunSettings`.
    """
    return RunSettings(**with_changes(read_recipe(recipe).settings, changes))


def with_changes(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes: a given length, in epochs or minutes, replaces the other."""
    length = {"epochs", "minutes"}
    kept = settings if length.isdisjoint(changes) else {n: value for n, value in settings.items() if n not in length}
    return {**kept, **changes}
