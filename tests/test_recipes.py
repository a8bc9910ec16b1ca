"""Recipes: their files, their errors, and what replaces what on the command line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cspine_train import RunError, RunSettings, recipe_settings
from cspine_train.cli.commands import main
from cspine_train.cli.setting_options import setting_options, settings_of
from cspine_train.run.recipes import read_recipe, recipe_table, shipped_recipes, with_changes


@click.command()
@setting_options()
@click.pass_obj
def command(seen: list[RunSettings], recipe: str, **options: object) -> None:
    seen.append(settings_of(read_recipe(recipe).settings, **options))


def settings(*arguments: object) -> RunSettings:
    seen: list[RunSettings] = []
    result = CliRunner().invoke(command, [*map(str, arguments)], obj=seen, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


def test_the_shipped_recipes_are_valid_and_described() -> None:
    found = {recipe.name: recipe for recipe in shipped_recipes()}
    assert {"default", "laptop", "reference", "robust"} <= found.keys()
    assert all(recipe.description for recipe in found.values())
    assert RunSettings(**found["default"].settings) == RunSettings()
    reference = RunSettings(**found["reference"].settings)
    assert (reference.epochs, reference.batch_size, reference.learning_rate) == (100, 8, 1e-4)
    assert (reference.schedule, reference.context, reference.axes) == ("plateau", 0, (0,))
    assert (reference.pixel_mm, reference.crop_margin_mm) == (None, None)
    assert RunSettings(**found["robust"].settings).augment == "strong"
    assert RunSettings(**found["laptop"].settings).minutes is not None


def test_options_replace_a_recipe_which_replaces_defaults(tmp_path: Path) -> None:
    mine = written(
        tmp_path, 'description = "mine"\nencoder = "resnet34"\nbatch-size = 4\npixel-mm = "own"\naxis = 2\nsize = 64\n'
    )
    assert settings("--recipe", mine) == RunSettings(
        encoder="resnet34", batch_size=4, pixel_mm=None, axes=(2,), size_hw=(64, 64)
    )
    found = settings("--recipe", mine, "--batch-size", 8, "--pixel-mm", 2, "--seed", 3)
    assert found == RunSettings(encoder="resnet34", batch_size=8, axes=(2,), size_hw=(64, 64), seed=3)
    assert settings() == RunSettings()


def test_a_length_on_the_command_line_replaces_that_of_a_recipe(tmp_path: Path) -> None:
    mine = written(tmp_path, "minutes = 3")
    assert settings("--recipe", mine).minutes == 3
    assert settings("--recipe", mine, "--epochs", 20).length == "20 epochs"
    assert settings("--recipe", "reference", "--minutes", 2).length == "2 minutes"
    assert recipe_settings("robust", minutes=5, seed=1).length == "5 minutes"
    assert with_changes({"epochs": 3, "seed": 1}, {"minutes": 2}) == {"seed": 1, "minutes": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = 0", ["--epochs", "greater"]),
        ("epochs = 2\nminutes = 3", ["--epochs or --minutes"]),
        ("epoch = 2", ["'epoch'", "did you mean epochs?"]),
        ("batch_size = 2", ["'batch_size'", "batch-size"]),
        ("seed = 2", ["'seed'", "cannot set"]),
        ("folds = 5", ["'folds'", "cannot set"]),
        ('model = ["unet"]', ["--model"]),
        ("epochs 2", ["not valid TOML"]),
        ("a = " + 5000 * "[", ["not valid TOML"]),
        ("minutes = 1e300", ["--minutes", "less"]),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str, words: list[str]) -> None:
    mine = written(tmp_path, text)
    with pytest.raises(RunError) as caught:
        read_recipe(str(mine))
    assert all(word in str(caught.value) for word in [str(mine), *words])


def test_every_setting_of_a_recipe_has_the_name_of_its_option(tmp_path: Path) -> None:
    written(tmp_path, "compile = true\ncase-weight = 3")
    with pytest.raises(RunError, match="cannot set 'case-weight'"):
        read_recipe(str(tmp_path / "mine.toml"))
    assert RunSettings(**read_recipe(str(written(tmp_path, "compile = true"))).settings).compile


def test_an_unknown_recipe_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name, words in {"robst": ["did you mean robust?", "laptop"], str(tmp_path / "no.toml"): ["no.toml"]}.items():
        result = CliRunner().invoke(main, ["run", "--recipe", name])
        assert result.exit_code == 1
        assert all(word in result.output for word in words)
        assert "Traceback" not in result.output


def test_a_shipped_name_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").write_text("epochs = 7")
    assert read_recipe("default").settings == {}


def test_the_command_lists_recipes_and_where_they_differ() -> None:
    result = CliRunner().invoke(main, ["recipes"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.startswith("--")}
    names = [recipe.name for recipe in shipped_recipes()]
    assert len(lines["--epochs"]) == len(names)
    assert lines["--pixel-mm"][names.index("reference")] == "own"
    assert lines["--augment"][names.index("robust")] == "strong"
    assert [row[0] for row in recipe_table([read_recipe("robust")])] == ["--augment", "--epochs", "--average"]
