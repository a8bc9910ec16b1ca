"""Confusion matrices of validation with several labels, and their Dice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cspine_train.training.losses import with_background


def confusion(
    logits: torch.Tensor, shares: torch.Tensor, numbers: torch.Tensor, inside: torch.Tensor, patients: int
) -> torch.Tensor:
    """Count the pixels of a batch by patient, true class and predicted class.

    The true class of a pixel is the one with the largest share of it.

    Parameters
    ----------
    logits : Tensor
        (N, 1 + K, H, W), the background first.
    shares : Tensor
        float32 (N, K, H, W).
    numbers : Tensor
        int64 (N,): index of each slice's patient.
    inside : Tensor
        bool (N, 1, H, W): the pixels that count.
    patients : int
        Number of patients.

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


def over_patients(figures: torch.Tensor, cases: torch.Tensor, patients: Sequence[int] | None) -> torch.Tensor:
    """Return the mean over the cases of each patient: (cases, ...) becomes (patients, ...).

    Parameters
    ----------
    figures : Tensor
        float (cases, ...).
    cases : Tensor
        int64 (cases,): the number of each case.
    patients : sequence of int or None
        A number of the patient of every case; None: each case has its own.
    """
    of_cases = cases if patients is None else torch.tensor(patients, device=cases.device)[cases]
    return torch.stack([figures[of_cases == patient].mean(0) for patient in dict.fromkeys(of_cases.tolist())])


def mean_label_dice(counts: torch.Tensor, unknown: Sequence[int], patients: Sequence[int] | None = None) -> float:
    """Return the mean over patients of each patient's mean Dice over its labels.

    Cases without a label are left out; without any other case, the mean is 0.

    Parameters
    ----------
    counts : Tensor
        Result of `confusion`, summed over batches.
    unknown : sequence of int
        Number of labels of each case that no training case has: their Dice is 0.
    patients : sequence of int, optional
        A number of each case's patient; by default, each case has its own.
    """
    both = counts.diagonal(dim1=1, dim2=2)[:, 1:].double()
    truth, found = counts.sum(2)[:, 1:], counts.sum(1)[:, 1:]
    dice = 2 * both / (truth + found).clamp_min(1)
    has = truth > 0
    labels = has.sum(1) + torch.tensor(unknown, device=counts.device)
    cases = (labels > 0).nonzero().flatten()
    if not len(cases):
        return 0.0
    of_cases = ((dice * has).sum(1) / labels.clamp_min(1))[cases]
    return float(over_patients(of_cases, cases, patients).mean())
