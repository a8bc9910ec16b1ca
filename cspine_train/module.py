"""One training step, one validation step, and how the learning rate moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import nn

from cspine_train.settings import RunSettings
from cspine_train.transforms import RandomChanges

MONITOR = "valid_dice"
THRESHOLD = "threshold"
#: Probabilities that validation tries as the border between vertebra and the rest.
THRESHOLDS = tuple(round(0.3 + 0.05 * step, 2) for step in range(11))
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SliceSegmenter(lightning.LightningModule):
    """Learns to tell vertebra from everything else in slices.

    The loss is soft Dice plus binary cross-entropy. Validation counts voxels per patient over all its slices, at the
    network's pixel size, and averages Dice over patients, not over batches, at the threshold where that is highest:
    soft Dice gives pixels of which it is unsure more than their due, so that 0.5 marks too many.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: RunSettings,
        validation_cases: Sequence[str],
        crop_hw: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        self.network = network.to(memory_format=torch.channels_last)
        self._settings = settings
        self._dice_loss = smp.losses.DiceLoss("binary", from_logits=True)
        self._entropy_loss = nn.BCEWithLogitsLoss()
        self._change = None
        if settings.augment:
            self._change = RandomChanges(crop_hw=crop_hw)
        elif crop_hw:
            self._change = RandomChanges(0, 0, 0, 0, 0, crop_hw)
        self._cases = tuple(validation_cases)
        self._counts = self._no_counts()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Change a training batch at random, on its device; all randomness depends on seed and step only."""
        images, masks, numbers = batch
        if self.trainer.training:
            # Dropout draws from the same generator, so that a run that goes on draws what it would have.
            generator = torch.manual_seed(self._settings.seed * 1_000_003 + self.global_step)
            if self._change is not None:
                images, masks = self._change(images, masks, generator)
        return images.contiguous(memory_format=torch.channels_last), masks, numbers

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, masks, _ = batch
        logits = self.network(images)
        loss: torch.Tensor = self._dice_loss(logits, masks) + self._entropy_loss(logits, masks)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's counts."""
        self._counts = self._no_counts()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count, for each patient and threshold, voxels in both masks, in the prediction, and in the truth."""
        images, masks, numbers = batch
        probabilities = torch.sigmoid(self.network(images).float())
        truth = masks > 0.5
        for number, threshold in enumerate(THRESHOLDS):
            predicted = probabilities > threshold
            counts = torch.stack([mask.sum((1, 2, 3)) for mask in (predicted & truth, predicted, truth)], 1)
            self._counts[number].index_add_(0, numbers.cpu(), counts.double().cpu())

    def on_validation_epoch_end(self) -> None:
        """Log the mean Dice over the validation patients, and the threshold that gave it."""
        both, predicted, truth = self._counts.unbind(2)
        dice = torch.where(predicted + truth > 0, 2 * both / (predicted + truth).clamp_min(1), torch.ones_like(both))
        best = int(dice.mean(1).argmax())
        self.log(MONITOR, dice[best].mean().float(), prog_bar=True)
        self.log(THRESHOLD, THRESHOLDS[best])

    def _no_counts(self) -> torch.Tensor:
        return torch.zeros(len(THRESHOLDS), len(self._cases), 3, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule where it is one of steps; a plateau is looked for by a callback."""
        settings = self._settings
        if settings.schedule == "onecycle":
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=settings.learning_rate, weight_decay=1e-2)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
