"""What random changes keep, what they change, and that nothing but a sample's own seed decides."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cspine_train.data.augmentation import Amounts, Augmentation, Stream, sample_seeds
from cspine_train.data.random_changes import (
    blurred,
    coarsened,
    convolved,
    distorted,
    ends,
    ghosted,
    remapped,
    sampling_grid,
    standardised_like,
    warped,
)
from cspine_train.extensions import AUGMENTATIONS
from cspine_train.run.settings import RunSettings

Pair = tuple[torch.Tensor, torch.Tensor]
LEVELS = {name: AUGMENTATIONS.load(name) for name in AUGMENTATIONS.names()}


def batch() -> Pair:
    images = torch.zeros(6, 1, 64, 96)
    images[:, :, 20:44, 30:66] = 1
    return images, images.clone()


def change(
    amounts: Amounts, images: torch.Tensor, masks: torch.Tensor, *, crop: tuple[int, int] | None = None,
    axis: int = 0, seed: int = 0,
) -> Pair:  # fmt: skip
    axes = torch.full((len(images),), axis)
    return Augmentation(amounts, crop)(images, masks, axes, sample_seeds(seed, 0, len(images)))


@pytest.mark.parametrize("level", LEVELS)
def test_a_sample_is_changed_by_its_own_seed_alone(level: str) -> None:
    """Whatever else is in its batch: so it is in each of several processes that share one."""
    rng = torch.Generator().manual_seed(0)
    images, masks = torch.rand(8, 3, 48, 64, generator=rng), torch.rand(8, 2, 48, 64, generator=rng)
    axes, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), sample_seeds(5, 7, 8)
    augment = Augmentation(level, (32, 32))
    together = augment(images, masks, axes, seeds)
    torch.rand(5)
    for part in (slice(0, 3), slice(3, 8)):
        apart = augment(images[part], masks[part], axes[part], seeds[part])
        torch.testing.assert_close(apart[0], together[0][part], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(apart[1], together[1][part], atol=1e-6, rtol=1e-6)
    assert together[0].isfinite().all()
    if level != "none":
        other = augment(images, masks, axes, sample_seeds(5, 8, 8))
        assert all((first != second).any() for first, second in zip(together[0], other[0], strict=True))


def test_each_change_has_its_own_random_numbers() -> None:
    seeds, cpu = sample_seeds(1, 2, 3), torch.device("cpu")
    first = Stream(seeds, "blur", cpu).uniform(4)
    other = Stream(seeds, "ghosts", cpu)
    assert not (first == other.uniform(4)).any()
    assert torch.equal(Stream(seeds, "blur", cpu).uniform(4), first)
    assert len(first.unique()) == first.numel()


@pytest.mark.parametrize("axis", [0, 1])
def test_one_more_change_leaves_the_others_as_they_were(axis: int) -> None:
    """Each pair of levels differs by changes that the compared output does not show."""
    images = torch.rand(16, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    masks = (images[:, 1:2] > 0.5).float()
    place = {"flip": 0.5, "degrees": 12.0, "scale": 0.2, "shift": 0.1}
    intensity = {"contrast": 0.3, "noise": 0.2, "remap": 0.5, "convolve": 0.5, "field": 0.4, "blur": 1.0, "ghosts": 0.1}
    _, moved = change(Amounts(**place), images, masks, axis=axis)
    _, same = change(Amounts(**place, **intensity, coarse=2.0, chance=0.5), images, masks, axis=axis)
    assert torch.equal(moved, same)
    # A window only masks what would be there without it.
    shown, _ = change(Amounts(**place), images, torch.ones_like(masks), axis=axis)
    narrow, seen = change(Amounts(**place, window=0.5), images, torch.ones_like(masks), axis=axis)
    whole = (seen > 0).expand_as(shown)
    assert torch.equal(narrow[whole], shown[whole])
    # Noise is added last: the difference is noise, however contrast changes before it.
    contrast, _ = change(Amounts(contrast=0.3), images, masks, axis=axis)
    noisy, _ = change(Amounts(contrast=0.3, noise=0.2), images, masks, axis=axis)
    still, _ = change(Amounts(degrees=1e-9), images, masks, axis=axis)
    alone, _ = change(Amounts(degrees=1e-9, noise=0.2), images, masks, axis=axis)
    torch.testing.assert_close(noisy - contrast, alone - still, atol=1e-5, rtol=1e-5)


def test_seeds_are_of_run_step_and_place() -> None:
    seeds = [seed for run, step in itertools.product(range(3), range(3)) for seed in sample_seeds(run, step, 8)]
    assert len(set(seeds)) == len(seeds)
    assert sample_seeds(2, 1, 8)[:3] == sample_seeds(2, 1, 3)


def test_image_and_mask_move_together_and_each_sample_by_itself() -> None:
    images, masks = batch()
    moved, moved_masks = change(Amounts(degrees=20, scale=0.2, shift=0.1, distortion=0.3, chance=1), images, masks)
    inside = moved_masks[:, :, 8:-8, 8:-8]
    torch.testing.assert_close(moved[:, :, 8:-8, 8:-8], inside)
    assert len({tuple(mask.flatten().tolist()) for mask in moved_masks}) == 6
    assert 0 <= moved_masks.min() < moved_masks.max() <= 1


def test_a_rotation_turns_without_shearing_on_oblong_slices() -> None:
    axis_h, axis_w = torch.arange(64) - 31.5, torch.arange(160) - 79.5
    disc = (axis_h[:, None] ** 2 + axis_w[None] ** 2 < 20**2).float().expand(8, 1, -1, -1)
    turned, _ = change(Amounts(degrees=45), disc, disc)
    assert (turned - disc).abs().mean() < 0.01


def test_a_grid_moves_as_its_numbers_say() -> None:
    """A pixel shows what lies shifted, scaled and, where that was drawn, mirrored along rows."""
    image = torch.arange(64.0 * 48).view(1, 1, 64, 48)
    still, one = torch.zeros(1), torch.ones(1)
    grid = sampling_grid((64, 48), (64, 48), still, one, torch.tensor([[3.0, -5.0]]), torch.tensor([False]))
    moved = warped(image, grid, beyond="zeros")
    torch.testing.assert_close(moved[0, 0, :-3, 5:], image[0, 0, 3:, :-5], atol=1e-2, rtol=0)
    grid = sampling_grid((64, 48), (64, 48), still, one, torch.zeros(1, 2), torch.tensor([True]))
    torch.testing.assert_close(warped(image, grid, beyond="zeros"), image.flip(2), atol=1e-2, rtol=0)
    square = torch.zeros(1, 1, 64, 48)
    square[..., 28:36, 20:28] = 1
    grid = sampling_grid((64, 48), (64, 48), still, 2 * one, torch.zeros(1, 2), torch.tensor([False]))
    assert float(warped(square, grid, beyond="zeros").sum()) == pytest.approx(4 * 64, rel=0.02)


def test_a_distortion_goes_through_its_knots() -> None:
    still = torch.zeros(1)
    grid = sampling_grid((65, 65), (65, 65), still, still + 1, torch.zeros(1, 2), torch.tensor([False]))
    knots = torch.zeros(1, 2, 5, 5)
    knots[0, 0, 2, 1], knots[0, 1, 2, 1] = 0.05, -0.03
    bent = distorted(grid, knots) - grid
    torch.testing.assert_close(bent[0, 32, 16], torch.tensor([0.1, -0.06]))
    assert bent[0, ::16, ::16].abs().sum() == pytest.approx(0.16, abs=1e-5)


def marked(axis: int, *, flip: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    masks = images[:, 1:2]
    return images, *change(Amounts(flip=flip), images, masks, axis=axis, seed=seed)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_left_and_right_are_the_only_sides_that_change_places(axis: int) -> None:
    """Across a sagittal slice's plane, so its neighbours do; along the rows of a coronal or axial slice."""
    images, changed, masks = marked(axis, flip=1.0, seed=0)
    expected = images.flip(1) if axis == 0 else images.flip(2)
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(masks, expected[:, 1:2], atol=1e-4, rtol=0)
    images, changed, _ = marked(axis, flip=0.5, seed=1)
    same = torch.tensor([torch.allclose(a, b, atol=1e-4) for a, b in zip(images, changed, strict=True)])
    assert 0 < same.sum() < 16


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=3),
    st.integers(0, 99),
)
def test_a_crop_holds_what_is_labelled(
    size: tuple[int, int], crop: tuple[int, int], labelled: list[tuple[float, float]], seed: int
) -> None:
    crop = (min(crop[0], size[0]), min(crop[1], size[1]))
    mask = torch.zeros(1, 2, *size)
    places = [(int(y * (size[0] - 1)), int(x * (size[1] - 1))) for y, x in labelled]
    for number, (y, x) in enumerate(places):
        mask[0, number % 2, y, x] = 1
    image = torch.arange(1, size[0] * size[1] + 1.0).view(1, 1, *size)
    part, part_mask = change(Amounts(), image, mask, crop=crop, seed=seed)
    assert tuple(part.shape[-2:]) == crop
    found = {round(value) for value in part.flatten().tolist()}
    assert len(found) == crop[0] * crop[1]
    assert found <= set(range(1, image.numel() + 1))
    for axis in (0, 1):
        across = [place[axis] for place in places]
        # What is labelled is all there wherever a crop of this size can hold it.
        if across and max(across) - min(across) < crop[axis]:
            rows = {(value - 1) // size[1] if axis == 0 else (value - 1) % size[1] for value in found}
            assert set(across) <= rows
    inside = sum(round(float(image[0, 0, y, x])) in found for _, y, x in {(n % 2, *p) for n, p in enumerate(places)})
    assert float(part_mask.sum()) == pytest.approx(inside, abs=1e-3)


def test_crops_lie_at_random() -> None:
    image = torch.zeros(64, 1, 64, 64)
    image[..., 31, 31] = 1
    _, masks = change(Amounts(), image, image, crop=(24, 24))
    places = masks[:, 0].nonzero()[:, 1:]
    assert len(places) == 64
    assert len(places.unique(dim=0)) > 40
    assert places.min() == 0
    assert places.max() == 23


def test_a_turned_crop_shows_the_slice_at_its_corners() -> None:
    """A ramp stays a ramp under rotation; a crop that was cut out first would show its smeared border."""
    ramp = torch.arange(96.0).expand(4, 1, 96, 96)
    mask = torch.zeros(4, 1, 96, 96)
    mask[..., 32:64, 32:64] = 1
    turned, _ = change(Amounts(degrees=45), ramp, mask, crop=(32, 32), seed=5)
    for axis in (2, 3):
        assert turned.diff(n=2, dim=axis).abs().max() < 1e-3
    assert (turned.diff(dim=2).abs().amax((1, 2, 3)) > 0.05).all()


def test_no_change_changes_nothing() -> None:
    images, masks = batch()
    same, same_masks = change(Amounts(), images, masks)
    assert torch.equal(same, images)
    assert torch.equal(same_masks, masks)


def test_a_small_field_of_view_shows_one_part_and_a_dark_margin() -> None:
    images = 1 + torch.rand(64, 2, 40, 60, generator=torch.Generator().manual_seed(0))
    changed, masks = change(Amounts(window=1), images, images[:, :1])
    places = set()
    for image, mask, before in zip(changed, masks, images, strict=True):
        shown = (mask[0] > 0).nonzero()
        (top, left), (bottom, right) = shown.amin(0).tolist(), shown.amax(0).tolist()
        assert bottom - top + 1 >= 10
        assert right - left + 1 >= 15
        assert len(shown) == (bottom - top + 1) * (right - left + 1)
        part = (slice(None), slice(top, bottom + 1), slice(left, right + 1))
        torch.testing.assert_close(image[part], before[part])
        image[part] = before.min()
        torch.testing.assert_close(image, before.min().expand_as(image))
        places.add((top, left, bottom, right))
    assert len(places) > 60


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.integers(0, 99))
def test_a_map_is_linear_between_its_values(values: list[float], seed: int) -> None:
    images = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2
    table = np.array([values, values[::-1]], np.float32)
    mapped = remapped(images, torch.from_numpy(table))
    inside = images.clamp(0, 1).numpy()
    for number in (0, 1):
        expected = np.interp(inside[number], np.linspace(0, 1, len(values)), table[number])
        expected = expected + (images[number].numpy() - inside[number])
        np.testing.assert_allclose(mapped[number].numpy(), expected, atol=1e-5)


