"""How label maps are read: which values are segmented or ignored, and which defects are accepted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from cspine_data.errors import InputError

_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")
# Label maps have at most 255 values.
_LONGEST_RANGE = 1000


def parse_label_values(given: str | Sequence[int | str] | None) -> tuple[int | str, ...] | None:
    """Convert ``1,2``, ``1-25,101`` or ``C3,C4`` to label values and names of segments.

    Raises
    ------
    InputError
        If there is no value, one is not positive, or a range is empty or too long.
    """
    if given is None:
        return None
    values: list[int | str] = []
    for part in given.split(",") if isinstance(given, str) else given:
        text = str(part).strip()
        between = _RANGE.fullmatch(text)
        if between:
            first, last = map(int, between.groups())
            if not first <= last < first + _LONGEST_RANGE:
                raise InputError(
                    f"label values {text!r}", "are no range", "give the lowest value first, and at most 1000 values"
                )
            values += range(first, last + 1)
        else:
            values.append(int(text) if re.fullmatch(r"[-+]?\d{1,9}", text) else text)
    if not values or any(value == "" or (isinstance(value, int) and value <= 0) for value in values):
        raise InputError(f"label values {given!r}", "are not known", "give values or names, as in 1-7 or C3,C4")
    return tuple(dict.fromkeys(values))


def label_values_text(values: Sequence[int | str]) -> str:
    """Return label values and names as `parse_label_values` reads them, with ranges: ``1-25,101``."""
    parts: list[list[int | str]] = []
    for value in values:
        if parts and isinstance(value, int) and parts[-1][-1] == value - 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ",".join("-".join(map(str, dict.fromkeys((part[0], part[-1])))) for part in parts)


class LabelOptions(BaseModel):
    """How label maps are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label_values: Annotated[tuple[int | str, ...] | None, BeforeValidator(parse_label_values)] = None
    """Label values to segment, such as 1,2 or 1-25, or names of segments, such as C3,C4; all others become background.
    Default: all, or the choice of the stored case."""
    ignore_label: int | None = None
    """Label value of voxels to ignore, such as -1. Default: none, or that of the stored case."""
    trust_voxels: bool = False
    """Assume that a label map whose header has no position is on its volume's grid, voxel for voxel."""
    resample_labels: bool = False
    """Resample label maps on another grid to their volume's grid (nearest neighbour), and report the change of each
    label's volume."""

    @field_validator("ignore_label")
    @classmethod
    def _is_no_background(cls, value: int | None) -> int | None:
        if value == 0:
            raise InputError("ignore_label 0", "is the background", "give the label value of voxels to ignore")
        return value


#: All values are segmented, none is ignored, and no defect that could change a label map's meaning is accepted.
DEFAULT_LABELS = LabelOptions()
