"""Conversion of slices to network input, and of network output to slices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cspine_data import IGNORE_INDEX
from cspine_train.data.sizes import coarser_shape, network_shape


def resample(images: torch.Tensor, shape_hw: tuple[int, int]) -> torch.Tensor:
    """Resample images (N, C, h, w) to another size: bilinear, with averaging if it is smaller."""
    if tuple(images.shape[-2:]) == shape_hw:
        return images
    smaller = shape_hw[0] < images.shape[-2] or shape_hw[1] < images.shape[-1]
    return functional.interpolate(images, size=shape_hw, mode="bilinear", align_corners=False, antialias=smaller)


def fit(images: torch.Tensor, size_hw: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """Pad or crop each side of images to a size, about their centre.

    The same call with the images' own size undoes it: padding is cropped, and what was cropped is padded.

    Parameters
    ----------
    images : Tensor
        (..., h, w).
    size_hw : tuple of int
        The new size.
    values : Tensor
        (..., 1, 1): value that each image is padded with.
    """
    fitted = values.expand(*images.shape[:-2], *size_hw).clone()
    height, width = (min(pair) for pair in zip(images.shape[-2:], size_hw, strict=True))
    _middle(fitted, height, width).copy_(_middle(images, height, width))
    return fitted


def _middle(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def inside(shapes_hw: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Return which pixels of images are not padding of `fit`, bool (N, 1, H, W).

    `shapes_hw`, int64 (N, 2), are the sizes before `fit`, and `size_hw` is the size after it.
    """
    sizes = torch.tensor(size_hw, device=shapes_hw.device)
    own = torch.minimum(shapes_hw, sizes)
    return rectangles((sizes - own) // 2, own, size_hw)


def rectangles(first: torch.Tensor, sides: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Return which pixels are in a rectangle, one for each image, bool (N, 1, H, W).

    `first` and `sides`, (N, 2), are the first row and column of each rectangle, and the number of its rows and columns.
    """
    rows, columns = (
        (pixels >= first[:, axis, None]) & (pixels < (first + sides)[:, axis, None])
        for axis, pixels in enumerate(torch.arange(size, device=first.device) for size in size_hw)
    )
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def to_network(
    slices: NDArray[np.float32],
    spacing_mm: tuple[float, float],
    pixel_mm: float | None,
    size_hw: tuple[int, int],
) -> torch.Tensor:
    """Convert slices of one size, (N, h, w), to network input, (N, 1, H, W): resample them, then pad or crop.

    Padding has each slice's darkest value, as outside the image is air. Training, evaluation and prediction all use
    this function.
    """
    images = torch.from_numpy(np.ascontiguousarray(slices)).unsqueeze(1)
    images = resample(images, network_shape((slices.shape[1], slices.shape[2]), spacing_mm, pixel_mm))
    return fit(images, size_hw, images.amin((-2, -1), keepdim=True))


def with_context(images: torch.Tensor, context: int, start: int, stop: int) -> torch.Tensor:
    """Return slices ``start`` to ``stop`` of a volume with their neighbours as channels, as `SliceDataset` does.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W): all slices of the volume, in order.
    context : int
        Neighbours on each side.
    start, stop : int
        Range of slices.

    Returns
    -------
    Tensor
        (stop - start, 2 `context` + 1, H, W).
    """
    around = torch.arange(start, stop)[:, None] + torch.arange(-context, context + 1)
    return images[around.clamp(0, len(images) - 1), 0]


def shares_of(numbers: torch.Tensor, labels: int, ignores: bool = False) -> torch.Tensor:
    """Convert class numbers to the share of each pixel that has each label, float32 (N, K, H, W).

    Parameters
    ----------
    numbers : Tensor
        uint8 (N, 1, H, W): 0 for no label, `IGNORE_INDEX` for an ignored pixel.
    labels : int
        Number of labels.
    ignores : bool
        Whether pixels may be ignored: K is then `labels` + 1, and the last channel is the ignored share.
    """
    if labels == 1 and not ignores:
        return numbers.float()
    classes = torch.arange(1, labels + 1 + ignores, device=numbers.device)
    if ignores:
        classes[-1] = IGNORE_INDEX
    return (numbers == classes.view(1, -1, 1, 1)).float()


def masks_to_network(
    masks: NDArray[np.uint8],
    spacing_mm: tuple[float, float],
    pixel_mm: float | None,
    size_hw: tuple[int, int],
    labels: int = 1,
    ignores: bool = False,
) -> torch.Tensor:
    """Convert class numbers (N, h, w) to shares of labels on the network's grid, (N, K, H, W), see `shares_of`.

    Shares keep the position of a border within a pixel: label maps resampled to 2 mm and back have Dice 0.99, and 0.96
    if thresholded in between (spine14).
    """
    shares = shares_of(torch.from_numpy(masks)[:, None], labels, ignores)
    shape_hw = network_shape((masks.shape[1], masks.shape[2]), spacing_mm, pixel_mm)
    return fit(resample(shares, shape_hw), size_hw, torch.zeros(1, 1, 1, 1))


def from_network(
    logits: torch.Tensor, shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> NDArray[np.float32]:
    """Convert logits to the probability of each label on the slices' own grid, float32 (N, K, h, w).

    Logits are (N, 1, H, W), or (N, 1 + K, H, W) with the background first. Probabilities are interpolated instead of
    logits, as they are linear in the labelled share of a pixel. They are 0 where the network saw nothing.
    """
    logits = logits.float()
    shares = torch.sigmoid(logits) if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
    unseen = torch.zeros((1, 1, 1, 1), device=logits.device)
    shares = fit(shares, network_shape(shape_hw, spacing_mm, pixel_mm), unseen)
    shares = functional.interpolate(shares, size=shape_hw, mode="bilinear", align_corners=False)
    return np.asarray(shares.cpu().numpy())


def coarser(images: torch.Tensor, masks: torch.Tensor, size_hw: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample a batch, (N, C, H, W) and (N, K, H, W), to pixels larger by `COARSER`, and pad it to a size."""
    shape_hw = coarser_shape((images.shape[-2], images.shape[-1]))
    images, masks = resample(images, shape_hw), resample(masks, shape_hw)
    return fit(images, size_hw, images.amin((-2, -1), keepdim=True)), fit(masks, size_hw, masks.new_zeros(1, 1, 1, 1))
