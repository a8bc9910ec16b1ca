"""Splits from files and by site: what they hold, what is refused, and that a run keeps its own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from cspine_data import GivenSplit, InputError, Split, open_cohort, prepare, read_splits
from cspine_train import RunError, RunSettings
from cspine_train.cli.commands import default_run_name
from cspine_train.run.record import load_record
from cspine_train.study.plan import Grid, Plan, plan_study, sites_of
from tests.conftest import do_serially, write_case

#: Case: patient and site. Patient A was scanned at both sites; E has no label map.
COHORT = {
    "A1": ("A", "X"), "A2": ("A", "Y"), "B": ("B", "X"), "C": ("C", "X"), "D": ("D", "Y"), "E": ("E", "Z"),
    "F": ("F", "Y"),
}  # fmt: skip
RECIPE = ("--encoder", "tu-test_resnet", "--weights", "none", "--epochs", 1, "--variant", "raw", "--size", 32)
RECIPE += ("--recipe", "reference")


@pytest.fixture(scope="module")
def site_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    with (folder / "list.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("case", "volume", "label", "patient", "site"))
        for case, (patient, site) in COHORT.items():
            write_case(folder, case)
            table.writerow((case, f"{case}.nrrd", f"{case}S-label.nrrd" if case != "E" else "", patient, site))
    with pytest.MonkeyPatch.context() as patches:
        do_serially(patches)
        assert len(prepare(pairs=folder / "list.csv", store=folder / "s.zarr", n4=False, axes="0").done) == 7
    return folder / "s.zarr"


def nnunet(folder: Path, *folds: tuple[list[str], list[str]]) -> Path:
    path = folder / "splits_final.json"
    path.write_text(json.dumps([{"train": train, "val": val} for train, val in folds]))
    return path


def table(folder: Path, text: str) -> Path:
    (folder / "split.csv").write_text(text)
    return folder / "split.csv"


def test_the_cases_of_val_are_tested_and_validation_is_taken_from_train(site_store: Path, tmp_path: Path) -> None:
    folds = read_splits(nnunet(tmp_path, (["A1", "A2", "B", "C"], ["D"]), (["D", "C"], ["A1", "A2", "B", "E"])))
    assert [(fold.fold, fold.folds, fold.validation) for fold in folds] == [(0, 2, ()), (1, 2, ())]
    cohort = open_cohort(site_store)
    assert cohort.split(given=folds[0]) == Split(("A1", "A2", "B"), ("C",), ("D",))
    # E has no label map.
    assert cohort.split(given=folds[1]) == Split(("C",), ("D",), ("A1", "A2", "B"))


def test_a_table_names_cases_or_patients(site_store: Path, tmp_path: Path) -> None:
    cohort = open_cohort(site_store)
    by_case = table(tmp_path, "Case;Part\nA1;train\nB;Val\nD;test\nD;test\n")
    assert cohort.split(given=read_splits(by_case)[0]) == Split(("A1",), ("B",), ("D",))
    by_patient = table(tmp_path, "part,patient\ntest,A\nvalidation,C\ntrain,B\ntrain,E\n")
    (given,) = read_splits(by_patient)
    assert (given.by, given.test) == ("patient", ("A",))
    split = cohort.split(given=given)
    assert split == Split(("B",), ("C",), ("A1", "A2"))
    assert cohort.slices(0, "test", of=split).cases == ("A1", "A2")
    assert len(cohort.volumes("valid", of=split)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case,part\nA1,train\nA2,test\nB,validation\n", "patient 'A': is in two parts.*train and test"),
        ("case,part\nA1,train\nZ,test\nB,validation\n", "case 'Z' of the split: is not in the store"),
        ("patient,part\nA,train\nA1,test\nB,validation\n", "patient 'A1' of the split: is not in the store"),
        ("case,part\nA1,train\nE,test\nB,validation\n", "no labelled case of the store for test"),
        ("case,part\nA1,train\nB,test\n", "split.csv: names no case for validation"),
        ("case,part\nA1,train\nB,holdout\n", "line 3: part is 'holdout'; write train, validation, test"),
        ("case,part\n,train\n", "line 2 names no case or patient"),
        ("part\ntrain\n", "line 2 names no case or patient"),
        ("case,patient,part\nA1,A,train\n", "columns case and patient.*keep one"),
        ("case\nA1\n", "lacks the column part"),
    ],
)
def test_a_bad_table_is_refused_in_a_line(text: str, words: str, site_store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        open_cohort(site_store).split(given=read_splits(table(tmp_path, text))[0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "has no fold"),
        ('[{"train": ["A1"], "val": []}]', "fold 0 has no case in 'val'"),
        ('[{"train": "A1", "val": ["B"]}]', "is not nnU-Net's list"),
        ('{"train": ["A1"]}', "is not nnU-Net's list"),
        ("[" * 100_000, "is not nnU-Net's list"),
        ("\x00", "is not nnU-Net's list"),
    ],
)
def test_bad_json_is_refused_in_a_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(InputError, match=f"s.json: {words}"):
        read_splits(tmp_path / "s.json")


def test_a_site_is_tested_by_models_of_the_others(site_store: Path, tmp_path: Path) -> None:
    cohort = open_cohort(site_store)
    assert cohort.sites["A2"] == "Y"
    # A was scanned at both sites: its other case is in no part.
    assert cohort.split(test_site="Y") == Split(("B",), ("C",), ("A2", "D", "F"))
    assert cohort.split(test_site="X") == Split(("D",), ("F",), ("A1", "B", "C"))
    # E, the only one of site Z, has no label map.
    with pytest.raises(InputError, match="site 'Z': is no site of the store's labelled cases; known are X, Y"):
        cohort.split(test_site="Z")
    with pytest.raises(InputError, match="test_site and folds|folds and test_site"):
        cohort.split(test_site="Y", folds=3)


def test_cases_without_a_site_are_named(store: Path) -> None:
    with pytest.raises(InputError, match=r"2 cases.*without a site \(A, B\).*--pairs"):
        open_cohort(store).split(test_site="X")
    with pytest.raises(RunError, match="fewer than two sites"):
        sites_of(open_cohort(store))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folds": 3, "test_site": "X"}, "--folds and --test-site exclude each other"),
        ({"split": GivenSplit(train=("A",), test=("B",)), "folds": 3}, "--folds and --split exclude each other"),
        ({"fold": 1}, "needs --folds"),
        # A record of an untrusted run reads no file.
        ({"split": "splits_final.json"}, "split"),
    ],
)
def test_settings_split_in_one_way(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunSettings(**options)


def test_runs_of_other_splits_have_other_names() -> None:
    splits = [GivenSplit(train=("A", "B"), test=(case,), fold=fold, folds=2) for fold, case in enumerate("CD")]
    many = [RunSettings(split=splits[0]), RunSettings(split=splits[1]), RunSettings(test_site="../X")]
    names = [default_run_name(settings) for settings in (*many, RunSettings(test_site=".._X"), RunSettings())]
    assert len(set(names)) == 5
    assert "-fold1of2-" in names[1]
    assert not any("/" in name or ".." in name for name in names)
    assert [settings.split_name for settings in many] == ["fold 0 of 2", "fold 1 of 2", "test site ../X"]


def test_a_study_tests_each_fold_of_a_file_and_each_site(site_store: Path, tmp_path: Path) -> None:
    cohort = open_cohort(site_store)
    folds = read_splits(nnunet(tmp_path, (["A1", "A2", "B", "C"], ["D"]), (["D", "C"], ["A1", "A2", "B"])))
    assert sites_of(cohort) == ["X", "Y"]
    small = {"models": ["unet"], "encoders": ["random"], "variants": ["raw"], "axes": [(0,)]}
    of_file = plan_study(cohort, Grid(**small, splits=folds).settings(RunSettings()))
    assert [cell.settings.fold_of for cell in of_file.cells] == [(0, 2), (1, 2)]
    assert Plan.model_validate_json(of_file.model_dump_json()) == of_file
    of_site = plan_study(cohort, Grid(**small, test_sites=["X", "Y"]).settings(RunSettings()))
    assert [cell.settings.test_site for cell in of_site.cells] == ["X", "Y"]
    with pytest.raises(RunError, match="--folds and --leave-site-out exclude each other"):
        Grid(**small, folds=3, test_sites=["Y"]).settings(RunSettings())


def test_the_commands_of_a_study_take_sites_and_files(
    site_store: Path, store: Path, tmp_path: Path, run_train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Timing the steps takes seconds.
    monkeypatch.setattr("cspine_train.cli.study_commands._print_cost", lambda *_: None)
    command = ("study", "--plan", "-o", tmp_path / "study", "--models", "unet", "--encoders", "tu-test_resnet:random")
    command = (*command, "--axes", "0", "--variants", "raw", "--epochs", 1, "--size", 32, "--store")
    planned = run_train(*command, site_store, "--leave-site-out")
    assert planned.exit_code == 0, planned.output
    assert "splits: test site X, test site Y" in planned.output
    path = nnunet(tmp_path, (["A1", "A2", "B"], ["D"]), (["D", "C", "B"], ["A1", "A2"]))
    assert "splits: fold 0 of 2, fold 1 of 2" in run_train(*command, site_store, "--split", path).output
    refused = run_train(*command, store, "--leave-site-out")
    assert refused.exit_code == 1
    assert "has fewer than two sites (none)" in refused.output


def test_a_run_keeps_its_split_when_the_file_is_gone(
    site_store: Path, tmp_path: Path, run_train: Callable[..., Result], without_pictures: None
) -> None:
    path = nnunet(tmp_path, (["A1", "A2", "B"], ["D"]), (["D", "C", "B"], ["A1", "A2"]))
    command = ("run", "--store", site_store, "--split", path, *RECIPE, "-o", tmp_path / "run")
    refused = run_train(*command, "--fold", 2)
    assert refused.exit_code == 2
    assert "--fold 2: is none of the 2" in " ".join(refused.output.split())
    done = run_train(*command, "--fold", 1)
    assert done.exit_code == 0, done.output
    record = load_record(tmp_path / "run")
    assert record.split == Split(("B", "C"), ("D",), ("A1", "A2"))
    assert record.settings.fold_of == (1, 2)
    other = run_train(*command, "--fold", 0)
    assert other.exit_code == 1
    assert "holds a run of other settings (split" in other.output
    path.unlink()
    again = run_train(*command, "--fold", 1)
    assert again.exit_code == 0, again.output
    assert run_train(*command, "--fold", 0).exit_code == 1
    evaluated = run_train("evaluate", tmp_path / "run")
    assert evaluated.exit_code == 0, evaluated.output
    assert "mean of 1" in evaluated.output


def test_the_command_tests_a_site(
    site_store: Path, tmp_path: Path, run_train: Callable[..., Result], without_pictures: None
) -> None:
    done = run_train("run", "--store", site_store, "--test-site", "Y", *RECIPE, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "tested on site Y, trained on the others" in done.output
    assert load_record(tmp_path / "run").test == ("A2", "D", "F")
    unknown = run_train("run", "--store", site_store, "--test-site", "Z", *RECIPE, "-o", tmp_path / "other")
    assert unknown.exit_code == 1
    assert "known are X, Y" in unknown.output
