"""Evaluations of named vertebrae, from label maps to every table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from torch import nn

from cspine_data import Preprocessing
from cspine_train import Evaluation, RunError, RunSettings, compare
from cspine_train.cli.score_tables import print_scores
from cspine_train.evaluation.patient_score import score_patient
from cspine_train.evaluation.scoring import _written
from cspine_train.levels.naming import FoundLevel, NamedSpine
from cspine_train.metrics.instances import LEVEL_MEASURES
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import Segmented
from cspine_train.reports.model_card import write_card
from cspine_train.reports.run_report import write_report
from cspine_train.run.evaluations import means_of_levels, recorded_evaluations, reliability_of_names
from cspine_train.run.record import RunRecord, load_record, save_record
from cspine_train.study.plan import Cell, Plan, save_plan
from cspine_train.study.report import study_findings
from cspine_train.study.tables import rendered
from tests.test_comparison import evaluated
from tests.test_report import Page
from tests.test_tables import PATIENTS, found_in, row

STORED = RunSettings(labels="stored")
LEVELS = (19, 20, 21)
DIAGONAL_MM = float(np.linalg.norm((6, 6, 30)))
Maps = Mapping[str, tuple[NDArray[np.int16], NDArray[np.int16]]]


def spine(*values: int) -> NDArray[np.int16]:
    """Boxes of 4 x 4 x 5 voxels, one below the other; a value of 0 leaves a gap."""
    labels = np.zeros((6, 6, 30), np.int16)
    for number, value in enumerate(values):
        labels[1:5, 1:5, 30 - 7 * number - 5 : 30 - 7 * number] = value
    return labels


def evaluation_of(
    run: Path, maps: Maps, values: tuple[int, ...] = LEVELS, settings: RunSettings = STORED,
    sure: Mapping[int, float] | None = None, **patients: str
) -> Evaluation:  # fmt: skip
    """Evaluate predicted and true label maps, by case, as those of a run of levels with these probabilities."""
    record = RunRecord(
        store="s.zarr", settings=settings, weights_used="none", size_hw=(32, 32),
        preprocessing=Preprocessing(bias=None), train=(), validation=(), test=tuple(maps), label_values=values,
        levels=LEVELS, digests=dict.fromkeys(maps, ""), versions={}, patients=patients, finished=True,
    )  # fmt: skip
    (run / "evaluation").mkdir(parents=True)
    save_record(run, record)
    loaded = LoadedRun(run, record, nn.Identity())
    named = NamedSpine(tuple(FoundLevel(v, "", p, (0, 0, 0), 1, 1) for v, p in (sure or {}).items()))
    scores = [
        score_patient(Segmented(case, truth, (1, 1, 1), found, truth, spine=named), "test", loaded)
        for case, (found, truth) in maps.items()
    ]
    return _written(loaded, "test", tuple(scores), (), 1.0)


TRUE = spine(*LEVELS)
#: The last patient's second vertebra is missed.
SIX: Maps = {f"P{number}": (spine(19, 0, 21) if number == 5 else TRUE, TRUE) for number in range(6)}


def test_a_missed_vertebra_lowers_the_means_of_its_level(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "run", SIX)
    assert [(one.level, one.split, one.patients) for one in evaluation.levels] == [
        ("T12", "test", 6),
        ("L1", "test", 6),
        ("L2", "test", 6),
    ]
    means = {measure.name: mean for measure, mean in evaluation.levels[1].means.items()}
    for name in ("dice", "surface_dice_1mm", "identification_rate"):
        assert means[name].mean == pytest.approx(5 / 6)
        assert means[name].low < 5 / 6
    for name in ("hausdorff95_mm", "localisation_distance_mm"):
        assert means[name].mean == pytest.approx(DIAGONAL_MM / 6)
    assert evaluation.levels[0].text(next(iter(evaluation.levels[0].means))) == "1.0000 [1.0000, 1.0000]"
    of_patient = evaluation.scores[5].figures
    assert [of_patient[measure.name] for measure in LEVEL_MEASURES] == pytest.approx(
        [2 / 3, DIAGONAL_MM / 3, 4 / 5, 1, 4 / 5]
    )
    assert evaluation.means["test"]["identification_rate"].mean == pytest.approx(17 / 18)


def test_fewer_than_six_patients_have_no_interval_of_a_level(tmp_path: Path) -> None:
    five = evaluation_of(tmp_path / "run", {case: SIX[case] for case in list(SIX)[1:]})
    assert {mean.low for level in five.levels for mean in level.means.values() if mean} == {None}


def test_a_level_counts_each_patient_once_and_only_those_who_have_it(tmp_path: Path) -> None:
    maps = {
        "A1": (TRUE, TRUE),
        "A2": (spine(19, 0, 21), TRUE),
        "B": (spine(19, 20), spine(19, 20)),
        # Its lowest vertebra is one too many.
        "C": (TRUE, spine(19, 20)),
    }
    evaluation = evaluation_of(tmp_path / "run", maps, A1="A", A2="A")
    dice = {one.level: (one.patients, next(iter(one.means.values()))) for one in evaluation.levels}
    assert {level: (patients, mean.mean if mean else None) for level, (patients, mean) in dice.items()} == {
        "T12": (3, 1),
        "L1": (3, pytest.approx((0.5 + 1 + 1) / 3)),
        "L2": (1, 1),
    }
    extra = evaluation.scores[3].figures
    assert (extra["identification_rate"], extra["recognition_quality"]) == (1, pytest.approx(4 / 5))


def test_only_vertebrae_count_also_those_that_no_training_case_has(tmp_path: Path) -> None:
    """Value 5 is a disc in this run, and 28, T13, was never learnt."""
    evaluation = evaluation_of(tmp_path / "run", {"A": (spine(19, 20, 21, 0), spine(19, 20, 28, 5))}, (5, *LEVELS))
    assert [one.level for one in evaluation.levels] == ["T12", "T13", "L1"]
    assert evaluation.scores[0].figures["identification_rate"] == pytest.approx(2 / 3)
    # The missed disc is no instance; T13 is one, under another name.
    assert evaluation.scores[0].figures["recognition_quality"] == 1
    with (tmp_path / "run" / "evaluation" / "test-labels.csv").open(newline="") as file:
        rows = {line["label"]: (line["level"], line["identification_rate"]) for line in csv.DictReader(file)}
    assert rows == {"5": ("", ""), "19": ("T12", "1.0"), "20": ("L1", "1.0"), "21": ("L2", ""), "28": ("T13", "0.0")}


def test_report_card_and_terminal_show_patients_and_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = evaluation_of(tmp_path / "run", SIX)
    print_scores(evaluation)
    printed = capsys.readouterr().out
    record = load_record(tmp_path / "run")
    texts = Page(write_report(tmp_path / "run", record)).texts
    card = write_card(tmp_path / "run", record).read_text()
    for measure in LEVEL_MEASURES:
        assert measure.heading in texts
        assert measure.heading in printed
        assert measure.heading in card
    confusion = texts[texts.index("Confusion of labels") :]
    assert [confusion[confusion.index(name) - 1] for name in ("T12", "L1", "L2")] == ["none", "T12", "L1"]
    first = texts.index("L1")
    assert texts[first + 1 : first + 3] == ["6", evaluation.levels[1].text(next(iter(evaluation.levels[1].means)))]
    (line,) = (line.split() for line in printed.splitlines() if line.startswith("L1"))
    assert line[1:4] == ["test", "6", "0.8333"]


SURE = {19: 0.95, 20: 0.6, 21: 0.99}
#: The names of the second patient are one too low, and its lowest vertebra is unlabelled.
NAMED: Maps = {"A": (TRUE, TRUE), "B": (TRUE, spine(18, 19))}


def test_rows_of_levels_have_the_probability_and_the_true_level(tmp_path: Path) -> None:
    evaluation_of(tmp_path / "run", NAMED, sure=SURE)
    with (tmp_path / "run" / "evaluation" / "test-labels.csv").open(newline="") as file:
        rows = [(line["case"], line["level"], line["probability"], line["true_level"]) for line in csv.DictReader(file)]
    assert rows == [
        ("A", "T12", "0.95", "T12"), ("A", "L1", "0.6", "L1"), ("A", "L2", "0.99", "L2"),
        ("B", "T11", "", ""), ("B", "T12", "0.95", "T11"), ("B", "L1", "0.6", "T12"), ("B", "L2", "0.99", ""),
    ]  # fmt: skip


def test_reliability_counts_names_whose_true_level_is_known(tmp_path: Path) -> None:
    (names,) = evaluation_of(tmp_path / "run", NAMED, sure=SURE).names
    assert (names.split, names.patients) == ("test", 2)
    assert (names.correct, names.uncertain_correct, names.wrong, names.uncertain_wrong) == (3, 1, 2, 1)
    assert [one.number if one else 0 for one in names.bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert names.calibration_error == pytest.approx((2 * 0.1 + 2 * 0.95 + 0.99 - 2) / 5)


def test_report_and_terminal_show_the_reliability_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    print_scores(evaluation_of(run, NAMED, sure=SURE))
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "calibration error" in line)
    page = Page(write_report(run, load_record(run)))
    (caption,) = (text for text in page.texts if "calibration error" in text)
    for text in (note, caption):
        assert "5 names of vertebrae in 2 test patients" in text
        assert "0.218" in text
        assert "1 of 2 wrong" in text
        assert "1 of 3 correct" in text
    assert [(dot["cx"], dot["cy"]) for dot in page.of("circle")] == [("180.0", "110.0"), ("252.7", "76.7")]
    assert not any("chose the temperature" in text for text in page.texts)


def test_validation_patients_have_a_diagram_of_their_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluation_of(run, NAMED, sure=SURE)
    path = run / "evaluation" / "test.json"
    evaluation = json.loads(path.read_text())
    for one in (one for rows in ("patients", "labels") for one in evaluation[rows] if one["case"] == "A"):
        one["split"] = "validation"
    path.write_text(json.dumps(evaluation))
    captions = [text for text in Page(write_report(run, load_record(run))).texts if "calibration error" in text]
    assert ["1 validation patient" in text and "chose the temperature" in text for text in captions] == [True, False]
    assert ["no name was wrong" in text for text in captions] == [True, False]


def test_an_evaluation_with_another_calibration_is_left_out(tmp_path: Path) -> None:
    evaluation_of(tmp_path / "run", NAMED, sure=SURE)
    record = load_record(tmp_path / "run")
    assert len(list(recorded_evaluations(tmp_path / "run", record))) == 1
    for changed in ({"level_temperature": 2.0}, {"threshold": 0.4}):
        calibrated = record.model_copy(update=changed)
        assert not list(recorded_evaluations(tmp_path / "run", calibrated))


def test_older_evaluations_have_no_probabilities(tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluation_of(run, NAMED, sure=SURE)
    path = run / "evaluation" / "test.json"
    evaluation = json.loads(path.read_text())
    del evaluation["level_temperature"]
    for one in evaluation["labels"]:
        del one["probability"], one["true_level"]
    path.write_text(json.dumps(evaluation))
    record = load_record(run)
    ((_, read),) = recorded_evaluations(run, record)
    assert reliability_of_names(read) == ()
    assert means_of_levels(read)
    assert not any("eliability of" in text for text in Page(write_report(run, record)).texts)


def test_runs_are_compared_by_a_measure_of_levels(tmp_path: Path, run_train: Callable[..., Result]) -> None:
    for name, maps in (("a", SIX), ("b", dict.fromkeys(SIX, (TRUE, TRUE)))):
        evaluation_of(tmp_path / name, maps)
    comparison = compare([tmp_path / "a", tmp_path / "b"], measure="identification_rate")
    assert [model.mean.mean for model in comparison.models] == [pytest.approx(17 / 18), 1]
    done = run_train("compare", tmp_path / "a", tmp_path / "b", "--measure", "localisation_distance_mm")
    assert "localisation distance: lower is better" in done.output


def test_runs_are_compared_by_one_level(tmp_path: Path, run_train: Callable[..., Result]) -> None:
    """One of the patients of the second run does not have the vertebra."""
    for name, maps in (("a", SIX), ("b", {**dict.fromkeys(SIX, (TRUE, TRUE)), "P0": (spine(19), spine(19))})):
        evaluation_of(tmp_path / name, maps)
    runs = tmp_path / "a", tmp_path / "b"
    comparison = compare(runs, level="L1")
    assert comparison.patients == ("P1", "P2", "P3", "P4", "P5")
    assert [model.mean.mean for model in comparison.models] == [pytest.approx(4 / 5), 1]
    done = run_train("compare", *runs, "--level", "T12", "--measure", "hausdorff95_mm")
    assert "T12: mean Hausdorff 95 %, mm" in done.output
    with pytest.raises(RunError, match="level 'D12': is unknown"):
        compare(runs, level="D12")
    with pytest.raises(RunError, match="a: has no test scores of C5"):
        compare(runs, level="C5")
    with pytest.raises(RunError, match="a: its test scores have no panoptic_quality"):
        compare(runs, measure="panoptic_quality", level="L1")


def test_evaluations_without_levels_stay_readable(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / name, dict.fromkeys(PATIENTS, 0.9)) for name in "ab"]
    assert compare(runs).models[0].mean.mean == pytest.approx(0.9)
    with pytest.raises(RunError, match="a: its test scores have no identification_rate.*choose from dice"):
        compare(runs, measure="identification_rate")
    record = load_record(runs[0])
    assert not any("identification" in text or "level" in text for text in Page(write_report(runs[0], record)).texts)
    ((_, evaluation),) = recorded_evaluations(runs[0], record)
    assert means_of_levels(evaluation) == ()
    assert reliability_of_names(evaluation) == ()


#: A row of a level without its value.
LABEL = {"case": "P0", "split": "test", "dice": 1.0, "identification_rate": 1.0}


@pytest.mark.parametrize(
    "damage",
    [
        {"labels": [{"label": 20}]},
        {"labels": None},
        {"labels": [LABEL]},
        *({"labels": [LABEL | {"label": 20, "probability": wrong}]} for wrong in (1.5, -1, float("nan"), "1")),
    ],
)
def test_an_evaluation_with_damaged_labels_is_left_out(tmp_path: Path, damage: dict[str, Any]) -> None:
    run = evaluated(tmp_path / "run", {"P0": 0.9})
    path = run / "evaluation" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    record = load_record(run)
    with pytest.warns(UserWarning, match="damaged"):
        assert not list(recorded_evaluations(run, record))


@pytest.mark.parametrize("levels", [[20, 19], [19, 19], [19, 22], [5], [999]])
def test_a_record_whose_levels_are_no_labels_of_vertebrae_is_refused(tmp_path: Path, levels: list[int]) -> None:
    run = evaluated(tmp_path / "run", {"P0": 0.9})
    record = json.loads((run / "run.json").read_text()) | {"label_values": [19, 20, 999]}
    (run / "run.json").write_text(json.dumps(record | {"levels": [19, 20]}))
    assert load_record(run).levels == (19, 20)
    (run / "run.json").write_text(json.dumps(record | {"levels": levels}))
    with pytest.raises(RunError, match="damaged.*levels"):
        load_record(run)


def test_a_study_shows_each_vertebra_of_each_condition(tmp_path: Path) -> None:
    """Seeds are averaged, and T13 comes between T12 and L1."""
    cells = []
    for seed, lowest in ((0, 21), (1, 0)):
        settings = RunSettings(labels="stored", seed=seed)
        cells.append(Cell(name=f"seed{seed}", settings=settings))
        maps = {case: (spine(19, 28, 20, lowest), spine(19, 28, 20, 21)) for case in SIX}
        evaluation_of(tmp_path / "runs" / f"seed{seed}", maps, (19, 20, 21), settings)
    save_plan(tmp_path, Plan(store="s.zarr", cells=tuple(cells)))
    found, *_ = study_findings(tmp_path)
    frame = found.vertebrae.frame
    assert frame["level"].tolist() == ["T12", "T13", "L1", "L2"]
    assert frame["patients"].tolist() == ["6"] * 4
    assert frame["Dice"].tolist() == ["1.0000 [1.0000, 1.0000]"] * 3 + ["0.5000 [0.5000, 0.5000]"]
    assert frame["localisation distance, mm"].tolist()[3].startswith(f"{DIAGONAL_MM / 2:.2f} ")
    for form in ("markdown", "latex", "html"):
        assert "Each vertebra" in rendered(found, form)


def test_a_study_shows_the_measures_of_levels_if_its_runs_have_them() -> None:
    rows = [row(patient=patient, identification_rate=0.75) for patient in PATIENTS]
    found = found_in(rows)
    assert found.measures.frame["identification rate"].tolist() == ["0.7500 [0.7500, 0.7500]"]
    assert "panoptic quality" not in found.measures.frame
    (line,) = csv.DictReader(io.StringIO(rendered(found, "csv")))
    assert (line["identification_rate"], "panoptic_quality" in line) == ("0.75", False)
