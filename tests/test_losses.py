"""Each loss against its formula, and where formulas end: nothing labelled, shares between 0 and 1, extreme logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cspine_train import extensions
from cspine_train.training.losses import SegmentationLoss, with_background

LOSSES = extensions.LOSSES.names()


def a_batch(labels: int, soft: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = labels + 1 if labels > 1 else 1
    logits = 2 * torch.randn(3, classes, 8, 10, generator=generator)
    if soft:
        shares = torch.rand(3, labels, 8, 10, generator=generator) / labels
    else:
        numbers = torch.randint(0, labels + 1, (3, 1, 8, 10), generator=generator)
        shares = (numbers == torch.arange(1, labels + 1).view(1, -1, 1, 1)).float()
    return logits.requires_grad_(), shares


def gradient(name: str, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(SegmentationLoss(name, shares.shape[1])(logits, shares), logits)
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_the_default_is_what_it_was_bit_for_bit(soft: bool, empty: bool) -> None:
    import segmentation_models_pytorch as smp

    logits, shares = a_batch(1, soft)
    shares = shares * (not empty)
    before = smp.losses.DiceLoss("binary", from_logits=True)(logits, shares) + nn.BCEWithLogitsLoss()(logits, shares)
    now = SegmentationLoss("dice_bce")(logits, shares)
    assert torch.equal(now, before)
    assert torch.equal(torch.autograd.grad(now, logits)[0], torch.autograd.grad(before, logits)[0])


def test_binary_losses_are_their_formulas() -> None:
    probabilities = torch.tensor([0.8, 0.4, 0.1, 0.3], dtype=torch.float64).view(1, 1, 2, 2)
    shares = torch.tensor([1.0, 0.5, 0.0, 0.0]).view(1, 1, 2, 2)
    # The lesser of the two: 0.8 + 0.4; probabilities 1.6, shares 1.5.
    dice = 1 - 2 * 1.2 / (1.6 + 1.5)
    tversky = 1 - 1.2 / (1.2 + 0.3 * 0.4 + 0.7 * 0.3)
    entropies = [-math.log(0.8), -(math.log(0.4) + math.log(0.6)) / 2, -math.log(0.9), -math.log(0.7)]
    focal = sum((1 - math.exp(-entropy)) ** 2 * entropy for entropy in entropies) / 4
    # Lin et al.: (1 - p)^2 times -log p, p the probability of what is true.
    assert (1 - math.exp(-entropies[0])) ** 2 * entropies[0] == pytest.approx(0.2**2 * -math.log(0.8))
    expected = {
        "dice": dice, "tversky": tversky, "dice_bce": dice + sum(entropies) / 4, "dice_focal": dice + focal,
    }  # fmt: skip
    for name in LOSSES:
        found = SegmentationLoss(name)(torch.logit(probabilities), shares)
        assert found.item() == pytest.approx(expected[name], abs=1e-6), name


def test_losses_of_several_labels_are_their_formulas() -> None:
    """Two pixels, two labels: probabilities of none, the first and the second, and the shares of the two."""
    probabilities = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]], dtype=torch.float64)
    shares = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    dice = (1 - 2 * 0.7 / (0.9 + 1) + 1 - 2 * 0.3 / (0.4 + 0.5)) / 2
    tversky = (1 - 0.7 / (0.7 + 0.3 * 0.2 + 0.7 * 0.3) + 1 - 0.3 / (0.3 + 0.3 * 0.1 + 0.7 * 0.2)) / 2
    entropies = [-math.log(0.7), -(math.log(0.5) + math.log(0.3)) / 2]
    focal = sum((1 - math.exp(-entropy)) ** 2 * entropy for entropy in entropies) / 2
    expected = {
        "dice": dice, "tversky": tversky, "dice_bce": dice + sum(entropies) / 2, "dice_focal": dice + focal,
    }  # fmt: skip
    logits = torch.log(probabilities).T.reshape(1, 3, 1, 2) + 5
    for name in LOSSES:
        found = SegmentationLoss(name, 2)(logits, shares.T.reshape(1, 2, 1, 2))
        assert found.item() == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_loss_is_least_where_the_probability_is_the_share(name: str, share: float) -> None:
    """The product of probability and share, in place of the lesser of the two, has Dice grow until all is 0 or 1."""
    tried = torch.linspace(0.01, 0.99, 99)
    shares = torch.full((1, 1, 4, 4), share)
    losses = [SegmentationLoss(name)(torch.logit(p).expand(1, 1, 4, 4), shares).item() for p in tried]
    assert tried[losses.index(min(losses))].item() == pytest.approx(share, abs=0.011)
    # A softmax of label, another label of which there is nothing, and none.
    two = torch.cat([shares, torch.full_like(shares, 1e-3)], 1)
    losses = []
    for p in tried:
        pixel = torch.log(torch.stack([0.999 - p, p, torch.tensor(1e-3)]).clamp_min(1e-4))
        losses.append(SegmentationLoss(name, 2)(pixel.view(1, 3, 1, 1).expand(1, 3, 4, 4), two).item())
    assert tried[losses.index(min(losses))].item() == pytest.approx(share, abs=0.011)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [1, 3])
def test_what_is_marked_in_an_empty_slice_is_taken_off(name: str, labels: int) -> None:
    logits, shares = a_batch(labels, soft=False)
    shares[1] = 0
    assert SegmentationLoss(name, labels)(logits, shares).isfinite()
    found = gradient(name, logits, shares)[1]
    # Down, in every pixel; of several labels the background goes up.
    assert (found[-1 if labels == 1 else 0] * (1 if labels == 1 else -1) > 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_batch_without_any_label_is_finite_and_taken_off(name: str, labels: int) -> None:
    logits, shares = a_batch(labels, soft=False)
    shares = torch.zeros_like(shares)
    loss = SegmentationLoss(name, labels)(logits, shares)
    assert 0 < loss < 5
    down = gradient(name, logits, shares)
    down = down if labels == 1 else -down[:, :1]
    assert (down > 0).all()
    background = torch.full_like(logits, -20.0)
    background[:, 0] = -20.0 if labels == 1 else 20.0
    assert SegmentationLoss(name, labels)(background, shares).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_label_that_a_batch_lacks_is_taken_off(name: str) -> None:
    """Found where there is nothing, by a batch that is right about all else."""
    numbers = torch.zeros(2, 8, 8, dtype=torch.int64)
    numbers[:, 2:6, 2:4] = 1
    shares = torch.stack([numbers == 1, numbers == 2], 1).float()
    logits = 20 * nn.functional.one_hot(numbers, 3).movedim(3, 1).float()
    logits[0, 2, 0, :4] = 21
    found = gradient(name, logits.requires_grad_(), shares)
    assert (found[0, 2, 0, :4] > 1e-4 / 128).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [1, 3])
def test_losses_are_computed_in_float32(name: str, labels: int) -> None:
    logits, shares = a_batch(labels, soft=True)
    loss = SegmentationLoss(name, labels)
    expected = loss(logits.bfloat16().float(), shares)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits.bfloat16(), shares)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4, 1e30])
def test_gradients_are_finite_at_extreme_logits(name: str, labels: int, size: float) -> None:
    for soft, empty in ((False, False), (True, False), (False, True)):
        logits, shares = a_batch(labels, soft)
        extreme = (size * logits.detach().sign()).requires_grad_()
        shares = shares * (not empty)
        assert SegmentationLoss(name, labels)(extreme, shares).isfinite()
        assert gradient(name, extreme, shares).isfinite().all()


@given(st.integers(2, 5), st.integers(0, 99), st.booleans())
def test_the_order_of_labels_and_memory_does_not_matter(labels: int, seed: int, soft: bool) -> None:
    logits, shares = a_batch(labels, soft, seed)
    order = torch.randperm(labels, generator=torch.Generator().manual_seed(seed))
    moved = torch.cat([logits[:, :1], logits[:, 1:][:, order]], 1).contiguous(memory_format=torch.channels_last)
    for name in LOSSES:
        loss = SegmentationLoss(name, labels)
        torch.testing.assert_close(loss(moved, shares[:, order]), loss(logits, shares), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_background(shares).sum(1), torch.ones(3, 8, 10))