def test_the_ends_are_near_the_darkest_and_the_brightest() -> None:
    images = torch.linspace(0, 1, 100 * 100).view(1, 1, 100, 100) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    low, high = ends(images)
    torch.testing.assert_close(low.flatten() / torch.tensor([1.0, 5.0]), torch.full((2,), 0.01), atol=0.02, rtol=0)
    torch.testing.assert_close(high.flatten() / torch.tensor([1.0, 5.0]), torch.full((2,), 0.98), atol=0.02, rtol=0)


def test_a_changed_contrast_keeps_tissues_mean_and_deviation() -> None:
    images = torch.full((1, 1, 40, 40), -2.0)
    images[..., 10:30, 10:30] = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    changed = 3 - 0.2 * images
    low, high = ends(images)
    back = standardised_like(changed, images, low, high)
    weight = ((images - low) / (high - low)).clamp(0, 1)

    def moments(of: torch.Tensor) -> tuple[float, float]:
        mean = (weight * of).sum() / weight.sum()
        return float(mean), float((weight * (of - mean) ** 2).sum() / weight.sum())

    assert moments(back) == pytest.approx(moments(images), abs=1e-4)
    assert float((back * images)[..., 10:30, 10:30].mean()) < 0  # still reversed
    flat = standardised_like(torch.ones_like(images), images, low, high)
    assert flat.isfinite().all()


