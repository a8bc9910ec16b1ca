"""Batches of slices, read ahead of the network.

A batch is decoded directly into its tensors, without a tensor for each slice. A thread reads ahead, so that batches
need not pass between processes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cspine_data import IGNORE_INDEX, CspineDataError, SliceDataset
from cspine_train.data.sizes import network_shape
from cspine_train.data.transforms import masks_to_network, shares_of, to_network
from cspine_train.run.label_classes import class_numbers


class Batch(NamedTuple):
    """Slices as they are copied to the network's device.

    Attributes
    ----------
    images : Tensor
        (N, C, H, W): int16 as stored, or float32 if slices were resampled or cropped.
    scales : Tensor
        float32 (N,): factor from `images` to normalised intensities.
    masks : Tensor
        uint8 (N, 1, H, W): class numbers, 0 for no label. If slices were resampled or cropped, float32 (N, K, H, W):
        shares of labels. See `shares_of`; binary labels are one label.
    numbers : Tensor
        int64 (N,): index of each slice's case in `SliceDataset.cases`.
    axes : Tensor
        int64 (N,): axis of each slice.
    shapes_hw : Tensor
        int64 (N, 2): height and width of each slice at the network's pixel size, before padding or cropping.
    """

    images: torch.Tensor
    scales: torch.Tensor
    masks: torch.Tensor
    numbers: torch.Tensor
    axes: torch.Tensor
    shapes_hw: torch.Tensor

    def intensities(self) -> torch.Tensor:
        """Return the images as normalised intensities, float32."""
        return self.images.float() * self.scales.view(-1, 1, 1, 1)

    def shares(self, labels: int, ignores: bool = False) -> torch.Tensor:
        """Return the share of each pixel that has each label, see `shares_of`."""
        # Only one byte per pixel was copied to the device, however many labels there are.
        return shares_of(self.masks, labels, ignores) if self.masks.dtype == torch.uint8 else self.masks


# Batches read, or being read, while another is used.
_AHEAD = 2


class SliceBatches(Dataset[Batch]):
    """Reads slices for `BatchLoader`, a batch at a time.

    Memory is pinned if there is a GPU, and shared in a worker process.

    Parameters
    ----------
    slices : SliceDataset
        With ``labels="binary"``, or ``"stored"``.
    pixel_mm : float or None
        Pixel size to resample to; None keeps that of each slice.
    size_hw : tuple of int
        Size of every image.
    values : sequence of int
        Label values of the classes, for stored labels; see `class_numbers`.
    ignores : bool
        Whether voxels of the run may be ignored, see `shares_of`.
    """

    def __init__(
        self,
        slices: SliceDataset,
        pixel_mm: float | None,
        size_hw: tuple[int, int],
        values: Sequence[int] = (),
        ignores: bool = False,
    ) -> None:
        self.slices = slices
        self._values = tuple(values)
        self._labels = max(1, len(values))
        self._ignores = ignores
        self._pixel_mm = pixel_mm
        self._size_hw = size_hw
        cropped = any(height > size_hw[0] or width > size_hw[1] for height, width in slices.shapes_hw)
        self._as_stored = pixel_mm is None and not cropped

    def __len__(self) -> int:
        return len(self.slices)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return a batch; in a worker process, return an error instead of raising it.

        PyTorch would add the worker's traceback to the message.
        """
        try:
            return self._batch(items)
        except (CspineDataError, OSError) as error:
            if get_worker_info() is None:
                raise
            return error  # type: ignore[return-value]

    def _batch(self, items: Sequence[int]) -> Batch:
        channels = 2 * self.slices.context + 1
        image_dtype, mask_dtype = (torch.int16, torch.uint8) if self._as_stored else (torch.float32, torch.float32)
        images = _empty((len(items), channels, *self._size_hw), image_dtype)
        masks = _empty((len(items), 1 if self._as_stored else self._labels + self._ignores, *self._size_hw), mask_dtype)
        if self._as_stored:
            self._read(items, images.numpy(), masks.numpy())
            scales = torch.from_numpy(self.slices.scales(items))
        else:
            self._fit_into(items, images, masks)
            scales = torch.ones(len(items))
        numbers = torch.tensor([self.slices.case_number(item) for item in items])
        axes = torch.tensor([self.slices.place(item).axis for item in items])
        shapes = [
            network_shape(self.slices.shape(item), self.slices.spacing_mm(item), self._pixel_mm) for item in items
        ]
        return Batch(images, scales, masks, numbers, axes, torch.tensor(shapes))

    def _fit_into(self, items: Sequence[int], images: torch.Tensor, masks: torch.Tensor) -> None:
        alike: dict[Any, list[int]] = {}
        for number, item in enumerate(items):
            alike.setdefault((self.slices.shape(item), self.slices.spacing_mm(item)), []).append(number)
        for (shape_hw, spacing_mm), numbers in alike.items():
            stored = np.empty((len(numbers), images.shape[1], *shape_hw), np.float32)
            labels = np.empty((len(numbers), 1, *shape_hw), np.uint8)
            self._read([items[number] for number in numbers], stored, labels)
            seen = to_network(stored.reshape(-1, *shape_hw), spacing_mm, self._pixel_mm, self._size_hw)
            images[numbers] = seen.view(len(numbers), -1, *self._size_hw)
            masks[numbers] = masks_to_network(
                labels[:, 0], spacing_mm, self._pixel_mm, self._size_hw, self._labels, self._ignores
            )

    def _read(self, items: Sequence[int], images: NDArray[Any], masks: NDArray[np.uint8]) -> None:
        """Read images and class numbers."""
        if self.slices.labels == "binary":
            self.slices.read_into(items, images, masks)
            return
        # Wide enough for the label values of every case.
        stored = np.empty(masks.shape, np.int64)
        self.slices.read_into(items, images, stored)
        masks[...] = class_numbers(stored, self._values)
        for item, mask, values in zip(items, masks, stored, strict=True):
            for ignored in self.slices.ignored_values(item):
                mask[values == ignored] = IGNORE_INDEX


class BatchLoader(DataLoader[Batch]):
    """Reads batches ahead, in a thread or in worker processes.

    Attributes
    ----------
    waited_s : float
        Time spent waiting for batches, since it was last set to 0.
    """

    def __init__(self, dataset: SliceBatches, batch_size: int = 1, **options: Any) -> None:
        workers = options.pop("num_workers", 0)
        super().__init__(
            dataset,
            batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            # Batches of this process are pinned when they are made.
            pin_memory=workers > 0 and torch.cuda.is_available(),
            collate_fn=_uncollated,
            **options,
        )
        self.waited_s = 0.0

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return self._timed(batches if self.num_workers else _read_ahead(batches))

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - started
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch


def _read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, "cspine-read-ahead") as reader:
        coming = deque(reader.submit(next, batches, None) for _ in range(_AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(reader.submit(next, batches, None))
            yield batch


def _uncollated(batch: Any) -> Any:
    return batch


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate memory to decode into: pinned if there is a GPU, and shared in a worker process."""
    in_worker = get_worker_info() is not None
    memory = torch.empty(shape, dtype=dtype, pin_memory=not in_worker and torch.cuda.is_available())
    if in_worker:
        memory.share_memory_()  # type: ignore[no-untyped-call]
    return memory
