"""Options of commands, made from the typed fields of `PrepareOptions`, `Preprocessing` and `BiasParameters`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import cloup
from pydantic import BaseModel

from cspine_data.errors import InputError
from cspine_data.preparation.options import PrepareOptions, Selection
from cspine_data.preprocessing.parameters import PRESETS, BiasParameters, Preprocessing, bias_parameters, checked

#: The options that select cases.
SELECTION = tuple(Selection.model_fields)
Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(readable=False, path_type=Path)
# By the name of the option's value, the field of the bias field's parameters. Their defaults depend on the preset.
_BIAS = {
    "n4_engine": "engine", "n4_resolution": "resolution_mm", "n4_spacing": "spline_mm", "n4_iterations": "iterations",
}  # fmt: skip


def prepare_options(command: Command) -> Command:
    """Give a command the options of `prepare`, in groups."""
    store = cloup.option("--store", type=PATH, default="data/cspine.zarr", help="Store to create or to add to.")
    preset = cloup.option("--n4-preset", type=click.Choice(list(PRESETS)), help="Accuracy or speed; default: default.")
    parameters = [field_option("normalisation", Preprocessing), field_option("spacing_mm", Preprocessing, "spacing")]
    groups = {
        "Input and output": [store, *map(field_option, (*SELECTION, "note", "anonymise"))],
        "Preprocessing": [field_option("n4"), field_option("axes"), *parameters],
        "Bias field": [preset, *(_option(BiasParameters, field, name, None) for name, field in _BIAS.items())],
        "Label maps": list(map(field_option, ("ignore_label", "trust_voxels"))),
        "Machine": list(map(field_option, ("workers", "scheduler", "rehash"))),
    }
    for title, options in reversed(groups.items()):
        command = cloup.option_group(title, *options)(command)
    return command


def field_options(*fields: str) -> Callable[[Command], Command]:
    """Give a command the options of some fields of `PrepareOptions`."""

    def decorate(command: Command) -> Command:
        for field in reversed(fields):
            command = field_option(field)(command)
        return command

    return decorate


def field_option(field: str, model: type[BaseModel] = PrepareOptions, name: str = "") -> Callable[[Any], Any]:
    """Return the option of a field, with its help, type and default."""
    return _option(model, field, name or field, model.model_fields[field].default)


def _option(model: type[BaseModel], field: str, name: str, default: Any) -> Callable[[Any], Any]:
    info = model.model_fields[field]
    kinds = [kind for kind in get_args(info.annotation) or (info.annotation,) if kind is not NoneType]
    spelling = f"--{name.replace('_', '-')}"
    more: dict[str, Any] = {"help": " ".join((info.description or "").split()), "default": default}
    if get_origin(info.annotation) is Literal:
        more["type"] = click.Choice(kinds)
    elif kinds == [bool]:
        # A flag that is neither on nor off by default has two spellings.
        more |= {"is_flag": True, "default": default is None}
        spelling += f"/--no-{name}" if default is None else ""
    elif default == ():
        more |= {"multiple": True, "metavar": "PATTERN"}
    elif isinstance(default, tuple):
        more["default"] = "".join(map(str, default))
    else:
        more["type"] = {Path: PATH, int: int, float: float}.get(kinds[0], str)
    return cloup.option(spelling, name, **more)


def preprocessing_of(n4: bool, n4_preset: str | None, normalisation: str, spacing: str | None, **bias: Any) -> Any:
    """Return the preprocessing parameters of a command's options.

    Raises
    ------
    InputError
        If one is not valid, not known, or contradicts another one.
    """
    changes = {_BIAS[name]: value for name, value in bias.items() if value is not None}
    if (changes or n4_preset) and not n4:
        raise InputError("--no-n4", "contradicts the other --n4 options", "leave them out")
    values = {
        "bias": bias_parameters(n4_preset or "default", **changes) if n4 else None,
        "normalisation": normalisation,
        "spacing_mm": spacing,
    }
    return checked(Preprocessing, "", values)
