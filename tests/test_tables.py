"""Statistics and tables of a study."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from cspine_data import Preprocessing
from cspine_data.tools import count
from cspine_train.metrics.overlap import MEASURES
from cspine_train.metrics.statistics import MeanInterval
from cspine_train.run.evaluations import BATCH_AVERAGED, patient_measures
from cspine_train.run.folder import write_rows
from cspine_train.run.record import RunRecord, save_record
from cspine_train.run.settings import RunSettings
from cspine_train.study.plan import Cell, Plan, load_plan, save_plan
from cspine_train.study.published import published_percent
from cspine_train.study.ranking import contrasts, levels, n4_answer, ranked
from cspine_train.study.report import write_outcome
from cspine_train.study.results import CONDITION, scores, study_table, tidy
from cspine_train.study.runner import is_done
from cspine_train.study.tables import Findings, findings, rendered
from tests.browser import CHROMIUM, browser
from tests.conftest import not_installed

HOSTILE = "<img src=x onerror=alert(1)>|\"'&{{ 7 * 7 }}_%"
PATIENTS = tuple(f"P{number}" for number in range(8))


def row(
    model: str = "unet", variant: str = "n4", patient: str = "P0", dice: float = 0.9, **other: Any
) -> dict[str, Any]:
    known = {
        "encoder": "resnet50",
        "weights": "random",
        "axes": "0",
        "folds": None,
        "fold": None,
        "seed": 0,
        "training": "9 epochs",
        "batch_size": 8,
        "kept_epoch": 3,
        "validation_dice": 0.8,
        "train_seconds": 60.0,
        "cell": f"{model}-{variant}",
        "note": "data: synthetic",
    }
    # Those of a run with binary labels.
    figures = {measure.name: dice for measure in (*MEASURES, BATCH_AVERAGED)}
    return known | figures | {"model": model, "variant": variant, "patient": patient} | other


def grid(gain: dict[str, float], spread: float = 0.01) -> list[dict[str, Any]]:
    """Two models, both variants, eight patients; `gain` is what N4 and fpn add, the spread is theirs by patient."""
    rng = np.random.default_rng(0)
    base = {patient: 0.8 + 0.02 * number for number, patient in enumerate(PATIENTS)}
    of_patient = {name: rng.normal(0, spread, len(PATIENTS)) for name in gain}
    rows = []
    for model, variant, (number, patient) in product(("unet", "fpn"), ("n4", "raw"), enumerate(PATIENTS)):
        dice = base[patient] + sum(gain[n] + of_patient[n][number] for n in gain if n in (model, variant))
        rows.append(row(model, variant, patient, round(float(dice), 6)))
    return rows


Rows = list[dict[str, Any]]


def condition(model: str, variant: str) -> tuple[Any, ...]:
    return (model, "resnet50 (random)", variant, "0", "9 epochs", 8)


def scored(rows: Rows, figure: str = "dice") -> pd.DataFrame:
    return scores(tidy(rows), figure)


def found_in(rows: Rows) -> Findings:
    return findings(tidy(rows))


def of_conditions(figures: dict[tuple[Any, ...], dict[str, float]]) -> pd.DataFrame:
    """Make what `scores` returns."""
    return pd.DataFrame(figures).rename_axis(index="patient", columns=CONDITION)


def compared(dice: pd.DataFrame) -> list[Any]:
    return list(contrasts(dice).itertuples())


def test_levels_are_compared_patient_by_patient_over_their_common_conditions() -> None:
    rows = grid({"n4": 0.03, "fpn": 0.0})
    # A condition without its twin is in no comparison of variants.
    rows += [row("linknet", "n4", patient, 0.1) for patient in PATIENTS]
    of_dice = scored(rows)
    variant = next(one for one in compared(of_dice) if one.factor == "variant")
    differences = [
        np.mean([of_dice[condition(m, "n4")][p] - of_dice[condition(m, "raw")][p] for m in ("unet", "fpn")])
        for p in PATIENTS
    ]
    assert (variant.better, variant.worse, variant.pairs, variant.patients) == ("n4", "raw", 2, 8)
    assert variant.difference.mean == pytest.approx(np.mean(differences))
    assert (variant.patients_higher, variant.pairs_higher) == (sum(d > 0 for d in differences), 2)
    found = compared(of_dice)
    assert [one.factor for one in found] == ["model"] * 3 + ["variant"]
    plain = float(wilcoxon(np.round(differences, 6)).pvalue)
    # Holm's correction: the smallest of four is taken by four; what two models' comparisons go before, by two.
    alone = min(
        float(wilcoxon(np.round([of_dice[a][p] - of_dice[b][p] for p in PATIENTS], 6)).pvalue)
        for a, b in (
            (condition("linknet", "n4"), condition("unet", "n4")),
            (condition("linknet", "n4"), condition("fpn", "n4")),
        )
    )
    assert variant.p == pytest.approx(min(1, plain * (4 if plain <= alone else 2)))
    best = {one.factor: one for one in reversed(list(levels(of_dice).itertuples()))}
    assert best["variant"].level == "n4"
    assert best["model"].conditions == 1


@pytest.mark.parametrize(
    ("gain", "spread", "answer"),
    [
        (
            0.03,
            0.005,
            r"^Does N4 help\? Yes: Dice with N4 minus Dice without is \+3\.\d\d points over 8 patients and 2 pairs",
        ),
        (-0.03, 0.005, r"^Does N4 help\? No, it harms: .* is -2\.\d\d points .* \(higher with N4 in 0 of 8 patients"),
        (0.0, 0.02, r"^Does N4 help\? The evidence does not decide: .* 95 % interval -\d\.\d\d to \+\d\.\d\d, p = "),
    ],
)
def test_whether_n4_helps_is_answered_or_said_to_be_undecided(gain: float, spread: float, answer: str) -> None:
    assert re.match(answer, n4_answer(contrasts(scored(grid({"n4": gain}, spread)))))


def test_few_patients_decide_nothing() -> None:
    rows = grid({"n4": 0.05}, 0.001)
    of_five = n4_answer(contrasts(scored([one for one in rows if one["patient"] < "P5"])))
    assert "5 patients: too few" in of_five
    assert "interval" not in of_five.partition("Dice with N4")[2]
    assert "p =" not in of_five
    of_six = n4_answer(contrasts(scored([one for one in rows if one["patient"] < "P6"])))
    assert of_six.startswith(
        "Does N4 help? The evidence does not decide (after 2 comparisons fewer than 7 patients never can): "
    )
    assert "95 % interval" in of_six
    of_one = n4_answer(contrasts(scored([one for one in rows if one["patient"] == "P0"])))
    assert "1 patient: too few" in of_one
    assert "95 %" not in of_one
    alone = n4_answer(contrasts(scored([one for one in rows if one["variant"] == "n4"])))
    assert alone == "Does N4 help? Nothing can be said: no condition was run both with it and without."


@pytest.mark.parametrize("patients", [1, 2, 5])
@pytest.mark.parametrize("form", ["markdown", "csv", "latex", "html"])
def test_too_few_patients_have_no_interval_test_or_ranking_in_any_form(form: str, patients: int) -> None:
    rows = [one for one in grid({"n4": 0.05}) if one["patient"] < f"P{patients}"]
    found = found_in(rows)
    assert len(found.ranking.frame) == len(found.factors.frame) == 0
    assert any("too few" in caveat and count(patients, "patient") in caveat for caveat in found.caveats)
    means = [one for one in found.conditions.to_numpy().flat if isinstance(one, MeanInterval)]
    assert len(means) == 4 * (len(MEASURES) + 2)
    assert all(one.low is None for one in means)
    assert {(told.p, told.sure) for told in found.pairs.frame.itertuples()} == {("", "too few patients")}
    text = rendered(found, form)
    assert "too few" in text
    assert not re.search(r"\[[-+]?\d", text)
    if form == "csv":
        assert {line["dice_low"] for line in csv.DictReader(io.StringIO(text))} == {""}


def test_six_patients_have_intervals_tests_and_a_ranking() -> None:
    found = found_in([one for one in grid({"n4": 0.05}) if one["patient"] < "P6"])
    assert len(found.ranking.frame) == 4
    assert len(found.factors.frame)
    assert not any("too few" in caveat for caveat in found.caveats)
    assert all(one.low is not None for one in found.conditions.dice)
    assert all(found.pairs.frame.p)


@given(st.lists(st.floats(0, 1).map(lambda d: round(d, 4)), min_size=16, max_size=16), st.randoms())
def test_the_order_of_rows_changes_nothing(dice: list[float], random: Any) -> None:
    rows = [
        row("unet", variant, patient, one)
        for (variant, patient), one in zip(product(("n4", "raw"), PATIENTS), dice, strict=True)
    ]
    shuffled = random.sample(rows, len(rows))
    one, other = (compared(scored(r))[0] for r in (rows, shuffled))
    assert one.p == pytest.approx(other.p)
    assert one.difference.mean == pytest.approx(other.difference.mean)
    if one.difference.mean:
        assert one.better == other.better


def test_seeds_of_a_patient_are_averaged_and_folds_are_one_condition() -> None:
    rows = [
        row(patient="P0", dice=0.8, seed=0),
        row(patient="P0", dice=0.9, seed=1),
        row(patient="P1", dice=0.7, fold=1),
    ]
    (of_patients,) = (column for _, column in scored(rows).items())
    assert dict(of_patients) == pytest.approx({"P0": 0.85, "P1": 0.7})


def test_each_test_site_has_a_row() -> None:
    """A model was trained twice, and tested on the site that it was not trained on; two seeds are averaged."""
    rows = [
        row(model, patient=f"{site}{number}", dice=dice + seed / 100, test_site=site, seed=seed)
        for model in ("unet", "fpn")
        for site, dice, patients in (("X", 0.8, 7), ("Y", 0.6, 2))
        for number in range(patients)
        for seed in (0, 1)
    ]
    found = found_in(rows)
    sites = found.sites.frame
    assert list(sites["test site"]) == ["X", "Y", "X", "Y"]
    assert list(sites.patients) == ["7", "2", "7", "2"]
    # An interval needs six patients.
    assert [dice.partition(" ")[0] for dice in sites.Dice] == ["0.8050", "0.6050", "0.8050", "0.6050"]
    assert ["[" in dice for dice in sites.Dice] == [True, False, True, False]
    assert any("share training patients" in caveat for caveat in found.caveats)
    assert found.sites in found.tables
    assert found_in([row()]).sites not in found_in([row()]).tables


def test_one_patient_that_turns_the_mean_decides_nothing() -> None:
    """Thirteen a little better, one much worse: ranks are for N4, the mean is against it."""
    patients = [f"P{number:02d}" for number in range(14)]
    rows = [row("unet", "raw", patient, 0.8) for patient in patients]
    rows += [row("unet", "n4", patient, 0.81 + number / 1000) for number, patient in enumerate(patients[1:])]
    rows.append(row("unet", "n4", "P00", 0.1))
    (found,) = compared(scored(rows))
    assert (found.better, found.p < 0.05, found.sure) == ("raw", True, False)
    told = "The evidence does not decide, mean and ranks point to different sides: .* is -3"
    assert re.search(told, n4_answer(contrasts(scored(rows))))


def ranked_rows(figures: dict[tuple[Any, ...], dict[str, float]]) -> list[Any]:
    return list(ranked(of_conditions(figures)).itertuples())


def test_a_place_is_not_sure_where_ranks_and_mean_point_to_different_sides() -> None:
    patients = [f"P{number}" for number in range(14)]
    better = {patient: 0.81 + 0.001 * number for number, patient in enumerate(patients)} | {"P13": 0.2}
    worse = dict.fromkeys(patients, 0.8)
    best, other = ranked_rows({condition("unet", "n4"): better, condition("unet", "raw"): worse})
    assert (best.variant, other.variant) == ("raw", "n4")
    assert other.p < 0.05
    assert not other.sure
    _, other = ranked_rows({condition("unet", "n4"): better | {"P13": 0.9}, condition("unet", "raw"): worse})
    assert other.sure
    alike = {condition(model, "n4"): worse for model in ("fpn", "unet")}
    assert [one.place for one in ranked_rows({condition("linknet", "n4"): better, **alike})] == [1, 1, 3]


def test_a_seed_that_one_condition_lacks_is_taken_from_the_others() -> None:
    rows = [row("unet", variant, patient, 0.8) for variant in ("n4", "raw") for patient in PATIENTS]
    rows += [row("unet", "raw", patient, 0.9, seed=1) for patient in PATIENTS]
    (found,) = compared(scored(rows))
    assert (found.difference.mean, found.p) == (0, 1)
    assert any("seeds that all have" in caveat for caveat in found_in(rows).caveats)
    assert any(caveat.startswith("one seed: ") for caveat in found_in(rows[:16]).caveats)
    # With no seed in common nothing is compared, and nothing breaks.
    assert found_in([one for one in rows if one["seed"] == (one["variant"] == "raw")]).tables == ()


def test_a_fold_that_one_condition_lacks_takes_no_patient_from_the_others() -> None:
    rows = grid({"n4": 0.03}, 0.001)
    before = next(one for one in compared(scored(rows)) if one.factor == "variant")
    rows += [row("linknet", variant, "P0", 0.7) for variant in ("n4", "raw")]
    after = next(one for one in compared(scored(rows)) if one.factor == "variant")
    assert (before.patients, after.patients, after.pairs) == (8, 8, 3)
    assert after.sure
    assert any("levels and ranking" in caveat for caveat in found_in(rows).caveats)


def test_conditions_are_ranked_beside_the_best() -> None:
    found = list(ranked(scored(grid({"n4": 0.03, "fpn": 0.02}))).itertuples())
    assert [(one.model, one.variant) for one in found] == [
        ("fpn", "n4"),
        ("unet", "n4"),
        ("fpn", "raw"),
        ("unet", "raw"),
    ]
    assert found[0].difference is None
    assert np.isnan(found[0].p)
    assert all(one.difference.mean < 0 for one in found[1:])
    assert ranked(scored([])).empty


def published_beside(table: Any) -> list[tuple[str, str]]:
    return list(table.frame[["published, %", "difference"]].itertuples(index=False, name=None))


def test_the_published_figures_are_72_and_stand_beside_the_same_cell() -> None:
    published = published_percent()
    assert len(published) == 72
    assert published["0", "unet", "random", "n4"] == 75
    rows = [
        row(dice=0.8),
        row(variant="raw", dice=0.8),
        row(encoder="inceptionv4", weights="imagenet", dice=0.8),
        row(encoder="inceptionv4", weights="random", dice=0.8),
        row(encoder="tu-resnet10t", dice=0.8),
    ]
    (table,) = found_in(rows).cells
    assert published_beside(table) == [("75", "+5.0"), ("84", "-4.0"), ("79", "+1.0"), ("", ""), ("", "")]
    assert not any("from a file" in note for note in table.notes)
    # What to do where ImageNet's weights cannot be had.
    (table,) = found_in([row(encoder="inceptionv4", weights="in.pth", dice=0.8)]).cells
    assert published_beside(table) == [("79", "+1.0")]
    assert "these is not known." in table.notes[-1]
    assert "resnet50 without pretrained weights" in rendered(found_in(rows), "markdown")


class Cells(HTMLParser):
    """The text of each cell of an HTML page's tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_every_form_holds_the_same_cells_and_shows_names_as_text() -> None:
    rows = [row(variant=variant, patient=patient, encoder=HOSTILE) for variant in ("n4", "raw") for patient in PATIENTS]
    found = found_in(rows)
    encoder = f"{HOSTILE} (random)"
    in_csv = list(csv.DictReader(io.StringIO(rendered(found, "csv"))))
    assert [(line["encoder"], line["variant"]) for line in in_csv] == [(encoder, "n4"), (encoder, "raw")]
    assert [float(in_csv[0][name]) for name in ("dice", "dice_low", "batch_averaged_percent")] == [0.9, 0.9, 90]
    html = Cells(rendered(found, "html"))
    assert "img" not in html.tags
    assert sum(cell.strip() == encoder for cell in html.cells) == 6
    markdown = rendered(found, "markdown")
    assert "<img" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 7, 9, 10, 11)
    latex = rendered(found, "latex")
    assert latex.count(r"\begin{tabular}") == 5
    assert r"\_\%" in latex


