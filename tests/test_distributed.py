"""Training in several processes: batches, losses and counts of the whole batch; processes that die; refusals."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.utils.data import BatchSampler

from cspine_data import open_cohort
from cspine_train import Machines, RunError, RunSettings, train
from cspine_train.cli.commands import main as train_main
from cspine_train.data.batches import SliceBatches
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sampling import ProcessBatches
from cspine_train.models.build import build_model
from cspine_train.run.folder import METRICS_NAME
from cspine_train.run.record import load_record
from cspine_train.training.checkpoints import Place, checkpoints
from cspine_train.training.processes import ProcessCheck, synchronised, trainer_devices, training_errors
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.processes import Command, forked
from tests.test_checkpoints import same, weights
from tests.test_killed import processes

pytestmark = pytest.mark.usefixtures("without_pictures")

OPTIONS = {"model": "pspnet", "encoder": "tu-test_resnet", "weights": "none", "pixel_mm": 12.0, "precision": "32"}
OPTIONS |= {"epochs": 2, "schedule": "onecycle", "learning_rate": 3e-5, "augment": "strong", "batch_size": 8}
OPTIONS |= {"context": 0, "crop_margin_mm": "whole"}
SETTINGS = RunSettings(**OPTIONS)
TWO = Machines(devices=2)
ALWAYS = 1e-9
SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Any:
    """Train on the CPU even where there is a GPU, for it may be one."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_the_parts_of_a_batch_are_the_batch(count: int, size: int, world: int, drop_last: bool) -> None:
    order = np.random.default_rng(count).permutation(count).tolist()
    whole = list(BatchSampler(order, size * world, drop_last))
    shared = [ProcessBatches(order, size * world, drop_last, rank, world) for rank in range(world)]
    assert {len(batches) for batches in shared} == {len(whole)}
    for batch, *parts in zip(whole, *shared, strict=True):
        assert sorted(chain(*parts)) == sorted(batch)
        assert [part[:1] for part in parts] == [[item] for item in batch[:world]] + [[]] * (world - len(batch))
        assert len(batch) < size * world or {len(part) for part in parts} == {size}


