"""The expected Dice of a mask, from calibrated probabilities.

Voxels are counted by their logits, so that a calibration is fitted, and the expected Dice computed, without volumes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import expit

from cspine_train.metrics.overlap import Overlap

# Bins of logits from -20 to 20; float32 probabilities near 1 end at 17.
_LIMIT, _PER_UNIT = 20, 40
_BINS = 2 * _LIMIT * _PER_UNIT
_CENTRES = (np.arange(_BINS) + 0.5) / _PER_UNIT - _LIMIT
# Lowest and highest slope and intercept.
_BOUNDS = ((0.01, -_LIMIT), (100, _LIMIT))


def count_logits(
    total: NDArray[np.float32],
    weight: float,
    mask: NDArray[np.bool_],
    truth: NDArray[np.bool_] | None = None,
    ignored: NDArray[np.bool_] | None = None,
    implausible: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Count the voxels of a volume by truth, mask and the logit of the probability of any label.

    Parameters
    ----------
    total : ndarray
        float32, (K, x, y, z): the probability of each label, times `weight`.
    weight : float
        The sum of the weights of the runs.
    mask, truth : ndarray of bool
        The predicted mask, and the true mask if it is known, (x, y, z).
    ignored : ndarray of bool, optional
        Voxels that do not count.
    implausible : ndarray of bool, optional
        Voxels that get the lowest logit, whatever their probability.

    Returns
    -------
    ndarray
        int64, (2, 2, bins): outside and inside the true mask, outside and inside the predicted mask. Without a truth,
        all voxels are outside it.
    """
    counts = np.zeros(4 * _BINS, np.int64)
    # Slab by slab: logits of a whole volume would take as much memory as its probabilities.
    for x, in_mask in enumerate(mask):
        probability = np.clip(total[:, x].sum(0) / np.float32(weight), 0, 1)
        with np.errstate(divide="ignore"):
            logits = np.log(probability) - np.log1p(-probability)
        if implausible is not None:
            logits[implausible[x]] = -_LIMIT
        cells = np.clip((logits + _LIMIT) * _PER_UNIT, 0, _BINS - 1).astype(np.int32) + _BINS * in_mask
        if truth is not None:
            cells += 2 * _BINS * truth[x]
        counts += np.bincount(cells.ravel() if ignored is None else cells[~ignored[x]], minlength=4 * _BINS)
    return counts.reshape(2, 2, _BINS)


def calibrated_logits(counts: NDArray[np.int64]) -> tuple[float, float]:
    """Return the slope and intercept of the calibrated logit.

    With them, the expected numbers of true positive and of false negative voxels are the true ones. These numbers
    decide the Dice of a mask. The likelihood (Platt 1999) depends more on the many voxels of the background.

    Parameters
    ----------
    counts : ndarray
        Those of `count_logits` with the truth, or their sum over volumes.
    """
    outside, inside = counts.sum(0)
    overlap = counted_overlap(counts)

    def errors(parameters: NDArray[np.float64]) -> list[float]:
        probability = expit(parameters[0] * _CENTRES + parameters[1])
        pairs = ((probability @ inside, overlap.true_positive), (probability @ outside, overlap.false_negative))
        # Half a voxel, as there may be none.
        return [float(np.log((expected + 0.5) / (true + 0.5))) for expected, true in pairs]

    found = least_squares(errors, (1.0, 0.0), bounds=_BOUNDS)
    return float(found.x[0]), float(found.x[1])


def expected_dice(counts: NDArray[np.int64], slope: float = 1.0, intercept: float = 0.0) -> float:
    """Return the Dice of a mask if its calibrated probabilities are right.

    It is 2 sum(p m) / (sum(p) + sum(m)) with probabilities p and mask m (Borges 2024, "Soft Dice Confidence"). For an
    empty mask, it is 1 if less than half a voxel is expected, else 0.

    Parameters
    ----------
    counts : ndarray
        The voxels, see `count_logits`; the truth is not used.
    slope, intercept : float
        The calibrated logit is the logit times `slope`, plus `intercept`.
    """
    outside, inside = counts.sum(0)
    probability = expit(slope * _CENTRES + intercept)
    probable, marked = float(probability @ (outside + inside)), int(inside.sum())
    return 2 * float(probability @ inside) / (probable + marked) if marked else float(probable < 0.5)


def counted_overlap(counts: NDArray[np.int64]) -> Overlap:
    """Return the overlap of mask and truth in the voxels of `count_logits`."""
    (_, false_positive), (false_negative, true_positive) = counts.sum(2).tolist()
    return Overlap(true_positive, false_positive, false_negative)
