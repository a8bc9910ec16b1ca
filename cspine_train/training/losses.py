"""Losses: functions of logits and labelled shares, and the module that prepares their inputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from cspine_train.extensions import LOSSES

#: Weights of false positives and false negatives in the Tversky index (Salehi et al. 2017, arXiv 1706.05721).
TVERSKY = (0.3, 0.7)
#: Exponent of the focal loss (Lin et al. 2017, arXiv 1708.02002).
GAMMA = 2.0
# A logit whose probability is 0 or 1 in single precision.
_CERTAIN = 1e4


class SegmentationLoss(nn.Module):
    """Computes a loss in float32, without the pixels that do not count.

    The loss itself is a function of

    - logits, float32 (N, 1, H, W) for a sigmoid, or (N, 1 + K, H, W) for a softmax over the background and K labels;
    - shares, float32 (N, K, H, W): the share of each pixel that has each label, from 0 to 1;
    - counted, bool (N, 1, H, W): the pixels that count, or None if all do. Elsewhere logits and shares are those of
      certain background, so that sums leave these pixels out; a mean has to divide by the number of counted pixels.

    It returns a scalar. With several labels, Dice and Tversky are averaged over them, without the background. A batch
    counts as a whole: false positives in an empty slice lower the overlap of the slices beside it.

    Parameters
    ----------
    name : str
        A loss in the group ``cspine.losses``.
    labels : int
        Number of labels, K.
    """

    def __init__(self, name: str, labels: int = 1) -> None:
        super().__init__()
        self._labels = labels
        self._loss = LOSSES.load(name)

    def forward(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, float32, whatever the precision of the logits.

        Parameters
        ----------
        logits : Tensor
            (N, 1, H, W), or (N, 1 + K, H, W) for K > 1 labels.
        shares : Tensor
            float32 (N, K, H, W); or (N, K + 1, H, W), where the last channel is the share of each pixel that does not
            count. A pixel counts only if that is 0.
        """
        # In bfloat16, sums over a million pixels have less than three digits; the overlap is a difference of such sums.
        with torch.autocast(logits.device.type, enabled=False):
            logits, counted = logits.float(), None
            if shares.shape[1] > self._labels:
                shares, counted = shares[:, : self._labels], shares[:, self._labels :] == 0
                logits, shares = torch.where(counted, logits, _background(logits)), shares * counted
            return cast("torch.Tensor", self._loss(logits, shares, counted))


def dice(logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return 1 - 2 I / (P + T): the sums over a batch of the lesser of probability and share, and of each of them.

    The lesser of the two replaces the usual product, which is not minimal where the probability equals a fractional
    share (Wang et al. 2023, arXiv 2303.16296).
    """
    return _overlap("DiceLoss", logits, shares) + _absent(logits, shares, counted)


def tversky(logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return 1 - I / (I + 0.3 (P - I) + 0.7 (T - I)), see `dice`: false negatives weigh more than false positives."""
    alpha, beta = TVERSKY
    return _overlap("TverskyLoss", logits, shares, alpha=alpha, beta=beta) + _absent(logits, shares, counted)


def dice_bce(logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return Dice loss plus the mean cross-entropy of the pixels."""
    return _overlap("DiceLoss", logits, shares) + _entropy(logits, shares, counted)


def dice_focal(logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return Dice loss plus the mean focal loss (1 - exp(-c))^2 c of each pixel's cross-entropy c.

    It rises with c, so that it too is minimal where the probability equals the share.
    """
    entropy = _entropy(logits, shares, counted, "none")
    return _overlap("DiceLoss", logits, shares) + _mean((1 - torch.exp(-entropy)) ** GAMMA * entropy, counted)


def with_background(shares: torch.Tensor) -> torch.Tensor:
    """Prepend the share of each pixel that has no label: (N, K, H, W) to (N, 1 + K, H, W)."""
    return torch.cat([(1 - shares.sum(1, keepdim=True)).clamp_min(0), shares], 1)


def _overlap(name: str, logits: torch.Tensor, shares: torch.Tensor, **options: Any) -> torch.Tensor:
    from segmentation_models_pytorch import losses

    if logits.shape[1] == 1:
        loss = getattr(losses, name)(mode="binary", **options)(logits, shares)
    else:
        # SMP's "multiclass" takes class numbers instead of shares: the softmax is applied here.
        probabilities = logits.softmax(1)[:, 1:]
        loss = getattr(losses, name)(mode="multilabel", from_logits=False, **options)(
            probabilities.flatten(2), shares.flatten(2)
        )
    return cast("torch.Tensor", loss)


def _absent(logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the mean probability of the labels that a batch lacks.

    Their overlap is 0 / 0, which SMP counts as 0, without a gradient. The cross-entropy removes their false positives;
    an overlap alone needs this term.
    """
    probabilities = torch.sigmoid(logits) if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
    absent = shares.sum((0, 2, 3)) == 0
    # Pixels that do not count have probability 0.
    scale = 1.0 if counted is None else counted.numel() / counted.sum().clamp_min(1)
    return (probabilities.mean((0, 2, 3)) * absent * scale).mean()


def _background(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits, (1, C, 1, 1), of a pixel that is certainly background."""
    certain = logits.new_full((1, logits.shape[1], 1, 1), -_CERTAIN)
    if logits.shape[1] > 1:
        certain[:, 0] = _CERTAIN
    return certain


def _mean(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of one value per pixel, (N, 1, H, W), over the pixels that count."""
    return values.mean() if counted is None else (values * counted).sum() / counted.sum().clamp_min(1)


def _entropy(
    logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None, reduction: str = "mean"
) -> torch.Tensor:
    if counted is not None and reduction == "mean":
        return _mean(_entropy(logits, shares, counted, "none"), counted)
    if shares.shape[1] > 1:
        entropy = functional.cross_entropy(logits, with_background(shares), reduction=reduction)
        return entropy if reduction == "mean" else entropy.unsqueeze(1)
    return functional.binary_cross_entropy_with_logits(logits, shares, reduction=reduction)
