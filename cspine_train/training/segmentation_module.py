"""Training and validation steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import lightning
import torch
from torch import nn

from cspine_train.data.augmentation import Augmentation, sample_seeds
from cspine_train.data.batches import Batch
from cspine_train.data.sizes import ImageSizes
from cspine_train.data.transforms import coarser, inside
from cspine_train.run.folder import MONITOR, THRESHOLD
from cspine_train.run.settings import RunSettings
from cspine_train.training.callbacks import TimeBudget
from cspine_train.training.confusion import confusion, mean_label_dice, over_patients
from cspine_train.training.losses import SegmentationLoss
from cspine_train.training.optimisers import optimisation
from cspine_train.training.processes import average_batch_statistics

#: Thresholds of the probability of vertebra that validation tries.
THRESHOLDS = tuple(round(0.3 + 0.05 * step, 2) for step in range(11))
# A schedule that follows the clock is divided into so many steps.
_CLOCK_STEPS = 10_000
# Gives each process its own random numbers.
_RANK_SEED = 500_009


class Seen(NamedTuple):
    """A batch as the network sees it.

    Attributes
    ----------
    images, masks : Tensor
        float32 (N, C, H, W) and (N, K, H, W), see `shares_of`.
    numbers : Tensor
        int64 (N,): index of each slice's case.
    shapes_hw : Tensor
        int64 (N, 2): height and width of each slice before padding and augmentation.
    """

    images: torch.Tensor
    masks: torch.Tensor
    numbers: torch.Tensor
    shapes_hw: torch.Tensor


def best_threshold(counts: torch.Tensor, patients: Sequence[int] | None = None) -> tuple[float, float]:
    """Return the highest mean Dice over patients and its threshold: among equals, the nearest to 0.5.

    Cases without a labelled pixel are left out; without any other case, Dice is 0.

    Parameters
    ----------
    counts : Tensor
        int64 (cases, 2, thresholds + 1): numbers of unlabelled and of labelled voxels, by the number of `THRESHOLDS`
        that their probability exceeds.
    patients : sequence of int, optional
        A number of each case's patient; by default, each case has its own.
    """
    labelled = (counts[:, 1].sum(1) > 0).nonzero().flatten()
    if not len(labelled):
        return 0.0, 0.5
    counts = counts[labelled]
    marked = counts.flip(2).cumsum(2).flip(2)[..., 1:].double()
    both, total = marked[:, 1], marked.sum(1) + counts[:, 1].sum(1, keepdim=True)
    dice = over_patients(2 * both / total, labelled, patients).mean(0)
    best = (dice > dice.max() - 1e-9).nonzero().flatten().tolist()
    nearest = min(best, key=lambda number: abs(THRESHOLDS[number] - 0.5))
    return float(dice[nearest]), THRESHOLDS[nearest]


class SliceSegmenter(lightning.LightningModule):
    """Trains a network to segment slices.

    Validation counts the voxels of each patient over all slices, at the network's pixel size, and averages Dice over
    patients, not over batches. The threshold is the one of the highest Dice: after training with soft Dice, 0.5 marks
    too many pixels. With several labels, each pixel gets the most probable one, and a patient's Dice is the mean over
    its labels.

    Parameters
    ----------
    network : Module
        The network to train.
    settings : RunSettings
        Loss, optimiser, schedule, augmentation and seed.
    validation_cases : sequence of str
        Validation cases, in the order of their numbers in a batch.
    sizes : ImageSizes, optional
        Sizes of crops and of coarse images; neither by default.
    labels : int
        Number of labels.
    unknown : sequence of int, optional
        Number of labels of each validation case that no training case has, see `mean_label_dice`.
    ignores : bool
        Whether pixels may be ignored, see `shares_of`.
    patients : sequence of int, optional
        A number of each validation case's patient; by default, each case has its own.
    budget : TimeBudget, optional
        The callback that ends training by the clock; by default, it ends after the epochs of `settings`.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: RunSettings,
        validation_cases: Sequence[str],
        sizes: ImageSizes | None = None,
        labels: int = 1,
        unknown: Sequence[int] | None = None,
        ignores: bool = False,
        patients: Sequence[int] | None = None,
        budget: TimeBudget | None = None,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self._settings = settings
        self._coarse_hw = sizes.coarse_hw if sizes else None
        self._loss = SegmentationLoss(settings.loss, labels)
        self._augment = Augmentation(settings.augment, sizes.crop_hw if sizes else None, labels)
        # Compiled for each size: code for dynamic sizes depends on the first, and a resumed run starts with another.
        compiled = torch.compile(self.network, dynamic=False) if settings.compile else None
        self._forward = self.network.__call__ if compiled is None else compiled
        self._cases = tuple(validation_cases)
        self._labels = labels
        self._ignores = ignores
        self._patients = patients
        self.budget = budget
        self._unknown = tuple(unknown or [0] * len(self._cases))
        self._counts = self._no_counts()
        # Some encoders have parameters that are never trained.
        encoder = cast("Any", network).encoder if settings.frozen_share else nn.Identity()
        self._encoder_parameters = [one for one in encoder.parameters() if one.requires_grad]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Seen:
        """Augment a training batch on its device, at random by seed and step only."""
        images, masks = batch.intensities(), batch.shares(self._labels, self._ignores)
        if self.trainer.training:
            # Dropout draws from this generator: the same numbers in a resumed run, and others in each process.
            torch.manual_seed(self._settings.seed * 1_000_003 + self.global_step + _RANK_SEED * self.global_rank)
            world = self.trainer.world_size
            seeds = sample_seeds(self._settings.seed, self.global_step, len(images) * world)
            images, masks = self._augment(images, masks, batch.axes, seeds[self.global_rank :: world])
            if self._coarse_hw and self._is_within(self._settings.coarse_share):
                images, masks = coarser(images, masks, self._coarse_hw)
        images = images.contiguous(memory_format=torch.channels_last)
        return Seen(images, masks, batch.numbers, batch.shapes_hw)

    def _share_done(self) -> float:
        """Return the share of training that is over, by the clock or in steps."""
        if self.budget:
            return self.budget.share
        return self.global_step / int(self.trainer.estimated_stepping_batches)

    def _is_within(self, share: float) -> bool:
        """Return whether the step belongs to this first share of training."""
        return share > 0 and self._share_done() < share

    def on_train_batch_start(self, batch: Seen, batch_idx: int) -> None:
        """Freeze the encoder in the first steps, and its batch statistics and dropout too; then train it."""
        if self._settings.frozen_share:
            frozen = self._is_within(self._settings.frozen_share)
            cast("Any", self.network).encoder.train(not frozen)
            # DDP's static graph needs the same gradients in every step.
            for parameter in self._encoder_parameters if self.trainer.world_size == 1 else ():
                parameter.requires_grad_(not frozen)

    def on_after_backward(self) -> None:
        """Drop the gradients of a frozen encoder: the optimiser then leaves its weights alone, without weight decay."""
        if self._is_within(self._settings.frozen_share):
            for parameter in self._encoder_parameters:
                parameter.grad = None

    def training_step(self, batch: Seen, batch_idx: int) -> torch.Tensor:
        """Return the loss of the whole batch, over all processes."""
        logits, masks = self._whole_batch(self._forward(batch.images)), self._whole_batch(batch.masks)
        loss: torch.Tensor = self._loss(logits, masks)
        # A checkpoint does not hold this mean: in a resumed epoch it is over the remaining steps only.
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(masks), logger=False)
        return loss

    def _whole_batch(self, part: torch.Tensor) -> torch.Tensor:
        """Gather the parts of a batch from all processes: Dice of a batch is not the mean over its parts."""
        if self.trainer.world_size == 1:
            return part
        # Its backward pass sums gradients over the processes, and DDP averages them: the whole batch's gradient.
        return cast("torch.Tensor", self.all_gather(part, sync_grads=part.requires_grad)).flatten(0, 1)

    def on_validation_epoch_start(self) -> None:
        """Reset the counts."""
        self._counts = self._no_counts()

    def validation_step(self, batch: Seen, batch_idx: int) -> None:
        """Count each patient's voxels by label and by the number of thresholds that their probability exceeds.

        With several labels, count them by true and by predicted label.
        """
        images, masks, numbers, shapes_hw = batch
        shown = inside(shapes_hw, (images.shape[2], images.shape[3]))
        if self._ignores:
            masks, ignored = masks[:, : self._labels], masks[:, self._labels :]
            shown &= ignored == 0
        if self._labels > 1:
            self._counts += confusion(self.network(images), masks, numbers, shown, len(self._cases)).cpu()
            return
        probabilities = torch.sigmoid(self.network(images).float())
        above = torch.bucketize(probabilities, torch.tensor(THRESHOLDS, device=probabilities.device))
        bins = (2 * numbers.view(-1, 1, 1, 1) + (masks > 0.5)) * (len(THRESHOLDS) + 1) + above
        counts = torch.bincount(bins[shown], minlength=self._counts.numel())
        self._counts += counts.view_as(self._counts).cpu()

    def on_validation_epoch_end(self) -> None:
        """Log the mean Dice over the validation patients, and the threshold that gave it."""
        counts = self.trainer.strategy.reduce(self._counts.to(self.device), reduce_op="sum").cpu()
        several = self._labels > 1
        if several:
            dice, threshold = mean_label_dice(counts, self._unknown, self._patients), 0.5
        else:
            dice, threshold = best_threshold(counts, self._patients)
        self.log(MONITOR, dice, logger=False)
        self.log(THRESHOLD, threshold, logger=False)

    def _no_counts(self) -> torch.Tensor:
        if self._labels > 1:
            return torch.zeros(len(self._cases), 1 + self._labels, 1 + self._labels, dtype=torch.int64)
        return torch.zeros(len(self._cases), 2, len(THRESHOLDS) + 1, dtype=torch.int64)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """Take a step, then average the running statistics of batch normalisation over the processes."""
        super().optimizer_step(*arguments, **named)
        average_batch_statistics(self.network)

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule unless it is ``plateau``, which is a callback."""
        steps = _CLOCK_STEPS if self.budget else int(self.trainer.estimated_stepping_batches)
        return optimisation(self.network, self._settings, steps)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the schedule by a step, or to the share of the time that is over."""
        if self.budget:
            scheduler.last_epoch = round(self.budget.share * (_CLOCK_STEPS - 1)) - 1
        scheduler.step()
