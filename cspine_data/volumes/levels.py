"""Names and label values of vertebrae, in VerSe's scheme and in those of other tools.

Values: 1 to 7 are C1 to C7, 8 to 19 T1 to T12, 20 to 25 L1 to L6, 26 the sacrum, 28 T13 (Sekuboyina et al. 2021).
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Collection, Sequence

from cspine_data.errors import InputError

SACRUM, T13 = 26, 28
#: The name of each value.
LEVEL_NAMES = {
    **{number: f"C{number}" for number in range(1, 8)},
    **{7 + number: f"T{number}" for number in range(1, 13)},
    **{19 + number: f"L{number}" for number in range(1, 7)},
    SACRUM: "sacrum",
    T13: "T13",
}
#: The usual vertebrae from head to feet: seven cervical, twelve thoracic and five lumbar.
USUAL = tuple(range(1, 25))
#: All vertebrae from head to feet, with the rare T13 and L6.
SPINE = (*range(1, 20), T13, *range(20, SACRUM))
# For each region, by the first letter of its names: its levels, and the hues (degrees) of the first and the last.
_REGIONS: dict[str, tuple[Sequence[int], tuple[int, int]]] = {
    "C": (range(1, 8), (195, 265)),
    "T": ((*range(8, 20), T13), (60, 170)),
    "L": (range(20, SACRUM), (0, 45)),
    "s": ((SACRUM,), (310, 310)),
}
# Neighbours alternate between dark and light, to be distinct with colour vision deficiency, too.
_LIGHTNESS, _SATURATION = (0.36, 0.72), 0.8
_VALUES = {name.lower(): value for value, name in LEVEL_NAMES.items()}
_LEVEL = re.compile(
    r"(vertebrae?[-_ ]*)?((?P<region>c|t|th|l)0?(?P<number>\d{1,2})|(?P<sacrum>sacrum))([-_ ]*vertebrae?)?",
    re.IGNORECASE,
)
#: For each scheme, its label values by VerSe's. SCT has VerSe's up to L5, and the sacrum has 25.
SCHEMES: dict[str, dict[int, int]] = {
    "verse": {value: value for value in LEVEL_NAMES},
    "totalspineseg": {
        **{value: 10 + value for value in range(1, 8)},
        **{value: 13 + value for value in range(8, 20)},
        **{value: 21 + value for value in range(20, 25)},
        SACRUM: 50,
    },
    "sct": {**{value: value for value in range(1, 25)}, SACRUM: 25},
}


def level_value(name: str) -> int | None:
    """Return VerSe's value of a vertebra's name, such as ``C3`` or ``vertebrae_C3``; None for other names."""
    found = _LEVEL.fullmatch(name.strip())
    if not found:
        return None
    return SACRUM if found["sacrum"] else _VALUES.get(f"{found['region'][0]}{int(found['number'])}".lower())


def level_colour(value: int) -> tuple[int, int, int]:
    """Return the colour of a level in pictures and segmentations: red, green and blue, 0 to 255.

    The hue shows the region: blue for cervical, green for thoracic, red for lumbar vertebrae, purple for the sacrum.

    Parameters
    ----------
    value : int
        A value of `LEVEL_NAMES`.
    """
    levels, (first, last) = _REGIONS[LEVEL_NAMES[value][0]]
    position = levels.index(value)
    hue = first + (last - first) * position / max(len(levels) - 1, 1)
    red, green, blue = colorsys.hls_to_rgb(hue / 360, _LIGHTNESS[position % 2], _SATURATION)
    return round(255 * red), round(255 * green), round(255 * blue)


def levels_between(upper: int, lower: int) -> tuple[int, ...]:
    """Return the levels between two levels, without T13 and L6, which most spines lack."""
    return tuple(value for value in SPINE[SPINE.index(upper) + 1 : SPINE.index(lower)] if value in USUAL)


def levels_text(levels: Collection[int]) -> str:
    """Return levels as abbreviated text, from head to feet: ``T11-L3 L5`` if L4 is missing."""
    runs: list[list[int]] = []
    for value in (value for value in SPINE if value in levels):
        if runs and not levels_between(runs[-1][-1], value):
            runs[-1].append(value)
        else:
            runs.append([value])
    return " ".join("-".join(dict.fromkeys((LEVEL_NAMES[run[0]], LEVEL_NAMES[run[-1]]))) for run in runs)


def consecutive_levels(lowest: str | None, highest: str | None, count: int) -> tuple[int, ...]:
    """Return the values of consecutive vertebrae from head to feet, given the lowest or the highest.

    ``L6`` and ``T13`` are in the sequence only if they are the lowest or the highest.

    Raises
    ------
    InputError
        If both or neither are given, the name is not a vertebra's, or the spine has too few vertebrae on that side.
    """
    name = lowest or highest
    if name is None or (lowest and highest):
        raise InputError("lowest and highest", "exclude each other", "give the name of one of them")
    value = level_value(name)
    if value is None:
        raise InputError(f"level {name!r}", "is not known", "give C1 to C7, T1 to T12, L1 to L5, or L6, T13 or sacrum")
    sequence = [*USUAL]
    if value == T13:
        sequence.insert(sequence.index(20), T13)
    elif value not in sequence:
        sequence = [*sequence, value]
    at = sequence.index(value)
    first = at - count + 1 if lowest else at
    if first < 0 or first + count > len(sequence):
        end = "lowest" if lowest else "highest"
        problem = f"do not fit if the {end} is {LEVEL_NAMES[value]}"
        raise InputError(f"{count} vertebrae", problem, f"give another {end} level")
    return tuple(sequence[first : first + count])
