"""What training makes small: how far what a network says of a batch is from what is labelled there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from cspine_train.run.settings import LossName

#: What a voxel marked in vain and one missed weigh in Tversky's index (Salehi et al. 2017, arXiv 1706.05721).
TVERSKY = (0.3, 0.7)
#: Focal loss: the power of what is left to be learnt of a pixel (Lin et al. 2017, arXiv 1708.02002).
GAMMA = 2.0
# A logit whose probability is 0 or 1 in single precision.
_CERTAIN = 1e4


class SegmentationLoss(nn.Module):
    """Compares logits with the shares of each pixel that are labelled.

    - ``dice``: 1 - 2 I / (P + T), where P and T are the sums of probabilities and shares over a batch, I that of the
      lesser of the two (Wang et al. 2023, arXiv 2303.16296: where shares are no whole numbers, the usual product is
      not least where the probability is the share).
    - ``tversky``: 1 - I / (I + 0.3 (P - I) + 0.7 (T - I)); what is missed weighs more than what is marked in vain.
    - ``dice_bce``: ``dice`` and the cross-entropy, averaged over pixels.
    - ``dice_focal``: ``dice`` and the focal loss (1 - exp(-c))^2 c of each pixel's cross-entropy c, averaged. It rises
      with c, so that it too is least where the probability is the share.

    With several labels, Dice and Tversky are averaged over them; the background has none of its own.

    A batch is counted as one, not slice by slice: voxels marked in an empty slice lower the overlap of those beside
    it. Of a label that a whole batch lacks the overlap is 0 / 0, which SMP counts as no loss and which moves nothing:
    there the cross-entropy is what takes off what is marked in vain, or, where an overlap stands alone, the mean
    probability, which the loss then is.

    Parameters
    ----------
    name : str
        Which.
    labels : int
        How many are told apart. One is a sigmoid's; for several, the first of the softmax's channels is what has none.
    """

    def __init__(self, name: LossName, labels: int = 1) -> None:
        super().__init__()
        from segmentation_models_pytorch import losses

        self._labels = labels
        self._several = labels > 1
        # SMP's "multiclass" takes numbers of classes, not shares; a softmax is made here and given as it is.
        how = {"mode": "multilabel", "from_logits": False} if self._several else {"mode": "binary"}
        alpha, beta = TVERSKY
        self._overlap: nn.Module = (
            losses.TverskyLoss(**how, alpha=alpha, beta=beta) if name == "tversky" else losses.DiceLoss(**how)
        )
        self._pixels: Callable[..., torch.Tensor] | None = {"dice_bce": _entropy, "dice_focal": _focal}.get(name)

    def forward(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, float32, whatever the precision of the logits.

        Parameters
        ----------
        logits : Tensor
            (N, 1, H, W), or (N, 1 + K, H, W) where K labels are told apart.
        shares : Tensor
            float32 (N, K, H, W), from 0 to 1; or (N, K + 1, H, W), the last channel the share of each pixel that does
            not count. A pixel of which any share does not count is left out of every sum and mean.
        """
        # Sums over a million pixels have no three digits in bfloat16, and the overlap is a difference of such sums.
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            counted = None
            if shares.shape[1] > self._labels:
                shares, counted = shares[:, : self._labels], shares[:, self._labels :] == 0
                # Away from any border: nothing is marked there, nothing is labelled, nothing has a gradient.
                logits, shares = torch.where(counted, logits, self._background(logits)), shares * counted
            if self._several:
                probabilities = logits.softmax(1)[:, 1:]
                overlap = self._overlap(probabilities.flatten(2), shares.flatten(2))
            else:
                overlap = self._overlap(logits, shares)
            if self._pixels is not None:
                return torch.add(overlap, self._pixels(logits, shares, counted))
            probabilities = probabilities if self._several else torch.sigmoid(logits)
            absent = shares.sum((0, 2, 3)) == 0
            # What does not count has probability 0.
            share = 1.0 if counted is None else counted.numel() / counted.sum().clamp_min(1)
            return torch.add(overlap, (probabilities.mean((0, 2, 3)) * absent * share).mean())

    def _background(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits, (1, C, 1, 1), of a pixel that is background beyond doubt."""
        certain = logits.new_full((1, logits.shape[1], 1, 1), -_CERTAIN)
        if self._several:
            certain[:, 0] = _CERTAIN
        return certain


def with_background(shares: torch.Tensor) -> torch.Tensor:
    """Put before the shares of several labels, (N, K, H, W), what of each pixel has none: (N, 1 + K, H, W)."""
    return torch.cat([(1 - shares.sum(1, keepdim=True)).clamp_min(0), shares], 1)


def _mean(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of one value a pixel, (N, 1, H, W), over the pixels that count; all do where that is None."""
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


def _focal(logits: torch.Tensor, shares: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    entropy = _entropy(logits, shares, counted, "none")
    return _mean((1 - torch.exp(-entropy)) ** GAMMA * entropy, counted)
