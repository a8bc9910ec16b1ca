"""What libraries of medical imaging make of slices: nnU-Net's Blosc2 files, MONAI's datasets, TorchIO's queue."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from layouts import KINDS, STRIDE, Layout, put, volumes_of
from numpy.typing import NDArray

from cspine_data import CaseRecord

_L1_BYTES, _L3_BYTES, _SAFETY = 32768, 1441792, 0.8
# What a planner leaves of a volume for a 3-D network.
_PATCH_VOXELS = 128**3


def blosc2_shapes(size: Sequence[int], patch: Sequence[int], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the chunks and blocks that nnU-Net v2 would choose.

    A block begins as the patch, each side up to a power of two, and is halved along the axis where it is largest
    against the patch until the L1 cache holds it. A chunk is as many blocks as the core's share of the L3 cache holds,
    added where there are fewest, and on average at most one and a half patches long.
    """
    block = [2 ** math.ceil(math.log2(n)) for n in patch]
    while math.prod(block) * itemsize > _L1_BYTES * _SAFETY:
        axis = max((a for a, n in enumerate(block) if n > 1), key=lambda a: block[a] / patch[a])
        block[axis] = min(2 ** math.floor(math.log2(block[axis] - 1)), size[axis])
    block = [min(pair) for pair in zip(block, size, strict=True)]
    chunk = list(block)
    while math.prod(chunk) * itemsize < _L3_BYTES * _SAFETY:
        growing = [a for a, n in enumerate(chunk) if n < size[a] and patch[a] > 1]
        if not growing:
            break
        axis = min(growing, key=lambda a: chunk[a] / block[a])
        before, chunk[axis] = chunk[axis], min(chunk[axis] + block[axis], size[axis])
        if np.mean(np.divide(chunk, patch)) > 1.5:
            chunk[axis] = before
            break
    return tuple(chunk), tuple(block)


class Blosc2Planar(Layout):
    """Blosc2 as nnU-Net v2 lays it out for a 2-D network: slices first, a file an axis."""

    name = "Blosc2 nnU-Net 2-D"

    @staticmethod
    def patch(shape: Sequence[int]) -> tuple[int, ...]:
        """Return the patch that the network would be given."""
        return (1, *(math.ceil(n / STRIDE) * STRIDE for n in shape[1:]))

    @classmethod
    def write_slices(cls, folder: Path, name: str, slices: NDArray[Any]) -> None:
        import blosc2

        blosc2.set_nthreads(1)
        chunks, blocks = blosc2_shapes(slices.shape, cls.patch(slices.shape), slices.itemsize)
        settings = {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1}
        path = str(folder / f"{name}.b2nd")
        blosc2.asarray(slices, urlpath=path, chunks=chunks, blocks=blocks, cparams=settings)

    def file(self, number: int, kind: str) -> str:
        return f"{super().file(number, kind)}.b2nd"

    def read(self, number: int, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        # nnU-Net opens a case's files each time that it draws from it.
        image, label = (self._open_file(number, kind)[self.where(position)] for kind in KINDS)
        return image, label

    def where(self, position: int) -> Any:
        """Return the index of a slice."""
        return position

    def _open_file(self, number: int, kind: str) -> Any:
        import blosc2

        blosc2.set_nthreads(1)
        path = str(self.folder / self.file(number, kind))
        return blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})


class Blosc2Volumes(Blosc2Planar):
    """Blosc2 as nnU-Net v2 lays it out for a 3-D network: whole volumes, one file for all axes."""

    name = "Blosc2 nnU-Net 3-D"

    @staticmethod
    def patch(shape: Sequence[int]) -> tuple[int, ...]:
        share = min(1.0, (_PATCH_VOXELS / math.prod(shape)) ** (1 / 3))
        return tuple(max(16, round(n * share / 16) * 16) for n in shape)

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        for kind, volume in zip(KINDS, (levels_xyz, label_xyz), strict=True):
            cls.write_slices(folder, f"{record.case}-{kind}", volume)

    def file(self, number: int, kind: str) -> str:
        return f"{self.records[number].case}-{kind}.b2nd"

    def where(self, position: int) -> Any:
        return (slice(None),) * self.axis + (position,)


