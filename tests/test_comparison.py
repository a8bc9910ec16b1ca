"""Runs beside each other: the same patients, in pairs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, rankdata, wilcoxon

from cspine_data import Preprocessing
from cspine_train import RunError, compare
from cspine_train.cli.commands import default_run_name
from cspine_train.metrics.statistics import holm, signed_rank_p
from cspine_train.run.record import RunRecord, save_record
from cspine_train.run.settings import RunSettings


def evaluated(folder: Path, dice: Mapping[str, float], part: str = "test", data: str = "", **settings: object) -> Path:
    """Make what a comparison reads of a run folder: its record, and an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        store="s.zarr", settings=RunSettings(**settings), weights_used="none", size_hw=(32, 32),
        preprocessing=Preprocessing(bias=None), notes=("synthetic",), train=(), validation=(), test=(),
        digests={"P0": data},
        versions={},
    )  # fmt: skip
    save_record(folder, record)
    (folder / "evaluation").mkdir(exist_ok=True)
    rows = [{"case": case, "split": part, "dice": figure} for case, figure in dice.items()]
    (folder / "evaluation" / f"{part}.json").write_text(json.dumps({"patients": rows}))
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
    assert (second.higher, second.lower, third.higher, third.lower) == (6, 1, 0, 7)
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
    assert any("scores of them: P7" in line for line in lines)


@pytest.mark.parametrize(
    "parts",
    [
        [{"test_site": "X"}, {"test_site": "Y"}],
        [
            {"split": {"train": ["P9"], "test": [case], "fold": fold, "folds": 2}}
            for fold, case in enumerate(("P0", "P4"))
        ],
    ],
)
def test_the_sites_or_given_folds_of_a_model_are_one(parts: list[dict[str, object]], tmp_path: Path) -> None:
    halves = [dict(list(PATIENTS.items())[start : start + 4]) for start in (0, 4)]
    runs = [
        evaluated(tmp_path / f"{model}{number}", halves[number], model=model, **parts[number])
        for model in ("unet", "fpn")
        for number in (0, 1)
    ]
    comparison = compare(runs)
    assert [len(model.runs) for model in comparison.models] == [2, 2]
    assert comparison.patients == tuple(PATIENTS)
    assert any("folds share training patients" in caveat for caveat in comparison.caveats)
    with pytest.raises(RunError, match="has the same fold"):
        compare([*runs, evaluated(tmp_path / "again", halves[1], model="fpn", **parts[1])])


def test_a_patient_of_two_sites_has_the_mean_over_all_its_cases(tmp_path: Path) -> None:
    sites = []
    for site, dice in (("X", {"P": 0.8, "Q": 0.5}), ("Y", {"P": 0.6})):
        sites.append(evaluated(tmp_path / site, dice, test_site=site))
        rows = [{"case": case + site, "patient": case, "split": "test", "dice": one} for case, one in dice.items()]
        (sites[-1] / "evaluation" / "test.json").write_text(json.dumps({"patients": rows}))
    other = evaluated(tmp_path / "other", {"P": 0.9, "Q": 0.9})
    scores = compare([*sites, other]).models[0].scores
    assert scores == {"P": pytest.approx(0.7), "Q": pytest.approx(0.5)}


def test_folds_of_two_split_files_are_not_one_model(tmp_path: Path) -> None:
    runs = [
        evaluated(
            tmp_path / str(fold), dict.fromkeys(tested, 0.9),
            split={"train": ["P9"], "test": tested, "fold": fold, "folds": 2},
        )
        for fold, tested in enumerate((["P0", "P1"], ["P1", "P2"]))
    ]  # fmt: skip
    with pytest.raises(RunError, match="tests P1, as another fold does"):
        compare([*runs, evaluated(tmp_path / "other", PATIENTS)])


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
    assert comparison.models[1].higher == 8
    assert any("folds share training patients" in caveat for caveat in comparison.caveats)
    again = evaluated(tmp_path / "again", dict(list(PATIENTS.items())[4:]), folds=3, fold=1)
    with pytest.raises(RunError, match="again: has the same"):
        compare([*one, again])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", PATIENTS)
    with pytest.raises(RunError, match="model cannot be compared"):
        compare([run])
    with pytest.raises(RunError, match="run: has no validation"):
        compare([run, run], "validation")
    with pytest.raises(RunError, match="all of these runs"):
        compare([run, evaluated(tmp_path / "other", {"Q": 0.9})])
    with pytest.raises(RunError, match="measure 'dize': is unknown"):
        compare([run, run], measure="dize")
    with pytest.raises(RunError, match="nowhere: is no run"):
        compare([run, tmp_path / "nowhere"])


def test_patients_that_do_not_differ_find_nothing_and_that_is_said(tmp_path: Path) -> None:
    """Enough patients, of whom too few differ for the test to reach 5 %."""
    other = {case: dice + 0.01 * (number < 5) for number, (case, dice) in enumerate(PATIENTS.items())}
    comparison = compare([evaluated(tmp_path / "a", PATIENTS), evaluated(tmp_path / "b", other)])
    assert comparison.models[1].p == pytest.approx(2 / 32)
    assert any("only 5 patients differ" in caveat for caveat in comparison.caveats)


