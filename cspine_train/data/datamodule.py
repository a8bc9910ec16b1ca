"""How the slices of a run come to the network in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np

from cspine_data import CaseRecord, Cohort, Split
from cspine_train.data.batches import BatchLoader, SliceBatches
from cspine_train.data.sampling import EpochSampler, ProcessBatches, weights_of
from cspine_train.data.sizes import USUAL_SIDES, Sides, image_sizes
from cspine_train.errors import RunError
from cspine_train.run.settings import RunSettings


@dataclass(frozen=True)
class _Records:
    """Records of cases, read anew each time: forked workers begin with all that the training process holds."""

    cohort: Cohort
    cases: tuple[str, ...]
    variant: str

    def __iter__(self) -> Iterator[CaseRecord]:
        return (self.cohort.record(case, self.variant) for case in self.cases)


class CohortSlices(lightning.LightningDataModule):
    """The training and validation slices of a run.

    Parameters
    ----------
    cohort : Cohort
        Where they are stored.
    split : Split
        The cases of each part.
    settings : RunSettings
        What was asked.
    workers : int
        Processes that read slices; 0 reads in this one.
    sides : Sides
        What sizes the network takes, see `sides_of`.
    values : sequence of int
        The label values that are told apart, see `label_values`; not for binary labels.
    rank, world : int
        This process, and how many train together. Each reads its part of every batch and of the validation slices.
    """

    def __init__(
        self,
        cohort: Cohort,
        split: Split,
        settings: RunSettings,
        workers: int = 0,
        sides: Sides = USUAL_SIDES,
        values: Sequence[int] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._workers = workers
        self._rank, self._world = rank, world
        #: The epoch that training begins with, and how many of its batches are done; not 0 where a run goes on.
        self.first_epoch, self.batches_done = 0, 0
        self.validation_cases = split.validation
        axes, variant = settings.axes, settings.variant
        how: dict[str, Any] = {"variant": variant, "labels": settings.labels, "context": settings.context}
        train = cohort.slices(axes, cases=split.train, **how)
        validation = cohort.slices(axes, cases=split.validation, **how)
        train_records, validation_records, test_records = (
            _Records(cohort, cases, variant) for cases in (split.train, split.validation, split.test)
        )
        #: Sizes of the images, see `ImageSizes`.
        self.sizes = image_sizes(train_records, validation_records, test_records, settings, sides)
        self._weights = weights_of(train.cases, settings.case_weights, cohort.cases)
        #: Whether voxels of any patient do not count.
        self.ignores = train.ignores or validation.ignores
        pixel_mm, sizes = settings.pixel_mm, self.sizes
        self._train = SliceBatches(train, pixel_mm, sizes.slice_hw, values, self.ignores)
        self._validation = SliceBatches(validation, pixel_mm, sizes.validation_hw, values, self.ignores)

    @property
    def labelled_slices(self) -> int:
        """How many training slices have labelled voxels, but for those of cases that weigh nothing."""
        slices = self._train.slices
        return int(np.count_nonzero(slices.labelled_voxels * self._weights[slices.case_numbers]))

    @property
    def smallest_batch(self) -> int:
        """Slices in the smallest training batch."""
        return min(self._settings.batch_size, len(self._sampler()))

    def check_processes(self) -> None:
        """Refuse a number of processes that cannot divide the slices.

        Raises
        ------
        RunError
            If the slices of a step cannot be divided evenly, or there are fewer validation slices than processes.
        """
        step = min(self._settings.batch_size, len(self._sampler()))
        if step % self._world:
            raise RunError(
                f"a step's {step} slices cannot be divided evenly among {self._world} processes; choose a --batch-size "
                "that can"
            )
        if len(self._validation) < self._world:
            raise RunError(
                f"{len(self._validation)} validation slices are too few for {self._world} processes; choose fewer "
                "--devices"
            )

    def _sampler(self) -> EpochSampler:
        settings, slices = self._settings, self._train.slices
        return EpochSampler(
            slices.labelled_voxels, settings.empty_share, settings.seed,
            slices.case_numbers, self._weights, settings.balance,
        )  # fmt: skip

    def slices_of_an_epoch(self) -> int:
        """Return how many training slices an epoch draws."""
        return len(self._sampler())

    def train_dataloader(self) -> BatchLoader:
        """Return an epoch's batches: labelled slices and a share of empty ones, shuffled."""
        settings, sampler = self._settings, self._sampler()
        # Worker processes ask for the first epoch's order before Lightning has said which epoch it is, and for batches
        # that the network has not come to when a checkpoint is written: what is done is told by the checkpoint.
        sampler.begin(self.first_epoch, self.batches_done * settings.batch_size)
        # A last batch of one slice would leave batch normalisation nothing to average over.
        drop_last = len(sampler) > settings.batch_size
        batches = ProcessBatches(sampler, settings.batch_size, drop_last, self._rank, self._world)
        return BatchLoader(self._train, batch_sampler=batches, num_workers=self._workers)

    def val_dataloader(self) -> BatchLoader:
        """Return every slice of the validation patients, in order, or this process' part of them."""
        size = 2 * self._settings.batch_size // self._world
        slices = range(self._rank, len(self._validation), self._world)
        return BatchLoader(self._validation, size, sampler=slices, num_workers=self._workers)
