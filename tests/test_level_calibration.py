"""Calibration of levels on validation volumes: the threshold of vertebra, and what counts there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from cspine_train.prediction.level_calibration import LevelSample, best_temperature, calibrated_levels
from cspine_train.prediction.predictor import LoadedRun
from tests.test_labels import a_run
from tests.test_levels import spine

LUMBAR = (20, 21, 22, 23, 24)
IGNORED = 99


class Says(LoadedRun):
    """A run whose prediction of every volume is known."""

    total: NDArray[np.float32]

    def on_network_grid(self, prepared: Any, part: slice = slice(None)) -> NDArray[np.float32]:
        return self.total[..., part]


def calibration(total: NDArray[np.float32], label: NDArray[np.uint8]) -> dict[str, float]:
    made = a_run(nn.Identity(), LUMBAR)
    record = made.record.model_copy(update={"levels": LUMBAR, "validation": ("A",)})
    run = Says(made.path, record, made.network)
    object.__setattr__(run, "total", total)
    prepared = SimpleNamespace(spacing_mm=(1, 1, 1), label_on_network_grid=lambda label_xyz: label_xyz)
    cohort: Any = SimpleNamespace(
        prepared=lambda case, variant: prepared,
        label_xyz=lambda case, variant: label,
        record=lambda case, variant: SimpleNamespace(ignored_values=(IGNORED,)),
    )
    return calibrated_levels(run, cohort)


def test_ignored_voxels_do_not_choose_the_threshold() -> None:
    truth = spine(5)
    outside = np.zeros(truth.shape, bool)
    outside[:4] = True
    total = np.stack([np.where(truth == number, 0.57, 0) for number in range(1, 6)]).astype(np.float32)
    total[0][outside] = 0.52
    label = np.where(truth, truth + 19, 0).astype(np.uint8)
    assert calibration(total, label)["threshold"] == pytest.approx(0.55)
    assert calibration(total, np.where(outside, IGNORED, label).astype(np.uint8))["threshold"] == 0.5


def test_the_temperature_is_higher_if_certain_evidence_is_wrong() -> None:
    right = LevelSample(np.eye(5), (30.0,) * 4, LUMBAR)
    wrong = replace(right, evidence=np.eye(5)[[1, 2, 3, 4, 4]])
    assert best_temperature([right], LUMBAR) == 1
    assert best_temperature([right, wrong], LUMBAR) > 2
    assert best_temperature([], LUMBAR) == 1
