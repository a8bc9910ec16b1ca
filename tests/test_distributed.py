"""Two real processes, connected by gloo, learn and count what one does; they end together and go on together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
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
from cspine_train.data.process_shares import Share, SharedBatches
from cspine_train.run.folder import METRICS_NAME
from cspine_train.run.record import load_record
from cspine_train.training import segmentation_module as module_of_steps
from cspine_train.training.checkpoints import checkpoints
from cspine_train.training.processes import _SameStart, _watch
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.test_checkpoints import same, weights
from tests.test_killed import processes

pytestmark = pytest.mark.usefixtures("without_pictures")

#: It has dropout, and does not magnify what is lost in rounding as deeper networks do in their first steps.
OPTIONS = {"model": "pspnet", "encoder": "resnet18", "weights": "none", "pixel_mm": 12.0, "precision": "32"}
OPTIONS |= {"epochs": 2, "schedule": "onecycle", "learning_rate": 3e-5, "augment": "strong", "batch_size": 8}
SETTINGS = RunSettings(**OPTIONS)
TWO = Machines(devices=2)
ALWAYS = 1e-9


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_shares_are_all_once_and_in_order(count: int, size: int, world: int, drop_last: bool) -> None:
    """Uneven ones too; of a batch that can be divided they are equal, so that all take as many steps."""
    shares = [Share(rank, world) for rank in range(world)]
    parts = [list(share.of(range(count))) for share in shares]
    assert list(chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    order = np.random.default_rng(count).permutation(count).tolist()
    whole = list(BatchSampler(order, size * world, drop_last))
    shared = [SharedBatches(order, size * world, drop_last, share) for share in shares]
    assert {len(batches) for batches in shared} == {len(whole)}
    for batch, *of_all in zip(whole, *shared, strict=True):
        assert list(chain(*of_all)) == batch
        assert len(batch) < size * world or {len(one) for one in of_all} == {size}


LAYERS = """
import copy, sys, torch
from torch import distributed, nn
from cspine_train.data.process_shares import processes, see_whole_batches, sum_over_processes, this_share, whole_batch

class WithActivation(nn.BatchNorm2d):  # As timm's.
    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, images):
        return self.act(super().forward(images))

torch.manual_seed(0)
alone = nn.Sequential(
    nn.Conv2d(1, 4, 3), WithActivation(4), nn.Dropout2d(0.4), nn.Conv2d(4, 4, 3), nn.Dropout(0.3),
    nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1, affine=False),
).to(memory_format=torch.channels_last)
together = copy.deepcopy(alone)
images, masks = (3 * torch.randn(6, 1, 12, 10) + 7).to(memory_format=torch.channels_last), torch.rand(6, 1, 8, 6)

def loss(logits, masks):
    shares = logits.sigmoid()
    return 1 - 2 * (shares * masks).sum() / (shares + masks).sum() + nn.functional.mse_loss(shares, masks)

