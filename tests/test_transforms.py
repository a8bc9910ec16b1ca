from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cspine_train.metrics import Overlap, overlap
from cspine_train.transforms import (
    RandomChanges,
    fixed_size,
    from_network,
    mask_to_network,
    network_shape,
    pad,
    to_network,
    unpad,
)

shapes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@given(shapes, st.integers(0, 40), st.integers(0, 40))
def test_unpadding_undoes_padding(shape: tuple[int, int], more_h: int, more_w: int) -> None:
    image = torch.rand(1, 1, *shape)
    padded = pad(image, (shape[0] + more_h, shape[1] + more_w), -3.0)
    assert padded.shape[-2:] == (shape[0] + more_h, shape[1] + more_w)
    assert torch.equal(unpad(padded, shape), image)
    assert (padded == -3.0).sum() == padded.numel() - image.numel()


@given(shapes)
@settings(max_examples=50, deadline=None)
def test_native_pixels_come_back_as_they_went(shape: tuple[int, int]) -> None:
    slices = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    images = to_network(slices, (0.7, 1.3), None, None)
    assert images.shape[-2] % 32 == images.shape[-1] % 32 == 0
    back = from_network(images, shape, (0.7, 1.3), None)
    np.testing.assert_allclose(back, 1 / (1 + np.exp(-slices)), atol=1e-6)


def test_a_pixel_size_makes_pixels_square_in_millimetres() -> None:
    assert network_shape((100, 50), (0.5, 2.0), 1.0) == (50, 100)
    assert network_shape((100, 50), (0.5, 2.0), None) == (100, 50)
    assert network_shape((1, 1), (0.1, 0.1), 5.0) == (1, 1)
    assert fixed_size([(33, 64), (10, 65)]) == (64, 96)


def test_a_smooth_mask_survives_half_the_resolution() -> None:
    axis = np.arange(100) - 50
    disc = (axis[:, None] ** 2 + axis[None] ** 2 < 30**2).astype(np.uint8)
    mask = mask_to_network(disc, (1, 1), 2.0, (64, 64))
    assert 0 < mask[(mask > 0) & (mask < 1)].mean() < 1
    assert float(mask.sum()) * 4 == pytest.approx(disc.sum(), rel=1e-3)
    back = from_network(torch.logit(mask[None], eps=1e-4), (100, 100), (1, 1), 2.0)[0] > 0.5
    assert overlap(back, disc > 0).dice > 0.985


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(6, 1, 64, 96)
    images[:, :, 20:44, 30:66] = 1
    return images, images.clone()


def test_changes_depend_on_their_generator_only() -> None:
    images, masks = batch()
    change = RandomChanges()
    first = change(images, masks, torch.Generator().manual_seed(1))
    torch.rand(5)
    again = change(images, masks, torch.Generator().manual_seed(1))
    other = change(images, masks, torch.Generator().manual_seed(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_image_and_mask_move_together_and_each_sample_by_itself() -> None:
    images, masks = batch()
    moved, moved_masks = RandomChanges(contrast=0, noise=0)(images, masks, torch.Generator().manual_seed(0))
    # The contrast's span is clamped, so that interpolated borders agree to rounding only.
    torch.testing.assert_close(moved, moved_masks, atol=1e-5, rtol=0)
    assert len({tuple(mask.flatten().tolist()) for mask in moved_masks}) == 6
    assert 0 <= moved_masks.min() < moved_masks.max() <= 1


def test_a_rotation_turns_without_shearing_on_oblong_slices() -> None:
    axis_h, axis_w = torch.arange(64) - 31.5, torch.arange(160) - 79.5
    disc = (axis_h[:, None] ** 2 + axis_w[None] ** 2 < 20**2).float().expand(8, 1, -1, -1)
    turned, _ = RandomChanges(45, 0, 0, 0, 0)(disc, disc, torch.Generator().manual_seed(3))
    assert (turned - disc).abs().mean() < 0.01


def test_no_change_changes_nothing() -> None:
    images, masks = batch()
    same, same_masks = RandomChanges(0, 0, 0, 0, 0)(images, masks, torch.Generator())
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(same_masks, masks, atol=1e-5, rtol=0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_overlap_counts_voxels(pairs: list[tuple[bool, bool]]) -> None:
    predicted, truth = (np.array(column).reshape(1, 1, -1) for column in zip(*pairs, strict=True))
    found = overlap(predicted, truth)
    assert found.true_positive == sum(p and t for p, t in pairs)
    assert found.false_positive == sum(p and not t for p, t in pairs)
    assert found.false_negative == sum(t and not p for p, t in pairs)
    assert 0 <= found.iou <= found.dice <= 1
    assert found.dice == pytest.approx(2 * found.iou / (1 + found.iou))


def test_empty_masks_are_defined() -> None:
    assert Overlap(0, 0, 0).dice == Overlap(0, 0, 0).iou == 1
    assert Overlap(0, 3, 0).dice == Overlap(0, 0, 3).iou == 0
    with pytest.raises(ValueError, match=r"masks of shapes \(1,\) and \(2,\) cannot be compared"):
        overlap(np.zeros(1, bool), np.zeros(2, bool))
