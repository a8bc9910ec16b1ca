"""Reliability of probabilities: bins and expected calibration error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from cspine_train.metrics.calibration import BINS, expected_calibration_error, reliability_bins


@pytest.mark.parametrize("predictions", [1, 7, 1000])
def test_the_error_equals_that_of_torchmetrics(predictions: int) -> None:
    random = np.random.default_rng(predictions)
    probabilities = random.uniform(size=predictions)
    correct = random.uniform(size=predictions) < probabilities**2
    theirs = binary_calibration_error(torch.tensor(probabilities), torch.tensor(correct), n_bins=BINS, norm="l1")
    ours = expected_calibration_error(reliability_bins(probabilities.tolist(), correct.tolist()))
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_a_bin_includes_its_upper_limit_and_the_first_one_zero() -> None:
    bins = reliability_bins([number / 10 for number in range(11)], [True] * 11)
    assert [one.number if one else 0 for one in bins] == [2, *[1] * 9]
    assert [one.probability if one else None for one in bins[1:]] == pytest.approx([n / 10 for n in range(2, 11)])


def test_a_bin_has_the_mean_probability_and_the_accuracy() -> None:
    bins = reliability_bins([0.81, 0.83, 0.88, 1.0], [True, False, True, True])
    assert bins[:8] == (None,) * 8
    assert bins[8] is not None
    assert (bins[8].number, bins[8].probability, bins[8].accuracy) == (3, pytest.approx(0.84), pytest.approx(2 / 3))
    assert expected_calibration_error(bins) == pytest.approx(3 / 4 * (0.84 - 2 / 3))


def test_without_predictions_there_is_no_error() -> None:
    assert expected_calibration_error(reliability_bins([], [])) == 0


def test_each_probability_needs_its_prediction() -> None:
    with pytest.raises(ValueError, match="2 probabilities.*1 prediction"):
        reliability_bins([0.5, 0.6], [True])
