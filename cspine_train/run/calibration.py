"""Calibration of a run's probabilities, and whether its expected Dice can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cspine_train.metrics.expected_dice import expected_dice

#: Largest difference between the mean expected and the mean true Dice of the validation patients.
LARGEST_DIFFERENCE = 0.05
_Share = Annotated[float, Field(ge=0, le=1)]


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
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slope: float = Field(gt=0)
    intercept: float
    expected_dice: _Share
    true_dice: _Share
    patients: int = Field(ge=1)

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

    def expected(self, counts: NDArray[np.int64]) -> float:
        """Return the expected Dice of a mask from its `count_logits`."""
        return expected_dice(counts, self.slope, self.intercept)

    @property
    def agrees(self) -> bool:
        """Whether expected and true Dice of the validation patients agree."""
        return abs(self.expected_dice - self.true_dice) <= LARGEST_DIFFERENCE
