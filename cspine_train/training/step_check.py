"""Check before training that a network can take a run's steps, and that they fit into memory.

A copy of the network takes a step on PyTorch's device ``meta``, whose tensors have shapes but no numbers. It takes a
fraction of a second and little memory, and fails where the network would.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import psutil
import torch
from distributed.system import MEMORY_LIMIT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cspine_data import Cohort, Split
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sizes import ImageSizes
from cspine_train.errors import RunError, reason_of
from cspine_train.extensions import LOSSES
from cspine_train.models.build import sides_of
from cspine_train.run.settings import RunSettings
from cspine_train.training.allocator import release_free_blocks
from cspine_train.training.optimisers import precision_of

_GIB = 1024**3
_ONE_VALUE = "Expected more than 1 value per channel"
# Code and working memory of PyTorch's kernels for CPUs, which come with the first steps.
_KERNELS = 150 * 1024**2
# Memory of a step in 16 bits, as a share of that in 32 bits: 0.53 to 0.57 for three networks.
_HALF = 0.55
# Batches of a `BatchLoader` in memory: one in use, two read ahead.
_BATCHES = 3
# Tensors of Adam for each parameter.
_ADAM_STATES = 2
# More bytes than any machine has. Beyond them, PyTorch could not count the elements of a tensor.
_TOO_LARGE = 2.0**50
# Proposed settings need at most this share of the allowed memory, as free memory changes.
_PROPOSED_SHARE = 0.95
# The largest proposed pixel, as a multiple of the smallest.
_COARSEST = 20


@dataclass(frozen=True)
class StepCheck:
    """Checks the steps of runs that differ in batch size and image size only.

    Attributes
    ----------
    network : Module
        The network; it is not changed.
    cohort : Cohort
        The store.
    split : Split
        The cases of each part.
    values : tuple of int
        Label values of the network's classes, see `label_values`.
    devices : int
        Number of GPUs of each machine, or of processes where there are none.
    world : int
        Number of processes on all machines.
    limit_bytes : int or None
        Memory that the run may take; None: what is free.
    """

    network: nn.Module
    cohort: Cohort
    split: Split
    values: tuple[int, ...] = ()
    devices: int = 1
    world: int = 1
    limit_bytes: int | None = None
    _known: dict[Any, float] = field(default_factory=dict, init=False, repr=False)

    @property
    def _sharing(self) -> int:
        """Number of processes whose steps are in one memory: that of a GPU, or of a machine without GPUs."""
        return 1 if torch.cuda.is_available() else self.devices

    def data_of(self, settings: RunSettings) -> CohortSlices:
        """Return the data of a run; raises `RunError` as `CohortSlices` does."""
        return CohortSlices(self.cohort, self.split, settings, 0, sides_of(self.network), self.values, world=self.world)

    def allowed_bytes(self) -> float:
        """Return the memory that the run may take, with what its processes take already."""
        return self.free_bytes() if self.limit_bytes is None else self.limit_bytes

    def free_bytes(self) -> float:
        """Return the free memory of the GPU, or of this machine, with what the run's processes take already."""
        if torch.cuda.is_available():
            return float(torch.cuda.mem_get_info()[0])
        return float(min(psutil.virtual_memory().available + self._taken_bytes, MEMORY_LIMIT))

    def needed_bytes(self, settings: RunSettings, data: CohortSlices) -> float:
        """Return the peak memory of a run on a GPU, or on a machine without GPUs: training and validation.

        Raises `RunError` if the network fails on the images.
        """
        key = settings.batch_size, data.smallest_batch, data.sizes
        if key not in self._known:
            self._known[key] = self._needed_bytes(settings, data.sizes, data.smallest_batch)
        return self._known[key]

    def check(self, settings: RunSettings, data: CohortSlices) -> None:
        """Refuse, with a `RunError`, a run whose network fails on its images, or that does not fit into memory."""
        needed, allowed = self.needed_bytes(settings, data), self.allowed_bytes()
        if needed <= allowed:
            return
        if found := self.proposals(settings):
            remedy = f"choose {', or '.join(found)}"
        else:
            own = self._taken_bytes / _GIB
            alone = f" (the process alone takes {own:.1f} GiB)" if own else ""
            remedy = f"choose a smaller --size, --encoder or --model{alone}"
        raise RunError(
            f"size {_text(data.sizes.slice_hw)}: training on {data.smallest_batch} slices at a time takes about "
            f"{needed / _GIB:.1f} GiB of memory, and {allowed / _GIB:.1f} GiB are "
            f"{'free' if self.limit_bytes is None else 'allowed'}; {remedy}"
        )

    def proposals(self, settings: RunSettings) -> tuple[str, ...]:
        """Return the largest ``--batch-size`` and the smallest ``--pixel-mm``, each alone, with which a run fits."""
        batches = range(self.world, settings.batch_size, self.world)
        above = bisect_left(batches, True, key=lambda size: not self._fits(settings, batch_size=size))
        smallest = settings.pixel_mm or self._smallest_pixel_mm(settings)
        # In tenths of a millimetre.
        pixels = range(int(10 * smallest) + 1, int(10 * _COARSEST * smallest) + 1)
        enough = bisect_left(pixels, True, key=lambda tenths: self._fits(settings, pixel_mm=tenths / 10))
        found: list[dict[str, Any]] = [{"batch_size": batches[above - 1]}] if above else []
        found += [{"pixel_mm": pixels[enough] / 10}] if enough < len(pixels) else []
        return tuple(
            f"--{name.replace('_', '-')} {value:g}"
            for one in found
            if self._fits(settings, refused=False, **one)
            for name, value in one.items()
        )

    def _fits(self, settings: RunSettings, refused: bool = True, **changed: Any) -> bool:
        """Return whether a run fits into memory with other settings; `refused` if it is refused for another reason."""
        other = settings.model_copy(update=changed)
        try:
            needed = self.needed_bytes(other, self.data_of(other))
        except RunError:
            return refused
        return needed <= _PROPOSED_SHARE * self.allowed_bytes()

    def _smallest_pixel_mm(self, settings: RunSettings) -> float:
        records = (self.cohort.record(case, settings.variant) for case in self.split.train)
        return min(min(record.sliced_spacing_xyz_mm) for record in records)

    def _needed_bytes(self, settings: RunSettings, sizes: ImageSizes, slices: int) -> float:
        labels, channels = max(1, len(self.values)), settings.channels
        share = self._sharing / self.world
        # Validation batches have twice the slices.
        read, validated = slices * _pixels(sizes.slice_hw), 2 * slices * _pixels(sizes.validation_hw)
        batches = 4.0 * (channels + labels) * share * _BATCHES * max(read, validated)
        if batches > _TOO_LARGE:
            return batches
        meta = copy.deepcopy(self.network).to("meta")
        training = validation = 0
        for size_hw in sizes.trained_hw:
            with _refusal(settings, "train on", size_hw):
                shape = slices, channels, *size_hw
                training = max(training, training_bytes(meta.train(), shape, settings.loss, labels))
        with _refusal(settings, "predict", sizes.validation_hw):
            validation = validation_bytes(meta.eval(), (2 * slices, channels, *sizes.validation_hw))
        # Between training and validation, the heap of a CPU is in pieces too small for the other's tensors.
        steps = max(training, validation) if torch.cuda.is_available() else training + validation
        half = "bf16" in precision_of(settings.precision)
        weights = sum(parameter.nbytes for parameter in meta.parameters())
        copies = _ADAM_STATES + bool(settings.average) + torch.cuda.is_available()
        return self._taken_bytes + self._sharing * copies * weights + (_HALF if half else 1.0) * share * steps + batches

    @cached_property
    def _taken_bytes(self) -> float:
        """What the processes take already, or will take for PyTorch itself."""
        if torch.cuda.is_available():
            return 0
        # Steps before, as in a notebook or another plan, left memory that the next can use.
        release_free_blocks()
        return self._sharing * (float(psutil.Process().memory_info().rss) + _KERNELS)