def study_of(folder: Path, weights: str = "none", note: str = "synthetic") -> Path:
    """Make what a study's outcome is made of: plans, and two runs that are trained and scored."""
    cells = []
    for variant in ("n4", "raw"):
        asked = RunSettings(variant=variant, weights=weights, encoder="resnet50", epochs=2)
        cells.append(Cell(name=f"unet-n4-{variant}", settings=asked))
        run = folder / "runs" / cells[-1].name
        (run / "evaluation").mkdir(parents=True)
        record = RunRecord(
            store="s.zarr",
            settings=asked,
            weights_used="none",
            size_hw=(32, 32),
            notes=(note,),
            train=(),
            validation=(),
            test=PATIENTS,
            digests={},
            versions={},
            finished=True,
            kept_epoch=1,
            kept_dice=0.8,
            preprocessing=Preprocessing(bias=None),
        )
        save_record(run, record)
        write_rows(
            run / "metrics.csv",
            ("epoch", "valid_dice", "seconds"),
            [{"epoch": n, "valid_dice": 0.5 + n / 10, "seconds": 30} for n in range(2)],
        )
        patients = [
            {"case": p, "split": "test", **{m.name: 0.9 - n / 100 for m in patient_measures()}}
            for n, p in enumerate(PATIENTS)
        ]
        (run / "evaluation" / "test.json").write_text(json.dumps({"patients": patients, "kept_epoch": 1}))
        write_rows(
            run / "evaluation" / "test-slices.csv",
            ("case", "split", "axis", "slice", "dice"),
            [{"case": "P0", "split": "test", "axis": 0, "slice": n, "dice": 0.8} for n in range(5)],
        )
    save_plan(folder, Plan(store="s.zarr", cells=tuple(cells)))
    return folder


