"""Transforms of augmentation: functions of a batch of slices and of random numbers.

Each sample has its own random numbers, a tensor of N for images (N, C, H, W); neighbouring slices (C) change alike.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from cspine_train.data.transforms import rectangles


def crop_centres(masks: torch.Tensor, size_hw: tuple[int, int], draws: torch.Tensor) -> torch.Tensor:
    """Place a crop in each slice at random so that it holds all labelled pixels, or as many as it can.

    Parameters
    ----------
    masks : Tensor
        (N, K, H, W), above 0 where labelled.
    size_hw : tuple of int
        Size of a crop.
    draws : Tensor
        (N, 2), from 0 to 1: position of each crop between its first and its last possible row and column.

    Returns
    -------
    Tensor
        (N, 2): row and column of the crops' centres, in pixels from the slices' centres.
    """
    centres = []
    labelled_hw = (masks > 0).any(1)
    for axis, size in enumerate(size_hw):
        full = masks.shape[2 + axis]
        labelled = labelled_hw.any(2 - axis).float()
        empty = labelled.amax(1) == 0
        first = torch.where(empty, full, labelled.argmax(1))
        last = torch.where(empty, 0, full - 1 - labelled.flip(1).argmax(1))
        ends = torch.stack([(last - size + 1).clamp(0, full - size), first.clamp(0, full - size)], 1)
        earliest, latest = ends.amin(1), ends.amax(1)
        begin = earliest + torch.floor(draws[:, axis] * (latest - earliest + 1))
        centres.append(begin + (size - full) / 2)
    return torch.stack(centres, 1)


def sampling_grid(
    full_hw: tuple[int, int],
    crop_hw: tuple[int, int],
    radians: torch.Tensor,
    scale: torch.Tensor,
    centre: torch.Tensor,
    mirrored: torch.Tensor,
) -> torch.Tensor:
    """Return the sampling grid of a rotated, scaled, shifted and mirrored crop, for `grid_sample`.

    Parameters
    ----------
    full_hw, crop_hw : tuple of int
        Sizes of the slices and of the crops.
    radians, scale : Tensor
        (N,): rotation and magnification of each crop.
    centre : Tensor
        (N, 2): row and column of its centre, in pixels from the slice's centre.
    mirrored : Tensor
        bool (N,): whether to reverse its rows.

    Returns
    -------
    Tensor
        (N, h, w, 2), column and row from -1 to 1.
    """
    (height, width), (crop_h, crop_w) = full_hw, crop_hw
    cos, sin = torch.cos(radians) / scale, torch.sin(radians) / scale
    sign = 1 - 2 * mirrored.float()
    right, down = 2 * centre[:, 1] / width, 2 * centre[:, 0] / height
    # Coordinates run from -1 to 1 along the sides of crop and slice, so that a rotation depends on their ratios.
    rows = (
        torch.stack([cos * crop_w / width, -sin * sign * crop_h / width, right], 1),
        torch.stack([sin * crop_w / height, cos * sign * crop_h / height, down], 1),
    )
    return functional.affine_grid(torch.stack(rows, 1), [len(scale), 1, crop_h, crop_w], align_corners=False)


def smooth_fields(knots: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Interpolate values on a coarse grid, (N, K, h, w) to (N, K, H, W), bicubic."""
    return functional.interpolate(knots, size=size_hw, mode="bicubic", align_corners=True)


def distorted(grid: torch.Tensor, knots: torch.Tensor) -> torch.Tensor:
    """Distort a sampling grid, (N, h, w, 2), by shifts on a coarse grid.

    `knots`, (N, 2, rows, columns), are shifts along columns and rows, as shares of the slice's width and height.
    """
    shifts = smooth_fields(2 * knots, (grid.shape[1], grid.shape[2]))
    return grid + shifts.movedim(1, -1)


