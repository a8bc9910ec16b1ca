"""A run that is stopped within an epoch goes on with what the epoch has not seen, and ends with the same weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cspine_data import open_cohort
from cspine_train import RunSettings, train
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sampling import EpochSampler
from cspine_train.run.record import load_record
from cspine_train.training.checkpoints import DurableCheckpoints, Place, checkpoints, newest_checkpoint
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.conftest import Stopped
from tests.processes import Command

pytestmark = pytest.mark.usefixtures("without_pictures")

#: Dropout draws in FPN; at every step there is a checkpoint.
SMALL = {"model": "fpn", "encoder": "tu-test_resnet", "weights": "none", "pixel_mm": 12.0, "precision": "32"}
SMALL |= {"batch_size": 8, "context": 0, "crop_margin_mm": "whole"}
ALWAYS = 1e-9


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(run: Path, but: tuple[int, ...] = ()) -> list[list[str]]:
    """The rows of a run without their times, and without the loss of epochs that were broken."""
    header, *rows = (row.split(",") for row in (run / "metrics.csv").read_text().splitlines())
    assert header[-2:] == ["seconds", "seconds_waiting"]
    rows = [row[:-2] for row in rows]
    return [[*row[:1], *row[2:]] if row[0] in map(str, but) else row for row in rows]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each training step saw, by epoch and number of the batch; `stop` is the step before which to stop."""
    found: dict[str, Any] = {"seen": {}, "stop": None}
    step = SliceSegmenter.training_step

    def watched(self: SliceSegmenter, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == found["stop"]:
            found["stop"] = None
            raise Stopped
        place = (self.trainer.current_epoch, batch_idx)
        assert found["seen"].setdefault(self.global_step, (place, batch[0].sum()))[0] == place
        assert torch.equal(found["seen"][self.global_step][1], batch[0].sum())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SliceSegmenter, "training_step", watched)
    return found


def batches_of(store: Path, settings: RunSettings) -> int:
    cohort = open_cohort(store)
    return len(CohortSlices(cohort, cohort.split(variant="n4"), settings).train_dataloader())


@pytest.mark.parametrize(("schedule", "workers"), [("plateau", 0), ("onecycle", 1)])
def test_a_run_stopped_within_epochs_goes_on_in_the_same_order_to_the_same_weights(
    schedule: str, workers: int, phantom_store: Path, tmp_path: Path, steps: dict[str, Any]
) -> None:
    """Stopped in the first epoch, at a later one's first step and before its last; each step sees what it would have.

    Two checkpoints fall between stops; the steps of an undisturbed run and of the disturbed one are compared as they
    are taken, and no step is taken again.
    """
    settings = RunSettings(**SMALL, schedule=schedule, learning_rate=3e-3, epochs=3, balance="cases")
    count = batches_of(phantom_store, settings)
    assert count > 4
    train(phantom_store, tmp_path / "undisturbed", settings)
    run = tmp_path / "stopped"
    stops = [(3, Place(0, 3)), (count, Place(1)), (2 * count - 1, Place(1, count - 1)), (3 * count - 2, None)]
    # Processes take longer to start than this takes to train.
    for stop, left in stops[1:3] if workers else stops:
        steps["stop"] = stop
        with pytest.raises(Stopped):
            train(phantom_store, run, settings, workers, checkpoint_minutes=ALWAYS)
        assert steps["stop"] is None
        assert list(checkpoints(run / "checkpoints")) == [left or Place(2, count - 2)]
        assert not load_record(run).finished
    train(phantom_store, run, settings, workers, checkpoint_minutes=ALWAYS)
    assert len(steps["seen"]) == 3 * count
    assert list(checkpoints(run / "checkpoints")) == [Place(3)]
    assert same(weights(run), weights(tmp_path / "undisturbed"))
    broken = (0, 1, 2)
    assert history(run, broken) == history(tmp_path / "undisturbed", broken)


def test_what_a_network_has_not_come_to_is_not_counted_as_seen(
    phantom_store: Path, tmp_path: Path, steps: dict[str, Any]
) -> None:
    """Processes read ahead; and a checkpoint that is older than the stop has its steps taken again."""
    settings = RunSettings(**SMALL, epochs=1)
    train(phantom_store, tmp_path / "undisturbed", settings, workers=1)
    steps["stop"] = 4
    with pytest.raises(Stopped):
        train(phantom_store, tmp_path / "run", settings, workers=1, checkpoint_minutes=ALWAYS)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "epoch=0-batch=4.ckpt").write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="batch=4.ckpt is damaged"):
        assert newest_checkpoint(folder) is None
    (folder / "epoch=0-batch=4.ckpt").unlink()
    train(phantom_store, tmp_path / "run", settings, workers=2)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))
    assert history(tmp_path / "run") == history(tmp_path / "undisturbed")
    assert [file.name for file in folder.iterdir()] == ["epoch=0.ckpt"]


