"""What happens to slices between the store and the network: one pixel size, one fixed size, random changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


def network_shape(
    shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> tuple[int, int]:
    """Return the size of a slice at the network's pixel size."""
    if pixel_mm is None:
        return shape_hw
    height, width = (max(1, round(n * mm / pixel_mm)) for n, mm in zip(shape_hw, spacing_mm, strict=True))
    return height, width


class Sides(NamedTuple):
    """What the height and the width of a network's images may be: multiples of one number, no less than another."""

    multiple: int = 32
    least: int = 32


#: Of nearly all: their encoders halve the size five times.
USUAL_SIDES = Sides()


def fixed_size(shapes_hw: Sequence[tuple[int, int]], sides: Sides) -> tuple[int, int]:
    """Return the smallest size that a network takes and that holds slices of all these sizes."""
    height, width = (
        math.ceil(max(*sizes, sides.least) / sides.multiple) * sides.multiple for sizes in zip(*shapes_hw, strict=True)
    )
    return height, width


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


def masks_to_network(
    masks: NDArray[np.uint8], spacing_mm: tuple[float, float], pixel_mm: float | None, size_hw: tuple[int, int]
) -> torch.Tensor:
    """Bring binary masks (N, h, w) to the network's grid as the share of each pixel that is labelled, (N, 1, H, W).

    Half a share keeps where in a pixel the border runs: truth brought to 2 mm and back has Dice 0.99, thresholded on
    the way 0.96 (spine14).
    """
    shares = torch.from_numpy(masks)[:, None].float()
    shape_hw = network_shape((masks.shape[1], masks.shape[2]), spacing_mm, pixel_mm)
    return fit(resample(shares, shape_hw), size_hw, torch.zeros(1, 1, 1, 1))


def from_network(
    logits: torch.Tensor, shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> NDArray[np.float32]:
    """Bring logits (N, 1, H, W) back to the slices' own grid as probabilities, float32 (N, h, w).

    Probabilities are interpolated, not logits: they follow the share of a pixel that is labelled, which is linear.
    Where the network saw nothing there is nothing.
    """
    unseen = torch.full((1, 1, 1, 1), -math.inf, device=logits.device)
    shares = torch.sigmoid(fit(logits.float(), network_shape(shape_hw, spacing_mm, pixel_mm), unseen))
    shares = functional.interpolate(shares, size=shape_hw, mode="bilinear", align_corners=False)
    return np.asarray(shares.squeeze(1).cpu().numpy())


def crop_centres(masks: torch.Tensor, size_hw: tuple[int, int], draws: torch.Tensor) -> torch.Tensor:
    """Place a crop in each slice at random so that it holds all that is labelled there, as far as it is large enough.

    Parameters
    ----------
    masks : Tensor
        (N, 1, H, W), above 0 where labelled.
    size_hw : tuple of int
        Size of a crop.
    draws : Tensor
        (N, 2), from 0 to 1: where between its first and its last possible row and column a crop begins.

    Returns
    -------
    Tensor
        (N, 2), row and column of the crops' centres, in pixels from the slices' centres.
    """
    centres = []
    for axis, size in enumerate(size_hw):
        full = masks.shape[2 + axis]
        labelled = (masks[:, 0] > 0).any(2 - axis).float()
        empty = labelled.amax(1) == 0
        first = torch.where(empty, full, labelled.argmax(1))
        last = torch.where(empty, 0, full - 1 - labelled.flip(1).argmax(1))
        ends = torch.stack([(last - size + 1).clamp(0, full - size), first.clamp(0, full - size)], 1)
        earliest, latest = ends.amin(1), ends.amax(1)
        begin = earliest + torch.floor(draws[:, axis].to(masks.device) * (latest - earliest + 1))
        centres.append(begin + (size - full) / 2)
    return torch.stack(centres, 1)


class RandomChanges:
    """Random rotation, scaling, shift, contrast, brightness and noise, each sample its own, image and mask together.

    Works on a whole batch on its device. No flips: left-right is the only one that anatomy allows, and sagittal
    slices do not show it.

    Parameters
    ----------
    degrees : float
        Largest rotation.
    scale : float
        Largest change of size, as a share.
    shift : float
        Largest shift, as a share of the size.
    contrast : float
        Largest change of contrast, as a share; brightness shifts by up to as much of a standard deviation.
    noise : float
        Largest standard deviation of added noise, in standard deviations of the tissue.
    crop_hw : tuple of int, optional
        Size of the part of each slice that is kept, see `crop_centres`; shifts then move it, by a share of the whole
        slice, off what it would hold. It is cut out as the slice is turned, so that what turns into view at its border
        is the slice itself.
    """

    def __init__(
        self,
        degrees: float = 12.0,
        scale: float = 0.2,
        shift: float = 0.08,
        contrast: float = 0.3,
        noise: float = 0.15,
        crop_hw: tuple[int, int] | None = None,
    ) -> None:
        self.degrees, self.scale, self.shift = degrees, scale, shift
        self.contrast, self.noise = contrast, noise
        self.crop_hw = crop_hw

    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change a batch.

        Parameters
        ----------
        images, masks : Tensor
            float32 (N, C, H, W) and (N, 1, H, W); a mask holds shares from 0 to 1.
        generator : Generator
            Where the randomness comes from, on the CPU, so that every device draws the same.
        """
        grid = self._grid(images, masks, generator)
        images = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        masks = functional.grid_sample(masks, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return self._intensities(images, generator), masks

    def _grid(self, images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, channels, height, width = images.shape
        crop_h, crop_w = self.crop_hw or (height, width)
        draws = torch.rand(count, 4, generator=generator) * 2 - 1
        angle = torch.deg2rad(draws[:, 0] * self.degrees).to(images.device)
        size = torch.exp(draws[:, 1] * math.log1p(self.scale)).to(images.device)
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        right, down = (draws[:, 2:] * self.shift * 2).to(images.device).unbind(1)
        if self.crop_hw:
            centre_y, centre_x = crop_centres(masks, self.crop_hw, torch.rand(count, 2, generator=generator)).unbind(1)
            right, down = right + 2 * centre_x / width, down + 2 * centre_y / height
        # Coordinates run from -1 to 1 along the sides of crop and slice, so a rotation has to know their ratios.
        rows = (
            torch.stack([cos * crop_w / width, -sin * crop_h / width, right], 1),
            torch.stack([sin * crop_w / height, cos * crop_h / height, down], 1),
        )
        return functional.affine_grid(torch.stack(rows, 1), [count, channels, crop_h, crop_w], align_corners=False)

    def _intensities(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(images)
        draws = torch.rand(count, 4, generator=generator)
        gain = 1 + (draws[:, 0] * 2 - 1) * self.contrast
        offset = (draws[:, 1] * 2 - 1) * self.contrast
        power = torch.exp((draws[:, 2] * 2 - 1) * self.contrast)
        sigma = draws[:, 3] * self.noise
        gain, offset, power, sigma = (v.view(-1, 1, 1, 1).to(images.device) for v in (gain, offset, power, sigma))
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        span = (high - low).clamp_min(1e-6)
        images = low + span * ((images - low) / span).clamp(0, 1) ** power
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        return images * gain + offset + sigma * noise
