"""Whether a network can take a run's steps, and in what memory: found out before anything is trained.

PyTorch has a device, ``meta``, whose tensors have shapes and no numbers. A network's shadow there takes a step of any
size in a fraction of a second and next to no memory, draws nothing at random, and fails where the network would.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import psutil
import torch
from distributed.system import MEMORY_LIMIT
from torch import nn

from cspine_train.data.sizes import Steps
from cspine_train.errors import RunError
from cspine_train.run.settings import RunSettings

_MIB = 1024**2
# PyTorch's words where batch normalisation has nothing to average over.
_ONE_VALUE = "Expected more than 1 value per channel"


@dataclass(frozen=True)
class Trial:
    """What became of a step.

    Attributes
    ----------
    failure : str
        Why the network cannot take it, in PyTorch's words; empty where it can.
    kept_bytes, largest_bytes : int
        What float32 arithmetic keeps for the way back, all of it and its largest tensor, but for the network's own.
        The steps of five networks took 1.06 to 1.27 times all of it.
    """

    failure: str
    kept_bytes: int
    largest_bytes: int


def check_steps(network: nn.Module, settings: RunSettings, steps: Steps) -> None:
    """Refuse a run whose network cannot take its steps, or whose steps do not go into memory.

    Parameters
    ----------
    network : Module
        On the CPU; it is left as it is, and so is the state of all random generators.
    settings : RunSettings
        What was asked.
    steps : Steps
        What is to be tried.

    Raises
    ------
    RunError
        If a step fails, or its lower bound of memory is more than what is free.
    """
    channels, batch = settings.channels, settings.batch_size
    # Before a shadow is made of them: no tensor may have as many elements as can be asked for.
    _check_memory(4 * (channels + 1) * batch * steps.read_hw[0] * steps.read_hw[1], batch, steps.read_hw)
    share = 0.5 if steps.half else 1.0
    slices = min(steps.fewest, 2)
    for size_hw in steps.train_hw:
        trial = _checked(network, settings, (slices, channels, *size_hw), training=True)
        _check_memory(share * trial.kept_bytes * batch / slices, batch, size_hw)
    trial = _checked(network, settings, (1, channels, *steps.validation_hw), training=False)
    _check_memory(share * trial.largest_bytes * 2 * batch, 2 * batch, steps.validation_hw)


def try_step(network: nn.Module, shape: tuple[int, int, int, int], *, training: bool) -> Trial:
    """Let a network's shadow take a step on images of a shape, (N, C, H, W), to train or to validate."""
    shadow = _shadow(network)
    own = {_address(tensor) for tensor in (*shadow.parameters(), *shadow.buffers())}
    # Held, so that no two are at one address.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        failure = _failure(shadow, torch.zeros(shape, device="meta"), training)
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in own]
    return Trial(failure, sum(sizes), max(sizes, default=0))


def _checked(network: nn.Module, settings: RunSettings, shape: tuple[int, int, int, int], *, training: bool) -> Trial:
    trial = try_step(network, shape, training=training)
    failure = trial.failure
    if failure and not failure.startswith(_ONE_VALUE):
        # What asks its tensors for numbers fails without them, and only then.
        with torch.random.fork_rng(devices=[]):
            failure = _failure(copy.deepcopy(network), torch.zeros(shape), training)
    if not failure:
        return trial
    named = f"{settings.model} with encoder {settings.encoder!r}: cannot {'train on' if training else 'see'}"
    size = _told(shape[2:])
    if failure.startswith(_ONE_VALUE):
        two = "--batch-size 2 or more" if settings.batch_size == 1 else "a larger --empty-share, for an epoch of two"
        raise RunError(
            f"{named} one slice of {size} at a time (its batch normalisation has one value left per channel); "
            f"choose {two}"
        )
    raise RunError(f"{named} slices of {size} ({failure}); choose another --size, --encoder or --model")


def _failure(network: nn.Module, images: torch.Tensor, training: bool) -> str:
    try:
        seen = network.train(training)(images)
        if training:
            seen.sum().backward()
    # Whatever a layer provokes with a shape that it was not made for.
    except Exception as error:  # noqa: BLE001
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _shadow(network: nn.Module) -> nn.Module:
    """Return a copy of a network on the device ``meta``, without its numbers ever being copied."""
    memo: dict[int, torch.Tensor] = {
        id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()
    }
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(network, memo)


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _check_memory(needed_bytes: float, slices: int, size_hw: tuple[int, int]) -> None:
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    if needed_bytes > free:
        raise RunError(
            f"size {_told(size_hw)}: a step on {slices} slices takes {_size(needed_bytes)} of memory or more, "
            f"of which {_size(free)} are free; choose a smaller --size or --batch-size, or a larger --pixel-mm"
        )


def _told(size_hw: tuple[int, ...]) -> str:
    return ",".join(map(str, size_hw))


def _size(number: float) -> str:
    mib = number / _MIB
    return f"{mib / 1024:.0f} GiB" if mib > 10240 else f"{mib:.0f} MiB"
