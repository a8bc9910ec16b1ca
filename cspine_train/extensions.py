"""Extension points: losses, augmentations, architectures and metrics by name, the project's own and those of plug-ins.

Inside the project, a new one is a function and a line in its group, or for metrics in `MEASURES`. Outside it, an
installed package declares an entry point in the group. CONTRIBUTING.md shows both.
"""

from __future__ import annotations

from typing import Any

from cspine_data import CspineDataError
from cspine_data.tools import ExtensionPoint
from cspine_train.errors import RunError


class _Extensions(ExtensionPoint):
    """A group whose names are unknown, or cannot be imported, with a `RunError`."""

    def load(self, name: str) -> Any:
        """Import what a name stands for."""
        try:
            return super().load(name)
        except CspineDataError as error:
            raise RunError(str(error)) from error


LOSSES = _Extensions(
    "cspine.losses",
    {
        "dice": "cspine_train.training.losses:dice",
        "dice_bce": "cspine_train.training.losses:dice_bce",
        "dice_focal": "cspine_train.training.losses:dice_focal",
        "tversky": "cspine_train.training.losses:tversky",
    },
)
AUGMENTATIONS = _Extensions(
    "cspine.augmentations",
    {
        "none": "cspine_train.data.augmentation:NONE",
        "light": "cspine_train.data.augmentation:LIGHT",
        "reference": "cspine_train.data.augmentation:REFERENCE",
        "strong": "cspine_train.data.augmentation:STRONG",
    },
)
ARCHITECTURES = _Extensions(
    "cspine.architectures",
    {
        "unet": "segmentation_models_pytorch:Unet",
        "fpn": "segmentation_models_pytorch:FPN",
        "linknet": "segmentation_models_pytorch:Linknet",
        "pspnet": "segmentation_models_pytorch:PSPNet",
    },
)
#: Those of plug-ins; all are used, see `MEASURES`.
METRICS = _Extensions("cspine.metrics", {})
