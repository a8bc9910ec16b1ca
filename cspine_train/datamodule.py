"""Which slices make up an epoch, and how they come to the network in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from cspine_data import CaseRecord, Cohort, SliceDataset, Split
from cspine_train.errors import RunError
from cspine_train.settings import RunSettings
from cspine_train.transforms import fixed_size, mask_to_network, network_shape, to_network

_FEWEST_PIXELS = 4
Item = tuple[torch.Tensor, torch.Tensor, int]


class NetworkSlices(Dataset[Item]):
    """Slices as the network takes them: image (C, H, W) and mask (1, H, W), float32, and the number of their case."""

    def __init__(self, slices: SliceDataset, pixel_mm: float | None, size_hw: tuple[int, int]) -> None:
        self.slices = slices
        self._pixel_mm = pixel_mm
        self._size_hw = size_hw
        self._number_of = {record.case: number for number, record in enumerate(slices.records)}

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, item: int) -> Item:
        image, mask = self.slices[item]
        spacing_mm = self.slices.spacing_mm(item)
        return (
            to_network(image, spacing_mm, self._pixel_mm, self._size_hw)[:, 0],
            mask_to_network(mask[0], spacing_mm, self._pixel_mm, self._size_hw),
            self._number_of[self.slices.place(item).case],
        )


class EpochSampler(Sampler[int]):
    """All labelled slices in random order and, among them, a changing choice of empty ones.

    An epoch's order depends on the seed and the epoch's number only, so that a resumed run goes on as it would have.

    Parameters
    ----------
    labelled_voxels : ndarray of int
        How many labelled voxels each slice has.
    empty_share : float
        Empty slices in an epoch, as a share of the labelled ones.
    seed : int
        Where the order comes from.
    """

    def __init__(self, labelled_voxels: NDArray[Any], empty_share: float, seed: int) -> None:
        self._labelled = np.flatnonzero(labelled_voxels)
        self._empty = np.flatnonzero(labelled_voxels == 0)
        self._empties = min(self._empty.size, round(empty_share * self._labelled.size))
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is for; Lightning calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return int(self._labelled.size + self._empties)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        chosen = rng.choice(self._empty, self._empties, replace=False) if self._empties else self._empty[:0]
        return iter(rng.permutation(np.concatenate([self._labelled, chosen])).tolist())


class CohortSlices(lightning.LightningDataModule):
    """The training and validation slices of a run."""

    def __init__(self, cohort: Cohort, split: Split, settings: RunSettings, workers: int = 0) -> None:
        super().__init__()
        self._settings = settings
        self._workers = workers
        #: The epoch that training begins with; not 0 where a run goes on.
        self.first_epoch = 0
        self.validation_cases = split.validation
        axes, variant = settings.axes, settings.variant
        train = cohort.slices(axes, variant=variant, cases=split.train, context=settings.context)
        validation = cohort.slices(axes, variant=variant, cases=split.validation, context=settings.context)
        tested = [cohort.record(case, variant) for case in split.test]
        _check_pixels(train.records, settings)
        self.size_hw = _size_that_holds([*train.records, *validation.records, *tested], settings)
        #: The size of the part of a slice that training sees; None where it sees the whole.
        self.crop_hw = _size_that_holds_labels(train.records, settings, self.size_hw)
        self._train = NetworkSlices(train, settings.pixel_mm, self.size_hw)
        self._validation = NetworkSlices(validation, settings.pixel_mm, self.size_hw)

    @property
    def labelled_slices(self) -> int:
        """How many training slices have labelled voxels."""
        return int(np.count_nonzero(self._train.slices.labelled_voxels))

    def train_dataloader(self) -> DataLoader[Item]:
        """Return an epoch's batches: labelled slices and a share of empty ones, shuffled."""
        sampler = EpochSampler(self._train.slices.labelled_voxels, self._settings.empty_share, self._settings.seed)
        # Worker processes ask for the first epoch's order before Lightning has said which epoch it is.
        sampler.set_epoch(self.first_epoch)
        # A last batch of one slice would leave batch normalisation nothing to average over.
        drop_last = len(sampler) > self._settings.batch_size
        return DataLoader(
            self._train, self._settings.batch_size, sampler=sampler, drop_last=drop_last, **self._common()
        )

    def val_dataloader(self) -> DataLoader[Item]:
        """Return every slice of the validation patients, in order."""
        return DataLoader(self._validation, 2 * self._settings.batch_size, **self._common())

    def _common(self) -> dict[str, Any]:
        return {
            "num_workers": self._workers,
            "persistent_workers": self._workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _check_pixels(records: Sequence[CaseRecord], settings: RunSettings) -> None:
    """Refuse a pixel size that leaves next to nothing of any patient's labelled region."""
    if settings.pixel_mm is None:
        return
    smallest = [min(r.labelled_extent_mm(a) for a in range(3) if a != axis) for r in records for axis in settings.axes]
    if 0 < max(smallest) < _FEWEST_PIXELS * settings.pixel_mm:
        raise RunError(
            f"pixel size {settings.pixel_mm} mm: leaves fewer than {_FEWEST_PIXELS} pixels across what is labelled, "
            f"at most {max(smallest):.0f} mm; choose a smaller --pixel-mm"
        )


def _size_that_holds(records: Sequence[CaseRecord], settings: RunSettings) -> tuple[int, int]:
    shapes = []
    for record in records:
        for axis in settings.axes:
            height, width = (size for a, size in enumerate(record.sliced_size_xyz) if a != axis)
            first, second = (mm for a, mm in enumerate(record.sliced_spacing_xyz_mm) if a != axis)
            shapes.append(network_shape((height, width), (first, second), settings.pixel_mm))
    return fixed_size(shapes)


def _size_that_holds_labels(
    records: Sequence[CaseRecord], settings: RunSettings, size_hw: tuple[int, int]
) -> tuple[int, int] | None:
    """Return the size of a crop that holds any training patient's labelled region and its margin."""
    if settings.crop_margin_mm is None:
        return None
    shapes = []
    for record in records:
        for axis in settings.axes:
            extents = [record.labelled_extent_mm(a) + 2 * settings.crop_margin_mm for a in range(3) if a != axis]
            pixels = [settings.pixel_mm or mm for a, mm in enumerate(record.sliced_spacing_xyz_mm) if a != axis]
            height, width = (math.ceil(extent / mm) for extent, mm in zip(extents, pixels, strict=True))
            shapes.append((height, width))
    height, width = (min(pair) for pair in zip(fixed_size(shapes), size_hw, strict=True))
    return height, width
