"""Slices as network input, and network output as slices: pixel size, margins, context and shares of labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cspine_data import IGNORE_INDEX
from cspine_train.data.sizes import Sides, coarser_shape, fixed_size, network_shape


def resample(images: torch.Tensor, shape_hw: tuple[int, int]) -> torch.Tensor:
    """Resample images (N, C, h, w) to another size, bilinear, averaged where that is smaller."""
    if tuple(images.shape[-2:]) == shape_hw:
        return images
    smaller = shape_hw[0] < images.shape[-2] or shape_hw[1] < images.shape[-1]
    return functional.interpolate(images, size=shape_hw, mode="bilinear", align_corners=False, antialias=smaller)


def fit(images: torch.Tensor, size_hw: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """Bring images (..., h, w) to a size about their centre: padded, or cropped, along each side.

    Undone by the same call with the images' own size: what was padded is cut off, and what was cut off is padded.

    Parameters
    ----------
    images : Tensor
        (..., h, w).
    size_hw : tuple of int
        The size wanted.
    values : Tensor
        (..., 1, 1): what each image is padded with.
    """
    fitted = values.expand(*images.shape[:-2], *size_hw).clone()
    height, width = (min(pair) for pair in zip(images.shape[-2:], size_hw, strict=True))
    _middle(fitted, height, width).copy_(_middle(images, height, width))
    return fitted


def _middle(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def inside(shapes_hw: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Return which pixels of images that `fit` has brought to a size are not margin.

    Parameters
    ----------
    shapes_hw : Tensor
        int64 (N, 2): the sizes that they had.
    size_hw : tuple of int
        The size that they have.

    Returns
    -------
    Tensor
        bool (N, 1, H, W).
    """
    sizes = torch.tensor(size_hw, device=shapes_hw.device)
    own = torch.minimum(shapes_hw, sizes)
    return rectangles((sizes - own) // 2, own, size_hw)


def rectangles(first: torch.Tensor, sides: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Return which pixels of images are in a rectangle of each, bool (N, 1, H, W).

    Parameters
    ----------
    first, sides : Tensor
        (N, 2): first row and column of each rectangle, and how many it has.
    size_hw : tuple of int
        Size of the images.
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
    """Bring slices of one size, (N, h, w), to what a network takes, (N, 1, H, W).

    A margin is filled with each slice's darkest value: outside the image is air. Training, evaluation and prediction
    all pass here.
    """
    images = torch.from_numpy(np.ascontiguousarray(slices)).unsqueeze(1)
    images = resample(images, network_shape((slices.shape[1], slices.shape[2]), spacing_mm, pixel_mm))
    return fit(images, size_hw, images.amin((-2, -1), keepdim=True))


def with_context(images: torch.Tensor, context: int, start: int, stop: int) -> torch.Tensor:
    """Give some of a volume's slices, in order, (N, 1, H, W), their neighbours as channels, as `SliceDataset` does.

    Returns
    -------
    Tensor
        (stop - start, 2 `context` + 1, H, W).
    """
    around = torch.arange(start, stop)[:, None] + torch.arange(-context, context + 1)
    return images[around.clamp(0, len(images) - 1), 0]


def shares_of(numbers: torch.Tensor, labels: int, ignores: bool = False) -> torch.Tensor:
    """Turn the number of each pixel's label into the share of it that has each label, float32 (N, K, H, W).

    Parameters
    ----------
    numbers : Tensor
        uint8 (N, 1, H, W): 0 for no label, `IGNORE_INDEX` for a pixel that does not count.
    labels : int
        How many labels are told apart.
    ignores : bool
        Whether pixels may be ignored: K is then `labels` + 1, the last channel the share that does not count.
    """
    if labels == 1 and not ignores:
        return numbers.float()
    told = torch.arange(1, labels + 1 + ignores, device=numbers.device)
    if ignores:
        told[-1] = IGNORE_INDEX
    return (numbers == told.view(1, -1, 1, 1)).float()


def masks_to_network(
    masks: NDArray[np.uint8],
    spacing_mm: tuple[float, float],
    pixel_mm: float | None,
    size_hw: tuple[int, int],
    labels: int = 1,
    ignores: bool = False,
) -> torch.Tensor:
    """Bring masks (N, h, w) to the network's grid as the share of each pixel that has each label, (N, K, H, W).

    A mask holds the number of each pixel's label, see `shares_of`. Half a share keeps where in a pixel the border runs:
    truth brought to 2 mm and back has Dice 0.99, thresholded on the way 0.96 (spine14).
    """
    shares = shares_of(torch.from_numpy(masks)[:, None], labels, ignores)
    shape_hw = network_shape((masks.shape[1], masks.shape[2]), spacing_mm, pixel_mm)
    return fit(resample(shares, shape_hw), size_hw, torch.zeros(1, 1, 1, 1))


def from_network(
    logits: torch.Tensor, shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> NDArray[np.float32]:
    """Bring logits back to the slices' own grid as each label's probability, float32 (N, K, h, w).

    Logits are (N, 1, H, W), or (N, 1 + K, H, W), the first the background's. Probabilities are interpolated, not
    logits: they follow the share of a pixel that is labelled, which is linear. Where the network saw nothing there is
    nothing.
    """
    logits = logits.float()
    shares = torch.sigmoid(logits) if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
    unseen = torch.zeros((1, 1, 1, 1), device=logits.device)
    shares = fit(shares, network_shape(shape_hw, spacing_mm, pixel_mm), unseen)
    shares = functional.interpolate(shares, size=shape_hw, mode="bilinear", align_corners=False)
    return np.asarray(shares.cpu().numpy())


def coarser(images: torch.Tensor, masks: torch.Tensor, sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring a batch, (N, C, H, W) and (N, K, H, W), to pixels larger by `COARSER`, padded to what a network takes."""
    shape_hw = coarser_shape((images.shape[-2], images.shape[-1]))
    images, masks = resample(images, shape_hw), resample(masks, shape_hw)
    size_hw = fixed_size([shape_hw], sides)
    return fit(images, size_hw, images.amin((-2, -1), keepdim=True)), fit(masks, size_hw, masks.new_zeros(1, 1, 1, 1))
