"""Options of commands, made from the typed fields of `PrepareOptions`, `Preprocessing` and `BiasParameters`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import cloup
from pydantic import BaseModel

from cspine_data.errors import InputError
from cspine_data.preparation.options import PrepareOptions, Selection
from cspine_data.preprocessing.parameters import PRESETS, BiasParameters, Preprocessing, bias_parameters, checked
from cspine_data.terminal import PATH
from cspine_data.volumes.label_options import LabelOptions

#: The options that select cases.
SELECTION = tuple(Selection.model_fields)
#: The options that tell how label maps are read.
LABELS = tuple(LabelOptions.model_fields)
Command = TypeVar("Command", bound=Callable[..., Any])
# Other types are written as text, which the field parses.
_TYPES: dict[Any, Any] = {Path: PATH, int: int, float: float}
# By the name of the option's value, the field of the bias field's parameters. Their defaults depend on the preset.
_BIAS = {
    "n4_engine": "engine", "n4_resolution": "resolution_mm", "n4_spacing": "spline_mm", "n4_iterations": "iterations",
}  # fmt: skip


def prepare_options(command: Command) -> Command:
    """Give a command the options of `prepare`, in groups."""
    store = cloup.option("--store", type=PATH, default="data/cspine.zarr", help="Store to create or to add to.")
    preset = cloup.option(
        "--n4-preset", type=click.Choice(list(PRESETS)), help="Trade-off between accuracy and time. [default: default]"
    )
    parameters = [field_option("normalisation", Preprocessing), field_option("spacing_mm", Preprocessing, "spacing")]
    groups = {
        "Input and output": [store, *map(field_option, (*SELECTION, "note", "anonymise"))],
        "Preprocessing": [field_option("n4"), field_option("axes"), *parameters],
        "Bias field": [preset, *(_option(BiasParameters, field, name, None) for name, field in _BIAS.items())],
        "Label maps": list(map(field_option, LABELS)),
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
    kind: Any = info.annotation
    if NoneType in get_args(kind):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    spelling, text = f"--{name.replace('_', '-')}", _texts(model)[field]
    if kind is bool and default is None:
        return cloup.option(f"{spelling}/--no-{name}", name, default=True, help=text)
    if kind is bool:
        return cloup.option(spelling, name, is_flag=True, help=text)
    if get_origin(kind) is Literal:
        return cloup.option(spelling, name, type=click.Choice(get_args(kind)), default=default, help=text)
    if default == ():
        return cloup.option(spelling, name, multiple=True, metavar="PATTERN", help=text)
    if isinstance(default, tuple):
        default = "".join(map(str, default))
    return cloup.option(spelling, name, type=_TYPES.get(kind, str), default=default, help=text)


@cache
def _texts(model: type[BaseModel]) -> dict[str, str]:
    """Return the text below each field of a model; pydantic would parse it in every process that has the model."""
    fields = [
        one for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel for one in _body(base)
    ]
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in pairwise(fields)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _body(model: type[BaseModel]) -> list[ast.stmt]:
    (definition,) = ast.parse(inspect.getsource(model)).body
    return list(getattr(definition, "body", ()))


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
