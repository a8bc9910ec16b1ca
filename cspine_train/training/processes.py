"""Devices and processes of a run, through Lightning's DDP."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed, nn

from cspine_train.errors import RunError
from cspine_train.run.machines import Machines

# The longest that a process waits for another. Rank 0 alone checks the network and writes files meanwhile.
_TIMEOUT = timedelta(minutes=10)
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
_CONNECTION_ERRORS = ("gloo", "Connection closed", "Connection reset", "NCCL")


def trainer_devices(machines: Machines, from_command: bool = False) -> dict[str, Any]:
    """Return the arguments of Lightning's trainer; `from_command` as in `train`.

    Raises `RunError` if the machine has fewer GPUs, processes cannot be started, or torchrun started another number of
    them.
    """
    devices = _devices_of_a_node(machines.devices)
    options: dict[str, Any] = {"devices": devices, "num_nodes": machines.nodes, "use_distributed_sampler": False}
    options |= {"deterministic": machines.deterministic or None}
    world = devices * machines.nodes
    if TorchElasticEnvironment.detect() and world != int(os.environ["WORLD_SIZE"]):
        raise RunError(
            f"--devices {devices} --nodes {machines.nodes}: needs {world} processes, but torchrun started "
            f"{os.environ['WORLD_SIZE']}; give both the same numbers"
        )
    if world == 1 and machines.strategy == "auto":
        return options
    if not (TorchElasticEnvironment.detect() or SLURMEnvironment.detect() or "LOCAL_RANK" in os.environ):
        _prepare_launch(devices, machines.nodes, from_command)
    return options | {"strategy": _DDP()}


def _devices_of_a_node(wanted: int | Literal["auto"]) -> int:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if wanted == "auto":
        return gpus or 1
    if gpus is not None and wanted > gpus:
        raise RunError(
            f"--devices {wanted}: this machine has {gpus} GPU; ask for fewer devices, or set CUDA_VISIBLE_DEVICES= to "
            "train on the CPU"
        )
    return wanted


def _prepare_launch(devices: int, nodes: int, from_command: bool) -> None:
    if not from_command:
        # Lightning would run the caller's script, or notebook server, again in each process.
        raise RunError(
            f"{devices * nodes} processes: cannot be started from Python; use cspine-train run --devices {devices}, or "
            f"start your script with torchrun --nproc-per-node {devices}"
        )
    missing = [name for name in _ADDRESS if name not in os.environ]
    if nodes > 1 and missing:
        raise RunError(
            f"--nodes {nodes}: {', '.join(missing)} not set; start the command with srun or torchrun, or set them on "
            "each node"
        )
    # Lightning kills this process when another has died; its message says why.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    if nodes == 1 and sys.platform == "linux":
        # Lightning's address of a single node is 127.0.0.1. Gloo would listen at the host name's address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


class _DDP(DDPStrategy):
    """Lightning's DDP, in which rank 0 writes checkpoints without the others."""

    def __init__(self) -> None:
        # Processes validate on unequal numbers of batches, so that buffers cannot be broadcast at each forward pass;
        # see `average_batch_statistics`. A static graph allows encoder parts that the decoder does not use.
        super().__init__(broadcast_buffers=False, static_graph=True, timeout=_TIMEOUT)

    def barrier(self, name: str | None = None) -> None:
        """Wait for the other processes, but not for a checkpoint: only rank 0 knows that it is due."""
        if name != "Trainer.save_checkpoint":
            super().barrier(name)


class ProcessCheck(Callback):
    """Refuses processes that see other data, checkpoints or weights than rank 0, as on a disk that is not shared.

    `start` describes what this process sees.
    """

    def __init__(self, start: str) -> None:
        self._start = start

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare this process with rank 0."""
        if trainer.strategy.broadcast(self._start) != self._start:
            raise RunError(
                f"process {trainer.global_rank + 1} of {trainer.world_size}: sees another store, run folder or first "
                "weights than process 1; put them on a disk that all machines share"
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End at SIGTERM at once: Lightning's handler waits for the other processes, which may be in a step."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _exit)


def _exit(*_: Any) -> None:
    raise SystemExit(1)


def is_first() -> bool:
    """Return whether this process has rank 0 in the run that it trained last."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def synchronised(network: nn.Module) -> nn.Module:
    """Convert a network's batch normalisation to `SyncBatchNorm`, which PyTorch has for GPUs only.

    timm's conversion keeps the activations in timm's layers; Lightning's ``sync_batchnorm`` drops them.
    """
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return converted


def average_batch_statistics(network: nn.Module) -> None:
    """Average the running mean and variance of local batch normalisation over the processes.

    Each process normalises by its own part of a batch, but validation, checkpoints and the saved model need the same
    statistics in all. `SyncBatchNorm` has them already.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if buffers:
        flat = torch.cat(buffers)
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for buffer, mean in zip(buffers, torch.split(flat, [len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(mean)


@contextmanager
def training_errors(trainer: Any, run: Path) -> Iterator[None]:
    """Raise errors of training as one line, and end the processes that this one started.

    Raises `RunError` if another process has ended, or PyTorch does not support an option for this network.
    """
    try:
        yield
        if trainer.world_size > 1:
            trainer.strategy.barrier()
    except BaseException as error:
        if trainer.world_size > 1 and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if isinstance(error, RuntimeError):
            _raise_as_run_error(error, trainer, run)
        raise
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _raise_as_run_error(error: RuntimeError, trainer: Any, run: Path) -> None:
    if "deterministic implementation" in str(error):
        what = str(error).split(" does not have", 1)[0].rsplit(maxsplit=1)[-1]
        raise RunError(
            f"{run}: --deterministic is not supported for this network, as PyTorch has no deterministic {what}; "
            "choose another --model, or leave the option out"
        ) from None
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        what = str(error).split("\n", 1)[0][:200]
        raise RunError(f"{run}: cannot be trained with --compile here ({what}); leave the option out") from None
    lost = isinstance(error, distributed.DistError) or any(word in str(error) for word in _CONNECTION_ERRORS)
    if trainer.world_size > 1 and lost:
        if not trainer.is_global_zero:
            # Rank 0 prints the message.
            raise SystemExit(1) from None
        raise RunError(f"{run}: another process of the run has ended; run the same command again to resume") from None


def end_with_the_first() -> None:
    """End this process, a command's own, when the process that started it ends."""

    def wait() -> None:
        # Python could not close `sys.stdin` at exit while a thread reads it.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
