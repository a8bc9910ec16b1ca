"""Callbacks of training: plateau schedule, early stopping, time budget, weight averaging, the kept model, curves."""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cspine_train.models.build import save_model
from cspine_train.reports.figures import draw_curves, never_fatal
from cspine_train.run.folder import CURVES_NAME, METRICS_NAME, MODEL_FOLDER, MONITOR, THRESHOLD, write_rows
from cspine_train.run.record import load_record, save_record

# Epochs in a row without improvement. Validation Dice improves when it exceeds every earlier value by any amount:
# one rule decides which epoch is kept, when the learning rate falls and when training stops.
_LOWER_AFTER = 5
_STOP_AFTER = 7
# Times of training beyond this share of the time budget are reported.
_MUCH_LONGER = 1.05
# Curves take at most a twentieth of a run's time.
_DRAW_AFTER = 20
_log = logging.getLogger("cspine_train")


class Plateau(EarlyStopping):
    """Divides the learning rate by 3 after 5 epochs without improvement, and stops training after 7.

    The reduced rate is in the optimiser before the epoch's checkpoint is written. Lightning would step a plateau
    scheduler after that, so that a resumed run would miss a step.
    """

    def __init__(self) -> None:
        super().__init__(MONITOR, mode="max", patience=_STOP_AFTER)

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint: that of Lightning's class, as in checkpoints of older versions."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop a resumed run at once if it was killed after its last epoch."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare the epoch's Dice with the best, and reduce the rate if it is time to."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.wait_count == _LOWER_AFTER:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] /= 3


