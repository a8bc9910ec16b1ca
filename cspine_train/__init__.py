"""Training, evaluation and prediction of spine segmentation models, on the stores of `cspine_data`.

The names below are the public ones. They are imported when they are first used, so that commands start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cspine_data.tools import install_hint

if TYPE_CHECKING:
    from cspine_train.errors import CspineTrainError, ModelError, RunError
    from cspine_train.evaluation.comparison import Comparison, compare
    from cspine_train.evaluation.patient_score import PatientScore
    from cspine_train.evaluation.scoring import Evaluation, evaluate
    from cspine_train.metrics.overlap import MaskMeasure, MaskPair
    from cspine_train.prediction.files import Options, Predicted, Target, find_targets, find_volumes, predict_files
    from cspine_train.prediction.predictor import LoadedRun, Prediction, load_run, predict, predict_volume
    from cspine_train.run.machines import Machines
    from cspine_train.run.recipes import recipe_settings
    from cspine_train.run.record import RunRecord
    from cspine_train.run.settings import RunSettings
    from cspine_train.training.pipeline import train

_HOME = {
    "evaluation.comparison": ("Comparison", "compare"),
    "errors": ("CspineTrainError", "ModelError", "RunError"),
    "evaluation.patient_score": ("PatientScore",),
    "evaluation.scoring": ("Evaluation", "evaluate"),
    "metrics.overlap": ("MaskMeasure", "MaskPair"),
    "prediction.predictor": ("LoadedRun", "Prediction", "load_run", "predict", "predict_volume"),
    "prediction.files": ("Options", "Predicted", "Target", "find_targets", "find_volumes", "predict_files"),
    "run.machines": ("Machines",),
    "run.recipes": ("recipe_settings",),
    "run.record": ("RunRecord",),
    "run.settings": ("RunSettings",),
    "training.pipeline": ("train",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Comparison",
    "CspineTrainError",
    "Evaluation",
    "LoadedRun",
    "Machines",
    "MaskMeasure",
    "MaskPair",
    "ModelError",
    "Options",
    "PatientScore",
    "Predicted",
    "Prediction",
    "RunError",
    "RunRecord",
    "RunSettings",
    "Target",
    "compare",
    "evaluate",
    "find_targets",
    "find_volumes",
    "load_run",
    "predict",
    "predict_files",
    "predict_volume",
    "recipe_settings",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ImportError as error:
        hint = install_hint(error)
        if hint is None:
            raise
        raise ImportError(hint, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
