"""Parsers of option values."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click


def weights_of(_context: click.Context, _option: click.Parameter, given: str | None) -> tuple[float, ...] | None:
    """Read W,W,..., a number for each run."""
    try:
        return None if given is None else tuple(float(weight) for weight in given.split(","))
    except ValueError:
        raise click.BadParameter(f"{given!r} is not W,W,..., such as 2,1,1: a number for each --run") from None


def list_of(_context: click.Context, option: click.Parameter, given: str) -> tuple[str, ...]:
    """Read A,B,..., each once."""
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    if not all(names):
        raise click.BadParameter(f"{given!r} is not A,B,...: names separated by commas")
    return names


def folds_of(_context: click.Context, _option: click.Parameter, given: str) -> int | None:
    """Read a number from 3, or reference."""
    if given == "reference":
        return None
    if not re.fullmatch("[1-9][0-9]{0,3}", given) or int(given) < 3:
        raise click.BadParameter(f"{given!r} is neither reference nor a number from 3")
    return int(given)


def weights_by_encoder(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """Read imagenet or none, for all encoders, and ENCODER=FILE."""
    weights = {}
    for one in given:
        encoder, equals, start = one.partition("=")
        if not equals and encoder in ("imagenet", "none"):
            weights[""] = encoder
        elif encoder and start:
            weights[encoder] = start
        else:
            raise click.BadParameter(f"{one!r} is neither imagenet, none nor ENCODER=FILE")
    return weights
