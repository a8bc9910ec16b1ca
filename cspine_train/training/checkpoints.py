"""When a run writes what it can go on from, under which names, and where it goes on."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cspine_data.tools import atomic_write, make_folder

_NAME = re.compile(r"epoch=(\d+)(?:-batch=(\d+))?\.ckpt")


@dataclass(frozen=True, order=True)
class Place:
    """How far a run has come: epochs that are complete, and batches of the one after them."""

    epochs: int = 0
    batches: int = 0

    @property
    def name(self) -> str:
        """What a checkpoint is called that was written here."""
        # A whole epoch bears its own number: so were checkpoints called before there were any within epochs.
        return f"epoch={self.epochs}-batch={self.batches}.ckpt" if self.batches else f"epoch={self.epochs - 1}.ckpt"

    def __str__(self) -> str:
        return f"{self.batches} steps of epoch {self.epochs + 1}" if self.batches else f"epoch {self.epochs}"

    @staticmethod
    def of(checkpoint: Path) -> Place | None:
        """Return where a checkpoint was written, by its name; None for a file that is none."""
        found = _NAME.fullmatch(checkpoint.name)
        if not found:
            return None
        epoch, batch = found.groups()
        return Place(int(epoch), int(batch)) if batch else Place(int(epoch) + 1)


def checkpoints(folder: Path) -> dict[Place, Path]:
    """Return the checkpoints in a folder, the newest first."""
    found = {place: path for path in folder.glob("*.ckpt") if (place := Place.of(path))}
    return dict(sorted(found.items(), reverse=True))


def newest_checkpoint(folder: Path) -> tuple[Place, Path] | None:
    """Return the newest checkpoint that is whole."""
    for place, path in checkpoints(folder).items():
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        # A file that was cut short breaks the reader in ways of its own.
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"{path} is damaged and left out ({type(error).__name__})", stacklevel=2)
        else:
            return place, path
    return None


class DurableCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint so that it appears when it is whole and on the disk, and not before.

    Lightning's own way goes through the folder for temporary files: from there a checkpoint is copied, and what a
    killed run was writing stays there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        make_folder(path.parent)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


class Checkpoints(Checkpoint):
    """Writes a checkpoint after every epoch and, within one, whenever some time has passed; the newest stays.

    Of several processes the first does, by its own clock, while the others go on.

    Parameters
    ----------
    folder : Path
        Where they lie.
    minutes : float
        The least time between two of an epoch.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self._folder = folder
        self._seconds = 60 * minutes
        self._written = monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count the time from here."""
        self._written = monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if it is time to."""
        # After the last batch comes validation, and then the epoch's own: a run that went on from between the two
        # would leave validation out.
        if monotonic() - self._written >= self._seconds and not trainer.is_last_batch:
            self._write(trainer, Place(trainer.current_epoch, batch_idx + 1))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the epoch's checkpoint, after all other callbacks are done with it."""
        self._write(trainer, Place(trainer.current_epoch + 1))

    def _write(self, trainer: lightning.Trainer, place: Place) -> None:
        if not trainer.is_global_zero:
            return
        path = self._folder / place.name
        trainer.save_checkpoint(path)
        for other in checkpoints(self._folder).values():
            if other != path:
                other.unlink()
        self._written = monotonic()