def test_the_table_has_a_row_for_each_patient_of_each_cell(tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    _, written = write_outcome(study)
    assert [path.name for path in written] == ["results.csv", "results.parquet", "tables.md", "report.html"]
    with written[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {measure.name for measure in MEASURES} <= set(rows[0])
    assert (rows[0]["train_seconds"], rows[0]["weights"], rows[0]["folds"]) == ("60.0", "random", "")
    # An evaluation of weights that the run did not keep is none.
    path = next((study / "runs").glob("*-n4/evaluation/test.json"))
    path.write_text(path.read_text().replace('"kept_epoch": 1', '"kept_epoch": 0'))
    plan = Plan(store="s", cells=(Cell(name="unet-n4-n4", settings=RunSettings()),))
    assert study_table(study, plan).empty


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"epoch,valid_dice\n0,0.5\n", "is damaged ('seconds')"),
        (
            b"epoch,valid_dice,seconds\n0,0.5,never\n",
            "float: 'never'",
        ),
        (b"epoch,valid_dice,seconds\n\xff\n", "is damaged ('utf-8' codec"),
    ],
)
def test_a_damaged_table_of_a_run_is_told_in_a_line(
    content: bytes, told: str, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    study = study_of(tmp_path / "study")
    damaged = study / "runs" / "unet-n4-raw" / "metrics.csv"
    damaged.write_bytes(content)
    refused = run_train("table", study)
    assert refused.exit_code == 1
    assert str(damaged) in refused.output
    assert told in refused.output
    # What is lost is only not shown.
    damaged.unlink()
    assert run_train("table", study).exit_code == 0
    write_outcome(study)


@pytest.mark.parametrize(
    ("old", "new"), [('"iou": 0.9', '"iou": null'), ('"kept_epoch": 1', '"kept_epoch": 1, "seconds": "long"')]
)
def test_a_damaged_evaluation_is_left_out_and_its_cell_not_done(old: str, new: str, tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    scores = study / "runs" / "unet-n4-n4" / "evaluation" / "test.json"
    assert old in scores.read_text()
    scores.write_text(scores.read_text().replace(old, new))
    with pytest.warns(UserWarning, match="damaged and left out"):
        table = study_table(study, load_plan(study))
    assert set(table.cell) == {"unet-n4-raw"}


def test_no_link_leads_out_of_a_study(tmp_path: Path, run_train: Callable[..., Result]) -> None:
    study = study_of(tmp_path / "study")
    (tmp_path / "mine").write_text("precious")
    for name in (".results.csv", ".results.parquet", ".tables.md", ".report.html"):
        (study / name).symlink_to(tmp_path / "mine")
    write_outcome(study)
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (study / "results.csv").is_symlink()
    cell = study / "runs" / "unet-n4-raw"
    cell.rename(tmp_path / "elsewhere")
    cell.symlink_to(tmp_path / "elsewhere")
    refused = run_train("table", study)
    assert refused.exit_code == 1
    assert f"{cell}: leads out" in refused.output


def test_a_cell_is_done_with_the_settings_that_it_is_asked_for(tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    cell = load_plan(study).cells[0]
    assert is_done(study, cell)
    assert not is_done(study, cell.model_copy(update={"settings": cell.settings.model_copy(update={"seed": 1})}))


def test_a_study_of_which_nothing_came_out_has_its_page(tmp_path: Path) -> None:
    study = study_of(tmp_path / "study")
    shutil.rmtree(study / "runs")
    write_rows(study / "failures.csv", ("cell", "reason"), [{"cell": "unet-n4-n4", "reason": "/store: is gone"}])
    found, written = write_outcome(study)
    assert found.answer.startswith("Does N4 help? Nothing")
    page = Page(written[-1].read_text(encoding="utf-8"))
    assert [attributes for tag, attributes in page.found if tag == "td"] == [{"class": "word"}] * 2


def test_tables_show_every_measure_with_its_mean_and_interval() -> None:
    rows = [row(patient=patient, dice=0.5) | {"hausdorff95_mm": 3.0} for patient in PATIENTS]
    found = found_in(rows)
    (told,) = found.measures.frame.to_dict("records")
    assert [name for name in told if name in {measure.heading for measure in MEASURES}] == [
        measure.heading for measure in MEASURES if measure.brief
    ]
    assert told["Hausdorff 95 %, mm"] == "3.00 [3.00, 3.00]"
    (line,) = csv.DictReader(io.StringIO(rendered(found, "csv")))
    assert all({name, f"{name}_low", f"{name}_high"} <= set(line) for name in (measure.name for measure in MEASURES))
    # An evaluation by an older cspine lacks a measure of one patient: no mean over others.
    del rows[0]["surface_dice_1mm"]
    (told,) = found_in(rows).measures.frame.to_dict("records")
    assert (told["surface Dice at 1 mm"], told["IoU"]) == ("", "0.5000 [0.5000, 0.5000]")


def test_conditions_as_csv_are_numbers_beside_what_was_published() -> None:
    rows = [row(axes=axes, patient=patient, dice=0.8) for axes in ("0", "012") for patient in PATIENTS]
    one, all_three = csv.DictReader(io.StringIO(rendered(found_in(rows), "csv")))
    assert (one["axes"], one["patients"], float(one["published_percent"])) == ("0", "8", 75)
    assert [float(one[f"difference_percent{end}"]) for end in ("", "_low", "_high")] == [5, 5, 5]
    # The reference study has no model of all axes.
    assert (all_three["axes"], all_three["published_percent"], all_three["difference_percent"]) == ("012", "", "")


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.script += data


def test_the_page_needs_nothing_beside_it_and_runs_no_script_but_its_own(tmp_path: Path) -> None:
    study = study_of(tmp_path / "study", f"/weights/{HOSTILE}", HOSTILE)
    write_rows(study / "failures.csv", ("cell", "reason"), [{"cell": "c", "reason": HOSTILE}])
    text = write_outcome(study)[1][-1].read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name in attributes for _, attributes in page.found for name in ("src", "href", "onerror", "onclick"))
    policy = next(a["content"] for t, a in page.found if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "default-src 'none'" in policy
    assert "{{ 7 * 7 }}" in text
    assert tags.count("figure") == 2 + 2 + 3


#: The least contrast of any text with what is behind it, as WCAG counts it.
CONTRAST = """
(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0.5) return color;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? "rgb(18, 18, 18)" : "rgb(255, 255, 255)";
  };
  const told = Array.from(document.querySelectorAll("body *")).filter((one) => one.offsetParent &&
    Array.from(one.childNodes).some((part) => part.nodeType === 3 && part.textContent.trim()));
  return Math.min(...told.map((one) => {
    const both = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => b - a);
    return (both[0] + 0.05) / (both[1] + 0.05);
  }));
})()
"""


def test_in_a_browser_the_page_is_read_sorted_and_filtered_by_keyboard(tmp_path: Path) -> None:
    if CHROMIUM is None:
        not_installed("chromium")
    page = write_outcome(study_of(tmp_path / "study", f"/weights/{HOSTILE}", HOSTILE))[1][-1]
    with browser(tmp_path / "profile") as seen:
        for width, scheme in product((400, 1600), ("light", "dark")):
            seen.open(page, width, scheme)
            assert seen.value("innerWidth") == width
            assert seen.value("document.documentElement.scrollWidth") <= width
            assert seen.value("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
            assert seen.value(CONTRAST) >= 4.5
            assert seen.value(f"document.body.textContent.includes({json.dumps(HOSTILE)})")

        rows = "document.querySelector('table.sortable').tBodies[0].rows"
        order = f"Array.from({rows}, row => row.cells[2].textContent).join()"
        heading = "document.activeElement.closest('th')?.cellIndex"
        # The words to filter by, then the headings of the first table.
        seen.press("Tab", 9)
        assert seen.value("document.activeElement.id") == "filter"
        while seen.value(heading) != 2:
            seen.press("Tab", 9)
        seen.press("Enter", 13, "\r")
        assert seen.value(order) == "raw,n4"
        seen.press("Enter", 13, "\r")
        assert seen.value(order) == "n4,raw"
        assert seen.value("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
        # A p is a small number, not a large one with something behind it.
        seen.value(f"['6e-05', '0.01'].forEach((p, row) => {{ {rows}[row].cells[2].textContent = p; }})")
        seen.press("Enter", 13, "\r")
        assert seen.value(order) == "0.01,6e-05"

        seen.open(page, 400, "dark")
        seen.press("Tab", 9)
        seen.type("RAW")
        assert seen.value(f"Array.from({rows}).filter(row => !row.hidden).length") == 1
        assert seen.errors == []