def warped(images: torch.Tensor, grid: torch.Tensor, *, beyond: str) -> torch.Tensor:
    """Sample images (N, C, H, W) on a grid; `beyond` their border are its pixels (``border``) or ``zeros``."""
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def window(shown: torch.Tensor, place: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Return which pixels are in a window, one for each slice, bool (N, 1, H, W).

    `shown`, (N, 2), are height and width of the windows in pixels; `place`, (N, 2), is their position, from 0 at the
    first row and column to 1 at the last.
    """
    sizes = torch.tensor(size_hw, device=shown.device)
    return rectangles(torch.floor(place * (sizes - shown + 1)), shown, size_hw)


def ends(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 1st and the 99th percentile of each sample's intensities, (N, 1, 1, 1) both."""
    some = images[:, images.shape[1] // 2, ::4, ::4].flatten(1)
    count = some.shape[1]
    ordered = some.sort(1).values
    low, high = ordered[:, count // 100], ordered[:, count - 1 - count // 100]
    return low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)


def remapped(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Map intensities (N, C, H, W) by piecewise linear functions; those outside 0 to 1 keep their distance from 0 or 1.

    `values`, (N, K), are the values of the functions at K equally spaced intensities from 0 to 1.
    """
    last = values.shape[1] - 1
    slopes = torch.diff(values, dim=1) * last
    # A sum of hinge functions: its six passes take half the time of a table look-up.
    bends = torch.diff(slopes, dim=1)
    inside = images.clamp(0, 1)
    mapped = images - inside + values[:, :1, None, None] + slopes[:, :1, None, None] * inside
    for number in range(1, last):
        mapped.addcmul_(bends[:, number - 1, None, None, None], (inside - number / last).clamp_min(0))
    return mapped


def convolved(images: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Apply a shallow network of random weights to one sample's slices (GIN, Ouyang et al. 2023).

    Parameters
    ----------
    images : Tensor
        (C, H, W), slices that are processed separately. The activation changes its slope at intensity 0.
    weights : list of Tensor
        (out, in, 3, 3) each; the first input and the last output have one channel.

    Returns
    -------
    Tensor
        (C, H, W).
    """
    seen = images.unsqueeze(1)
    for number, weight in enumerate(weights):
        if number:
            seen = functional.leaky_relu(seen, 0.01)
        seen = functional.conv2d(functional.pad(seen, (1, 1, 1, 1), mode="replicate"), weight)
    return seen.squeeze(1)


def standardised_like(
    changed: torch.Tensor, images: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Scale changed images to the mean and standard deviation that tissue had before.

    Scans of any contrast are normalised over their own tissue, so that a network never sees another mean or deviation.
    Pixels are weighted by their brightness before the change, which leaves out most of the air.
    """
    weight = ((images - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    weight = weight / weight.sum((1, 2, 3), keepdim=True).clamp_min(1e-6)

    def moments(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = (weight * of).sum((1, 2, 3), keepdim=True)
        return mean, (weight * (of - mean).square()).sum((1, 2, 3), keepdim=True).sqrt()

    (mean, deviation), (new_mean, new_deviation) = moments(images), moments(changed)
    return (changed - new_mean) * (deviation / new_deviation.clamp_min(0.05 * deviation + 1e-6)) + mean


def ghosted(images: torch.Tensor, low: torch.Tensor, strength: float, shift: int, dim: int) -> torch.Tensor:
    """Add ghosts of periodic motion: copies displaced along the phase encoding (Wood and Henkelman 1985).

    Modulating the lines of k-space by 1 + 2a cos(2 pi k s / n) adds copies of strength a, shifted by s to both sides.
    """
    signal = images - low
    copies = torch.roll(signal, shift, dim) + torch.roll(signal, -shift, dim)
    return low + (signal + strength * copies) / (1 + 2 * strength)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images (C, H, W) with a Gaussian, `sigma` in pixels."""
    reach = max(1, math.ceil(2.5 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    rows = functional.pad(images.unsqueeze(1), (reach, reach, reach, reach), mode="replicate")
    return functional.conv2d(functional.conv2d(rows, kernel.unsqueeze(2)), kernel.unsqueeze(3)).squeeze(1)


def coarsened(images: torch.Tensor, factors_hw: tuple[float, float]) -> torch.Tensor:
    """Resample images (C, H, W) to pixels larger by these factors, and back."""
    size_hw = images.shape[-2:]
    small = [max(4, round(size / factor)) for size, factor in zip(size_hw, factors_hw, strict=True)]
    coarse = functional.interpolate(
        images.unsqueeze(0), size=small, mode="bilinear", antialias=True, align_corners=False
    )
    return functional.interpolate(coarse, size=size_hw, mode="bilinear", align_corners=False).squeeze(0)
