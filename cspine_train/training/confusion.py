"""How good a network that tells labels apart is in validation: which label each pixel has, and which it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cspine_train.training.losses import with_background


def confusion(
    logits: torch.Tensor, shares: torch.Tensor, numbers: torch.Tensor, inside: torch.Tensor, patients: int
) -> torch.Tensor:
    """Count the pixels of a batch by patient, by the class that fills most of them, and by the likeliest one.

    Parameters
    ----------
    logits : Tensor
        (N, 1 + K, H, W), the background's first.
    shares : Tensor
        float32 (N, K, H, W).
    numbers : Tensor
        int64 (N,): which patient each slice is of.
    inside : Tensor
        bool (N, 1, H, W): which pixels count.
    patients : int
        How many there are.

    Returns
    -------
    Tensor
        int64 (patients, 1 + K, 1 + K).
    """
    classes = logits.shape[1]
    truth, found = with_background(shares).argmax(1), logits.argmax(1)
    cells = (numbers.view(-1, 1, 1) * classes + truth) * classes + found
    counts = torch.bincount(cells[inside.squeeze(1)], minlength=patients * classes**2)
    return counts.view(patients, classes, classes)


def mean_label_dice(counts: torch.Tensor, unknown: Sequence[int]) -> float:
    """Return the mean, over patients, of the mean Dice over the labels that each has.

    A patient without any label has no Dice and is left out; where there is no other, it is 0.

    Parameters
    ----------
    counts : Tensor
        What `confusion` gives, summed over batches.
    unknown : sequence of int
        How many labels each patient has besides, that no training case has: their Dice is 0.
    """
    both = counts.diagonal(dim1=1, dim2=2)[:, 1:].double()
    truth, found = counts.sum(2)[:, 1:], counts.sum(1)[:, 1:]
    dice = 2 * both / (truth + found).clamp_min(1)
    has = truth > 0
    labels = has.sum(1) + torch.tensor(unknown, device=counts.device)
    of_patients = ((dice * has).sum(1) / labels.clamp_min(1))[labels > 0]
    return float(of_patients.mean()) if len(of_patients) else 0.0