@contextmanager
def _refusal(settings: RunSettings, verb: str, size_hw: tuple[int, int]) -> Iterator[None]:
    """Turn the error of a layer into one line."""
    try:
        yield
    # Layers raise all kinds of errors for sizes that they do not take.
    except Exception as error:  # noqa: BLE001
        reason = reason_of(error)
        named, size = f"{settings.model} with encoder {settings.encoder!r}: cannot {verb}", _text(size_hw)
        if reason.startswith(_ONE_VALUE):
            remedy = "--batch-size 2 or more" if settings.batch_size == 1 else "a larger --empty-share"
            raise RunError(
                f"{named} one slice of {size} at a time (its batch normalisation has one value per channel); "
                f"choose {remedy}"
            ) from None
        # A layer that needs its tensors' numbers cannot be checked.
        if "meta" not in reason:
            raise RunError(
                f"{named} slices of {size} ({reason}); choose another --size, --encoder or --model"
            ) from None


def _pixels(size_hw: tuple[int, int]) -> float:
    return float(size_hw[0]) * size_hw[1]


def _text(size_hw: tuple[int, int]) -> str:
    return ",".join(map(str, size_hw))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations create, as long as they live.

    Parameters
    ----------
    network : Module
        Its parameters and buffers are not counted.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The tensors are kept, so that their addresses stay theirs.
        self._own = [tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())]
        self._bytes = {_address(storage): 0 for storage in self._own}
        self._live = 0
        #: The largest number of bytes that lived at the same time.
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its results."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = _address(storage)
        if address not in self._bytes:
            self._bytes[address] = storage.nbytes()
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self._live -= self._bytes.pop(address)


def _address(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)


def training_bytes(meta: nn.Module, shape: tuple[int, int, int, int], loss: str, labels: int) -> int:
    """Return the peak memory of a float32 step: activations, loss and gradients, without the weights.

    Parameters
    ----------
    meta : Module
        A network on the device ``meta``, in training mode.
    shape : tuple of int
        Shape of the images, (N, C, H, W).
    loss : str
        A loss in the group ``cspine.losses``.
    labels : int
        Number of labels.
    """
    with LiveBytes(meta) as live:
        for parameter in meta.parameters():
            # Lightning keeps the gradients of a step until the next backward pass.
            parameter.grad = torch.empty_like(parameter)
        logits = meta(torch.zeros(shape, device="meta"))
        shares = torch.zeros((shape[0], labels, *shape[2:]), device="meta")
        value = _loss(loss, logits, shares)
        del logits, shares
        meta.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
    meta.zero_grad()
    return int(live.peak)


def _loss(name: str, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    try:
        value: torch.Tensor = LOSSES.load(name)(logits, shares, None)
    # A plug-in's loss may need numbers, which are not there.
    except Exception:  # noqa: BLE001
        return logits.sum()
    return value


def validation_bytes(meta: nn.Module, shape: tuple[int, int, int, int]) -> int:
    """Return the peak memory of a float32 forward pass without gradients; `meta` is in evaluation mode."""
    with torch.no_grad(), LiveBytes(meta) as live:
        meta(torch.zeros(shape, device="meta"))
    return int(live.peak)
