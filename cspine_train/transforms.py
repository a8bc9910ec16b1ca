"""What happens to slices between the store and the network: one pixel size, one fixed size, random changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

#: Encoders halve the size five times.
STRIDE = 32


def network_shape(
    shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> tuple[int, int]:
    """Return the size of a slice at the network's pixel size."""
    if pixel_mm is None:
        return shape_hw
    height, width = (max(1, round(n * mm / pixel_mm)) for n, mm in zip(shape_hw, spacing_mm, strict=True))
    return height, width


def fixed_size(shapes_hw: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest size, a multiple of the stride, that holds slices of all these sizes."""
    height, width = (math.ceil(max(sizes) / STRIDE) * STRIDE for sizes in zip(*shapes_hw, strict=True))
    return height, width


def resample(images: torch.Tensor, shape_hw: tuple[int, int]) -> torch.Tensor:
    """Resample images (N, C, h, w) to another size, bilinear, averaged where that is smaller."""
    if tuple(images.shape[-2:]) == shape_hw:
        return images
    smaller = shape_hw[0] < images.shape[-2] or shape_hw[1] < images.shape[-1]
    return functional.interpolate(images, size=shape_hw, mode="bilinear", align_corners=False, antialias=smaller)


def pad(images: torch.Tensor, size_hw: tuple[int, int], value: float) -> torch.Tensor:
    """Pad images (..., h, w) to a size, evenly on both sides."""
    missing = [wanted - there for wanted, there in zip(size_hw, images.shape[-2:], strict=True)]
    top, left = missing[0] // 2, missing[1] // 2
    return functional.pad(images, (left, missing[1] - left, top, missing[0] - top), value=value)


def unpad(images: torch.Tensor, shape_hw: tuple[int, int]) -> torch.Tensor:
    """Cut from images (..., H, W) what `pad` added."""
    top, left = ((there - wanted) // 2 for there, wanted in zip(images.shape[-2:], shape_hw, strict=True))
    return images[..., top : top + shape_hw[0], left : left + shape_hw[1]]


def to_network(
    slices: NDArray[np.float32],
    spacing_mm: tuple[float, float],
    pixel_mm: float | None,
    size_hw: tuple[int, int] | None,
) -> torch.Tensor:
    """Bring slices of one size, (N, h, w), to what a network takes, (N, 1, H, W).

    The margin is filled with the darkest value of the slices: outside the image is air. Training, evaluation and
    prediction all pass here.
    """
    images = torch.from_numpy(np.ascontiguousarray(slices)).unsqueeze(1)
    images = resample(images, network_shape((slices.shape[1], slices.shape[2]), spacing_mm, pixel_mm))
    return pad(images, size_hw or fixed_size([(images.shape[-2], images.shape[-1])]), float(images.min()))


def mask_to_network(
    mask: NDArray[np.uint8], spacing_mm: tuple[float, float], pixel_mm: float | None, size_hw: tuple[int, int]
) -> torch.Tensor:
    """Bring a binary mask (h, w) to the network's grid, float32 (1, H, W): the share of each pixel that is labelled.

    Half a share keeps where in a pixel the border runs: truth brought to 2 mm and back has Dice 0.99, thresholded on
    the way 0.96 (spine14).
    """
    masks = torch.from_numpy(mask)[None, None].float()
    shape_hw = network_shape((mask.shape[0], mask.shape[1]), spacing_mm, pixel_mm)
    return pad(resample(masks, shape_hw), size_hw, 0.0)[0]


def from_network(
    logits: torch.Tensor, shape_hw: tuple[int, int], spacing_mm: tuple[float, float], pixel_mm: float | None
) -> NDArray[np.float32]:
    """Bring logits (N, 1, H, W) back to the slices' own grid as probabilities, float32 (N, h, w).

    Probabilities are interpolated, not logits: they follow the share of a pixel that is labelled, which is linear.
    """
    shares = torch.sigmoid(unpad(logits.float(), network_shape(shape_hw, spacing_mm, pixel_mm)))
    shares = functional.interpolate(shares, size=shape_hw, mode="bilinear", align_corners=False)
    return np.asarray(shares.squeeze(1).cpu().numpy())


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
    """

    def __init__(
        self,
        degrees: float = 12.0,
        scale: float = 0.2,
        shift: float = 0.08,
        contrast: float = 0.3,
        noise: float = 0.15,
    ) -> None:
        self.degrees, self.scale, self.shift = degrees, scale, shift
        self.contrast, self.noise = contrast, noise

    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change a batch.

        Parameters
        ----------
        images, masks : Tensor
            float32 (N, 1, H, W); a mask holds shares from 0 to 1.
        generator : Generator
            Where the randomness comes from, on the CPU, so that every device draws the same.
        """
        grid = self._grid(images, generator)
        images = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        masks = functional.grid_sample(masks, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return self._intensities(images, generator), masks

    def _grid(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = images.shape
        draws = torch.rand(count, 4, generator=generator) * 2 - 1
        angle = torch.deg2rad(draws[:, 0] * self.degrees)
        size = torch.exp(draws[:, 1] * math.log1p(self.scale))
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        # Coordinates run from -1 to 1 along both sides, so a rotation has to know the sides' ratio.
        rows = (
            torch.stack([cos, -sin * height / width, draws[:, 2] * self.shift * 2], 1),
            torch.stack([sin * width / height, cos, draws[:, 3] * self.shift * 2], 1),
        )
        theta = torch.stack(rows, 1).to(images.device)
        return functional.affine_grid(theta, list(images.shape), align_corners=False)

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