def test_validation_slices_are_divided_without_repetition(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    split = cohort.split(variant="n4")
    settings = SETTINGS.model_copy(update={"axes": (1,)})
    slices = [
        list(CohortSlices(cohort, split, settings, rank=rank, world=2).val_dataloader().sampler) for rank in (0, 1)
    ]
    total = len(cohort.slices((1,), variant="n4", cases=split.validation))
    assert total % 2
    assert sorted(chain(*slices)) == list(range(total))


ONE_STEP = """
import sys, lightning, torch
from types import SimpleNamespace
from torch import distributed, nn
from cspine_train import Machines, RunSettings
from cspine_train.data.batches import Batch
from cspine_train.training.processes import average_batch_statistics, trainer_devices
from cspine_train.training.segmentation_module import SliceSegmenter

class Watched(SliceSegmenter):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = {"loss": loss.detach(), "images": self._whole_batch(batch.images), "drawn": torch.rand(1)}
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.seen["gradients"] = [one.grad.clone() for one in self.parameters()]

world = int(sys.argv[1])
generator = torch.Generator().manual_seed(0)
images, masks = torch.randn(6, 1, 32, 32, generator=generator), torch.rand(6, 1, 32, 32, generator=generator)
labelled = torch.linspace(0, 1, 6).view(6, 1, 1, 1)
trainer = lightning.Trainer(
    **trainer_devices(Machines(devices=world), from_command=True), accelerator="cpu", max_epochs=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
mine = slice(trainer.global_rank, None, world)
batch = Batch(images, torch.ones(6), (masks < labelled).float(), *torch.zeros(2, 6).long(), torch.full((6, 2), 32))
torch.manual_seed(1)
network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
module = Watched(network, RunSettings(augment="strong", loss="dice_bce"), ["A", "B"])
data = torch.utils.data.DataLoader([Batch(*(part[mine] for part in batch))], batch_size=None)
trainer.fit(module, data)
module._counts += trainer.global_rank + 1
logged = {}
module.log = lambda name, value, **_: logged.update({name: value})
module.on_validation_epoch_end()
normalised = nn.BatchNorm2d(2)
with torch.no_grad():
    normalised.running_mean += torch.tensor([1.0, 3.0])[trainer.global_rank]
average_batch_statistics(normalised)
rank = trainer.global_rank
torch.save(module.seen | {"counts": module._counts, "mean": normalised.running_mean}, f"{sys.argv[2]}/{world}-{rank}")
if world > 1:
    distributed.barrier()
    distributed.destroy_process_group()
"""


def free_port() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def one_step(world: str, folder: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    sys.argv = ["", world, folder]
    exec(ONE_STEP, {})  # noqa: S102


def test_loss_gradients_and_counts_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Without batch normalisation and dropout, two processes take the step of one, to single precision."""
    port = free_port()
    two = [forked(one_step, "2", str(tmp_path), port | {"LOCAL_RANK": n}, output=tmp_path / f"said{n}") for n in "01"]
    for number, process in enumerate([*two, forked(one_step, "1", str(tmp_path), {})]):
        process.join(SECONDS)
        assert process.exitcode == 0, (tmp_path / f"said{number}").read_text()
    alone, first, second = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for one in (first, second):
        # The parts of the batch, one after the other.
        assert torch.equal(one["images"], alone["images"][[0, 2, 4, 1, 3, 5]])
        torch.testing.assert_close(one["loss"], alone["loss"], rtol=0, atol=1e-6)
        for gradient, expected in zip(one["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
        assert (one["counts"] == 3).all()
        assert one["mean"].tolist() == [2, 2]
    assert max(float(gradient.abs().max()) for gradient in alone["gradients"]) > 1e-3
    assert torch.equal(first["drawn"], alone["drawn"])
    assert not torch.equal(first["drawn"], second["drawn"])


def test_synchronised_batch_norm_keeps_the_activations_of_timm() -> None:
    network, _ = build_model("unet", "tu-mobilenetv3_small_050")
    images = torch.rand(1, 1, 64, 64)
    expected = network.eval()(images)
    found = synchronised(network)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in found.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in found.modules())
    assert torch.equal(found(images), expected)


def start(store: Path, run: Path, **options: Any) -> Command:
    """Start `cspine-train run --devices 2`; `name`, `environment`: how, `before`: what is done first."""
    how = {key: options.pop(key) for key in ("name", "environment") if key in options}
    options = OPTIONS | {"store": store, "output": run, "devices": 2} | options
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return Command("cspine-train", "run", *arguments, **how)


def pair(store: Path, run: Path) -> str:
    """Train in two processes that something else than Lightning started; return what they print."""
    two = [start(store, run, environment=port | {"LOCAL_RANK": rank}) for port in (free_port(),) for rank in "01"]
    told = [process.communicate(SECONDS)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], told
    # Rank 0 alone prints.
    assert told[1] == ""
    return told[0]


def wait_for(happened: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def children(process: Any) -> list[int]:
    return [pid for pid in processes(process.pid) if pid != process.pid]


@pytest.fixture(scope="module")
def two(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "two"
    told = pair(phantom_store, run)
    assert told.count("epoch 1 of 2") == told.count("kept epoch") == told.count(f"run: {run}") == 1
    return run


def rows(run: Path) -> list[list[float]]:
    return [[float(cell) for cell in row.split(",")] for row in (run / METRICS_NAME).read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def one(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train(phantom_store, run, SETTINGS)
    return run


def test_two_processes_learn_nearly_what_one_does(one: Path, two: Path) -> None:
    """Batch normalisation over half of each batch, and other dropout, are all that differs."""
    assert len(rows(one)) == len(rows(two)) == 2
    for first, second in zip(rows(one), rows(two), strict=True):
        assert second[1:3] == pytest.approx(first[1:3], abs=2e-2)
        assert second[4] == first[4]
    assert not same(weights(one), weights(two))
    assert (load_record(one).processes, load_record(two).processes) == (1, 2)
    made = {file.name for file in two.iterdir()} - {file.name for file in one.iterdir()}
    assert made <= {"overlays", "curves.png"}


def test_a_run_that_is_stopped_leaves_no_process_and_resumes(
    two: Path, phantom_store: Path, tmp_path: Path, long_run: bool
) -> None:
    """However it is stopped, it ends with the weights of the run that nothing disturbed."""

    def kill_others(process: Any) -> None:
        for child in children(process):
            os.kill(child, signal.SIGKILL)

    def ctrl_c(process: Any) -> None:
        os.killpg(process.pid, signal.SIGINT)

    run = tmp_path / "run"
    ways = [
        (kill_others, "another process of the run has ended|terminated with code -9"),
        (ctrl_c, "^Error: .*: interrupted; "),
        (Command.kill, "\\A"),
        (Command.terminate, "^Error: .*: interrupted; "),
    ]
    for stop, message in ways if long_run else ways[:2]:
        before = next(iter(checkpoints(run / "checkpoints")), Place())
        process = start(phantom_store, run, checkpoint_minutes=ALWAYS)
        wait_for(lambda before=before: next(iter(checkpoints(run / "checkpoints")), before) > before)
        assert len(children(process)) == 1
        stop(process)
        told, _ = process.communicate(timeout=SECONDS)
        assert process.returncode
        assert len(re.findall(message, told, re.MULTILINE)) == 1
        wait_for(lambda process=process: not processes(process.pid))
        assert not load_record(run).finished
    pair(phantom_store, run)
    assert same(weights(run), weights(two))
    assert rows(run)[-1][2:5] == rows(two)[-1][2:5]


def test_a_process_that_cannot_start_ends_the_run(phantom_store: Path, tmp_path: Path) -> None:
    """Lightning runs the program again, and there is no such file."""
    process = start(phantom_store, tmp_path / "run", name="no such program")
    told, _ = process.communicate(timeout=SECONDS)
    assert process.returncode
    assert "terminated with code 2" in told
    assert not processes(process.pid)


def test_a_lost_connection_is_one_error(tmp_path: Path) -> None:
    killed: list[int] = []
    strategy = SimpleNamespace(launcher=SimpleNamespace(kill=killed.append))
    trainer = SimpleNamespace(world_size=2, is_global_zero=True, strategy=strategy)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RunError, match="another process"), training_errors(trainer, tmp_path):
        raise lost
    assert killed == [signal.SIGKILL]
    trainer.is_global_zero = False
    with pytest.raises(SystemExit), training_errors(trainer, tmp_path):
        raise lost
    with pytest.raises(ZeroDivisionError), training_errors(trainer, tmp_path):
        raise ZeroDivisionError


def test_algorithms_are_deterministic_where_that_is_asked_for(
    one: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, machines, found = SliceSegmenter.training_step, Machines(deterministic=True), []

    def watched(module: SliceSegmenter, batch: Any, batch_idx: int) -> torch.Tensor:
        found.append(torch.are_deterministic_algorithms_enabled())
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SliceSegmenter, "training_step", watched)
    record = train(phantom_store, tmp_path / "run", SETTINGS, machines=machines)
    assert found
    assert all(found)
    assert record.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert same(weights(tmp_path / "run"), weights(one))

    def refused(*_: Any) -> torch.Tensor:
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set"
        )

    monkeypatch.setattr(SliceSegmenter, "training_step", refused)
    with pytest.raises(RunError, match="--deterministic.*adaptive_avg_pool2d_backward_cuda"):
        train(phantom_store, tmp_path / "other", SETTINGS, machines=machines)


def test_several_processes_are_not_started_from_python(phantom_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = dict(os.environ)
    with pytest.raises(RunError, match="cspine-train run --devices 2.*torchrun"):
        train(phantom_store, run, SETTINGS, machines=TWO)
    with pytest.raises(RunError, match="cspine-train run"):
        train(phantom_store, run, SETTINGS, machines=Machines(nodes=2))
    assert not run.exists()
    assert dict(os.environ) == before


def test_slices_that_cannot_be_divided_are_refused(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RunError, match="8 slices.*3 processes.*--batch-size"):
        train(phantom_store, tmp_path / "run", SETTINGS, machines=Machines(devices=3))
    assert not (tmp_path / "run").exists()
    cohort = open_cohort(phantom_store)
    assert CohortSlices(cohort, cohort.split(variant="n4"), SETTINGS, world=8).smallest_batch == 8
    monkeypatch.setattr(SliceBatches, "__len__", lambda _: 7)
    with pytest.raises(RunError, match="7 validation slices.*8 processes.*--devices"):
        CohortSlices(cohort, cohort.split(variant="n4"), SETTINGS, world=8)


def test_devices_that_are_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="--devices 2.*1 GPU.*CUDA_VISIBLE_DEVICES"):
        trainer_devices(TWO)
    assert trainer_devices(Machines(devices="auto"))["devices"] == 1
    monkeypatch.setattr(TorchElasticEnvironment, "detect", staticmethod(lambda: True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="1 processes.*torchrun started 2"):
        trainer_devices(Machines())


def test_nodes_have_to_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RunError, match="--nodes 2.*MASTER_ADDR.*srun or torchrun"):
        trainer_devices(Machines(nodes=2), from_command=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface has another name")
def test_processes_of_one_machine_connect_by_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    trainer_devices(TWO, from_command=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_processes_that_see_other_data_are_refused() -> None:
    strategy = SimpleNamespace(broadcast=lambda _: "epoch 1 imagenet {}")
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)
    ProcessCheck("epoch 1 imagenet {}").setup(trainer, None, "fit")
    with pytest.raises(RunError, match="process 2 of 2.*disk"):
        ProcessCheck("epoch 1 none {}").setup(trainer, None, "fit")


@pytest.mark.parametrize("devices", ["0", "two", "-1", "1,2"])
def test_devices_are_a_number_or_all(devices: str) -> None:
    result = CliRunner().invoke(train_main, ["run", "--devices", devices])
    assert result.exit_code == 2
    assert f"{devices!r} is neither auto nor a number from 1" in result.output
