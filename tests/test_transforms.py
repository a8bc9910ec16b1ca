from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cspine_train.data.sizes import Sides, fixed_size, labelled_pixels, network_shape
from cspine_train.data.transforms import fit, from_network, inside, masks_to_network, to_network
from cspine_train.metrics.overlap import Overlap, overlap

shapes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@given(shapes, st.integers(0, 40), st.integers(0, 40))
def test_unpadding_undoes_padding(shape: tuple[int, int], more_h: int, more_w: int) -> None:
    image = torch.rand(1, 1, *shape)
    padded = fit(image, (shape[0] + more_h, shape[1] + more_w), torch.full((1, 1, 1, 1), -3.0))
    assert padded.shape[-2:] == (shape[0] + more_h, shape[1] + more_w)
    assert torch.equal(fit(padded, shape, torch.full((1, 1, 1, 1), -3.0)), image)
    assert (padded == -3.0).sum() == padded.numel() - image.numel()


@given(shapes, shapes)
def test_what_a_size_holds_of_an_image_comes_back_to_its_place(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Padded along one side, cropped along the other, and back."""
    outside = torch.full((1, 1), -3.0)
    image = torch.rand(shape)
    fitted = fit(image, size, outside)
    assert tuple(fitted.shape) == size
    back = fit(fitted, shape, outside)
    kept = back != -3.0
    assert kept.sum() == min(shape[0], size[0]) * min(shape[1], size[1])
    assert torch.equal(back[kept], image[kept])
    for side in (0, 1):
        seen = kept.any(1 - side).nonzero().flatten()
        before, after = int(seen[0]), shape[side] - 1 - int(seen[-1])
        assert after - before in (0, 1)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 60), st.integers(2, 40))
def test_where_something_is_labelled_is_known_without_a_look(labelled: list[bool], size: int, other: int) -> None:
    mask = np.repeat(np.array(labelled, dtype=np.uint8)[:, None], 20, axis=1)
    (shown,) = masks_to_network(mask[None], (size / len(labelled), other / 20), 1.0, (size, other))
    rows = (shown[0] > 0).any(1).nonzero().flatten().tolist()
    found = labelled_pixels([int(voxel) for voxel in labelled], size)
    if found is None:
        assert not rows
    else:
        assert 0 <= found[0] <= rows[0] <= found[0] + 1
        assert found[1] - 1 <= rows[-1] <= found[1] < size


def test_logits_of_a_crop_are_of_its_part_of_the_slice() -> None:
    slices = np.random.default_rng(0).normal(size=(2, 40, 50)).astype(np.float32)
    back = from_network(to_network(slices, (1, 1), None, (32, 64)), (40, 50), (1, 1), None)[:, 0]
    np.testing.assert_allclose(back[:, 4:36], 1 / (1 + np.exp(-slices[:, 4:36])), atol=1e-6)
    assert not back[:, :4].any()
    assert not back[:, 36:].any()


@given(shapes)
def test_native_pixels_come_back_as_they_went(shape: tuple[int, int]) -> None:
    slices = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    images = to_network(slices, (0.7, 1.3), None, fixed_size([shape], Sides()))
    assert images.shape[-2] % 32 == images.shape[-1] % 32 == 0
    back = from_network(images, shape, (0.7, 1.3), None)[:, 0]
    np.testing.assert_allclose(back, 1 / (1 + np.exp(-slices)), atol=1e-6)


def test_a_margin_is_as_dark_as_its_own_slice() -> None:
    slices = np.array([np.full((4, 4), 5), np.full((4, 4), -2)], dtype=np.float32)
    images = to_network(slices, (1, 1), None, (32, 64))
    assert torch.equal(images, torch.tensor([5.0, -2.0]).view(2, 1, 1, 1).expand(2, 1, 32, 64))


def test_a_pixel_size_makes_pixels_square_in_millimetres() -> None:
    assert network_shape((100, 50), (0.5, 2.0), 1.0) == (50, 100)
    assert network_shape((100, 50), (0.5, 2.0), None) == (100, 50)
    assert network_shape((1, 1), (0.1, 0.1), 5.0) == (1, 1)
    assert fixed_size([(33, 64), (10, 65)], Sides()) == (64, 96)
    assert fixed_size([(33, 64), (10, 65)], Sides(8, 8)) == (40, 72)
    assert fixed_size([(33, 64), (10, 65)], Sides(16, 72)) == (80, 80)


def test_a_smooth_mask_survives_half_the_resolution() -> None:
    axis = np.arange(100) - 50
    disc = (axis[:, None] ** 2 + axis[None] ** 2 < 30**2).astype(np.uint8)
    (mask,) = masks_to_network(disc[None], (1, 1), 2.0, (64, 64))
    assert 0 < mask[(mask > 0) & (mask < 1)].mean() < 1
    assert float(mask.sum()) * 4 == pytest.approx(disc.sum(), rel=1e-3)
    back = from_network(torch.logit(mask[None], eps=1e-4), (100, 100), (1, 1), 2.0)[0, 0] > 0.5
    assert overlap(back, disc > 0).dice > 0.985


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
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        overlap(np.zeros(1, bool), np.zeros(2, bool))


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 40))
def test_inside_is_what_fitting_has_put_there(shapes: list[tuple[int, int]], size: int) -> None:
    expected = [fit(torch.ones(1, 1, *shape), (size, 24), torch.zeros(1, 1, 1, 1)) for shape in shapes]
    assert torch.equal(inside(torch.tensor(shapes), (size, 24)), torch.cat(expected) > 0)
