"""Augmentation of training batches on their device: transforms, their strength, chance and order."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cspine_train.data.random_changes import (
    blurred,
    coarsened,
    convolved,
    crop_centres,
    distorted,
    ends,
    ghosted,
    remapped,
    sampling_grid,
    smooth_fields,
    standardised_like,
    warped,
    window,
)
from cspine_train.errors import RunError
from cspine_train.extensions import AUGMENTATIONS

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Amounts:
    """A level of augmentation: the largest strength of each transform, and its chance.

    Attributes
    ----------
    flip : float
        Chance of a left-right flip: of the order of neighbours in sagittal slices, of the rows in the others. Other
        flips are not anatomical.
    degrees, scale, shift : float
        Largest rotation, in degrees; largest change of size and shift, as shares of the size.
    distortion : float
        Largest shift of a point of a coarse grid, as a share of the grid's cell.
    contrast : float
        Largest change of contrast, as a share; also that of brightness, in standard deviations, and of log gamma.
    noise : float
        Largest standard deviation of added noise, in standard deviations of the tissue.
    remap : float
        Chance of a random map of the intensities, which may reverse them.
    convolve : float
        Chance of a shallow network of random weights.
    field : float
        Largest deviation of the logarithm of a smooth field that slices are multiplied by.
    blur : float
        Largest standard deviation of a Gaussian blur, in pixels.
    coarse : float
        Largest factor of the pixel size.
    ghosts : float
        Largest strength of a motion ghost, as a share of the signal.
    window : float
        Chance of a small field of view: a window of at least a quarter of each side is shown, the rest is air.
    chance : float
        Chance of each of distortion, field, blur, coarse pixels and ghosts.
    """

    flip: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    distortion: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    remap: float = 0.0
    convolve: float = 0.0
    field: float = 0.0
    blur: float = 0.0
    coarse: float = 1.0
    ghosts: float = 0.0
    window: float = 0.0
    chance: float = 0.0


NONE = Amounts()
LIGHT = Amounts(flip=0.5, degrees=12, scale=0.2, shift=0.08, contrast=0.3, noise=0.15)
REFERENCE = Amounts(flip=0.5, degrees=15, scale=0.3, shift=0.1, distortion=0.3, blur=1.5, chance=0.5)
STRONG = Amounts(
    flip=0.5, degrees=12, scale=0.2, shift=0.08, distortion=0.1, contrast=0.3, noise=0.2, remap=0.35, convolve=0.1,
    field=0.4, blur=0.8, coarse=2.0, ghosts=0.15, window=0.2, chance=0.15,
)  # fmt: skip

# Intensities between which a random map is linear, and the kernels of a random network.
_KNOTS = 7
_LAYERS = ((2, 1, 3, 3), (2, 2, 3, 3), (1, 2, 3, 3))
_NARROWEST = 0.25
_GRID = 5


class Stream:
    """Random numbers of one transform: a row per sample, seeded by the sample and the transform's name.

    Adding a transform does not alter the numbers of the others, and a sample gets the same numbers in any batch and
    process.

    Parameters
    ----------
    seeds : sequence of int
        Seeds of the samples.
    name : str
        Name of the transform.
    device : torch.device
        Device of the results. All but noise is drawn on the CPU, so that the numbers are the same on every device.
    """

    def __init__(self, seeds: Sequence[int], name: str, device: torch.device) -> None:
        self._seeds = [seed ^ zlib.crc32(name.encode()) for seed in seeds]
        self._generators = [torch.Generator().manual_seed(seed) for seed in self._seeds]
        self._device = device

    def uniform(self, count: int = 0) -> torch.Tensor:
        """Draw from the uniform distribution from 0 to 1: (N,), or (N, count)."""
        drawn = torch.stack([torch.rand(max(count, 1), generator=one) for one in self._generators]).to(self._device)
        return drawn if count else drawn.squeeze(1)

    def symmetric(self, count: int = 0) -> torch.Tensor:
        """Draw from the uniform distribution from -1 to 1: (N,), or (N, count)."""
        return 2 * self.uniform(count) - 1

    def normal(self, count: int) -> torch.Tensor:
        """Draw from the standard normal distribution, (N, count)."""
        return math.sqrt(2) * torch.erfinv(self.symmetric(count).clamp(-1 + 1e-6, 1 - 1e-6))

    def happens(self, chance: float) -> torch.Tensor:
        """Draw true with a chance, bool (N,)."""
        return self.uniform() < chance

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """Draw standard normal noise of the images' shape, on their device."""
        drawn = torch.empty_like(like, memory_format=torch.contiguous_format)
        generator = torch.Generator(like.device)
        for sample, seed in zip(drawn, self._seeds, strict=True):
            sample.normal_(generator=generator.manual_seed(seed ^ 1))
        return drawn


