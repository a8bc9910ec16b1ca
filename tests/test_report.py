"""One page that tells all of a run, whatever its names hold."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from cspine_data import open_cohort
from cspine_train import RunSettings, train
from cspine_train.metrics.overlap import MEASURES
from cspine_train.metrics.statistics import mean_interval
from cspine_train.reports.model_card import write_card
from cspine_train.reports.run_report import MOST_PLOTS, write_report
from cspine_train.run.record import load_record, save_record
from tests.test_comparison import evaluated
from tests.test_training import SMALL

HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;{{ 7 * 7 }}"


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "labels"
    train(phantom_store, folder, RunSettings(**{**SMALL, "epochs": 1, "axes": (0, 1), "labels": "stored"}))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_evaluation_writes_all_that_the_page_shows(
    run: Path, phantom_store: Path, run_train: Callable[..., Result]
) -> None:
    done = run_train("evaluate", run)
    assert done.exit_code == 0, done.output
    folder = run / "evaluation"
    named = {"test.csv", "test.json", "test-slices.csv", "test-labels.csv", "test-confusion.csv"}
    assert {f"wrote {folder / name}" for name in named} | {f"wrote {run / 'report.html'}"} <= set(
        done.output.splitlines()
    )
    (row,) = rows_of(folder / "test.csv")
    means = json.loads((folder / "test.json").read_text())["means"]["test"]
    for measure in MEASURES:
        assert means[measure.name]["mean"] == pytest.approx(float(row[measure.name]), abs=1e-6)
        assert means[measure.name]["low"] is None
    assert "1 test patient" in done.output
    card = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    for measure in MEASURES:
        assert (measure.heading in done.output) == measure.brief
        assert (measure.heading in card) == measure.brief
    # Slices and the volume hold the same voxels, along each axis.
    slices = rows_of(folder / "test-slices.csv")
    for axis in "01":
        for count in ("true_positive_voxels", "false_positive_voxels", "false_negative_voxels"):
            assert sum(int(s[count]) for s in slices if s["axis"] == axis) == int(row[count])
    # So do the pairs of true and found labels.
    confusion = rows_of(folder / "test-confusion.csv")
    truth = open_cohort(phantom_store).label_xyz(row["case"], "n4")
    for value in np.unique(truth[truth != 0]):
        assert sum(int(r["voxels"]) for r in confusion if r["true_label"] == str(value)) == np.count_nonzero(
            truth == value
        )
    missed = sum(int(r["voxels"]) for r in confusion if r["found_label"] == "0")
    assert missed == int(row["false_negative_voxels"])

    page = Page(run / "report.html")
    assert f"{float(row['surface_dice_1mm']):.4f}" in page.texts
    assert all(measure.heading in page.texts for measure in MEASURES)
    assert sum("slices" in str(plot["aria-label"]) for plot in page.of("svg")) == 2
    pictures = [attributes["src"] for attributes in page.of("img")]
    assert [picture is not None and picture.startswith("data:image/png;base64,") for picture in pictures] == [True] * 7
    shown = {base64.b64decode(str(picture).partition(",")[2]) for picture in pictures}
    assert {(folder / f"test-{name}.png").read_bytes() for name in ("best", "levels-best")} <= shown
    assert all(attributes["alt"] for attributes in page.of("img"))


def test_the_page_needs_nothing_beside_it(run: Path) -> None:
    write_report(run, load_record(run))
    page = Page(run / "report.html")
    assert not page.of("script")
    assert not page.of("link")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name != "href"
            assert name != "src" or str(value).startswith("data:")
    text = (run / "report.html").read_text()
    assert "url(" not in text
    assert re.search("default-src 'none'", text)


def test_each_split_has_its_own_mean_and_few_patients_no_interval(tmp_path: Path) -> None:
    """Evaluations of versions that averaged validation and test patients together included."""
    run = evaluated(tmp_path / "run", {})
    (run / "evaluation" / "test.json").unlink()
    dice = {"validation": [0.5, 0.7], "test": [0.80, 0.82, 0.84, 0.86, 0.88, 0.90]}
    rows = [
        {"case": f"{split}{number}", "split": split, "dice": figure}
        for split, figures in dice.items()
        for number, figure in enumerate(figures)
    ]
    joint = {"dice": {"mean": 0.7875, "low": 0.7, "high": 0.85}}
    (run / "evaluation" / "validation-test.json").write_text(json.dumps({"patients": rows, "means": joint}))
    write_report(run, load_record(run))
    texts = Page(run / "report.html").texts
    assert "0.6000" in texts[texts.index("mean of 2 validation patients") :][:2]
    assert "0.8500" in texts[texts.index("mean of 6 test patients") :][:2]
    assert not any("0.7875" in text or "[0.7000, 0.8500]" in text for text in texts)
    assert [text for text in texts if text.startswith("[")] == [mean_interval(dice["test"]).between()]
    assert any("2 validation patients" in text for text in texts)
    assert not any("6 test patients: too few" in text for text in texts)
    card = write_card(run, load_record(run)).read_text()
    assert "0.5000 | 0.7000 |" in card
    assert f"| test | 6 | {mean_interval(dice['test']).text()} | 0.8000 | 0.9000 |" in card
    assert "2 validation patients" in card


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", {HOSTILE: 0.5})
    record = load_record(run).model_copy(update={"notes": (HOSTILE,)})
    save_record(run, record)
    (run / "evaluation" / "test-slices.csv").write_text(
        "case,split,axis,slice,dice\n" + f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",test,0,3,0.5\n'
    )
    write_report(run, record)
    page = Page(run / "report.html")
    assert not page.of("img")
    assert page.texts.count(HOSTILE) == 1
    assert f"data: {HOSTILE}" in page.texts
    (plot,) = page.of("svg")
    assert str(plot["aria-label"]).startswith(f"{HOSTILE}, sagittal: mean 0.500")


def test_without_an_evaluation_the_page_says_what_to_do(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", {})
    (run / "evaluation" / "test.json").unlink()
    write_report(run, load_record(run))
    assert "cspine-train evaluate RUN" in Page(run / "report.html").texts


def test_of_many_patients_the_lowest_are_plotted(tmp_path: Path) -> None:
    dice = {f"P{number:03}": number / 100 for number in range(60, 0, -1)}
    run = evaluated(tmp_path / "run", dice)
    rows = [f"{case},test,2,{index},{figure}" for case, figure in dice.items() for index in (4, 5, 9)]
    (run / "evaluation" / "test-slices.csv").write_text("\n".join(["case,split,axis,slice,dice", *rows]))
    write_report(run, load_record(run))
    plots = [str(attributes["aria-label"]) for attributes in Page(run / "report.html").of("svg")]
    assert len(plots) == MOST_PLOTS
    assert plots[0] == "P001, axial: mean 0.010 over 3 slices"
    assert plots[-1].startswith("P048")
    text = (run / "report.html").read_text()
    assert "The 48 lowest of\n60 are shown." in text
    # A gap where nothing is marked: two strokes.
    assert re.findall('class="curve" d="([^"]*)"', text)[0] == "M30.0 99.0L87.0 99.0M315.0 99.0"


def test_a_patient_that_cannot_be_read_is_named_and_the_others_are_scored(
    run: Path, phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    copy, store = shutil.copytree(run, tmp_path / "run"), shutil.copytree(phantom_store, tmp_path / "s.zarr")
    record = load_record(copy)
    damaged = record.train[0]
    (chunk,) = (store / "cases" / damaged / record.digests[damaged] / "volume" / "0").glob("c/0/0/0")
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    done = run_train("evaluate", copy, "--store", store, "--split", "train", "--split", "train")
    assert done.exit_code == 1
    assert f"note: not scored, as the store is damaged: {damaged}" in done.output
    assert re.search(rf"failed: .*{damaged}.*is damaged", done.output)
    assert [row["case"] for row in rows_of(copy / "evaluation" / "train.csv")] == list(record.train[1:])
    assert damaged in json.loads((copy / "evaluation" / "train.json").read_text())["failed"]
