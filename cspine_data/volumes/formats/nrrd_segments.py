"""The names, values and layers of 3D Slicer's segments in the header of a NRRD file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cspine_data.errors import InputError, printable
from cspine_data.volumes.segments import Segment

_KEY = re.compile(rb"Segment(\d{1,4})_(ID|Name|LabelValue|Layer)")
_NUMBER = re.compile(r"\d{1,5}")
# A label map has at most 255 values.
_MOST = 255
_LONGEST_NAME = 200
_EXPORT = "save the segmentation again in 3D Slicer"


def segment_key(key: bytes) -> str | None:
    """Return the name of a header's key if it describes a segment."""
    return key.decode("ascii") if _KEY.fullmatch(key) else None


def check_layers(path: Path, layers: int) -> int:
    """Return the number of layers of a segmentation, if it is plausible."""
    if not 0 < layers <= _MOST:
        raise InputError(path, f"has {layers} layers of segments", f"give 1 to {_MOST}")
    return layers


def parse_segments(path: Path, keys: Mapping[str, str], layers: int | None) -> tuple[Segment, ...]:
    """Return the segments that a header names.

    As in 3D Slicer, a segment without a value has the value 1, and one without a layer that of its own number.

    Parameters
    ----------
    path : Path
        The file, for messages.
    keys : mapping
        Its keys that describe segments, with their values.
    layers : int or None
        Number of layers; None for a 3-D file.
    """
    numbers = sorted({int(re.findall(r"\d+", key)[0]) for key in keys})
    if len(numbers) > _MOST:
        raise InputError(path, f"has {len(numbers)} segments", f"give at most {_MOST}")
    found: dict[tuple[int, int], Segment] = {}
    for number in numbers:
        name, value, layer = (keys.get(f"Segment{number}_{field}", "") for field in ("Name", "LabelValue", "Layer"))
        name = printable(" ".join((name or keys.get(f"Segment{number}_ID", "")).split()))[:_LONGEST_NAME]
        value = value or ("1" if layers or len(numbers) == 1 else "")
        layer = layer or (str(number) if layers else "0")
        if not name or not _NUMBER.fullmatch(value) or not int(value):
            continue
        if not _NUMBER.fullmatch(layer) or int(layer) >= (layers or 1):
            raise InputError(path, f"has a segment in layer {layer[:9]}, which it lacks", _EXPORT)
        place = int(layer), int(value)
        if place in found:
            raise InputError(path, f"gives two segments the same value, {value}", _EXPORT)
        found[place] = Segment(name, int(value), *place)
    segments = tuple(found.values())
    if len({segment.value for segment in segments}) < len(segments):
        # Each layer has its own values.
        segments = tuple(
            Segment(one.name, number, one.layer, one.layer_value) for number, one in enumerate(segments, start=1)
        )
    return segments
