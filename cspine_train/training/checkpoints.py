"""Checkpoints: their names, when they are written, and the one to resume from."""

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
    """How far a run has come: complete epochs, and batches of the epoch after them."""

    epochs: int = 0
    batches: int = 0

    @property
    def name(self) -> str:
        """The name of a checkpoint that is written here."""
        # At the end of an epoch the name holds the number of that epoch, from 0.
        return f"epoch={self.epochs}-batch={self.batches}.ckpt" if self.batches else f"epoch={self.epochs - 1}.ckpt"

    def __str__(self) -> str:
        return f"{self.batches} steps of epoch {self.epochs + 1}" if self.batches else f"epoch {self.epochs}"

    @staticmethod
    def of(checkpoint: Path) -> Place | None:
        """Parse the name of a checkpoint; None if the file is no checkpoint."""
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
    """Return the newest checkpoint that can be read."""
    for place, path in checkpoints(folder).items():
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        # A truncated file makes the reader raise errors of many kinds.
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"{path} is damaged and skipped ({type(error).__name__})", stacklevel=2)
        else:
            return place, path
    return None


class DurableCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint atomically and durably: it appears once it is complete and on the disk.

    Lightning writes to the system's folder for temporary files and copies from there; a killed run would leave its
    unfinished file behind.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        make_folder(path.parent)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


class Checkpoints(Checkpoint):
    """Writes a checkpoint after every epoch and every few `minutes` within one, and keeps the newest only.

    Rank 0 writes, by its own clock; the other ranks do not wait.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self._folder = folder
        self._seconds = 60 * minutes
        self._written = monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._written = monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if it is time to."""
        # Validation follows the last batch, then the epoch's own checkpoint. A run resumed from between the two would
        # skip validation.
        if monotonic() - self._written >= self._seconds and not trainer.is_last_batch:
            self._write(trainer, Place(trainer.current_epoch, batch_idx + 1))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the epoch's checkpoint, after all other callbacks."""
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
