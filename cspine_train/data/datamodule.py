"""The data module of a run: its training and validation batches."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
from numpy.typing import NDArray

from cspine_data import Cohort, Split
from cspine_data.tools import meant
from cspine_train.data.batches import BatchLoader, SliceBatches
from cspine_train.data.sampling import EpochSampler, ProcessBatches
from cspine_train.data.sizes import USUAL_SIDES, Sides, image_sizes
from cspine_train.errors import RunError
from cspine_train.run.settings import DataSettings, RunSettings


def _weights(cases: Sequence[str], settings: DataSettings, cohort: Cohort) -> NDArray[np.float64]:
    """Return the weights of training cases; refuse weights of cases that the store lacks."""
    unknown = settings.case_weights.keys() - {unicodedata.normalize("NFC", case) for case in cohort.cases}
    if unknown:
        case = min(unknown)
        raise RunError(
            f"case {case!r}: has a weight and is not in the store{meant(case, cohort.cases)}; see --case-weight"
        )
    return np.array([settings.weight_of(case) for case in cases], dtype=np.float64)


class CohortSlices(lightning.LightningDataModule):
    """The training and validation slices of a run.

    Parameters
    ----------
    cohort : Cohort
        The store.
    split : Split
        The cases of each part.
    settings : RunSettings
        Which slices, at which size and how often; batch size, context and seed.
    workers : int
        Processes that read slices; 0 reads in this one.
    sides : Sides
        Image sizes that the network takes, see `sides_of`.
    values : sequence of int
        Label values of the network's classes, see `label_values`; empty for binary labels.
    rank, world : int
        Rank of this process, and number of processes. Each reads its part of every batch and of the validation slices.

    Raises
    ------
    RunError
        If no training slice is labelled, the sizes do not suit the cohort (see `image_sizes`), a weight is given to an
        unknown case, or the processes cannot share the slices.
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
        self._batch_size = settings.batch_size
        self._workers = workers
        self._rank, self._world = rank, world
        #: The epoch to start from, and the number of its batches that are done; above 0 in a resumed run.
        self.first_epoch, self.batches_done = 0, 0
        how: dict[str, Any] = {"variant": settings.variant, "labels": settings.labels, "context": settings.context}
        train = cohort.slices(settings.axes, cases=split.train, **how)
        validation = cohort.slices(settings.axes, cases=split.validation, **how)
        weights = _weights(train.cases, settings, cohort)
        #: Sizes of the images, see `ImageSizes`.
        self.sizes = image_sizes(cohort, split, settings, sides)
        self._sampler = EpochSampler(
            train.labelled_voxels, settings.empty_share, settings.seed, train.case_numbers, weights, settings.balance
        )
        if not self.labelled_slices:
            option = "--case-weight" if settings.case_weights else "--axis"
            axes = ", ".join(map(str, settings.axes))
            raise RunError(f"{cohort.path}: no training slice is labelled along axis {axes}; choose another {option}")
        #: Whether voxels of any case are ignored.
        self.ignores = train.ignores or validation.ignores
        pixel_mm, sizes = settings.pixel_mm, self.sizes
        self._train = SliceBatches(train, pixel_mm, sizes.slice_hw, values, self.ignores)
        self._validation = SliceBatches(validation, pixel_mm, sizes.validation_hw, values, self.ignores)
        if self.smallest_batch % world:
            raise RunError(
                f"a step's {self.smallest_batch} slices cannot be divided evenly among {world} processes; choose a "
                "--batch-size that can"
            )
        if len(self._validation) < world:
            raise RunError(
                f"{len(self._validation)} validation slices are too few for {world} processes; choose fewer --devices"
            )

    @property
    def labelled_slices(self) -> int:
        """Number of labelled training slices, without cases of weight 0."""
        return self._sampler.labelled_slices

    @property
    def smallest_batch(self) -> int:
        """Slices in the smallest training batch."""
        return min(self._batch_size, len(self._sampler))

    @property
    def validation_steps(self) -> float:
        """Expected time of a validation, in training steps: a forward pass takes a third of a step."""
        seen, trained = math.prod(self.sizes.validation_hw), math.prod(self.sizes.trained_hw[0])
        return len(self._validation) * seen / (3 * self._batch_size * trained)

    def train_dataloader(self) -> BatchLoader:
        """Return an epoch's batches: labelled slices and a share of empty ones, shuffled."""
        # Workers read ahead of the network, and start before Lightning sets the epoch: only the checkpoint knows which
        # slices the network has seen.
        self._sampler.begin(self.first_epoch, self.batches_done * self._batch_size)
        # Batch normalisation cannot average over a last batch of one slice.
        drop_last = len(self._sampler) > self._batch_size
        batches = ProcessBatches(self._sampler, self._batch_size, drop_last, self._rank, self._world)
        return BatchLoader(self._train, batch_sampler=batches, num_workers=self._workers)

    def val_dataloader(self) -> BatchLoader:
        """Return all slices of the validation patients, in order, or the part of this process."""
        size = 2 * self._batch_size // self._world
        slices = range(self._rank, len(self._validation), self._world)
        return BatchLoader(self._validation, size, sampler=slices, num_workers=self._workers)
