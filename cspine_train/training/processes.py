"""Where a run computes: on which devices, in how many processes, and that these start and end together."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import distributed

from cspine_train.errors import RunError

# What ends a process that is left alone fails at once where gloo connects them; NCCL may wait for half an hour.
_GRACE_S = 10.0
# What Lightning and PyTorch read.
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# Where a process that is started here writes a byte when it is about to connect to the others.
_READY = "CSPINE_TRAIN_READY"


class Machines(BaseModel):
    """On what a run computes; but for rounding, and for dropout, the outcome does not depend on it.

    Attributes
    ----------
    devices : int or str
        GPUs of each node, or processes where there are none; ``auto``: all GPUs, or one process.
    nodes : int
        Machines. Something has to start a process on each: srun, torchrun, or a user.
    strategy : str
        How devices work together, by Lightning's name: ``ddp``, each has the whole network; ``auto`` is that where
        there is more than one.
    deterministic : bool
        Have PyTorch take only algorithms that give the same bits each time. On a CPU all that training uses do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: PositiveInt | Literal["auto"] = 1
    nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp"] = "auto"
    deterministic: bool = False

    @property
    def devices_of_a_node(self) -> int:
        """How many devices of this machine a run is to use.

        Raises
        ------
        RunError
            If there are fewer GPUs.
        """
        there = torch.cuda.device_count() if torch.cuda.is_available() else None
        if self.devices == "auto":
            return there or 1
        if there is not None and self.devices > there:
            raise RunError(
                f"--devices {self.devices}: this machine has {there} GPU; ask for no more, or hide it by "
                "CUDA_VISIBLE_DEVICES= to train on processors"
            )
        return self.devices

    def options(self) -> dict[str, Any]:
        """Return what Lightning's trainer has to be told.

        Raises
        ------
        RunError
            If these are not the processes that were started, or nobody says where the other nodes are.
        """
        devices = self.devices_of_a_node
        world = devices * self.nodes
        if TorchElasticEnvironment.detect() and world != int(os.environ["WORLD_SIZE"]):
            raise RunError(
                f"--devices {devices} --nodes {self.nodes}: are {world} processes, and torchrun started "
                f"{os.environ['WORLD_SIZE']}; say the same to both"
            )
        options: dict[str, Any] = {"devices": devices, "num_nodes": self.nodes, "use_distributed_sampler": False}
        if self.deterministic:
            options["deterministic"] = True
        shared = world > 1 or self.strategy == "ddp"
        return options | {"strategy": _Together() if shared else "auto"}


#: The usual.
ONE_DEVICE = Machines()


class _Together(DDPStrategy):
    """Lightning's DDP, between processes that are there already."""

    def __init__(self) -> None:
        # What batch normalisation has seen is the same everywhere, and the processes validate on unequal numbers of
        # batches: each would wait for the others at each. Encoders have parts that not every decoder uses.
        super().__init__(broadcast_buffers=False, static_graph=True)

    def _configure_launcher(self) -> None:
        # Lightning's would run the user's whole script again in each process, is not for notebooks, and ends this
        # process without a word when another has died.
        self._launcher = None

    def barrier(self, name: str | None = None) -> None:
        """Wait for the others, but not while one writes a checkpoint: it alone knows that it is time to."""
        if name != "Trainer.save_checkpoint":
            super().barrier(name)


class _SameStart(Callback):
    """Refuses to train with processes that see other data or checkpoints, as on a disk not shared, or first weights."""

    def __init__(self, start: str) -> None:
        self._start = start

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare with the first process."""
        if trainer.world_size > 1 and trainer.strategy.broadcast(self._start) != self._start:
            raise RunError(
                f"process {trainer.global_rank + 1} of {trainer.world_size}: sees another store, run folder or first "
                "weights than the first; put them on a disk that all machines share"
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End at SIGTERM as at Ctrl-C; Lightning's handler would first ask the others, who are busy with a step."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)


def is_first() -> bool:
    """Return whether this process is the first, or the only one, of the run that it trained last."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _end(*_: Any) -> None:
    raise SystemExit(1)