def test_a_random_network_keeps_the_size_and_leaves_slices_apart() -> None:
    slices = torch.rand(3, 12, 17, generator=torch.Generator().manual_seed(0))
    identity = torch.zeros(1, 1, 3, 3)
    identity[0, 0, 1, 1] = 1
    torch.testing.assert_close(convolved(slices, [identity, identity]), slices)
    weights = [torch.randn(2, 1, 3, 3), torch.randn(1, 2, 3, 3)]
    torch.testing.assert_close(convolved(slices, weights)[1], convolved(slices[1:2], weights)[0])


@pytest.mark.parametrize(("dim", "shift"), [(1, 5), (2, 11)])
def test_ghosts_are_what_a_modulated_k_space_gives(dim: int, shift: int) -> None:
    image = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(0))
    lines = torch.arange(image.shape[dim])
    modulation = 1 + 2 * 0.2 * torch.cos(2 * math.pi * lines * shift / image.shape[dim])
    shape = [1, 1, 1]
    shape[dim] = -1
    expected = torch.fft.ifft(torch.fft.fft(image - 0.1, dim=dim) * modulation.view(shape), dim=dim).real
    found = ghosted(image, torch.tensor(0.1), 0.2, shift, dim)
    torch.testing.assert_close(found, 0.1 + expected / 1.4, atol=1e-5, rtol=1e-5)


