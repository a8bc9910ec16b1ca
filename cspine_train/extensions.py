"""Extension points: losses, augmentations, architectures and metrics by name, the project's own and those of plug-ins.

Inside the project, a new one is a function and a line in its group, or for metrics in `MEASURES`. Outside it, an
installed package declares an entry point in the group. CONTRIBUTING.md shows both.
"""

from __future__ import annotations

from cspine_data import InputError
from cspine_data.tools import ExtensionPoint
from cspine_train.errors import RunError


def _error(*told: str) -> RunError:
    return RunError(str(InputError(*told)))


LOSSES = ExtensionPoint(
    "cspine.losses",
    {
        "dice": "cspine_train.training.losses:dice",
        "dice_bce": "cspine_train.training.losses:dice_bce",
        "dice_focal": "cspine_train.training.losses:dice_focal",
        "tversky": "cspine_train.training.losses:tversky",
    },
    _error,
)
AUGMENTATIONS = ExtensionPoint(
    "cspine.augmentations",
    {
        "none": "cspine_train.data.augmentation:NONE",
        "light": "cspine_train.data.augmentation:LIGHT",
        "reference": "cspine_train.data.augmentation:REFERENCE",
        "strong": "cspine_train.data.augmentation:STRONG",
    },
    _error,
)
ARCHITECTURES = ExtensionPoint(
    "cspine.architectures",
    {
        "unet": "segmentation_models_pytorch:Unet",
        "fpn": "segmentation_models_pytorch:FPN",
        "linknet": "segmentation_models_pytorch:Linknet",
        "pspnet": "segmentation_models_pytorch:PSPNet",
    },
    _error,
)
#: Those of plug-ins; all are used, see `MEASURES`.
METRICS = ExtensionPoint("cspine.metrics", {}, _error)
