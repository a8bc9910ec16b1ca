"""How far training has come and how long it will take, on a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import mean
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Callback

from cspine_train.run.folder import MONITOR

if TYPE_CHECKING:
    from rich.progress import Progress

# A validation batch is twice as large as one of training, and goes forward only: a third of a step.
_VALIDATION_STEPS = 2 / 3
_LATEST = 50


class Pace:
    """Measures how long steps take, and what lies between epochs, and tells how long the rest will.

    Between epochs are validation, checkpoints and pictures. Before the first is over, validation is reckoned from the
    steps. A process's first step is slower than all others and is left out.

    Parameters
    ----------
    clock : callable
        Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._steps: deque[float] = deque(maxlen=_LATEST)
        self._between_s: float | None = None
        self._validating = False
        self._first = True

    def epoch_begins(self) -> None:
        """Note that an epoch's steps begin, and so that what lay between is over."""
        if self._validating:
            self._between_s = self._clock() - self._since
        self._validating = False
        self._since = self._clock()

    def step_ends(self) -> None:
        """Note that a step is over."""
        now = self._clock()
        if self._first:
            self._first = False
        else:
            self._steps.append(now - self._since)
        self._since = now

    def validation_begins(self) -> None:
        """Note that an epoch's steps are over."""
        self._validating = True
        self._since = self._clock()

    @property
    def step_s(self) -> float | None:
        """Seconds that a step takes, on average over the latest; None before there were two."""
        return mean(self._steps) if self._steps else None

    def left_s(self, steps: int, validation_batches: int, epochs: int, steps_left: int) -> float | None:
        """Return how many seconds the rest of a run takes; None before that can be known.

        Parameters
        ----------
        steps, validation_batches : int
            Of an epoch.
        epochs : int
            How many come after the one that is under way.
        steps_left : int
            How many steps that one still has.
        """
        step_s = self.step_s
        if step_s is None:
            return None
        between_s = self._between_s
        if between_s is None:
            between_s = _VALIDATION_STEPS * step_s * validation_batches
        this_s = steps_left * step_s + between_s
        if self._validating:
            this_s = max(0.0, between_s - (self._clock() - self._since))
        return this_s + epochs * (steps * step_s + between_s)


class TerminalProgress(Callback):
    """One line on a terminal: epoch, steps, time of a step, last validation Dice, time left for the whole run.

    Parameters
    ----------
    rows : sequence of dict
        The rows of `metrics.csv` so far; grows as the run goes on.
    may_stop : bool
        Whether the run may stop early, so that the time left is the longest that it can be.
    """

    def __init__(self, rows: Sequence[dict[str, float]], may_stop: bool) -> None:
        self._rows = rows
        self._left = "at most {} left" if may_stop else "{} left"
        self._pace = Pace()
        self._bar: Progress | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the line."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
        )  # fmt: skip
        self._bar = Progress(*columns, console=Console(stderr=True), expand=True)
        self._bar.add_task("", total=None, told="")
        self._bar.start()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin with an epoch's steps."""
        self._pace.epoch_begins()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show that the step is under way: where nothing is known yet, at least that."""
        self._show(trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        self._pace.step_ends()
        self._show(trainer, batch_idx + 1)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin with validation."""
        self._pace.validation_begins()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch of validation."""
        self._show(trainer, batch_idx + 1, validating=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the line away."""
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back as it was."""
        self._stop()

    def _show(self, trainer: lightning.Trainer, done: int, validating: bool = False) -> None:
        if self._bar is None:
            return
        steps, batches = int(trainer.num_training_batches), int(sum(trainer.num_val_batches))
        epochs = trainer.max_epochs or 0
        step_s = self._pace.step_s
        told = []
        if validating:
            told.append("validating")
        elif step_s is not None:
            told.append(f"{step_s:.2f} s/step")
        if self._rows:
            told.append(f"Dice {self._rows[-1][MONITOR]:.3f}")
        left_s = self._pace.left_s(
            steps, batches, epochs - trainer.current_epoch - 1, 0 if validating else steps - done
        )
        if left_s is not None:
            told.append(self._left.format(timedelta(seconds=round(left_s))))
        self._bar.update(
            self._bar.task_ids[0],
            description=f"epoch {trainer.current_epoch + 1}/{epochs}",
            total=batches if validating else steps,
            completed=done,
            told="  ".join(told),
        )

    def _stop(self) -> None:
        if self._bar is not None:
            # What it showed last is no longer so.
            self._bar.update(self._bar.task_ids[0], visible=False)
            self._bar.stop()
            self._bar = None
