"""Runs beside each other: the same patients, in pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, wilcoxon

from cspine_data import Preprocessing
from cspine_train import RunError, compare
from cspine_train.comparison import holm, signed_rank_p
from cspine_train.settings import RunRecord, RunSettings, save_record


def evaluated(folder: Path, dice: Mapping[str, float], split: str = "test", **settings: object) -> Path:
    """Make what a comparison reads of a run folder: its record, and an evaluation."""
    folder.mkdir(exist_ok=True)
    record = RunRecord(
        store="s.zarr", settings=RunSettings(**settings), weights_used="none", size_hw=(32, 32),
        preprocessing=Preprocessing(bias=None), notes=("synthetic",), train=(), validation=(), test=(), digests={},
        versions={},
    )  # fmt: skip
    save_record(folder, record)
    (folder / "evaluation").mkdir(exist_ok=True)
    rows = [{"case": case, "split": split, "dice": figure} for case, figure in dice.items()]
    (folder / "evaluation" / f"{split}.json").write_text(json.dumps({"patients": rows}))
    return folder


PATIENTS = {f"P{number}": 0.9 - 0.01 * number for number in range(8)}


def test_patients_are_compared_in_pairs(tmp_path: Path, run_train: Callable[..., Result]) -> None:
    """The second is better by a little in all but one; the third lacks a patient, who is left out of all."""
    gains = [0.011, 0.012, 0.013, 0.014, 0.015, 0.016, -0.001]
    better = {case: dice + gain for (case, dice), gain in zip(PATIENTS.items(), [*gains, 0.5], strict=True)}
    worse = {case: dice - 0.02 - dice / 1e3 for case, dice in list(PATIENTS.items())[:-1]}
    runs = [evaluated(tmp_path / name, dice) for name, dice in (("a", PATIENTS), ("b", better), ("c", worse))]
    comparison = compare(runs)
    assert comparison.patients == tuple(PATIENTS)[:-1]
    first, second, third = comparison.models
    assert (first.difference, first.p, first.mean.mean) == (None, None, pytest.approx(0.87))
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(np.mean(gains))
    assert (second.better, second.worse, third.better, third.worse) == (6, 1, 0, 7)
    # By hand: the smallest of seven ranks is negative, 2 of 128 signs are as far out on each side; all seven, 1 of 128.
    assert second.p == pytest.approx(4 / 128)
    assert third.p == pytest.approx(2 * 2 / 128)
    told = run_train("compare", *runs)
    assert told.exit_code == 0
    lines = told.output.splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert lines[2].startswith("b      7         0.8814 [")
    assert "+0.0114 [" in lines[2]
    assert lines[2].split()[-3:] == ["6", "1", "0.031"]
    assert "note: data: synthetic" in lines
    assert "note: left out, as not all models have scores of them: P7" in lines


def test_the_folds_of_a_model_are_one(tmp_path: Path) -> None:
    cases = list(PATIENTS)
    one = [
        evaluated(tmp_path / f"one-fold{fold}", {case: PATIENTS[case] for case in cases[4 * fold : 4 * fold + 4]},
                  folds=3, fold=fold)
        for fold in range(2)
    ]  # fmt: skip
    other = [
        evaluated(tmp_path / f"other-fold{fold}", dict.fromkeys(cases[4 * fold:4 * fold + 4], 0.95), folds=3,
                  fold=fold, axes=(1,))
        for fold in range(2)
    ]  # fmt: skip
    comparison = compare([*one, *other])
    assert [model.name for model in comparison.models] == ["one-fold (2 folds)", "other-fold (2 folds)"]
    assert comparison.patients == tuple(PATIENTS)
    assert comparison.models[1].better == 8
    assert any("folds share training patients" in caveat for caveat in comparison.caveats)
    again = evaluated(tmp_path / "again", PATIENTS, folds=3, fold=1)
    with pytest.raises(RunError, match="again: is of a fold that another of these runs is of too; name each"):
        compare([*one, again])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", PATIENTS)
    with pytest.raises(RunError, match="one model alone cannot be compared"):
        compare([run])
    with pytest.raises(RunError, match="run: has no validation scores; run cspine-train evaluate .* --split"):
        compare([run, run], "validation")
    with pytest.raises(RunError, match="no test patient is common to all of these runs; compare runs of the"):
        compare([run, evaluated(tmp_path / "other", {"Q": 0.9})])
    with pytest.raises(RunError, match="^dize: no measure; choose from dice, iou, precision"):
        compare([run, run], measure="dize")
    with pytest.raises(RunError, match="nowhere: is no run folder"):
        compare([run, tmp_path / "nowhere"])


def test_few_patients_find_nothing_and_that_is_said(tmp_path: Path) -> None:
    runs = [
        evaluated(tmp_path / name, {case: PATIENTS[case] + more for case in list(PATIENTS)[:5]})
        for name, more in (("a", 0), ("b", 0.05))
    ]
    comparison = compare(runs)
    assert comparison.models[1].p == pytest.approx(2 / 32)
    assert "5 patients are too few for the test ever to find a difference at 5 %" in comparison.caveats


@given(st.lists(st.floats(-0.2, 0.2).map(lambda d: round(d, 3)), min_size=2, max_size=30))
@settings(deadline=None)
def test_p_is_that_of_scipy_and_one_where_nothing_differs(differences: list[float]) -> None:
    expected = float(wilcoxon(differences).pvalue) if any(differences) else 1.0
    assert signed_rank_p(differences) == pytest.approx(expected)
    assert signed_rank_p(differences[:1]) is None


@given(st.lists(st.floats(0, 1), max_size=9))
@settings(deadline=None)
def test_holm_is_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, more in zip(p_values, corrected, strict=True):
        assert p <= more <= min(1.0, p * len(p_values)) or more == pytest.approx(min(1.0, p * len(p_values)))
    # The same order, and never less than a procedure that allows more.
    for smaller, larger in zip(
        np.argsort(p_values, kind="stable")[:-1], np.argsort(p_values, kind="stable")[1:], strict=True
    ):
        assert corrected[smaller] <= corrected[larger]
    if p_values:
        assert (np.asarray(corrected) >= false_discovery_control(p_values) - 1e-12).all()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
