"""How training slices are changed at random, on the batch and on its device: how much, how often, in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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

Pair = tuple[torch.Tensor, torch.Tensor]
Level = Literal["none", "light", "reference", "strong"]


@dataclass(frozen=True)
class Amounts:
    """How strongly slices are changed, at most, and how often.

    Attributes
    ----------
    flip : float
        Chance of a left-right flip: the order of the neighbours in a sagittal slice, its rows in the others. No other
        flip is anatomy.
    degrees, scale, shift : float
        Largest rotation; largest change of size and shift, as shares of the size.
    distortion : float
        Largest shift of a point of a coarse grid, as a share of the grid's cell.
    contrast : float
        Largest change of contrast as a share; brightness moves by as much of a standard deviation, gamma by a factor.
    noise : float
        Largest standard deviation of added noise, in standard deviations of the tissue.
    remap : float
        Chance that intensities are sent through a random map, which may reverse them.
    convolve : float
        Chance that slices are sent through a shallow network of random weights.
    field : float
        Largest deviation of the logarithm of a smooth field that slices are multiplied by.
    blur : float
        Largest deviation of a Gaussian, in pixels.
    coarse : float
        Largest factor by which pixels are made coarser.
    ghosts : float
        Largest strength of a motion ghost, as a share of the signal.
    window : float
        Chance that all but a part of a slice, at least a quarter of each side, is margin, as where a field of view is
        small.
    chance : float
        Of each of distortion, field, blur, coarse pixels and ghosts.
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


LEVELS: dict[str, Amounts] = {
    "none": Amounts(),
    "light": Amounts(flip=0.5, degrees=12, scale=0.2, shift=0.08, contrast=0.3, noise=0.15),
    "reference": Amounts(flip=0.5, degrees=15, scale=0.3, shift=0.1, distortion=0.3, blur=1.5, chance=0.5),
    "strong": Amounts(
        flip=0.5, degrees=12, scale=0.2, shift=0.08, distortion=0.1, contrast=0.3, noise=0.2, remap=0.35, convolve=0.1,
        field=0.4, blur=0.8, coarse=2.0, ghosts=0.15, window=0.2, chance=0.15,
    ),
}  # fmt: skip

# Numbers drawn for a sample, enough for all that may happen to it.
_DRAWS = 200
_KNOTS = 7
_NARROWEST = 0.25
_GRID = 5


