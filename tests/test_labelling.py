"""From probabilities to a label map: levels beside other labels, thresholds, and predictions that are no spine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from cspine_train import RunError
from cspine_train.prediction.labelling import label_map, vertebra_probability
from cspine_train.prediction.predictor import LoadedRun, check_runs
from cspine_train.run.record import RunRecord
from tests.test_labels import a_run
from tests.test_levels import grid, spine

LUMBAR = (20, 21, 22, 23, 24)
DISC = 100


def record(values: tuple[int, ...], threshold: float = 0.5, levels: tuple[int, ...] = LUMBAR) -> RunRecord:
    made = a_run(nn.Identity(), values).record
    return made.model_copy(update={"levels": levels, "threshold": threshold})


def probabilities(truth: NDArray[np.uint8], share: float) -> NDArray[np.float32]:
    """The probability of five levels, 1 the highest."""
    return np.stack([np.where(truth == number, share, 0) for number in range(1, 6)]).astype(np.float32)


def test_the_threshold_decides_between_vertebra_and_background_and_other_labels_compete() -> None:
    truth = spine(5)
    total = probabilities(truth, 0.4)
    # Between them the background has 0.45 and discs 0.15.
    disc = np.where(truth, 0.15, 0.9).astype(np.float32)
    expected = np.where(truth, truth + 19, DISC)
    for threshold, inside in ((0.35, expected), (0.45, np.where(truth, 0, DISC))):
        made = record((*LUMBAR, DISC), threshold)
        found = label_map([made], np.concatenate([total, disc[None]]), [1.0], grid(truth.shape))
        assert (found.array_xyz == inside).mean() > 0.99
    likelier = np.where(truth == 2, 0.5, disc).astype(np.float32)
    found = label_map(
        [record((*LUMBAR, DISC), 0.35)], np.concatenate([total, likelier[None]]), [1.0], grid(truth.shape)
    )
    assert (found.array_xyz[truth == 2] == DISC).all()


def test_runs_are_fused_at_the_mean_of_their_thresholds() -> None:
    truth = spine(5)
    for share, marked in ((0.5, False), (0.7, True)):
        total = 4 * probabilities(truth, share)
        records = [record(LUMBAR, 0.4), record(LUMBAR, 0.7)]
        # (0.4 + 3 * 0.7) / 4 is 0.625.
        assert label_map(records, total, [1.0, 3.0], grid(truth.shape)).array_xyz.any() == marked


def test_a_run_of_levels_is_not_fused_with_one_that_knows_none() -> None:
    named, older = (
        LoadedRun(Path(name), record(LUMBAR, levels=levels), nn.Identity())
        for name, levels in (("named", LUMBAR), ("older", ()))
    )
    check_runs([named, named])
    with pytest.raises(RunError, match=r"older.*levels.*named"):
        check_runs([named, older])


def test_a_prediction_that_is_no_spine_is_labelled_voxel_by_voxel() -> None:
    """Thirty bodies are more than a spine has."""
    shape = (10, 10, 240)
    bodies = np.arange(240) % 8 < 6
    total = np.random.default_rng(0).random((5, *shape), np.float32) * bodies
    total[:, [0, -1]] = total[:, :, [0, -1]] = 0
    total *= 0.9 / total.sum(0).clip(min=1e-6)
    found = label_map([record(LUMBAR)], total, [1.0], grid(shape))
    assert found.spine is not None
    assert (found.spine.levels, "none was named" in found.spine.doubt) == ((), True)
    plain = np.where(total.max(0) > 1 - total.sum(0), total.argmax(0) + 20, 0)
    np.testing.assert_array_equal(found.array_xyz, plain)
    with pytest.raises(RunError):
        label_map([record(LUMBAR)], total, [1.0], grid(shape), lowest="L5")


def test_values_of_any_size_and_sign_are_beside_levels() -> None:
    truth = spine(5)
    other = np.where(truth, 0, 0.9).astype(np.float32)
    for value, dtype in ((-3, np.int16), (300, np.uint16), (70000, np.int32)):
        total = np.concatenate([probabilities(truth, 0.9), other[None]])
        array = label_map([record((*LUMBAR, value))], total, [1.0], grid(truth.shape)).array_xyz
        assert array.dtype == dtype
        assert (array == np.where(truth, truth.astype(int) + 19, value)).mean() > 0.99


def test_vertebra_is_the_sum_of_levels_unless_another_label_is_more_probable() -> None:
    total = np.array([[0.2, 0.2, 0.0], [0.3, 0.1, 0.0], [0.4, 0.6, 0.0]], np.float32).reshape(3, 3, 1, 1)
    assert vertebra_probability(total, (0, 1)).ravel().tolist() == pytest.approx([0.5, 0, 0])
    assert vertebra_probability(total[:2], (0, 1)).ravel().tolist() == pytest.approx([0.5, 0.3, 0])
