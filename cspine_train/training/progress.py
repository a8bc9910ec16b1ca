"""The progress bar of training on a terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from cspine_train.run.folder import MONITOR
from cspine_train.training.callbacks import TimeBudget, epoch_name


class TrainingProgress(RichProgressBar):
    """Lightning's progress bar on stderr, with the last validation Dice and the time left for the whole run.

    Parameters
    ----------
    may_stop_early : bool
        Whether early stopping may end the run, so that the time left is an upper bound.
    budget : TimeBudget or None
        The time that training may take; None if it ends after a number of epochs.
    """

    def __init__(self, may_stop_early: bool, budget: TimeBudget | None = None) -> None:
        super().__init__(console_kwargs={"stderr": True})
        self._budget = budget
        self._left_format = "at most {} left" if may_stop_early else "{} left"
        self._first_step = 0
        self._started: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the bar."""
        # Lightning reconfigures the console that all users of rich in this process share.
        self._shared_console = dict(vars(get_console()))
        self._total_steps = trainer.estimated_stepping_batches
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        if self._started is None:
            # The first step of a process is slower than all others.
            self._started, self._first_step = time.perf_counter(), trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """Return what the bar shows beside the steps."""
        shown: dict[str, Any] = {}
        if MONITOR in trainer.callback_metrics:
            shown["Dice"] = f"{float(trainer.callback_metrics[MONITOR]):.3f}"
        steps = trainer.global_step - self._first_step
        if self._started is not None and steps:
            # Validation is part of the time of the epochs that are over.
            step_s = (time.perf_counter() - self._started) / steps
            left_s = step_s * (self._total_steps - trainer.global_step)
            if self._budget:
                left_s = max(0.0, self._budget.time_remaining() or 0.0)
            shown["run"] = self._left_format.format(timedelta(seconds=round(left_s)))
        return shown

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {epoch_name(current_epoch, self.trainer.max_epochs, '/')}"

    def _stop_progress(self) -> None:
        super()._stop_progress()
        vars(get_console()).update(getattr(self, "_shared_console", {}))
