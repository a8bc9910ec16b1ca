"""Extension points: losses, augmentations, architectures and metrics by name, the project's own and those of plug-ins.

Inside the project, a new one is a function and a line in `BUILT_IN`, or for metrics in `MEASURES`. Outside it, an
installed package declares an entry point in the group. CONTRIBUTING.md shows both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cspine_train.errors import RunError, meant

LOSSES = "cspine.losses"
AUGMENTATIONS = "cspine.augmentations"
ARCHITECTURES = "cspine.architectures"
METRICS = "cspine.metrics"

#: Where each is, by group and name; imported when it is first used. All metrics are used, see `MEASURES`.
BUILT_IN: Mapping[str, Mapping[str, str]] = {
    LOSSES: {
        "dice": "cspine_train.training.losses:dice",
        "dice_bce": "cspine_train.training.losses:dice_bce",
        "dice_focal": "cspine_train.training.losses:dice_focal",
        "tversky": "cspine_train.training.losses:tversky",
    },
    AUGMENTATIONS: {
        "none": "cspine_train.data.augmentation:NONE",
        "light": "cspine_train.data.augmentation:LIGHT",
        "reference": "cspine_train.data.augmentation:REFERENCE",
        "strong": "cspine_train.data.augmentation:STRONG",
    },
    ARCHITECTURES: {
        "unet": "segmentation_models_pytorch:Unet",
        "fpn": "segmentation_models_pytorch:FPN",
        "linknet": "segmentation_models_pytorch:Linknet",
        "pspnet": "segmentation_models_pytorch:PSPNet",
    },
    METRICS: {},
}

# A name becomes part of folder names.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def names(group: str) -> tuple[str, ...]:
    """Return the names in a group: the project's own, then those of installed plug-ins."""
    return tuple(_registered(group))


def check_name(group: str, name: str) -> str:
    """Return a name that is in a group; a `ValueError` if it is not."""
    # Looking up plug-ins reads the metadata of every installed package.
    if name not in BUILT_IN[group] and name not in names(group):
        raise ValueError(
            f"{name!r} is unknown{meant(name, names(group))}; choose {', '.join(names(group))}, or install its plug-in"
        )
    return name


def load(group: str, name: str) -> Any:
    """Import the object of a name; a `RunError` if the name is unknown, or its plug-in cannot be imported."""
    try:
        return _registered(group)[check_name(group, name)].load()
    except ValueError as error:
        raise RunError(f"{group}: {error}") from None
    # A plug-in may raise anything as it is imported.
    except Exception as error:
        if name in BUILT_IN[group]:
            raise
        raise RunError(f"plug-in {name!r} of {group}: cannot be imported ({error}); correct or remove it") from error


def _registered(group: str) -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name, value, group) for name, value in BUILT_IN[group].items()}
    for plug_in in entry_points(group=group):
        if _NAME.fullmatch(plug_in.name):
            # A plug-in cannot replace one of the project's own.
            found.setdefault(plug_in.name, plug_in)
    return found
