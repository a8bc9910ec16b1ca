"""Training for a given time: when it ends, and the schedule that follows the clock."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from lightning.pytorch.callbacks import timer
from pydantic import ValidationError
from torch import nn

from cspine_train import RunSettings, train
from cspine_train.cli.commands import main
from cspine_train.run.record import load_record
from cspine_train.training.callbacks import TimeBudget, epoch_name
from cspine_train.training.optimisers import optimisation
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.test_checkpoints import SMALL

pytestmark = pytest.mark.usefixtures("without_pictures")
ONE_CYCLE = {"schedule": "onecycle", "learning_rate": 3e-3}


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_has_either_epochs_or_minutes() -> None:
    assert RunSettings().minutes is None
    assert RunSettings(minutes=2).epochs is None
    assert RunSettings(minutes=2).length == "2 minutes"
    assert RunSettings(epochs=3).length == "3 epochs"
    assert RunSettings(**RunSettings(minutes=2).model_dump()) == RunSettings(minutes=2)
    with pytest.raises(ValidationError, match="--epochs or --minutes"):
        RunSettings(epochs=3, minutes=2)


def test_epochs_are_named_from_one_on() -> None:
    assert [epoch_name(0, 8), epoch_name(7, 8, "/"), epoch_name(2, -1)] == ["1 of 8", "8/8", "3"]


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: self.now))


def trainer_of() -> Any:
    return SimpleNamespace(global_step=0, should_stop=False, strategy=SimpleNamespace(broadcast=lambda value: value))


def stepped(budget: TimeBudget, trainer: Any, clock: Clock, seconds: float) -> float:
    clock.now += seconds
    trainer.global_step += 1
    budget.on_train_batch_end(trainer)
    return budget.share


def test_steps_end_when_only_the_time_of_a_validation_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, trainer, module = Clock(monkeypatch), trainer_of(), SimpleNamespace()
    # Validation is expected to take as long as five steps: 10 of 60 seconds.
    budget = TimeBudget(1, validation_steps=5)
    budget.on_train_start(trainer, module)
    assert budget.share == 0
    assert stepped(budget, trainer, clock, 2) == pytest.approx(2 / 50)
    # It takes 20.
    budget.on_validation_start(trainer, module)
    clock.now += 20
    budget.on_validation_end(trainer, module)
    assert budget.share == pytest.approx(22 / 40)
    shares = [stepped(budget, trainer, clock, 2) for _ in range(9)]
    assert shares[-2] == pytest.approx(38 / 40)
    assert shares[-1] == 1
    assert trainer.should_stop


def test_no_epoch_begins_that_leaves_no_time_for_its_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, trainer, module = Clock(monkeypatch), trainer_of(), SimpleNamespace()
    budget = TimeBudget(1, validation_steps=0)
    budget.on_train_start(trainer, module)
    stepped(budget, trainer, clock, 31)
    assert not trainer.should_stop
    budget.on_validation_start(trainer, module)
    clock.now += 15
    budget.on_validation_end(trainer, module)
    assert trainer.should_stop


def test_the_time_of_a_killed_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, trainer, module = Clock(monkeypatch), trainer_of(), SimpleNamespace()
    first = TimeBudget(1, validation_steps=4)
    first.on_train_start(trainer, module)
    for _ in range(20):
        stepped(first, trainer, clock, 1)
    second = TimeBudget(1, validation_steps=4)
    second.load_state_dict(first.state_dict())
    clock.now += 500
    second.on_train_start(trainer, module)
    assert second.share == pytest.approx(20 / 60)
    # A validation is expected to take 4 s, also by what this process has seen.
    assert stepped(second, trainer, clock, 1) == pytest.approx(21 / 56)
    second.on_validation_start(trainer, module)
    clock.now += 6
    second.on_validation_end(trainer, module)
    third = TimeBudget(1, validation_steps=4)
    third.load_state_dict(second.state_dict())
    third.on_train_start(trainer, module)
    assert third.share == pytest.approx(27 / 54)
    assert stepped(third, trainer, clock, 28) == 1


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_the_schedule_by_the_clock_is_that_by_steps(schedule: str) -> None:
    layer, steps = nn.Linear(1, 1), 400
    by_steps = optimisation(layer, RunSettings(schedule=schedule, learning_rate=0.1), steps)
    module = SliceSegmenter(layer, RunSettings(schedule=schedule, learning_rate=0.1, minutes=1), ["a"])
    module.budget = SimpleNamespace(share=0.0)  # type: ignore[assignment]
    by_clock = module.configure_optimizers()
    for step in range(1, steps):
        for one in (by_steps, by_clock):
            one["optimizer"].step()
        by_steps["lr_scheduler"]["scheduler"].step()
        module.budget.share = step / steps  # type: ignore[union-attr]
        module.lr_scheduler_step(by_clock["lr_scheduler"]["scheduler"], None)
        rates = [one["optimizer"].param_groups[0]["lr"] for one in (by_steps, by_clock)]
        # The rates of a warm-up of few steps are farther apart.
        assert step < 25 or rates[1] == pytest.approx(rates[0], abs=0.002)


def test_a_real_run_ends_in_time_at_the_lowest_rate(phantom_store: Path, tmp_path: Path) -> None:
    budgets = []
    start = TimeBudget.on_train_start

    def watched(self: TimeBudget, *arguments: Any) -> None:
        budgets.append(self)
        start(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimeBudget, "on_train_start", watched)
        record = train(phantom_store, tmp_path / "run", RunSettings(**SMALL, **ONE_CYCLE, minutes=0.05))
    rows = rows_of(tmp_path / "run")
    assert record.finished
    assert record.kept_epoch == len(rows) - 1
    # A step, and a validation that takes longer than the one before, may exceed the 3 s.
    assert 2 < budgets[0].time_elapsed() < 4.5
    assert float(rows[-1]["learning_rate"]) < 0.2 * ONE_CYCLE["learning_rate"]
    # The same call finds it done.
    assert train(phantom_store, tmp_path / "run", record.settings) == load_record(tmp_path / "run")


def test_minutes_replace_epochs_on_the_command_line(phantom_store: Path, tmp_path: Path) -> None:
    options = ["--store", phantom_store, "-o", tmp_path / "run", "--minutes", 1, "--epochs", 2]
    both = CliRunner().invoke(main, ["run", *map(str, options)])
    assert both.exit_code != 0
    assert "--epochs or --minutes" in both.output
    assert not (tmp_path / "run").exists()
