"""Options of commands, made from the typed fields of `PrepareOptions`, `Preprocessing` and `BiasParameters`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click
import cloup

from cspine_data.errors import InputError
from cspine_data.preparation.options import PrepareOptions, Selection
from cspine_data.preprocessing.parameters import PRESETS, BiasParameters, Preprocessing, bias_parameters, checked
from cspine_data.terminal import PATH
from cspine_data.typed_options import field_option
from cspine_data.volumes.label_options import LabelOptions

#: The options that select cases.
SELECTION = tuple(Selection.model_fields)
#: The options that tell how label maps are read.
LABELS = tuple(LabelOptions.model_fields)
Command = TypeVar("Command", bound=Callable[..., Any])
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
    own = partial(field_option, PrepareOptions)
    parameters = [field_option(Preprocessing, "normalisation"), field_option(Preprocessing, "spacing_mm", "spacing")]
    groups = {
        "Input and output": [store, *map(own, (*SELECTION, "note", "anonymise"))],
        "Preprocessing": [own("n4"), own("axes"), *parameters],
        "Bias field": [preset, *(field_option(BiasParameters, field, name, None) for name, field in _BIAS.items())],
        "Label maps": list(map(own, LABELS)),
        "Machine": list(map(own, ("workers", "scheduler", "rehash"))),
    }
    for title, options in reversed(groups.items()):
        command = cloup.option_group(title, *options)(command)
    return command


def field_options(*fields: str) -> Callable[[Command], Command]:
    """Give a command the options of some fields of `PrepareOptions`, see `FieldCommand`."""
    groups = {"selection": SELECTION, "labels": LABELS}
    named = [name for field in fields for name in groups.get(field, (field,))]

    def decorate(command: Command) -> Command:
        for field in reversed(named):
            command = field_option(PrepareOptions, field)(command)
        return command

    return decorate


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
