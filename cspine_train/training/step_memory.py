"""Memory that training takes, estimated on PyTorch's device ``meta``, whose tensors have shapes but no numbers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cspine_train.extensions import LOSSES


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