def test_a_blur_has_its_deviation() -> None:
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    spread = blurred(point, 2.0)[0]
    offsets = (torch.arange(41) - 20.0) ** 2
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(1) * offsets).sum()) == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(spread, spread.T)
    torch.testing.assert_close(blurred(torch.ones(2, 9, 9), 3.0), torch.ones(2, 9, 9))


def test_coarse_pixels_lose_detail_and_keep_the_mean() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    coarse = coarsened(stripes, (1.0, 4.0))
    assert coarse.shape == stripes.shape
    assert float(coarse.std()) < 0.1
    assert float(coarse.mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(coarsened(stripes, (4.0, 1.0)), stripes, atol=1e-4, rtol=0)


def test_strong_changes_reverse_contrast_often_and_the_others_never() -> None:
    """Tissue of many intensities in dark air: does what was brighter stay so?"""
    shades = torch.linspace(0.2, 1, 48).expand(64, 1, 48, 48).clone()
    shades[:, :, :8] = 0
    still = {"flip": 0, "degrees": 0, "scale": 0, "shift": 0, "distortion": 0, "noise": 0, "chance": 0}
    reversed_share = {}
    for level, amounts in LEVELS.items():
        changed, _ = change(Amounts(**{**vars(amounts), **still}), shades, torch.zeros_like(shades))
        rising = (changed[:, 0, 20].diff(dim=1) > 0).float().mean(1)
        reversed_share[level] = float((rising < 0.5).float().mean())
    assert reversed_share["strong"] > 0.15
    assert reversed_share["none"] == reversed_share["light"] == reversed_share["reference"] == 0


def test_runs_of_before_there_were_levels_are_read() -> None:
    assert RunSettings.model_validate({"augment": True}).augment == "light"
    assert RunSettings.model_validate({"augment": False}).augment == "none"
    assert RunSettings.model_validate({"augment": "strong"}).augment == "strong"
