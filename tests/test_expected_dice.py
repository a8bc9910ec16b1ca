"""Expected Dice: calibration, agreement with the true Dice on validation patients, and what is shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit
from torch import nn

from cspine_train import RunSettings, evaluate, train
from cspine_train.metrics.expected_dice import calibrated_logits, count_logits, counted_overlap, expected_dice
from cspine_train.metrics.overlap import overlap
from cspine_train.prediction.confidence import calibration_of
from cspine_train.prediction.predictor import fused_calibration
from cspine_train.run.calibration import LARGEST_DIFFERENCE, Calibration
from cspine_train.run.record import RunRecord, load_record, save_record
from tests.conftest import write_case
from tests.test_labels import a_run
from tests.test_training import SMALL

CALIBRATION = Calibration(slope=0.8, intercept=0.1, expected_dice=0.91, true_dice=0.93, patients=3, labelled_ml=40)
MISLEADING = CALIBRATION.model_copy(update={"true_dice": 0.91 + 1.01 * LARGEST_DIFFERENCE})
SHAPE = (30, 31, 32)


def drawn(
    slope: float, intercept: float, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the probabilities that a network gives, a mask, and a truth drawn from the calibrated probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 3, SHAPE)
    truth = rng.random(SHAPE) < expit(slope * logits + intercept)
    probabilities = expit(logits).astype(np.float32)
    return probabilities, probabilities > 0.4, truth


@given(st.integers(0, 2**32))
def test_it_is_the_mean_dice_of_truths_drawn_from_the_probabilities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(0.3, 0.6, (12, 13, 14)).astype(np.float32)
    mask = probabilities > rng.uniform(0.3, 0.7)
    dice = np.mean([overlap(mask, rng.random(mask.shape) < probabilities).dice for _ in range(40)])
    # Weights change nothing; labels are added up.
    split = np.stack([probabilities * 0.25, probabilities * 0.75]) * 3
    for total, weight in ((probabilities[None], 1), (split, 3)):
        assert expected_dice(count_logits(total, weight, mask)) == pytest.approx(dice, abs=0.02)


def test_it_of_an_empty_mask_depends_on_the_probabilities() -> None:
    nothing = np.zeros((4, 4, 4), np.bool_)
    for probability, dice in ((0.3, 0), (1e-6, 1), (0, 1)):
        assert expected_dice(count_logits(np.full((1, 4, 4, 4), probability, np.float32), 1, nothing)) == dice


def test_all_voxels_are_counted_but_ignored_ones() -> None:
    probabilities, mask, truth = drawn(1, 0)
    probabilities.flat[:3] = 0, 1, np.float32(1 + 1e-6)
    ignored = np.zeros(SHAPE, np.bool_)
    ignored[3, 4:] = True
    counts = count_logits(probabilities[None], 1, mask, truth=truth, ignored=ignored)
    counted = ~ignored
    assert counted_overlap(counts) == overlap(mask & counted, truth & counted)
    assert counts.sum() == counted.sum()
    whole = count_logits(probabilities[None], 1, mask)
    assert whole[1].sum() == 0
    np.testing.assert_array_equal(whole[0, 1].sum(), mask.sum())


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, 0.7), (2.0, -1.0)])
def test_fitting_finds_the_calibration_that_truths_were_drawn_with(slope: float, intercept: float) -> None:
    probabilities, mask, truth = drawn(slope, intercept)
    counts = count_logits(probabilities[None], 1, mask, truth=truth)
    found = calibrated_logits(counts)
    assert found == pytest.approx((slope, intercept), abs=0.1)
    true = overlap(mask, truth).dice
    assert expected_dice(counts, *found) == pytest.approx(true, abs=1e-3)
    if slope != 1:
        assert abs(expected_dice(counts) - true) > 0.02


def test_the_calibration_of_probabilities_that_are_always_right_is_finite() -> None:
    truth = np.zeros((2, 5, 5), np.bool_)
    truth[0] = True
    counts = count_logits(np.where(truth, 0.9, 0.2).astype(np.float32)[None], 1, truth, truth=truth)
    assert np.isfinite(calibrated_logits(counts)).all()
    assert expected_dice(counts, *calibrated_logits(counts)) == pytest.approx(1, abs=1e-3)


def test_the_expected_dice_of_a_validation_patient_has_the_calibration_of_the_others() -> None:
    samples = [drawn(*parameters, seed) for seed, parameters in enumerate(((1.0, 0.0), (0.5, 0.7)))]
    first, second = (count_logits(probabilities[None], 1, mask, truth=truth) for probabilities, mask, truth in samples)
    dice = [counted_overlap(one).dice for one in (first, second)]
    both = calibration_of([first, second], "AB", 40)
    crossed = [expected_dice(first, *calibrated_logits(second)), expected_dice(second, *calibrated_logits(first))]
    assert both.expected_dice == pytest.approx(np.mean(crossed))
    assert both.true_dice == pytest.approx(np.mean(dice))
    assert (both.slope, both.intercept) == calibrated_logits(first + second)
    # Cases of one patient do not calibrate each other, and count as one patient.
    three = calibration_of([first, second, second], "AAB", 40)
    of_others = [calibrated_logits(second), calibrated_logits(second), calibrated_logits(first + second)]
    expected = [expected_dice(one, *how) for one, how in zip((first, second, second), of_others, strict=True)]
    assert three.expected_dice == pytest.approx(np.mean([np.mean(expected[:2]), expected[2]]))
    assert three.true_dice == pytest.approx(np.mean([np.mean(dice), dice[1]]))
    alone = calibration_of([second], "A", 40)
    assert alone.labelled_ml == 40
    assert [one.patients for one in (both, three, alone)] == [2, 2, 1]
    assert alone.expected_dice == pytest.approx(alone.true_dice, abs=0.01)


def test_voxels_of_implausible_components_count_as_wrong() -> None:
    mask = np.zeros((20, 40, 40), np.bool_)
    mask[:, :10, :10] = mask[:, :10, 20:30] = True
    body = 2000
    mask[0, 30, 30] = True
    certain = np.where(mask, 0.999, 1e-9).astype(np.float32)[None]
    spacing_mm = (1.0, 1.0, 2.0)
    # A body has 4 ml, and up to 8 are plausible.
    calibration = CALIBRATION.model_copy(update={"slope": 1.0, "intercept": 0.0, "labelled_ml": 4.0})
    assert calibration.expected_dice_of(certain, 1, mask, spacing_mm) == pytest.approx(1, abs=2e-3)
    mask[:, 20:, :] = True
    certain[0][mask] = 0.999
    big = 20 * 20 * 40
    share = 2 * 2 * body / (2 * body + 2 * body + big)
    assert calibration.expected_dice_of(certain, 1, mask, spacing_mm) == pytest.approx(share, abs=2e-3)


def record(calibration: Calibration | None, finished: bool = True) -> RunRecord:
    made = a_run(nn.Identity(), ()).record
    return made.model_copy(update={"calibration": calibration, "finished": finished})


def test_runs_are_fused_with_the_mean_calibration_if_all_have_an_expected_dice() -> None:
    other = Calibration(slope=0.4, intercept=-0.3, expected_dice=0.8, true_dice=0.81, patients=2, labelled_ml=20)
    records = [record(CALIBRATION), record(other)]
    fused = fused_calibration(records, [3.0, 1.0])
    assert fused is not None
    assert fused.model_dump() == pytest.approx(
        {"slope": 0.7, "intercept": 0.0, "expected_dice": 0.8825, "true_dice": 0.9, "patients": 2, "labelled_ml": 35}
    )
    assert fused_calibration([records[0]]) == CALIBRATION
    for bad, reason in ((record(None), "earlier"), (record(None, False), "not finished"), (record(MISLEADING), "0.91")):
        assert fused_calibration([records[0], bad]) is None
        assert reason in bad.why_no_expected_dice()
    assert records[0].why_no_expected_dice() == ""


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory, without_pictures: None) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(phantom_store, folder, RunSettings(**{**SMALL, "variant": "raw"}))
    return folder


def test_training_calibrates_on_whole_validation_volumes_and_evaluate_compares(run: Path) -> None:
    calibration = load_record(run).calibration
    assert calibration is not None
    (score,) = evaluate(run, ["validation"]).scores
    assert calibration.true_dice == pytest.approx(score.dice)
    save_record(run, load_record(run).model_copy(update={"calibration": CALIBRATION}))
    evaluation = evaluate(run, ["validation"])
    expected = evaluation.scores[0].expected_dice
    assert expected is not None
    assert evaluation.expected_dice_errors("validation") == [pytest.approx(expected - score.dice)]
    rows = json.loads((run / "evaluation" / "validation.json").read_text())["patients"]
    assert rows[0]["expected_dice"] == pytest.approx(expected, abs=1e-6)
    assert "expected_dice" in (run / "evaluation" / "validation.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("calibration", [CALIBRATION, MISLEADING, None])
def test_predict_shows_expected_and_true_dice_of_validation_or_the_reason_why_not(
    calibration: Calibration | None, run: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    save_record(run, load_record(run).model_copy(update={"calibration": calibration}))
    asked = ("predict", write_case(tmp_path / "raw", "A", label=False), "--run", run, "-o", tmp_path / "out")
    for verb in ("wrote", "there already"):
        done = run_train(*asked)
        assert done.exit_code == 0, done.output
        (line,) = (line for line in done.output.splitlines() if verb in line)
        shown = [
            "expected Dice" in line,
            "3 validation patients: expected 0.910, true 0.930" in line,
            "no expected Dice" not in done.output,
        ]
        assert shown == [calibration == CALIBRATION] * 3
    (row,) = csv.DictReader((tmp_path / "out" / "predictions.csv").open())
    assert bool(row["expected_dice"]) == (calibration == CALIBRATION)