def test_early_stopping_goes_on_counting(
    phantom_store: Path, tmp_path: Path, steps: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate falls on a plateau, and the run stops, when they would have."""
    # Dice that never gains: at any rate of learning, statistics of batch normalisation move it a little.
    monkeypatch.setattr("cspine_train.training.segmentation_module.best_threshold", lambda counts, patients: (0.5, 0.5))
    settings = RunSettings(
        **{**SMALL, "model": "linknet", "batch_size": 16}, schedule="plateau", learning_rate=1e-4, epochs=12
    )
    train(phantom_store, tmp_path / "undisturbed", settings)
    count, run = batches_of(phantom_store, settings), tmp_path / "run"
    for stop in (5 * count + 2, 7 * count + 1):
        steps["stop"] = stop
        with pytest.raises(Stopped):
            train(phantom_store, run, settings, checkpoint_minutes=ALWAYS)
    train(phantom_store, run, settings)
    rates = [float(row[4]) for row in history(run)]
    assert rates == pytest.approx([1e-4] * 6 + [1e-4 / 3] * 2)
    assert history(run, (5, 7)) == history(tmp_path / "undisturbed", (5, 7))
    assert same(weights(run), weights(tmp_path / "undisturbed"))


def command_line(store: Path, run: Path, workers: int) -> list[str]:
    options = {**SMALL, "epochs": 2, "schedule": "onecycle", "learning_rate": 3e-3, "workers": workers}
    options |= {"store": store, "output": run, "checkpoint_minutes": 0.1 / 60}
    return ["run", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def test_a_killed_process_goes_on_within_its_epoch(phantom_store: Path, tmp_path: Path) -> None:
    """With two processes that load slices; an undisturbed run has none."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = Command("cspine-train", *command_line(phantom_store, undisturbed, 0))
    process = Command("cspine-train", *command_line(phantom_store, killed, 2))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(place.batches for place in checkpoints(killed / "checkpoints")):
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not load_record(killed).finished
    stopped = next(iter(checkpoints(killed / "checkpoints")))
    assert stopped.batches
    again = Command("cspine-train", *command_line(phantom_store, killed, 2))
    for one in (whole, again):
        told, _ = one.communicate()
        assert one.returncode == 0, told
    assert f"after {stopped}, of 2 epochs" in told
    assert "warning" not in told
    assert same(weights(killed), weights(undisturbed))
    assert history(killed, (0, 1)) == history(undisturbed, (0, 1))
    kept = {"kept_epoch", "kept_dice", "threshold"}
    assert load_record(killed).model_dump(include=kept) == load_record(undisturbed).model_dump(include=kept)


places = st.builds(Place, st.integers(0, 2000), st.integers(0, 200_000)).filter(lambda place: place != Place())


@given(places, places)
def test_names_say_where_and_order_as_training_does(first: Place, second: Place) -> None:
    assert Place.of(Path("run") / first.name) == first
    assert (first.name == second.name) == (first == second)
    assert (first < second) == ((first.epochs, first.batches) < (second.epochs, second.batches))
    assert Place.of(Path(f".{first.name}")) is None
    assert Place.of(Path(f"{first.name}.part")) is None


def test_the_newest_checkpoint_that_is_whole_is_taken(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for place in (Place(9), Place(10), Place(10, 99), Place(10, 100)):
        DurableCheckpoints().save_checkpoint({"place": place.name}, tmp_path / place.name)
    assert newest_checkpoint(tmp_path) == (Place(10, 100), tmp_path / "epoch=10-batch=100.ckpt")
    newest = tmp_path / Place(10, 100).name
    newest.write_bytes(newest.read_bytes()[:-30])
    with pytest.warns(UserWarning, match="epoch=10-batch=100.ckpt is damaged"):
        assert newest_checkpoint(tmp_path) == (Place(10, 99), tmp_path / "epoch=10-batch=99.ckpt")
    (tmp_path / Place(11).name).touch()
    with pytest.warns(UserWarning, match="is damaged and skipped") as told:
        assert newest_checkpoint(tmp_path) == (Place(10, 99), tmp_path / "epoch=10-batch=99.ckpt")
    assert [Path(str(one.message).split()[0]).name for one in told] == ["epoch=10.ckpt", "epoch=10-batch=100.ckpt"]


def test_a_checkpoint_that_cannot_be_finished_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epoch=0.ckpt"
    DurableCheckpoints().save_checkpoint({"step": 1}, path)

    def full(_content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        DurableCheckpoints().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert newest_checkpoint(tmp_path) == (Place(1), path)


@given(st.integers(0, 30), st.integers(0, 3))
def test_an_epoch_that_goes_on_is_the_rest_of_it_and_others_are_whole(seen: int, epoch: int) -> None:
    def sampler() -> EpochSampler:
        return EpochSampler(torch.ones(24).numpy(), 0.25, seed=1)

    whole, rest = sampler(), sampler()
    rest.begin(epoch, seen)
    for number in (epoch, epoch + 1, epoch + 2):
        whole.set_epoch(number)
        if number > epoch:
            rest.set_epoch(number)
        assert list(rest) == list(whole)[seen if number == epoch else 0 :]
        assert len(rest) == len(whole)


def test_time_between_checkpoints_is_waited_for(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves on by a minute at each look: every third step has a checkpoint, an epoch's last one not."""
    written: list[str] = []
    save = DurableCheckpoints.save_checkpoint

    def noted(self: DurableCheckpoints, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        written.append(Path(path).name)
        save(self, checkpoint, path)

    monkeypatch.setattr(DurableCheckpoints, "save_checkpoint", noted)
    clock: Callable[[], float] = iter(range(0, 10**6, 60)).__next__
    monkeypatch.setattr("cspine_train.training.checkpoints.monotonic", clock)
    settings = RunSettings(**SMALL, epochs=1)
    count = batches_of(phantom_store, settings)
    train(phantom_store, tmp_path / "run", settings, checkpoint_minutes=3)
    assert written == [*(f"epoch=0-batch={n}.ckpt" for n in range(3, count, 3)), "epoch=0.ckpt"]
