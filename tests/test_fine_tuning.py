"""A run that starts from the weights of another: what it takes over, what it refuses, and what it says about scores."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from pydantic import ValidationError

from cspine_data import Split, open_cohort
from cspine_train import ModelError, RunError, RunSettings, train
from cspine_train.models.build import build_model
from cspine_train.models.trained import read_trained
from cspine_train.run.origin import MOST_SEEN, Origin, SeenCase, start_of
from cspine_train.run.record import load_record, save_record
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.conftest import Stopped, in_one_line
from tests.test_checkpoints import same, weights

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL = {
    "model": "fpn",
    "encoder": "tu-test_resnet",
    "pixel_mm": 12.0,
    "context": 1,
    "batch_size": 4,
    "schedule": "onecycle",
    "learning_rate": 1e-3,
    "precision": "32",
    "augment": "none",
}


@pytest.fixture(scope="module")
def origin(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory, without_pictures: None) -> Path:
    """A run that trained on CS_01 and CS_02, and validated on CS_03."""
    run = tmp_path_factory.mktemp("runs") / "origin"
    train(phantom_store, run, RunSettings(**SMALL, weights="none", epochs=1, case_weights={"CS_02": 2}))
    return run


def fine_tuned(origin: Path, **options: Any) -> RunSettings:
    return RunSettings(**SMALL | {"from_run": str(origin), "epochs": 1} | options)


def test_options_that_are_not_given_are_those_of_the_run(
    origin: Path, phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    run = tmp_path / "run"
    done = run_train(
        "run", "--from", origin, "--store", phantom_store, "-o", run, "--variant", "raw", "--seed", 1, "--clip-norm", 9
    )
    assert done.exit_code == 0, done.output
    before, record = load_record(origin), load_record(run)
    changed = {"variant": "raw", "seed": 1, "clip_norm": 9, "weights": "auto", "from_run": str(origin)}
    assert record.settings == before.settings.model_copy(update=changed | {"case_weights": {}})
    assert record.origin is not None
    assert (record.origin.name, record.origin.new_head) == ("origin", False)
    assert record.origin.start == before.caveats()[0]
    assert record.weights_used == hashlib.sha256((origin / "model" / "model.safetensors").read_bytes()).hexdigest()
    # The store has other digests of the same voxels, prepared without N4.
    assert record.digests != before.digests
    assert {seen.case: seen.trained for seen in record.origin.seen.values()} == {
        "CS_01": True,
        "CS_02": True,
        "CS_03": False,
    }
    caveat = record.caveats()[0]
    assert "origin" in caveat
    assert record.weights_used[:12] in caveat
    assert "random weights" in caveat
    assert f"note: {caveat}" in done.stdout
    assert "N4" in done.stderr
    assert "no N4" in done.stderr


def test_it_starts_from_all_weights_of_the_run(
    origin: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, torch.Tensor] = {}

    def stop(self: SliceSegmenter, *_: Any) -> None:
        first.update({name: tensor.clone() for name, tensor in self.network.state_dict().items()})
        raise Stopped

    monkeypatch.setattr(SliceSegmenter, "training_step", stop)
    with pytest.raises(Stopped):
        train(phantom_store, tmp_path / "run", fine_tuned(origin))
    # The first step has not changed batch statistics yet.
    assert same(first, weights(origin))


def test_other_labels_have_a_new_head(
    origin: Path, phantom_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cspine_train")
    record = train(phantom_store, tmp_path / "run", fine_tuned(origin, labels="stored"))
    assert len(record.label_values) > 1
    assert record.origin is not None
    assert record.origin.new_head
    assert "new head" in record.caveats()[0]
    assert [line for line in caplog.messages if "new head" in line and str(origin) in line]
    trained = read_trained(origin)
    network, _ = build_model("fpn", "tu-test_resnet", channels=3, classes=4)
    initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert trained.give(network, (1, 2, 3)).new_head
    for name, tensor in network.state_dict().items():
        from_run = not name.startswith("segmentation_head.")
        assert torch.equal(tensor, trained.state[name] if from_run else initial[name]), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "unet"), ("model fpn", "model unet", "leave out --model")),
        (("--context", 0, "--encoder", "resnet18"), ("context 1", "leave out --encoder and --context")),
        (("--folds", 4, "--fold", 0), ("CS_01", "split")),
        (("--weights", "none"), ("--weights and --from",)),
    ],
)
def test_what_does_not_suit_the_run_is_refused_in_one_line(
    options: tuple[object, ...],
    words: tuple[str, ...],
    origin: Path,
    phantom_store: Path,
    tmp_path: Path,
    run_train: Callable[..., Result],
) -> None:
    told = run_train("run", "--from", origin, "--store", phantom_store, "-o", tmp_path / "run", *options)
    assert told.exit_code != 0
    assert in_one_line(told.stderr.splitlines(keepends=True)[-1], *words)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_and_a_run_of_earlier_versions_are_refused(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        read_trained(tmp_path)
    old = tmp_path / "old"
    shutil.copytree(origin, old)
    save_record(old, load_record(old).model_copy(update={"voxels_sha256": {}}))
    with pytest.raises(RunError, match="train it again"):
        read_trained(old)


def test_damaged_weights_are_refused(origin: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(origin, run)
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cannot be loaded"):
        read_trained(run)
    file.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        read_trained(run)
    network, _ = build_model("unet", "tu-test_resnet", channels=3)
    with pytest.raises(ModelError, match="another network") as refused:
        read_trained(origin).give(network, ())
    assert refused.value.details


def seen(case: str, *, trained: bool, patient: str = "") -> SeenCase:
    return SeenCase(case=case, patient=patient or case, trained=trained)


@pytest.mark.parametrize(
    ("trained", "part", "spoilt"),
    [
        (True, "train", False),
        (True, "validation", True),
        (True, "test", True),
        (False, "train", False),
        (False, "validation", False),
        (False, "test", True),
    ],
)
def test_cases_that_trained_may_only_train_and_those_that_validated_may_not_test(
    trained: bool, part: str, spoilt: bool
) -> None:
    one = Origin(name="first", start="", new_head=False, seen={"0": seen("A", trained=trained, patient="P")})
    split = Split(**{"train": ("T",), "validation": ("V",), "test": ("E",)} | {part: ("X", "Y")})
    voxels = dict.fromkeys("TVEY", "1") | {"X": "0"}
    assert one.seen_cases(split, voxels) == (["X"] if spoilt else [])
    # Other voxels under the same name of a case or of a patient are a note.
    assert ("X" in one.same_names(split, {"X": "P"})) == spoilt
    split = Split(**{"train": ("T",), "validation": ("V",), "test": ("E",)} | {part: ("A",)})
    assert ("A" in one.same_names(split, {})) == spoilt


def test_the_note_about_names_is_beside_every_score(origin: Path) -> None:
    record = load_record(origin)
    one = Origin(name="first", start="", new_head=False, seen={"0": seen("CS_04", trained=True)})
    notes = record.model_copy(update={"origin": one}).caveats()
    assert [note for note in notes if "CS_04" in note and "first" in note]
    assert not [note for note in record.caveats() if "CS_04" in note]


def test_a_run_knows_what_all_runs_before_it_have_seen(origin: Path, tmp_path: Path) -> None:
    digests = load_record(origin).voxels_sha256
    before = {"0": seen("A", trained=True), digests["CS_03"]: seen("A_03", trained=True)}
    before |= {digests["CS_01"]: seen("A_01", trained=False)}
    run = tmp_path / "second"
    shutil.copytree(origin, run)
    first = Origin(name="first", start="it began", new_head=False, seen=before)
    weighted = load_record(run).settings.model_copy(update={"case_weights": {"CS_02": 0}})
    save_record(run, load_record(run).model_copy(update={"origin": first, "settings": weighted}))
    network, _ = build_model("fpn", "tu-test_resnet", channels=3)
    third = read_trained(run).give(network, ())
    assert third.name == "second"
    assert "first" in third.start
    assert "it began" in third.start
    # A case without weight has trained nothing.
    assert digests["CS_02"] not in third.seen
    assert {one.case: one.trained for one in third.seen.values()} == {"A": True, "A_03": True, "CS_01": True}


def test_what_a_record_holds_of_earlier_runs_is_bounded() -> None:
    assert len(start_of("x" * 5000)) == 1000
    one = seen("A", trained=True)
    with pytest.raises(ValidationError):
        Origin(name="", start="", new_head=False, seen={str(n): one for n in range(MOST_SEEN + 1)})
    with pytest.raises(ValidationError):
        Origin(name="", start="x" * 1001, new_head=False, seen={})


def test_a_resumed_run_does_not_need_the_run_that_it_starts_from(
    origin: Path,
    phantom_store: Path,
    tmp_path: Path,
    run_train: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = tmp_path / "origin"
    shutil.copytree(origin, moved)
    command = ("run", "--from", moved, "--store", phantom_store, "--epochs", 2, "--frozen-share", 0.5)
    whole = run_train(*command, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    step = SliceSegmenter.training_step

    def stopped(self: SliceSegmenter, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.current_epoch == 1:
            raise Stopped
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patches:
        patches.setattr(SliceSegmenter, "training_step", stopped)
        with pytest.raises(Stopped):
            run_train(*command, "-o", tmp_path / "resumed")
    begun = load_record(tmp_path / "resumed")
    assert not begun.finished
    shutil.rmtree(moved)
    resumed = run_train(*command, "-o", tmp_path / "resumed")
    assert resumed.exit_code == 0, resumed.output
    assert "going on after epoch 1" in resumed.stderr
    record = load_record(tmp_path / "resumed")
    assert record.finished
    assert (record.origin, record.weights_used) == (begun.origin, begun.weights_used)
    assert record.origin is not None
    assert same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


def test_a_frozen_encoder_keeps_its_weights_and_batch_statistics(
    origin: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half of the steps trains the decoder alone, the second half everything."""
    before: list[dict[str, torch.Tensor]] = []
    step = SliceSegmenter.training_step

    def watched(self: SliceSegmenter, batch: Any, batch_idx: int) -> torch.Tensor:
        before.append({name: tensor.clone() for name, tensor in self.network.state_dict().items()})
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SliceSegmenter, "training_step", watched)
    train(phantom_store, tmp_path / "run", fine_tuned(origin, frozen_share=0.5))
    half = (len(before) + 1) // 2
    assert half > 2

    def changed(first: int, last: int, prefix: str) -> set[str]:
        return {
            name
            for name, tensor in before[first].items()
            if name.startswith(prefix) and not torch.equal(tensor, before[last][name])
        }

    assert changed(0, half, "encoder.") == set()
    assert changed(0, half, "decoder.")
    assert changed(0, half, "segmentation_head.")
    after = changed(half, -1, "encoder.")
    assert [name for name in after if name.endswith(".weight")]
    assert [name for name in after if name.endswith("running_mean")]


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_compute_the_gradients_of_a_frozen_encoder_and_drop_them(processes: int) -> None:
    """DDP's static graph has no gradients that come later."""
    network, _ = build_model("fpn", "tu-test_resnet")
    module = SliceSegmenter(network, RunSettings(frozen_share=0.5), ["A"])
    encoder = [*network.encoder.parameters()]
    for step, frozen in enumerate([True, True, False]):
        module._trainer = SimpleNamespace(world_size=processes, global_step=step, estimated_stepping_batches=4)
        module.on_train_batch_start(None, step)
        assert network.encoder.training != frozen
        assert network.decoder.training
        assert {one.requires_grad for one in encoder} == {processes == 2 or not frozen}
        network(torch.rand(2, 1, 64, 64)).sum().backward()
        assert {one.grad is None for one in encoder} == {processes == 1 and frozen}
        module.on_after_backward()
        assert {one.grad is None for one in encoder} == {frozen}
        assert next(network.decoder.parameters()).grad is not None


def test_the_record_knows_the_voxels_of_its_cases(origin: Path, phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    assert load_record(origin).voxels_sha256 == {
        case: cohort.record(case, "raw").voxels_sha256 for case in ("CS_01", "CS_02", "CS_03", "CS_04")
    }