torch.manual_seed(5)
expected = loss(alone(images), masks)
expected.backward()
distributed.init_process_group("gloo", f"tcp://127.0.0.1:{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
see_whole_batches(together)
torch.manual_seed(5)
share = this_share()
found = loss(whole_batch(together(share.of(images))), whole_batch(share.of(masks)))
(found * processes()).backward()
near = dict(rtol=0, atol=1e-5)
torch.testing.assert_close(found, expected, **near)
for one, other in zip(together.parameters(), alone.parameters()):
    distributed.all_reduce(one.grad)
    torch.testing.assert_close(one.grad / processes(), other.grad, **near)
for one, other in zip(together.buffers(), alone.buffers()):
    torch.testing.assert_close(one, other, **near)
torch.testing.assert_close(together.eval()(images), alone.eval()(images), **near)
assert sum_over_processes(torch.tensor([share.rank, 5])).tolist() == [1, 10]
assert max(float(one.grad.abs().max()) for one in alone.parameters()) > 1e-3
# A process that ends while another still closes its connections would be aborted.
distributed.barrier()
distributed.destroy_process_group()
"""


def test_layers_and_losses_see_the_whole_batch() -> None:
    """Loss, gradients, running means and what dropout draws: as in one process, to float32's last digits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-c", LAYERS, rank, port], stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    for rank in ranks:
        _, told = rank.communicate(timeout=100)
        assert rank.returncode == 0, told


class Watched:
    """What the steps of a run in this process saw: masks of whole batches, losses, validation's counts."""

    def __init__(self, patches: pytest.MonkeyPatch) -> None:
        self.masks: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.counts: list[torch.Tensor] = []
        whole, add, step = (
            module_of_steps.whole_batch, module_of_steps.sum_over_processes, SliceSegmenter.training_step,
        )  # fmt: skip

        def whole_batch(share: torch.Tensor) -> torch.Tensor:
            found = whole(share)
            if not found.requires_grad:
                self.masks.append(found)
            return found

        def sum_over_processes(counts: torch.Tensor) -> torch.Tensor:
            self.counts.append(add(counts))
            return self.counts[-1]

        def training_step(module: SliceSegmenter, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = step(module, batch, batch_idx)
            self.losses.append(float(loss.detach()) / module.trainer.world_size)
            return loss

        patches.setattr(module_of_steps, "whole_batch", whole_batch)
        patches.setattr(module_of_steps, "sum_over_processes", sum_over_processes)
        patches.setattr(SliceSegmenter, "training_step", training_step)


@pytest.fixture(scope="module", autouse=True)
def on_processors() -> Any:
    """Two processes even where there is a GPU, for it may be one."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def ran(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Machines], tuple[Path, Watched]]:
    """Train in this process and, where two are asked for, in another; return the run and what was seen."""
    done: dict[Machines, tuple[Path, Watched]] = {}

    def call(machines: Machines) -> tuple[Path, Watched]:
        if machines not in done:
            run = tmp_path_factory.mktemp("runs") / "run"
            with pytest.MonkeyPatch.context() as patches:
                watched = Watched(patches)
                train(phantom_store, run, SETTINGS, machines=machines)
            done[machines] = run, watched
        return done[machines]

    return call


def rows(run: Path) -> list[list[float]]:
    return [[float(cell) for cell in row.split(",")] for row in (run / METRICS_NAME).read_text().splitlines()[1:]]


def test_two_processes_do_what_one_does(
    ran: Callable[[Machines], tuple[Path, Watched]], capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    two, together = ran(TWO)
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
    one, alone = ran(Machines())
    assert len(alone.masks) == len(together.masks) > 20
    # Slices, their order, and their random changes.
    assert all(torch.equal(first, second) for first, second in zip(alone.masks, together.masks, strict=True))
    # Rounding makes 1e-7 of the first steps' losses; AdamW then divides gradients by their own size, small ones too.
    assert together.losses[:5] == pytest.approx(alone.losses[:5], abs=2e-6)
    assert together.losses == pytest.approx(alone.losses, abs=2e-3)
    for first, second in zip(alone.counts, together.counts, strict=True):
        # No voxel twice and none left out; few come to lie on the other side of a threshold.
        assert torch.equal(first.sum(2), second.sum(2))
        assert (first - second).abs().sum() <= 1e-3 * first.sum()
    for first, second in zip(rows(one), rows(two), strict=True):
        assert second[1:3] == pytest.approx(first[1:3], abs=2e-3)
        assert second[4] == first[4]
    assert (load_record(one).processes, load_record(two).processes) == (1, 2)
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())


def test_validation_is_exactly_that_of_one_process(phantom_store: Path, tmp_path: Path) -> None:
    """A network that hardly moves: the same voxels on the same side of the same threshold, over an uneven division."""
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-12, "epochs": 1, "batch_size": 16, "axes": (1,)})
    found = []
    cohort = open_cohort(phantom_store)
    assert len(cohort.slices((1,), variant="n4", cases=cohort.split(variant="n4").validation)) % 2
    for machines in (Machines(), TWO):
        with pytest.MonkeyPatch.context() as patches:
            watched = Watched(patches)
            record = train(phantom_store, tmp_path / str(machines.devices), settings, machines=machines)
        found.append((watched.counts[0], record.kept_dice, record.threshold))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def wait_for(happened: Callable[[], Any], seconds: float = 100) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def test_processes_that_die_end_the_others_and_go_on_together(
    ran: Callable[[Machines], tuple[Path, Watched]], phantom_store: Path, tmp_path: Path
) -> None:
    """The second is killed, then the first: no process stays, and the run ends with the undisturbed one's weights."""
    run = tmp_path / "run"
    folder = run / "checkpoints"

    def kill_the_second() -> None:
        wait_for(lambda: checkpoints(folder))
        for pid, command in processes(os.getsid(0)).items():
            if command.endswith("join\0") and Path(f"/proc/{pid}/stat").read_text().split()[3] == str(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    with pytest.raises(RunError, match=r"process 2 of this machine ended \(killed by SIGKILL\); run the same command"):
        train(phantom_store, run, SETTINGS, checkpoint_minutes=ALWAYS, machines=TWO)
    killer.join()
    stopped = next(iter(checkpoints(folder)))

    options = OPTIONS | {"store": phantom_store, "output": run, "devices": 2, "checkpoint_minutes": ALWAYS}
    command = [sys.executable, "-m", "cspine_train", "run"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: next(iter(checkpoints(folder)), stopped) > stopped)
    assert len(processes(first.pid)) == 2
    first.kill()
    first.wait()
    wait_for(lambda: not processes(first.pid), 30)
    assert not load_record(run).finished
    train(phantom_store, run, SETTINGS, machines=TWO)
    undisturbed, _ = ran(TWO)
    assert same(weights(run), weights(undisturbed))
    assert rows(run)[-1][2:5] == rows(undisturbed)[-1][2:5]


def test_a_process_that_dies_before_it_connects_is_told_and_ends_no_caller(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch would wait half an hour for it; a notebook's kernel goes on."""
    fails = tmp_path / "python"
    fails.write_text("#!/bin/sh\nread request\nexit 3\n")
    fails.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fails))
    started = time.monotonic()
    with pytest.raises(RunError, match=r"process 2 of this machine ended \(status 3\); run the same command"):
        train(phantom_store, tmp_path / "run", SETTINGS, machines=TWO)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("end_process", [False, True])
def test_only_a_command_ends_its_process(
    end_process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    dead = subprocess.Popen(["/bin/sh", "-c", "exit 3"])
    dead.wait()
    ended: list[int] = []
    monkeypatch.setattr("cspine_train.training.processes._GRACE_S", 0.01)
    monkeypatch.setattr(os, "_exit", ended.append)
    _watch([dead], threading.Event(), tmp_path, end_process)
    assert ended == [1] * end_process
    assert ("status 3" in capfd.readouterr().err) == end_process


def test_algorithms_are_deterministic_where_that_is_asked_for(
    ran: Callable[[Machines], tuple[Path, Watched]],
    phantom_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, machines, found = SliceSegmenter.training_step, Machines(deterministic=True), []

    def watched(module: SliceSegmenter, batch: Any, batch_idx: int) -> torch.Tensor:
        found.append(torch.are_deterministic_algorithms_enabled())
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SliceSegmenter, "training_step", watched)
    record = train(phantom_store, tmp_path / "run", SETTINGS, machines=machines)
    assert all(found)
    assert record.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert same(weights(tmp_path / "run"), weights(ran(Machines())[0]))

    def refused(*_: Any) -> torch.Tensor:
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set"
        )

    monkeypatch.setattr(SliceSegmenter, "training_step", refused)
    with pytest.raises(
        RunError, match="cannot be trained with --deterministic here, as PyTorch has no such adaptive_avg"
    ):
        train(phantom_store, tmp_path / "other", SETTINGS, machines=machines)


def test_what_cannot_be_shared_is_refused_before_anything_is_started(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(
        RunError, match="a step's 8 slices cannot be divided evenly among 3 processes; choose a --batch"
    ):
        train(phantom_store, run, SETTINGS, machines=Machines(devices=3))
    with pytest.raises(RunError, match="7 validation slices are too few for 8 processes; choose fewer --devices"):
        Share(0, 8).check(16, 7)
    assert not run.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="--devices 2: this machine has 1 GPU; ask for no more, or hide it by CUDA_VIS"):
        TWO.options()
    assert Machines(devices="auto").options()["devices"] == 1
    monkeypatch.setattr(TorchElasticEnvironment, "detect", staticmethod(lambda: True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="--devices 1 --nodes 1: are 1 processes, and torchrun started 2; say the same"):
        Machines().options()


def test_nodes_have_to_know_of_each_other(phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RunError, match=r"--nodes 2: nobody says where the others are \(MASTER_ADDR, .*by srun or"):
        train(phantom_store, tmp_path / "run", SETTINGS, machines=Machines(nodes=2))


def test_processes_that_see_other_data_are_refused() -> None:
    strategy = SimpleNamespace(broadcast=lambda _: "epoch 1 imagenet {}")
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)
    _SameStart("epoch 1 imagenet {}").setup(trainer, None, "fit")
    with pytest.raises(RunError, match=r"process 2 of 2: sees another store, run folder or first weights than .*; put"):
        _SameStart("epoch 1 none {}").setup(trainer, None, "fit")


@pytest.mark.parametrize("devices", ["0", "two", "-1", "1,2"])
def test_devices_are_a_number_or_all(devices: str) -> None:
    result = CliRunner().invoke(train_main, ["run", "--devices", devices])
    assert result.exit_code == 2
    assert f"{devices!r} is neither auto nor a number from 1" in result.output
