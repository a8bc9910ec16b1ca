"""Extension points: losses, augmentations, architectures and metrics by name, the project's own and those of plug-ins.

Inside the project, a new one is a function and a line in `BUILT_IN`, or for metrics in `MEASURES`. Outside it, an
installed package declares an entry point in the group. CONTRIBUTING.md shows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cspine_data import CspineDataError
from cspine_data.tools import ExtensionPoint
from cspine_train.errors import RunError

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


def names(group: str) -> tuple[str, ...]:
    """Return the names in a group: the project's own, then those of installed plug-ins."""
    return _point(group).names()


def check_name(group: str, name: str) -> str:
    """Return a name that is in a group.

    Raises
    ------
    ValueError
        If it is not.
    """
    return _point(group).check(name)


def load(group: str, name: str) -> Any:
    """Import the object of a name; a `RunError` if the name is unknown, or its plug-in cannot be imported."""
    try:
        return _point(group).load(name)
    except CspineDataError as error:
        raise RunError(str(error)) from error


def _point(group: str) -> ExtensionPoint:
    return ExtensionPoint(group, BUILT_IN[group])