class TimeBudget(Timer):
    """Ends training, its last validation included, when its time is over.

    The time of an earlier process that was killed counts up to its last checkpoint.

    Parameters
    ----------
    minutes : float
        The time.
    validation_steps : float
        Expected time of a validation in training steps; it counts until the first validation is over.
    """

    def __init__(self, minutes: float, validation_steps: float) -> None:
        super().__init__(timedelta(minutes=minutes), verbose=False)
        self._seconds = 60 * minutes
        self._validation_steps = validation_steps
        self._last_validation_s: float | None = None
        # Steps and time before this process.
        self._first_step, self._earlier_s = 0, 0.0
        #: Share of the time for training steps that is over, from 0 to 1, the same in all processes.
        self.share = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._first_step, self._earlier_s = trainer.global_step, self.time_elapsed()
        self._update(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **named: Any) -> None:
        """End training if only the time of a validation is left."""
        self._update(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End training if there is no time for a step and another validation."""
        super().on_validation_end(trainer, pl_module)
        started, ended = self.start_time("validate"), self.end_time("validate")
        if started is not None and ended is not None:
            self._last_validation_s = ended - started
        self._update(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say so if a step and a validation took longer than the time."""
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self.time_elapsed() > _MUCH_LONGER * self._seconds:
            _log.info(
                "training took %.1f minutes instead of %g: a step or a validation takes longer than was left",
                self.time_elapsed() / 60, self._seconds / 60,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return super().state_dict() | {"last_validation_s": self._last_validation_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        super().load_state_dict(state_dict)
        self._last_validation_s = state_dict["last_validation_s"]

    def _update(self, trainer: lightning.Trainer) -> None:
        elapsed = self.time_elapsed()
        share = min(1.0, elapsed / max(1e-9, self._seconds - self._validation_s(trainer, elapsed)))
        # The clocks of processes differ, and all must take the same steps.
        self.share = trainer.strategy.broadcast(share)
        trainer.should_stop = trainer.should_stop or self.share >= 1

    def _validation_s(self, trainer: lightning.Trainer, elapsed: float) -> float:
        if self._last_validation_s is not None:
            return self._last_validation_s
        steps = trainer.global_step - self._first_step
        return self._validation_steps * (elapsed - self._earlier_s) / steps if steps else 0.0


def epoch_name(number: int, epochs: int | None, separator: str = " of ") -> str:
    """Return an epoch's number from 1 on, and the number of epochs if training does not end by the clock."""
    return f"{number + 1}{separator}{epochs}" if epochs and epochs > 0 else str(number + 1)


class WeightEMA(WeightAveraging):
    """Exponential moving average of weights and batch statistics; validation and the kept model use it.

    Parameters
    ----------
    decay : float
        EMA decay. Step n uses (1 + n) / (10 + n) as long as that is less, so that random initial weights are soon
        forgotten.
    """

    def __init__(self, decay: float) -> None:
        def update(averages: Any, values: Any, steps: Any) -> None:
            warm_up = (1 + float(steps)) / (10 + float(steps))
            get_ema_multi_avg_fn(min(decay, warm_up))(averages, values, steps)  # type: ignore[no-untyped-call]

        super().__init__(multi_avg_fn=update)

    @property
    def network(self) -> torch.nn.Module:
        """The averaged network."""
        assert self._average_model is not None  # noqa: S101
        network = self._average_model.module.network
        assert isinstance(network, torch.nn.Module)  # noqa: S101
        return network


class Keep(Callback):
    """Saves the network that the run keeps, and writes one row and one log line per epoch.

    With the plateau schedule the network is saved whenever validation improves. The other schedules end at their lowest
    rate, and the last epoch is kept: an earlier peak on a few validation patients is mostly luck.
    """

    def __init__(self, run: Path, schedule: str, average: WeightEMA | None = None) -> None:
        self._run = run
        self._keep_last = schedule != "plateau"
        self._average = average
        #: One row per epoch, as in `metrics.csv`.
        self.rows: list[dict[str, float]] = []
        self._started = time.perf_counter()
        self._waited_s = 0.0
        #: Fields of the run's record that describe the kept network.
        self.kept: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint, as in checkpoints of older versions."""
        return "_Keep"

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        times = {"seconds": time.perf_counter() - self._started, "waited_s": self._waited_s}
        return {"rows": self.rows, "kept": self.kept, **times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.rows, self.kept = state_dict["rows"], state_dict["kept"]
        # A resumed epoch includes the time that it took before.
        self._started = time.perf_counter() - state_dict.get("seconds", 0)
        self._waited_s = state_dict.get("waited_s", 0.0)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the epoch's clocks."""
        self._started = time.perf_counter()
        self._waited_s = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the time that training waited for the batch."""
        loader: Any = trainer.train_dataloader
        self._waited_s += loader.waited_s
        loader.waited_s = 0.0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the network if it is the one to keep, and log the epoch, on rank 0 only."""
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        dice, threshold = metrics[MONITOR], round(metrics[THRESHOLD], 2)
        if self._keep_last or not self.kept or dice > self.kept["kept_dice"]:
            self.kept = {"kept_epoch": trainer.current_epoch, "kept_dice": dice, "threshold": threshold}
            save_model(self._average.network if self._average else pl_module.network, self._run / MODEL_FOLDER)
            # An unfinished run predicts with the threshold of its validation.
            save_record(self._run, load_record(self._run).model_copy(update=self.kept))
        row = {
            "train_loss": round(metrics["train_loss"], 6),
            MONITOR: round(dice, 6),
            THRESHOLD: threshold,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - self._started, 2),
            "seconds_waiting": round(self._waited_s, 2),
        }
        self.rows.append({"epoch": trainer.current_epoch, **row})
        _log.info(
            "epoch %s: loss %.3f, validation Dice %.3f, %.0f s",
            epoch_name(trainer.current_epoch, trainer.max_epochs), metrics["train_loss"], dice, row["seconds"],
        )  # fmt: skip
        # Rows of a run that an older version started have fewer columns.
        write_rows(self._run / METRICS_NAME, self.rows[-1], self.rows)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.current_epoch)
            logger.save()


class Curves(Callback):
    """Draws the run's curves after an epoch, unless the last drawing took long compared with the time since then."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._drawn = -math.inf
        self._cost_s = 0.0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the curves if it is time to."""
        started = time.perf_counter()
        if started - self._drawn >= _DRAW_AFTER * self._cost_s:
            with never_fatal(f"{self._run / CURVES_NAME}"):
                draw_curves(self._run)
            self._drawn = time.perf_counter()
            self._cost_s = self._drawn - started
