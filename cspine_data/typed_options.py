"""Options of command lines, made from the fields of pydantic models.

A field is the one definition of its option: type, bounds and default, and its help as the text below it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
import cloup
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cspine_data.terminal import PATH

_FIELDS_OWN: Any = object()
# Other types are written as text, which the field parses.
_TYPES: dict[Any, Any] = {Path: PATH, int: int, float: float}


@dataclass(frozen=True)
class Spelling:
    """Option of a field, if it does not follow from name and type.

    Attributes
    ----------
    option : str
        Name of the option.
    metavar : str or None
        Placeholder of its value in the help.
    choices : tuple of str
        Possible values; empty for any text.
    multiple : bool
        Whether the option may be given several times.
    text : bool
        Whether a field that holds a number also takes a word, which its validator reads.
    """

    option: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    multiple: bool = False
    text: bool = False


def spelling_of(field: FieldInfo, name: str) -> Spelling:
    """Return the `Spelling` of a field, with the name of its option."""
    known = next((item for item in field.metadata if isinstance(item, Spelling)), Spelling())
    option = known.option or f"--{name.replace('_', '-')}"
    return replace(known, option=option)


def field_option(
    model: type[BaseModel], field: str, name: str = "", default: Any = _FIELDS_OWN
) -> Callable[[Any], Any]:
    """Return the option of a field, a decorator of commands.

    Parameters
    ----------
    model : type
        The model.
    field : str
        Name of the field.
    name : str
        Name of the option's value; by default, that of the field.
    default : object
        Default instead of the field's own. With None, where the default depends on other options, the option has no
        bounds: the model checks them.
    """
    info = model.model_fields[field]
    kind, spelling = _kind(info), spelling_of(info, name or field)
    more: dict[str, Any] = {"type": _TYPES.get(kind, str), "default": default, "help": _texts(model)[field]}
    bounded = default is not None
    if default is _FIELDS_OWN:
        more["default"] = default = info.get_default(call_default_factory=True, validated_data={})
    if spelling.text:
        more["type"] = str
    elif bounded:
        more["type"] = _range(kind, info) or more["type"]
    option = spelling.option
    choices = spelling.choices or (get_args(kind) if get_origin(kind) is Literal else ())
    if kind is bool:
        # Without a default, it is a choice between two ways.
        option += f"/--no-{option[2:]}" if default is None else ""
        more |= {"type": bool, "is_flag": True, "default": default is not False}
    elif choices:
        more["type"] = click.Choice(choices)
    if spelling.multiple or default == ():
        more |= {"multiple": True, "default": None, "metavar": spelling.metavar or "PATTERN"}
    elif spelling.metavar:
        more["metavar"] = spelling.metavar
    elif isinstance(default, tuple):
        more["default"] = "".join(map(str, default))
    return cloup.option(option, name or field, **more)


def _kind(field: FieldInfo) -> Any:
    """Return a field's type without ``None``."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(field.annotation) else field.annotation


def _range(kind: Any, field: FieldInfo) -> Any:
    """Return the type of numbers with bounds; None for others."""
    named = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(item, name) for item in field.metadata for name in named if hasattr(item, name)}
    if kind not in (int, float) or not bounds:
        return None
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    ranges = click.IntRange if kind is int else click.FloatRange
    return ranges(low, high, min_open="gt" in bounds, max_open="lt" in bounds)


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
