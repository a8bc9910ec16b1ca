"""Calibration of a run's probabilities, and whether its expected Dice can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cspine_train.metrics.components import implausible_components
from cspine_train.metrics.expected_dice import count_logits, expected_dice

#: Largest difference between the mean expected and the mean true Dice of the validation patients.
LARGEST_DIFFERENCE = 0.05
# A record may come from anybody: fits end far within this bound.
_MOST = 1e3
# Vertebrae that touch are one component, so that it may have the volume of all.
_FACTOR = 2
_Share = Annotated[float, Field(ge=0, le=1)]


def plausible_counts(
    total: NDArray[np.float32],
    weight: float,
    mask: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    labelled_ml: float,
    truth: NDArray[np.bool_] | None = None,
    ignored: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Return the `count_logits` of a mask whose components of implausible size have the lowest probability.

    The size is judged by `labelled_ml`, the largest labelled volume of a patient. Other parameters are those of
    `count_logits`, and the voxel spacing.
    """
    most_voxels = _FACTOR * 1e3 * labelled_ml / float(np.prod(spacing_mm))
    return count_logits(total, weight, mask, truth, ignored, implausible_components(mask, most_voxels))


class Calibration(BaseModel):
    """Calibration of a run's probabilities on its validation patients.

    Attributes
    ----------
    slope, intercept : float
        The calibrated logit of a voxel is `slope` times its logit, plus `intercept`.
    expected_dice, true_dice : float
        Mean expected and mean true Dice of the validation patients, on whole volumes. If there are several, each one's
        expected Dice has the calibration of the others. With one patient, they agree by construction.
    patients : int
        Number of validation patients.
    labelled_ml : float
        Largest labelled volume of one of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slope: float = Field(gt=0, le=_MOST)
    intercept: float = Field(ge=-_MOST, le=_MOST)
    expected_dice: _Share
    true_dice: _Share
    patients: int = Field(ge=1)
    labelled_ml: float = Field(gt=0, le=1e6)

    @classmethod
    def fused(cls, calibrations: Sequence[Calibration], weights: Sequence[float] | None = None) -> Calibration:
        """Return the calibration of the weighted mean of the runs' probabilities: the weighted mean of each field.

        `patients` is the smallest number of any run.
        """
        means = {
            name: float(np.average([getattr(one, name) for one in calibrations], weights=weights))
            for name in cls.model_fields
        }
        return cls(**{**means, "patients": min(one.patients for one in calibrations)})

    def expected_dice_of(
        self,
        total: NDArray[np.float32],
        weight: float,
        mask: NDArray[np.bool_],
        spacing_mm: tuple[float, float, float],
        ignored: NDArray[np.bool_] | None = None,
    ) -> float:
        """Return the expected Dice of a mask; parameters are those of `plausible_counts`."""
        counts = plausible_counts(total, weight, mask, spacing_mm, self.labelled_ml, ignored=ignored)
        return expected_dice(counts, self.slope, self.intercept)

    @property
    def agrees(self) -> bool:
        """Whether expected and true Dice of the validation patients agree."""
        return abs(self.expected_dice - self.true_dice) <= LARGEST_DIFFERENCE
