"""Estimated steps, image size, memory and time of a run."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback

from cspine_data import open_cohort
from cspine_train.data.datamodule import CohortSlices
from cspine_train.errors import RunError
from cspine_train.models.build import build_model
from cspine_train.run.label_classes import label_values, network_classes
from cspine_train.run.machines import Machines
from cspine_train.run.patient_split import cohort_fields, split_of
from cspine_train.run.process_state import restored_process_state
from cspine_train.run.settings import RunSettings
from cspine_train.training.callbacks import WeightEMA
from cspine_train.training.optimisers import precision_of
from cspine_train.training.pipeline import quieten_lightning, starting_weights
from cspine_train.training.processes import trainer_devices
from cspine_train.training.segmentation_module import SliceSegmenter
from cspine_train.training.step_check import StepCheck

# The fastest step counts: the first one is slower, and other work on the machine makes steps slower.
_FEWEST_STEPS, _MOST_STEPS, _ENOUGH_S = 2, 4, 2.0


@dataclass(frozen=True)
class EpochTime:
    """Time of an epoch's parts on this machine, from a few timed steps.

    Attributes
    ----------
    steps : int
        Training steps in an epoch.
    step_s : float
        Seconds of a training step.
    validation_s : float
        Seconds of the validation after an epoch.
    """

    steps: int
    step_s: float
    validation_s: float

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch."""
        return self.steps * self.step_s + self.validation_s

    def seconds(self, settings: RunSettings) -> float:
        """Return the time of all epochs, without early stopping; of a run with a time budget, that budget."""
        return 60 * settings.minutes if settings.minutes else (settings.epochs or 0) * self.epoch_s


@dataclass(frozen=True)
class RunPlan:
    """What a run takes.

    Attributes
    ----------
    settings : RunSettings
        The settings.
    steps : int
        Training steps in an epoch.
    batch : int
        Slices in a step.
    size_hw : tuple of int
        Size of the images that the network trains on, in pixels.
    validation_slices : int
        Slices in a validation, which are whole.
    validation_hw : tuple of int
        Size of their images.
    needed_bytes, allowed_bytes : float
        Estimated peak memory of the run, and the memory that it may take.
    time : EpochTime or None
        Time on this machine; None if a step takes more memory than is free here.
    refusal : str or None
        Why the run would be refused, and settings that fit; None if it would not be.
    """

    settings: RunSettings
    steps: int
    batch: int
    size_hw: tuple[int, int]
    validation_slices: int
    validation_hw: tuple[int, int]
    needed_bytes: float
    allowed_bytes: float
    time: EpochTime | None
    refusal: str | None


@restored_process_state()
def plan_run(store: str | Path, settings: RunSettings, machines: Machines | None = None) -> RunPlan:
    """Return what a run takes, without training it or making its folder.

    A few steps are timed on this machine, in this process. On a CPU under Linux, call
    `cspine_train.training.allocator.keep_large_blocks` first, as `train` says.

    Parameters
    ----------
    store : str or Path
        A store that `cspine-data prepare` made, or its URL.
    settings : RunSettings
        The settings.
    machines : Machines, optional
        Devices and memory limit. Steps are timed on one device, without communication.

    Raises
    ------
    RunError
        If the settings do not suit the cohort or the network. A run that does not fit into memory is no error, see
        `RunPlan.refusal`.
    ModelError
        If the model cannot be built or its weights are unavailable.
    CspineDataError
        If the store cannot be used.
    """
    machines = machines or Machines()
    devices = int(trainer_devices(machines, from_command=True)["devices"])
    cohort = open_cohort(store)
    split = split_of(cohort, settings)
    values = label_values(cohort, split, settings)
    if settings.from_run:
        starting_weights(settings, split, cohort_fields(cohort, split, settings.variant))
    weights = "none" if settings.from_run else settings.weights
    network, _ = build_model(settings.model, settings.encoder, weights, settings.channels, network_classes(values))
    check = StepCheck(network, cohort, split, values, devices, devices * machines.nodes, machines.memory)
    data = check.data_of(settings)
    needed, refusal = check.needed_bytes(settings, data), None
    try:
        check.check(settings, data)
    except RunError as error:
        refusal = str(error)
    timed = needed <= check.free_bytes() and not refusal
    validation: Any = data.val_dataloader()
    return RunPlan(
        settings,
        len(data.train_dataloader()),
        data.smallest_batch,
        data.sizes.trained_hw[0],
        len(validation.sampler),
        data.sizes.validation_hw,
        needed,
        check.allowed_bytes(),
        epoch_time(check, settings, data, {}) if timed else None,
        refusal,
    )


def epoch_time(
    check: StepCheck, settings: RunSettings, data: CohortSlices, timed: dict[Hashable, tuple[float, float]]
) -> EpochTime:
    """Time a few steps of a run on this machine.

    Parameters
    ----------
    check : StepCheck
        The run's network and cohort.
    settings : RunSettings
        The settings.
    data : CohortSlices
        Its slices.
    timed : dict
        Seconds of a training step and of a validation batch by network and image size: runs alike are timed once.
    """
    coarse = settings.coarse_share
    step_s = validation_s = 0.0
    for share, weight in ((0.0, 1 - coarse), (1.0, coarse)):
        if not weight:
            continue
        other = settings.model_copy(
            update={"coarse_share": share, "frozen_share": 0.0, "epochs": 1, "minutes": None, "compile": False}
        )
        key = (
            settings.model, settings.encoder, settings.channels, check.values, settings.precision, share,
            data.smallest_batch, data.sizes,
        )  # fmt: skip
        if key not in timed:
            timed[key] = _timed(check, other, data)
        step_s += weight * timed[key][0]
        validation_s = timed[key][1]
    validation: Any = data.val_dataloader()
    batches = len(validation.sampler) / validation.batch_size
    return EpochTime(len(data.train_dataloader()), step_s, batches * validation_s)


def _timed(check: StepCheck, settings: RunSettings, data: CohortSlices) -> tuple[float, float]:
    """Return the seconds of a training step and of a validation batch, as they are in `train`."""
    check.check(settings, data)
    quieten_lightning()
    clock = _Clock()
    module = SliceSegmenter(
        check.network,
        settings,
        check.split.validation,
        data.sizes,
        max(1, len(check.values)),
        ignores=data.ignores,
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=_MOST_STEPS,
        limit_val_batches=1,
        gradient_clip_val=settings.clip_norm,
        accelerator="auto",
        devices=1,
        precision=precision_of(settings.precision),
        callbacks=[*([WeightEMA(settings.average)] if settings.average else []), clock],
        # One process, also where torchrun or srun started several.
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return min(clock.steps_s), clock.validation_s


class _Clock(Callback):
    """Times steps from the end of one to the end of the next: reading, augmentation, network, loss and optimiser."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.validation_s = 0.0
        self._began = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps_s.append(self._passed())
        if len(self.steps_s) >= _FEWEST_STEPS and sum(self.steps_s) >= _ENOUGH_S:
            trainer.should_stop = True

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._passed()

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        self.validation_s = self._passed()

    def _passed(self) -> float:
        """Return the seconds since the last call, when the GPU has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began, self._began = self._began, time.perf_counter()
        return self._began - began


def duration(seconds: float) -> str:
    """Return a time as text: ``3 h 20 min``, ``4 min``."""
    minutes = max(1, round(seconds / 60))
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