class Augmentation:
    """Changes batches at random; each sample by a seed of its own, whatever batch and process it is in.

    Rotation, scaling, shift, flip, distortion and crop are one interpolation. Contrast comes before coil, resolution
    and noise, as in a scanner.

    Parameters
    ----------
    level : str or Amounts
        ``none``; ``light``: small changes of place and contrast; ``reference``: the set of the reference study;
        ``strong``: leaves no contrast to memorise.
    crop_hw : tuple of int, optional
        Size of the part of each slice that is kept, see `crop_centres`; shifts then move it, by a share of the whole
        slice, off what it would hold. It is cut out as the slice is turned, so that what turns into view at its border
        is the slice itself.
    labels : int, optional
        How many channels of masks, the first ones, are labels for a crop to hold; all by default.
    """

    def __init__(
        self, level: Level | Amounts, crop_hw: tuple[int, int] | None = None, labels: int | None = None
    ) -> None:
        self.amounts = level if isinstance(level, Amounts) else LEVELS[level]
        self.crop_hw = crop_hw
        self._labels = labels

    def __call__(self, images: torch.Tensor, masks: torch.Tensor, axes: torch.Tensor, seeds: Sequence[int]) -> Pair:
        """Change a batch.

        Parameters
        ----------
        images, masks : Tensor
            float32 (N, C, H, W) and (N, K, H, W); a mask holds shares from 0 to 1.
        axes : Tensor
            int64 (N,): the axis that each slice is across.
        seeds : sequence of int
            One a sample. Numbers are drawn on the CPU, so that every device draws the same, but for noise.

        Returns
        -------
        images, masks : Tensor
            The same shapes, or (N, C, h, w) and (N, K, h, w) of a crop.
        """
        draws = _Draws(seeds, images.device)
        images, masks = self._moved(images, masks, axes.to(images.device), draws)
        low, high = ends(images)
        images = self._of_other_contrast(images, low, high, draws)
        images = self._of_other_acquisition(images, low, draws)
        return self._of_other_scale(images, low, high, draws), masks

    def _moved(self, images: torch.Tensor, masks: torch.Tensor, axes: torch.Tensor, draws: _Draws) -> Pair:
        amounts, full_hw = self.amounts, (images.shape[2], images.shape[3])
        crop_hw = self.crop_hw or full_hw
        radians = math.radians(amounts.degrees) * draws.around()
        scale = torch.exp(math.log1p(amounts.scale) * draws.around())
        sizes = torch.tensor(full_hw, device=images.device)
        centre = amounts.shift * torch.stack([draws.around(), draws.around()], 1) * sizes
        flip = draws.whether(amounts.flip)
        where = torch.stack([draws.share(), draws.share()], 1)
        bent = draws.whether(amounts.chance if amounts.distortion else 0)
        knots = draws.around(2 * _GRID * _GRID).view(-1, 2, _GRID, _GRID)
        if self.crop_hw:
            centre = centre + crop_centres(masks[:, : self._labels], crop_hw, where)
        elif amounts == Amounts():
            return images, masks
        grid = sampling_grid(full_hw, crop_hw, radians, scale, centre, flip & (axes != 0))
        if bent.any():
            cells = torch.tensor(crop_hw[::-1], device=grid.device) / torch.tensor(full_hw[::-1], device=grid.device)
            reach = (amounts.distortion / (_GRID - 1) * cells).view(1, 2, 1, 1)
            grid = distorted(grid, knots * reach * bent.view(-1, 1, 1, 1))
        turned = flip & (axes == 0)
        if images.shape[1] > 1 and turned.any():
            images = torch.where(turned.view(-1, 1, 1, 1), images.flip(1), images)
        return self._windowed(warped(images, grid, beyond="border"), warped(masks, grid, beyond="zeros"), draws)

    def _windowed(self, images: torch.Tensor, masks: torch.Tensor, draws: _Draws) -> Pair:
        narrow = draws.whether(self.amounts.window)
        share, place = draws.share(2), draws.share(2)
        if not narrow.any():
            return images, masks
        sizes = torch.tensor(images.shape[2:], device=images.device)
        shown = (sizes * (_NARROWEST + (1 - _NARROWEST) * share)).ceil()
        shown = torch.where(narrow.unsqueeze(1), shown, sizes)
        within = window(shown, place, (images.shape[2], images.shape[3]))
        return torch.where(within, images, images.amin((1, 2, 3), keepdim=True)), masks * within

    def _of_other_contrast(
        self, images: torch.Tensor, low: torch.Tensor, high: torch.Tensor, draws: _Draws
    ) -> torch.Tensor:
        amounts = self.amounts
        mapped, folded = draws.whether(amounts.remap), draws.whether(amounts.convolve)
        values = _maps(draws)
        kernels = draws.normal(sum(map(math.prod, _LAYERS)))
        blend, zero = 0.7 * draws.share(), draws.share()
        gamma = torch.exp(amounts.contrast * draws.around())
        if amounts.contrast:
            # Where intensities are mapped at random, gamma is no news.
            values = torch.where(mapped.unsqueeze(1), values, _scale(len(values), values.device) ** gamma.unsqueeze(1))
        elif not (mapped | folded).any():
            return images
        span = (high - low).clamp_min(1e-6)
        shares = (images - low) / span
        changed = remapped(shares, values)
        for number in folded.nonzero().flatten().tolist():
            weights = [part.view(shape) for part, shape in zip(_parts(kernels[number]), _LAYERS, strict=True)]
            changed[number] = _blended(
                convolved(shares[number] - zero[number], weights), changed[number], float(blend[number])
            )
        changed = low + span * changed
        again = (mapped | folded).view(-1, 1, 1, 1)
        if not again.any():
            return changed
        return torch.where(again, standardised_like(changed, images, low, high), changed)

    def _of_other_acquisition(self, images: torch.Tensor, low: torch.Tensor, draws: _Draws) -> torch.Tensor:
        amounts = self.amounts
        ghosts, coiled, soft, coarse = (
            draws.whether(amounts.chance if there else 0)
            for there in (amounts.ghosts, amounts.field, amounts.blur, amounts.coarse > 1)
        )
        strength, place, side = draws.share(), draws.share(), draws.share()
        deviation, knots = draws.share(), draws.normal(_GRID * _GRID).view(-1, 1, _GRID, _GRID)
        sigma, factors = draws.share(), draws.share(2)
        if not amounts.chance:
            return images
        # Written into from here on: they are not the batch that was given, but what it was moved to.
        for number in ghosts.nonzero().flatten().tolist():
            dim = 1 + int(side[number] < 0.5)
            shift = round(float(0.1 + 0.4 * place[number]) * images.shape[1 + dim])
            images[number] = ghosted(images[number], low[number], amounts.ghosts * float(strength[number]), shift, dim)
        if coiled.any():
            log_field = smooth_fields(knots, (images.shape[2], images.shape[3]))
            log_field = amounts.field * deviation.view(-1, 1, 1, 1) * log_field
            images = low + (images - low) * torch.exp(torch.where(coiled.view(-1, 1, 1, 1), log_field, 0.0))
        for number in soft.nonzero().flatten().tolist():
            images[number] = blurred(images[number], 0.2 + amounts.blur * float(sigma[number]))
        for number in coarse.nonzero().flatten().tolist():
            first, second = (1 + (amounts.coarse - 1) * factors[number]).tolist()
            images[number] = coarsened(images[number], (first, second))
        return images

    def _of_other_scale(
        self, images: torch.Tensor, low: torch.Tensor, high: torch.Tensor, draws: _Draws
    ) -> torch.Tensor:
        amounts = self.amounts
        gain = (1 + amounts.contrast * draws.around()).view(-1, 1, 1, 1)
        offset = (amounts.contrast * draws.around()).view(-1, 1, 1, 1)
        sigma = (amounts.noise * draws.share()).view(-1, 1, 1, 1)
        if amounts.contrast:
            images = images * gain + offset
        return images + sigma * draws.noise(images) if amounts.noise else images