_Streams = Callable[[str], Stream]
#: A transform of images and masks of a batch, see `Augmentation`; returns new tensors of the same shapes.
Change = Callable[[torch.Tensor, torch.Tensor, Stream], Pair]


class Augmentation:
    """Augments batches: each sample has its own seed, and each transform its own random stream.

    Rotation, scaling, shift, flip, distortion and crop are one interpolation. Contrast comes before coil field,
    resolution and noise, as in a scanner; transforms of plug-ins come last.

    Parameters
    ----------
    level : str or Amounts
        A name in the group ``cspine.augmentations``, or several joined by ``+``: at most one level (``none``,
        ``light``, ``reference``, ``strong``, or another `Amounts`), and transforms, functions like `Change`.
    crop_hw : tuple of int, optional
        Size of random crops, see `crop_centres`. Shifts then move the crop, by a share of the whole slice. Crop and
        rotation are one interpolation, so that the corners of a crop show the slice.
    labels : int, optional
        Number of mask channels, the first ones, that a crop should hold; all by default.
    """

    def __init__(self, level: str | Amounts, crop_hw: tuple[int, int] | None = None, labels: int | None = None) -> None:
        parts = (
            {"": level} if isinstance(level, Amounts) else {name: AUGMENTATIONS.load(name) for name in level.split("+")}
        )
        levels = [part for part in parts.values() if isinstance(part, Amounts)]
        if len(levels) > 1:
            raise RunError(f"augmentation {level}: more than one level; choose one, and add transforms to it")
        self.amounts = levels[0] if levels else NONE
        self._changes: dict[str, Change] = {name: part for name, part in parts.items() if not isinstance(part, Amounts)}
        self.crop_hw = crop_hw
        self._labels = labels

    def __call__(self, images: torch.Tensor, masks: torch.Tensor, axes: torch.Tensor, seeds: Sequence[int]) -> Pair:
        """Augment a batch.

        Parameters
        ----------
        images, masks : Tensor
            float32 (N, C, H, W) and (N, K, H, W); a mask holds shares from 0 to 1.
        axes : Tensor
            int64 (N,): axis of each slice.
        seeds : sequence of int
            Seeds of the samples.

        Returns
        -------
        images, masks : Tensor
            The same shapes, or (N, C, h, w) and (N, K, h, w) of crops.
        """

        def stream(name: str) -> Stream:
            return Stream(seeds, name, images.device)

        images, masks = self._moved(images, masks, axes.to(images.device), stream)
        images, masks = self._windowed(images, masks, stream("window"))
        low, high = ends(images)
        images = self._of_other_contrast(images, low, high, stream)
        images = self._of_other_acquisition(images, low, stream)
        images = self._of_other_scale(images, stream)
        for name, change in self._changes.items():
            images, masks = change(images, masks, stream(name))
        return images, masks

    def _moved(self, images: torch.Tensor, masks: torch.Tensor, axes: torch.Tensor, stream: _Streams) -> Pair:
        """Rotate, scale, shift, flip, distort and crop images and masks."""
        amounts, full_hw = self.amounts, (images.shape[2], images.shape[3])
        if amounts == NONE and not self.crop_hw:
            return images, masks
        crop_hw = self.crop_hw or full_hw
        radians = math.radians(amounts.degrees) * stream("rotation").symmetric()
        scale = torch.exp(math.log1p(amounts.scale) * stream("scale").symmetric())
        centre = amounts.shift * stream("shift").symmetric(2) * torch.tensor(full_hw, device=images.device)
        flip = stream("flip").happens(amounts.flip)
        if self.crop_hw:
            centre = centre + crop_centres(masks[:, : self._labels], crop_hw, stream("crop").uniform(2))
        grid = sampling_grid(full_hw, crop_hw, radians, scale, centre, flip & (axes != 0))
        if amounts.distortion:
            distortion = stream("distortion")
            bent = distortion.happens(amounts.chance)
            knots = distortion.symmetric(2 * _GRID * _GRID).view(-1, 2, _GRID, _GRID)
            cells = torch.tensor(crop_hw[::-1], device=grid.device) / torch.tensor(full_hw[::-1], device=grid.device)
            reach = (amounts.distortion / (_GRID - 1) * cells).view(1, 2, 1, 1)
            if bent.any():
                grid = distorted(grid, knots * reach * bent.view(-1, 1, 1, 1))
        turned = flip & (axes == 0)
        if images.shape[1] > 1 and turned.any():
            images = torch.where(turned.view(-1, 1, 1, 1), images.flip(1), images)
        return warped(images, grid, beyond="border"), warped(masks, grid, beyond="zeros")

    def _windowed(self, images: torch.Tensor, masks: torch.Tensor, stream: Stream) -> Pair:
        """Narrow the field of view of some slices."""
        if not self.amounts.window:
            return images, masks
        narrow, share, place = stream.happens(self.amounts.window), stream.uniform(2), stream.uniform(2)
        sizes = torch.tensor(images.shape[2:], device=images.device)
        shown = (sizes * (_NARROWEST + (1 - _NARROWEST) * share)).ceil()
        shown = torch.where(narrow.unsqueeze(1), shown, sizes)
        within = window(shown, place, (images.shape[2], images.shape[3]))
        return torch.where(within, images, images.amin((1, 2, 3), keepdim=True)), masks * within

    def _of_other_contrast(
        self, images: torch.Tensor, low: torch.Tensor, high: torch.Tensor, stream: _Streams
    ) -> torch.Tensor:
        """Apply a random gamma, map or network to the intensities."""
        amounts = self.amounts
        if not (amounts.contrast or amounts.remap or amounts.convolve):
            return images
        remap, convolve = stream("remap"), stream("convolve")
        mapped, folded = remap.happens(amounts.remap), convolve.happens(amounts.convolve)
        values = _maps(remap)
        if amounts.contrast:
            gamma = torch.exp(amounts.contrast * stream("gamma").symmetric())
            # A random map replaces gamma.
            rising = torch.linspace(0, 1, _KNOTS, device=values.device) ** gamma.unsqueeze(1)
            values = torch.where(mapped.unsqueeze(1), values, rising)
        elif not (mapped | folded).any():
            return images
        span = (high - low).clamp_min(1e-6)
        shares = (images - low) / span
        changed = remapped(shares, values)
        kernels = convolve.normal(sum(map(math.prod, _LAYERS)))
        blend, zero = 0.7 * convolve.uniform(), convolve.uniform()
        for number in folded.nonzero().flatten().tolist():
            parts = torch.split(kernels[number], [math.prod(shape) for shape in _LAYERS])
            weights = [part.view(shape) for part, shape in zip(parts, _LAYERS, strict=True)]
            changed[number] = _blended(
                convolved(shares[number] - zero[number], weights), changed[number], float(blend[number])
            )
        changed = low + span * changed
        again = (mapped | folded).view(-1, 1, 1, 1)
        if not again.any():
            return changed
        return torch.where(again, standardised_like(changed, images, low, high), changed)

    def _of_other_acquisition(self, images: torch.Tensor, low: torch.Tensor, stream: _Streams) -> torch.Tensor:
        """Add motion ghosts and a coil's field, blur, and enlarge pixels."""
        amounts = self.amounts
        if not amounts.chance:
            return images
        # Changed in place from here on: these are resampled copies of the caller's images.
        if amounts.ghosts:
            ghosts = stream("ghosts")
            chosen, strength, place, side = ghosts.happens(amounts.chance), *ghosts.uniform(3).unbind(1)
            for number in chosen.nonzero().flatten().tolist():
                dim = 1 + int(side[number] < 0.5)
                shift = round(float(0.1 + 0.4 * place[number]) * images.shape[1 + dim])
                reach = amounts.ghosts * float(strength[number])
                images[number] = ghosted(images[number], low[number], reach, shift, dim)
        if amounts.field:
            field = stream("field")
            chosen, deviation = field.happens(amounts.chance).view(-1, 1, 1, 1), field.uniform().view(-1, 1, 1, 1)
            knots = field.normal(_GRID * _GRID).view(-1, 1, _GRID, _GRID)
            if chosen.any():
                log_field = amounts.field * deviation * smooth_fields(knots, (images.shape[2], images.shape[3]))
                images = low + (images - low) * torch.exp(torch.where(chosen, log_field, 0.0))
        if amounts.blur:
            blur = stream("blur")
            chosen, sigma = blur.happens(amounts.chance), blur.uniform()
            for number in chosen.nonzero().flatten().tolist():
                images[number] = blurred(images[number], 0.2 + amounts.blur * float(sigma[number]))
        if amounts.coarse > 1:
            coarse = stream("coarse")
            chosen, factors = coarse.happens(amounts.chance), 1 + (amounts.coarse - 1) * coarse.uniform(2)
            for number in chosen.nonzero().flatten().tolist():
                first, second = factors[number].tolist()
                images[number] = coarsened(images[number], (first, second))
        return images

    def _of_other_scale(self, images: torch.Tensor, stream: _Streams) -> torch.Tensor:
        """Change contrast and brightness, and add noise."""
        amounts = self.amounts
        if amounts.contrast:
            gain = 1 + amounts.contrast * stream("gain").symmetric().view(-1, 1, 1, 1)
            images = images * gain + amounts.contrast * stream("offset").symmetric().view(-1, 1, 1, 1)
        if amounts.noise:
            noise = stream("noise")
            images = images + amounts.noise * noise.uniform().view(-1, 1, 1, 1) * noise.noise(images)
        return images


def _maps(stream: Stream) -> torch.Tensor:
    """Draw maps of intensities from 0 to 1: a quarter rises, a quarter falls, the others are arbitrary.

    Air, the darkest, stays dark in 70 %.
    """
    kind, pinned = stream.uniform(), stream.happens(0.7)
    values = stream.uniform(_KNOTS)
    ordered = values.sort(1).values
    kind = kind.unsqueeze(1)
    values = torch.where(kind < 0.25, ordered, torch.where(kind < 0.5, ordered.flip(1), values))
    values[:, 0] = torch.where(pinned, 0.0, values[:, 0])
    return values


def _blended(folded: torch.Tensor, images: torch.Tensor, share: float) -> torch.Tensor:
    """Blend a slice with the output of a random network, scaled to the slice's mean and deviation."""
    folded = (folded - folded.mean()) * (images.std() / folded.std().clamp_min(1e-6)) + images.mean()
    return share * folded + (1 - share) * images


def sample_seeds(seed: int, step: int, count: int) -> list[int]:
    """Return the seeds of the samples of a step, in the order of its whole batch."""
    drawn = np.random.SeedSequence([seed, step]).generate_state(count, np.uint64)
    return [int(one) for one in drawn]