@contextmanager
def together(trainer: Any, run: Path, start: str, request: dict[str, Any], end_process: bool = False) -> Iterator[None]:
    """Train with all processes there: those of this machine are started here, where nobody else has.

    What it sets for this process is for `restored_process_state` to restore.

    Parameters
    ----------
    trainer : Trainer
        Made with the options of `Machines`.
    run : Path
        To be named in errors.
    start : str
        What must be the same in all.
    request : dict
        What the processes are told, through their standard input: for `cspine_train.training.pipeline.join`.
    end_process : bool
        As in `train`.

    Raises
    ------
    RunError
        If another process has died, or PyTorch cannot do what an option asks for.
    """
    others: list[subprocess.Popen[bytes]] = []
    over = threading.Event()
    try:
        if trainer.world_size > 1:
            trainer.callbacks.insert(0, _SameStart(start))
            _start(trainer, request, others, run)
            threading.Thread(target=_watch, args=(others, over, run, end_process), daemon=True).start()
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, torch.get_num_threads() // trainer.num_devices))
        yield
        over.set()
        for process in others:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            what = str(error).split(" does not have", 1)[0].rsplit(maxsplit=1)[-1]
            raise RunError(
                f"{run}: cannot be trained with --deterministic here, as PyTorch has no such {what}; choose another "
                "--model, or leave the option out"
            ) from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            what = str(error).split("\n", 1)[0][:200]
            raise RunError(f"{run}: cannot be trained with --compile here ({what}); leave the option out") from None
        if trainer.world_size == 1 or not _is_of_a_connection(error):
            raise
        raise RunError(_told(others, run)) from None
    finally:
        over.set()
        for process in others:
            process.kill()
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _start(trainer: Any, request: dict[str, Any], others: list[subprocess.Popen[bytes]], run: Path) -> None:
    """Start the other processes of this node, but where srun, torchrun or this function have, until all are ready."""
    environment = trainer.strategy.cluster_environment
    if environment.creates_processes_externally or not isinstance(environment, LightningEnvironment):
        if waiting := os.environ.pop(_READY, None):
            with os.fdopen(int(waiting), "wb") as first:
                first.write(b".")
        return
    if trainer.num_nodes == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    elif missing := [name for name in _ADDRESS if name not in os.environ]:
        raise RunError(
            f"--nodes {trainer.num_nodes}: nobody says where the others are ({', '.join(missing)} not set); start it "
            "by srun or torchrun, or set them on every node"
        )
    os.environ["LOCAL_RANK"] = "0"
    told = json.dumps(request).encode() + b"\n"
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as ready:
        with os.fdopen(writing, "wb"), _ctrl_c_ignored():
            for number in range(1, trainer.num_devices):
                command = [sys.executable, "-m", "cspine_train", "join"]
                variables = os.environ | {"LOCAL_RANK": str(number), _READY: str(writing)}
                # A pipe that ends when this process does, however that comes about.
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables, pass_fds=(writing,))
                others.append(process)
                assert process.stdin  # noqa: S101
                # One that is dead already is found below.
                with suppress(BrokenPipeError):
                    process.stdin.write(told)
                    process.stdin.flush()
        _wait_for(others, ready, run)


def _wait_for(others: list[subprocess.Popen[bytes]], ready: Any, run: Path) -> None:
    """Wait until all processes are about to connect: PyTorch would wait half an hour for one that died before."""
    waited_for = len(others)
    while waited_for:
        if any(process.poll() is not None for process in others):
            raise RunError(_told(others, run))
        if select.select([ready], [], [], 0.1)[0]:
            waited_for -= len(ready.read(waited_for))


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Let processes that are started here ignore Ctrl-C: whoever started them ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_the_first() -> None:
    """End this process, a command's own, when the one that started it ends."""

    def wait() -> None:
        # Not by way of `sys.stdin`, which Python could not close at its end while this waits.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _watch(others: list[subprocess.Popen[bytes]], over: threading.Event, run: Path, end_process: bool) -> None:
    """Stop PyTorch from waiting for a process that has died, or end this one where it may be ended."""
    while not over.wait(0.2):
        if any(process.poll() for process in others) and not over.wait(_GRACE_S):
            for process in others:
                process.kill()
            if end_process:
                print(f"Error: {_told(others, run)}", file=sys.stderr, flush=True)
                os._exit(1)
            if distributed.is_initialized() and distributed.group.WORLD:
                distributed.group.WORLD.abort()
            return


def _is_of_a_connection(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed", "Connection reset", "NCCL")
    )


def _told(others: list[subprocess.Popen[bytes]], run: Path) -> str:
    deadline = time.monotonic() + 2
    while others and time.monotonic() < deadline and not any(process.poll() for process in others):
        time.sleep(0.05)
    for rank, process in enumerate(others, 2):
        if status := process.returncode:
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            return f"{run}: process {rank} of this machine ended ({how}); run the same command again to go on"
    return f"{run}: lost another of its processes; run the same command again to go on"
