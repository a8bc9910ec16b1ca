"""Check before training that a network can take a run's steps, and that they fit into memory.

A copy of the network takes a step on PyTorch's device ``meta``, whose tensors have shapes but no numbers. It takes a
fraction of a second and little memory, and fails where the network would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from distributed.system import MEMORY_LIMIT
from torch import nn

from cspine_train.data.sizes import ImageSizes
from cspine_train.errors import RunError, reason_of
from cspine_train.run.settings import RunSettings

_GIB = 1024**3
_ONE_VALUE = "Expected more than 1 value per channel"


def check_steps(network: nn.Module, settings: RunSettings, sizes: ImageSizes, smallest_batch: int, half: bool) -> None:
    """Refuse, with a `RunError`, a run whose network fails on its images, or whose steps do not fit into memory.

    Parameters
    ----------
    network : Module
        The network; it is not changed.
    settings : RunSettings
        Channels and batch size, and names for messages.
    sizes : ImageSizes
        Sizes of its images.
    smallest_batch : int
        Slices in the smallest training batch.
    half : bool
        Whether the step computes in 16 bits.
    """
    channels, batch = settings.channels, settings.batch_size
    # Before the step: a user can ask for more elements than a tensor may have.
    _check_memory(4.0 * (channels + 1) * batch * sizes.slice_hw[0] * sizes.slice_hw[1], batch, sizes.slice_hw)
    meta = copy.deepcopy(network).to("meta")
    slices = min(smallest_batch, 2)
    for size_hw in sizes.trained_hw:
        saved = 0
        with _refusal(settings, "train on", size_hw):
            saved = saved_bytes(meta.train(), (slices, channels, *size_hw))
        _check_memory((0.5 if half else 1.0) * saved * batch / slices, batch, size_hw)
    with _refusal(settings, "predict", sizes.validation_hw):
        meta.eval()(torch.zeros((1, channels, *sizes.validation_hw), device="meta"))


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


def saved_bytes(meta: nn.Module, shape: tuple[int, int, int, int]) -> int:
    """Return the bytes that a float32 step saves for the backward pass, a lower bound of its memory.

    The network is on the device ``meta``; `shape` is that of its images, (N, C, H, W).
    """
    own = {_address(tensor) for tensor in (*meta.parameters(), *meta.buffers())}
    # Storages are kept alive, so that their addresses stay different.
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        meta(torch.zeros(shape, device="meta")).sum().backward()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _check_memory(needed_bytes: float, slices: int, size_hw: tuple[int, int]) -> None:
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else min(psutil.virtual_memory().available, MEMORY_LIMIT)
    if needed_bytes > free:
        raise RunError(
            f"size {_text(size_hw)}: a step on {slices} slices takes at least {needed_bytes / _GIB:.1f} GiB of memory, "
            f"and {free / _GIB:.1f} GiB are free; choose a smaller --size or --batch-size, or a larger --pixel-mm"
        )


def _text(size_hw: tuple[int, int]) -> str:
    return ",".join(map(str, size_hw))