_LAYERS = ((2, 1, 3, 3), (2, 2, 3, 3), (1, 2, 3, 3))


def _parts(kernels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(kernels, [math.prod(shape) for shape in _LAYERS])


def _scale(count: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(0, 1, _KNOTS, device=device).expand(count, -1)


def _maps(draws: _Draws) -> torch.Tensor:
    """Draw maps of intensities from 0 to 1: a quarter rise, a quarter fall, the rest go anywhere.

    Air, the darkest, mostly stays dark.
    """
    kind, pinned = draws.share(), draws.whether(0.7)
    values = draws.share(_KNOTS)
    ordered = values.sort(1).values
    kind = kind.unsqueeze(1)
    values = torch.where(kind < 0.25, ordered, torch.where(kind < 0.5, ordered.flip(1), values))
    values[:, 0] = torch.where(pinned, 0.0, values[:, 0])
    return values


def _blended(folded: torch.Tensor, images: torch.Tensor, share: float) -> torch.Tensor:
    """Mix a slice with what a random network made of it, brought to the slice's own deviation."""
    folded = (folded - folded.mean()) * (images.std() / folded.std().clamp_min(1e-6)) + images.mean()
    return share * folded + (1 - share) * images


def sample_seeds(seed: int, step: int, count: int) -> list[int]:
    """Return the seeds of a step's samples, in the order of its whole batch."""
    drawn = np.random.SeedSequence([seed, step]).generate_state(count, np.uint64)
    return [int(one) for one in drawn]


class _Draws:
    """Numbers drawn at random, a row a sample, each from a generator of its sample's own seed."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        generator = torch.Generator()
        rows = [torch.rand(_DRAWS, generator=generator.manual_seed(seed)) for seed in seeds]
        self._rows = torch.stack(rows).to(device)
        self._seeds = seeds
        self._taken = 0

    def share(self, count: int = 0) -> torch.Tensor:
        """Draw from 0 to 1: (N,), or (N, count)."""
        assert self._taken + max(count, 1) <= _DRAWS  # noqa: S101
        first, self._taken = self._taken, self._taken + max(count, 1)
        taken = self._rows[:, first : self._taken]
        return taken if count else taken.squeeze(1)

    def around(self, count: int = 0) -> torch.Tensor:
        """Draw from -1 to 1."""
        return 2 * self.share(count) - 1

    def normal(self, count: int) -> torch.Tensor:
        """Draw from the normal distribution, (N, count)."""
        return math.sqrt(2) * torch.erfinv(self.around(count).clamp(-1 + 1e-6, 1 - 1e-6))

    def whether(self, chance: float) -> torch.Tensor:
        """Draw whether something happens, bool (N,)."""
        return self.share() < chance

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """Draw noise of the images' shape, on their device."""
        drawn = torch.empty_like(like, memory_format=torch.contiguous_format)
        generator = torch.Generator(like.device)
        for sample, seed in zip(drawn, self._seeds, strict=True):
            sample.normal_(generator=generator.manual_seed(seed ^ 1))
        return drawn
