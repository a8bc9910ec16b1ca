"""What happens beside the steps of training: which weights are kept, when the rate falls, what is told of an epoch."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from cspine_train.models.build import save_model
from cspine_train.reports.figures import draw_curves, never_fatal
from cspine_train.run.folder import CURVES_NAME, METRICS_NAME, MODEL_FOLDER, MONITOR, write_rows
from cspine_train.run.record import load_record, save_record
from cspine_train.training.segmentation_module import THRESHOLD

# Epochs in a row without improvement. Validation Dice improves when it is above every earlier one, by however little:
# the same rule decides which epoch is kept, when the learning rate falls and when training stops.
_LOWER_AFTER = 5
_STOP_AFTER = 7
_PROGRESS = ("best", "num_bad_epochs", "last_epoch")
# So that curves cost a run no more than a twentieth of its time.
_DRAW_AFTER = 20
_log = logging.getLogger("cspine_train")


class Plateau(Callback):
    """Divides the learning rate by 3 after 5 epochs without improvement.

    Lightning steps a scheduler after it has saved the checkpoint, so that a run that goes on would miss one step; a
    callback's state is saved as it is.
    """

    @property
    def state_key(self) -> str:
        """Under which name its state is in a checkpoint; runs that are under way bear this one."""
        return "_Plateau"

    def __init__(self) -> None:
        self._schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return self._schedule.state_dict() if self._schedule else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self._state = state_dict

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to watch the optimiser's rate."""
        # PyTorch's patience is the number of epochs that it tolerates: the rate falls after one more.
        self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            trainer.optimizers[0], mode="max", factor=1 / 3, patience=_LOWER_AFTER - 1, threshold=0,
            threshold_mode="abs",
        )  # fmt: skip
        # Only what changes during training: older checkpoints also hold a patience and a threshold of their own.
        self._schedule.load_state_dict({name: self._state[name] for name in _PROGRESS if name in self._state})

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Lower the rate if it is time to."""
        if self._schedule:
            self._schedule.step(float(trainer.callback_metrics[MONITOR]))


class Keep(Callback):
    """Saves the network that the run keeps, and writes a row an epoch.

    On a plateau schedule that is the network whenever validation improves. The other schedules end with their lowest
    rate: the last epoch is kept, as a peak on a few validation patients halfway down the slope is mostly luck.

    Parameters
    ----------
    run : Path
        The run folder; its record is there.
    schedule : str
        As in `RunSettings`.
    """

    @property
    def state_key(self) -> str:
        """Under which name its state is in a checkpoint; runs that are under way bear this one."""
        return "_Keep"

    def __init__(self, run: Path, schedule: str) -> None:
        self._run = run
        self._last = schedule != "plateau"
        #: A row an epoch, as `metrics.csv` has them.
        self.rows: list[dict[str, float]] = []
        self._started = time.perf_counter()
        self._waited_s = 0.0
        #: What the run's record says of the network that is kept.
        self.kept: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        times = {"seconds": time.perf_counter() - self._started, "waited_s": self._waited_s}
        return {"rows": self.rows, "kept": self.kept, **times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        # Others look at the same list.
        self.rows[:], self.kept = state_dict["rows"], state_dict["kept"]
        # An epoch that goes on has taken what it took before.
        self._started = time.perf_counter() - state_dict.get("seconds", 0)
        self._waited_s = state_dict.get("waited_s", 0.0)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the epoch's clocks."""
        self._started = time.perf_counter()
        self._waited_s = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add up how long training waited for batches."""
        loader: Any = trainer.train_dataloader
        self._waited_s += loader.waited_s
        loader.waited_s = 0.0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the network if it is the one to keep, and the epoch's row; of several processes the first does."""
        if not trainer.is_global_zero:
            return
        dice = float(trainer.callback_metrics[MONITOR])
        threshold = round(float(trainer.callback_metrics[THRESHOLD]), 2)
        if self._last or not self.kept or dice > self.kept["kept_dice"]:
            self.kept = {"kept_epoch": trainer.current_epoch, "kept_dice": dice, "threshold": threshold}
            save_model(pl_module.kept, self._run / MODEL_FOLDER)
            # With the model, so that an unfinished run predicts as it was validated.
            save_record(self._run, load_record(self._run).model_copy(update=self.kept))
        self.rows.append(
            {
                "epoch": trainer.current_epoch,
                "train_loss": round(float(trainer.callback_metrics["train_loss"]), 6),
                MONITOR: round(dice, 6),
                THRESHOLD: threshold,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - self._started, 2),
                "seconds_waiting": round(self._waited_s, 2),
            }
        )
        _log.info(
            "epoch %d of %d: loss %.3f, validation Dice %.3f, %.0f s",
            trainer.current_epoch + 1, trainer.max_epochs, trainer.callback_metrics["train_loss"], dice,
            self.rows[-1]["seconds"],
        )  # fmt: skip
        # Rows of a run that an older cspine began know less.
        write_rows(self._run / METRICS_NAME, self.rows[-1], self.rows)


class Curves(Callback):
    """Draws the run's curves after an epoch, unless that took long in comparison with the time since it last did.

    Parameters
    ----------
    run : Path
        The run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._drawn = -math.inf
        self._cost_s = 0.0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw them, if it is time to."""
        started = time.perf_counter()
        if started - self._drawn >= _DRAW_AFTER * self._cost_s:
            with never_fatal(f"{self._run / CURVES_NAME}"):
                draw_curves(self._run)
            self._drawn = time.perf_counter()
            self._cost_s = self._drawn - started


class Stop(EarlyStopping):
    """Stops after 7 epochs without improvement.

    A run that was killed after its last epoch trains no other one when it is resumed.
    """

    def __init__(self) -> None:
        super().__init__(MONITOR, mode="max", patience=_STOP_AFTER)

    @property
    def state_key(self) -> str:
        """Under which name its state is in a checkpoint; runs that are under way bear this one."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop at once where it would have stopped already."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