def test_few_patients_find_nothing_and_that_is_said(tmp_path: Path, run_train: Callable[..., Result]) -> None:
    runs = [
        evaluated(tmp_path / name, {case: PATIENTS[case] + more for case in list(PATIENTS)[:5]})
        for name, more in (("a", 0), ("b", 0.05))
    ]
    comparison = compare(runs)
    assert comparison.models[1].p is None
    assert comparison.models[1].difference is not None
    assert comparison.models[1].difference.low is None
    assert comparison.models[1].difference.mean == pytest.approx(0.05)
    assert any("5 patients: too few" in caveat and "6" in caveat for caveat in comparison.caveats)
    told = run_train("compare", *runs).output
    assert "[" not in told
    assert "0.0625" not in told
    assert "5 patients: too few" in told
    assert "Wilcoxon" not in told


def test_folds_are_called_what_their_folders_have_in_common(tmp_path: Path) -> None:
    """By the names that runs are given by themselves; other data are another model, whatever the settings."""
    models = []
    for data, rate in (("now", 1e-2), ("now", 1e-3), ("then", 1e-2)):
        for fold in range(3):
            named = default_run_name(RunSettings(folds=3, fold=fold, learning_rate=rate))
            of_fold = {f"P{number}": 0.5 + rate for number in range(fold, 9, 3)}
            models.append(
                evaluated(tmp_path / data / named, of_fold, data=data, folds=3, fold=fold, learning_rate=rate)
            )
    comparison = compare(models)
    first, second, third = (model.name for model in comparison.models)
    assert (first, third) == ("linknet-tu-resnet10t-axis0-n4-seed0 (3 folds)",) * 2
    assert second.startswith("linknet-tu-resnet10t-axis0-n4-seed0-")
    assert second != first
    elsewhere = [evaluated(tmp_path / f"{fold}x", {f"Q{fold}": 0.9}, folds=3, fold=fold) for fold in range(2)]
    other = evaluated(tmp_path / "y", {"Q0": 0.9, "Q1": 0.9})
    assert compare([*elsewhere, other]).models[0].name == "0x (2 folds)"


def exact_p(differences: Sequence[float]) -> float:
    """The signed-rank test by its definition: how many of all signs give a sum of ranks as far out."""
    ranks = rankdata(np.abs(differences))
    middle = ranks.sum() / 2
    own = abs(ranks[np.asarray(differences) > 0].sum() - middle)
    sums = [sum(rank for rank, taken in zip(ranks, signs, strict=True) if taken)
            for signs in product((0, 1), repeat=len(ranks))]  # fmt: skip
    return float(np.mean([abs(one - middle) >= own - 1e-9 for one in sums]))


@given(st.lists(st.floats(0.01, 0.2), min_size=6, max_size=9, unique=True), st.integers(0, 511))
def test_p_is_what_all_signs_give(sizes: list[float], signs: int) -> None:
    differences = [size * (1 if signs >> place & 1 else -1) for place, size in enumerate(sizes)]
    assert signed_rank_p(differences) == pytest.approx(exact_p(differences))
    assert signed_rank_p([*differences, 0.0]) == pytest.approx(exact_p(differences))
    assert signed_rank_p([0.0] * 6) == 1
    assert signed_rank_p(differences[:5]) is None


def test_p_is_exact_of_as_many_patients_as_real_cohorts_have_with_ties_and_without_a_difference() -> None:
    assert signed_rank_p([0.01, 0.02, 0.03, 0.04, 0.05, *[0.0] * 9]) == pytest.approx(2 / 2**5)
    assert signed_rank_p([*[0.01 * n for n in range(1, 11)], *[0.0] * 4]) == pytest.approx(2 / 2**10)
    tied = [0.01 * (n // 2) * (1 if n % 4 else -1) for n in range(2, 16)]
    assert signed_rank_p(tied) == pytest.approx(exact_p(tied))
    # Why the test is our own, see docs/decisions/0043-exact-signed-ranks.md.
    for method in ("exact", "auto"):
        assert float(wilcoxon(tied, method=method).pvalue) != pytest.approx(exact_p(tied), rel=0.03)


def test_differences_that_are_equal_but_for_rounding_are_ties(tmp_path: Path) -> None:
    """Distances come in steps of a grid: 3.3 - 2.3 is not 1.1 - 0.1 in floating point."""
    first = {f"P{number}": round(0.3 * number, 6) for number in range(1, 9)}
    steps = [1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    second = {case: round(figure + step, 6) for (case, figure), step in zip(first.items(), steps, strict=True)}
    comparison = compare([evaluated(tmp_path / "a", first), evaluated(tmp_path / "b", second)])
    expected = float(wilcoxon(steps).pvalue)
    assert comparison.models[1].p == pytest.approx(expected)
    assert len({b - a for a, b in zip(first.values(), second.values(), strict=True)}) > 2


def test_an_evaluation_that_was_being_written_is_none(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / name, PATIENTS) for name in "ab"]
    (runs[0] / "evaluation" / ".test.json").write_text('{"patients": [{"case": "P1", "sp')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(compare(runs).patients) == 8
    (runs[0] / "evaluation" / "other.json").write_text('{"patients": [{"case": ["P1"], "split": "test", "dice": 1}]}')
    with pytest.warns(UserWarning, match="damaged and left out"):
        assert len(compare(runs).patients) == 8


@given(st.lists(st.floats(0, 1), max_size=9))
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
