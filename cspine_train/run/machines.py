"""Devices and memory of a run; each field defines an option, as in `RunSettings`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    WrapValidator,
)

from cspine_data.typed_options import Spelling


def _devices(given: object) -> object:
    if not isinstance(given, str) or given == "auto":
        return given
    if not re.fullmatch("[1-9][0-9]{0,3}", given):
        raise ValueError(f"{given!r} is neither auto nor a number from 1")
    return int(given)


def _memory(given: object, parse: Callable[[object], ByteSize | None]) -> ByteSize | None:
    try:
        return parse(given)
    except ValidationError:
        raise ValueError(f"{given!r} is not a size such as 8GB or 500MiB") from None


class Machines(BaseModel):
    """Devices and memory of a run; `cspine-train run --help` lists the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_devices)] = 1
    """Number of GPUs per machine, or of processes where there are none; auto: all GPUs."""
    nodes: int = Field(default=1, ge=1)
    """Number of machines; see docs/distributed.md."""
    strategy: Literal["auto", "ddp"] = "auto"
    """Lightning's strategy. ddp: a copy of the network on each device; auto: ddp for several devices."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that a run on a GPU is reproducible bit for bit."""
    memory: Annotated[ByteSize | None, WrapValidator(_memory), Spelling(metavar="SIZE")] = None
    """Memory limit, for example 8GB: of the GPU if there is one, else of the machine. A run that needs more is refused,
    and the message proposes a batch size or a pixel size. Default: the free memory."""
