"""How processes share every batch so that together they learn and count as one process would.

Each reads and computes an equal part of a batch. Where the whole batch matters, in the loss and in batch normalisation,
they tell each other what they have found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, Sampler

from cspine_train.errors import RunError


@dataclass(frozen=True)
class Share:
    """The part of one of several processes.

    Attributes
    ----------
    rank, world : int
        Which process, from 0, of how many.
    """

    rank: int = 0
    world: int = 1

    def of(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return this process' items: those of all, one after the other, are all items once."""
        first, last = (len(items) * rank // self.world for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def check(self, step: int, slices: int) -> None:
        """Refuse what processes cannot share.

        Parameters
        ----------
        step : int
            Slices of a training step.
        slices : int
            Slices to validate on.

        Raises
        ------
        RunError
            If a step's slices cannot be divided evenly, or a process had nothing to validate on.
        """
        if step % self.world:
            raise RunError(
                f"a step's {step} slices cannot be divided evenly among {self.world} processes; choose a --batch-size "
                "that can"
            )
        if slices < self.world:
            raise RunError(f"{slices} validation slices are too few for {self.world} processes; choose fewer --devices")


#: Of a process that is alone.
WHOLE = Share()


class SharedBatches(BatchSampler):
    """The share of one process in each batch of all.

    Parameters
    ----------
    sampler : Sampler
        The slices of an epoch, in an order that is the same in every process.
    batch_size : int
        Slices of a whole batch.
    drop_last : bool
        Whether to leave out a last batch that is smaller.
    share : Share
        Whose share.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, share: Share) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._share = share

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self._share.of(batch)) for batch in super().__iter__())


def processes() -> int:
    """Return how many processes train together; 1 where none but this does."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def this_share() -> Share:
    """Return the share of this process."""
    return Share(distributed.get_rank(), processes()) if processes() > 1 else WHOLE


def sum_over_processes(counts: torch.Tensor) -> torch.Tensor:
    """Return the sum of what every process has counted, the same in all."""
    if processes() == 1:
        return counts
    total = counts.clone()
    distributed.all_reduce(total)
    return total


def whole_batch(share: torch.Tensor) -> torch.Tensor:
    """Return a batch's tensor, (N, ...), from the shares of all processes, (n, ...), in the order of the batch.

    A loss of it is the same in every process; its gradient is of this process' share. As gradients are averaged over
    processes, the loss has to be multiplied by `processes` before it is differentiated.
    """
    if processes() == 1:
        return share
    parts = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(processes())]
    distributed.all_gather(parts, share.detach().contiguous())
    parts[distributed.get_rank()] = share
    return torch.cat(parts)


def see_whole_batches(network: nn.Module) -> None:
    """Let a network's layers that see a batch see the whole of it, not a share.

    Batch normalisation takes mean and variance over it: PyTorch's own way knows GPUs only, and drops the activations
    that timm's layers apply. Dropout draws for it, and takes the share of what is drawn.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = partial(_normalised, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Dropout | nn.Dropout2d):
            module.forward = partial(_dropped, module)  # type: ignore[method-assign]


def _dropped(module: Any, images: torch.Tensor) -> Any:
    if not module.training or processes() == 1 or not module.p:
        return type(module).forward(module, images)
    like = images[:, :, :1, :1].contiguous() if isinstance(module, nn.Dropout2d) else images
    order = torch.channels_last if like.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    shape = (processes() * len(like), *like.shape[1:])
    drawn = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order).bernoulli_(1 - module.p)
    kept = drawn.view(processes(), *like.shape)[distributed.get_rank()]
    return images * (kept / max(1 - module.p, 1e-12))


def _normalised(module: Any, images: torch.Tensor) -> Any:
    if not module.training or processes() == 1:
        return type(module).forward(module, images)
    mean, variance, count = _moments(images.detach())
    if module.track_running_stats:
        module.num_batches_tracked.add_(1)
        momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        module.running_mean.lerp_(mean, momentum)
        module.running_var.lerp_(variance * (count / (count - 1)), momentum)
    weight = torch.ones_like(mean) if module.weight is None else module.weight
    bias = torch.zeros_like(mean) if module.bias is None else module.bias
    images = _ByGiven.apply(images, weight, bias, mean, variance, module.eps)
    # A layer of timm's goes on with these.
    for name in ("drop", "act"):
        images = getattr(module, name, nn.Identity())(images)
    return images


def _moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the mean and variance of each channel over the batch, and over how many numbers each was taken."""
    others = [dim for dim in range(images.ndim) if dim != 1]
    variance, mean = torch.var_mean(images.float(), others, correction=0)
    all_found = [torch.empty(2, len(mean), device=images.device) for _ in range(processes())]
    distributed.all_gather(all_found, torch.stack([mean, variance]))
    means, variances = torch.stack(all_found, 1)
    mean = means.mean(0)
    # Shares are of one size. (Chan, Golub and LeVeque, Am. Stat. 37, 1983)
    return mean, (variances + (means - mean) ** 2).mean(0), processes() * images.numel() // len(mean)


class _ByGiven(torch.autograd.Function):
    """Batch normalisation by mean and variance of a batch, of which each process has an equal share."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight, mean, variance)
        ctx.eps = eps
        return functional.batch_norm(images, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        images, weight, mean, variance = ctx.saved_tensors
        # As if mean and variance were constants; PyTorch has it in one pass over the images.
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, images, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight, of_bias]).float()
        distributed.all_reduce(sums)
        along, shift = sums * len(mean) / (processes() * images.numel())
        scale = torch.rsqrt(variance + ctx.eps)
        slope = weight * scale * scale * along
        offset = weight * scale * shift - slope * mean
        shape = (1, -1, *[1] * (images.ndim - 2))
        through = direct.float() - slope.view(shape) * images.float() - offset.view(shape)
        return through.to(images.dtype), of_weight, of_bias, None, None, None