class MonaiPersistent(Layout):
    """MONAI's PersistentDataset, a slice an item: a file each, levels and label map in it."""

    name = "MONAI PersistentDataset"

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        volumes = {record.case: (levels_xyz, label_xyz)}
        for axis in range(3):
            dataset = cls.dataset(folder, [record], axis, volumes)
            for item in range(len(dataset)):
                dataset[item]

    @staticmethod
    def items(records: Sequence[CaseRecord], axis: int) -> list[dict[str, Any]]:
        """Return what the library is told of each slice."""
        return [
            {"case": record.case, "axis": axis, "position": position}
            for record in records
            for position in range(record.sliced_size_xyz[axis])
        ]

    @classmethod
    def dataset(cls, folder: Path, records: Sequence[CaseRecord], axis: int, volumes: Any) -> Any:
        """Return the library's dataset; `volumes` is what it fills its cache from."""
        from monai.data import PersistentDataset

        return PersistentDataset(cls.items(records, axis), _transform(volumes), cache_dir=folder)

    def __init__(self, store: Path, folder: Path, axis: int) -> None:
        super().__init__(store, folder, axis)
        self._dataset = self.dataset(folder, self.records, axis, self.volumes())

    def volumes(self) -> Any:
        """Return the arrays that the cache is to be filled from when it is opened."""
        return {}

    def read(self, number: int, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        item = self._dataset[self.first[number] + position]
        return np.asarray(item["image"]), np.asarray(item["label"])

    def paths(self, number: int, position: int) -> list[Path]:
        item = self._dataset.data[self.first[number] + position]
        return [self.folder / f"{self._dataset.hash_func(item).decode()}.pt"]


class MonaiCache(MonaiPersistent):
    """MONAI's CacheDataset, a slice an item: all of an axis in memory, no files."""

    name = "MONAI CacheDataset"

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        for axis in range(3):
            cls.dataset(folder, [record], axis, {record.case: (levels_xyz, label_xyz)})

    @classmethod
    def dataset(cls, folder: Path, records: Sequence[CaseRecord], axis: int, volumes: Any) -> Any:
        from monai.data import CacheDataset

        return CacheDataset(cls.items(records, axis), _transform(volumes), progress=False)

    def volumes(self) -> Any:
        return CaseByCase(self.store, self.records)

    def paths(self, number: int, position: int) -> list[Path]:
        return []


class CaseByCase:
    """A store's arrays by case, in memory one at a time: those that a cache was filled from are not its memory."""

    def __init__(self, store: Path, records: Sequence[CaseRecord]) -> None:
        self._store = store
        self._records = {record.case: record for record in records}
        self._held: tuple[str, Any] = ("", None)

    def __getitem__(self, case: str) -> tuple[NDArray[np.int16], NDArray[Any]]:
        if self._held[0] != case:
            self._held = ("", None)
            self._held = (case, volumes_of(self._store, self._records[case]))
        return self._held[1]


def _transform(volumes: Any) -> Any:
    """Return a transform of the library that cuts a slice out of volumes in memory."""
    from monai.transforms import Compose, Lambda

    def cut(item: dict[str, Any]) -> dict[str, NDArray[Any]]:
        axis, position = item["axis"], item["position"]
        planes = (np.take(volume, position, axis) for volume in volumes[item["case"]])
        return dict(zip(KINDS, map(np.ascontiguousarray, planes), strict=True))

    return Compose([Lambda(cut)])


class TorchioQueue(Layout):
    """TorchIO's SubjectsDataset and Queue: volumes as NIfTI files, patches one slice thick, drawn at random.

    As many slices as the others' epoch has, but the queue chooses them and their order, and it reads each volume once.
    Its workers read volumes; patches are cut in the main process.
    """

    name = "TorchIO Queue"
    by_slice = False

    @classmethod
    def write(cls, folder: Path, record: CaseRecord, levels_xyz: NDArray[np.int16], label_xyz: NDArray[Any]) -> None:
        import SimpleITK as sitk

        for kind, volume in zip(KINDS, (levels_xyz, label_xyz), strict=True):
            sitk.WriteImage(
                sitk.GetImageFromArray(volume.transpose(2, 1, 0)), str(folder / f"{record.case}-{kind}.nii")
            )

    def paths(self, number: int, position: int) -> list[Path]:
        return [self.folder / f"{self.records[number].case}-{kind}.nii" for kind in KINDS]

    def loader(self, slices: int, workers: int, batch_size: int) -> Iterator[Any]:
        """Return batches: images, masks, and which items they are."""
        import torchio
        from torch.utils.data import DataLoader

        shares = np.diff(np.linspace(0, slices, len(self.records) + 1).round()).astype(int).tolist()
        subjects = [self._subject(number, share) for number, share in enumerate(shares)]
        dataset = torchio.SubjectsDataset(subjects)
        queue = torchio.Queue(dataset, 300, max(shares), _one_slice_sampler(self.axis), num_workers=workers)
        return iter(DataLoader(queue, batch_size, collate_fn=self._batch))

    def _subject(self, number: int, share: int) -> Any:
        import torchio

        image, label = self.paths(number, 0)
        scan, labels = torchio.ScalarImage(image), torchio.LabelMap(label)
        return torchio.Subject(image=scan, label=labels, number=number, num_samples=share)

    def _batch(self, patches: Sequence[Any]) -> Any:
        import torch
        import torchio

        images = torch.from_numpy(np.empty((len(patches), 1, *self.size_hw), self.image_dtype))
        masks = torch.empty((len(patches), 1, *self.size_hw), dtype=torch.uint8)
        items = []
        for patch, image, mask in zip(patches, images.numpy(), masks.numpy(), strict=True):
            values, label = (patch[kind].data[0].numpy().squeeze(self.axis) for kind in KINDS)
            put(values, label, self.levels(patch["number"]), image[0], mask[0])
            items.append(self.first[patch["number"]] + int(patch[torchio.LOCATION][self.axis]))
        return images, masks, items


def _one_slice_sampler(axis: int) -> Any:
    """Return what draws whole slices of a volume at random, as the library's own UniformSampler draws patches."""
    import torch
    import torchio

    class OneSlice(torchio.data.PatchSampler):
        def _generate_patches(self, subject: Any, num_patches: int | None = None) -> Iterator[Any]:
            size = list(subject.spatial_shape)
            slices, size[axis] = size[axis], 1
            while True:
                start = [0, 0, 0]
                start[axis] = int(torch.randint(slices, (1,)).item())
                yield self.crop(subject, tuple(start), tuple(size))

    return OneSlice(1)
