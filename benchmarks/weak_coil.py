"""Volumes as a weak surface coil acquires them, and what each way of N4 makes of them.

`bias_accuracy.py COHORT --coil [--run RUN]` prints the table. Signal falls off away from the back, over Rician noise,
in 8 bits. What N4 leaves is held against the true field, over the voxels that our estimate takes for tissue: the coil's
field, and what `default` finds on the volume before the coil was simulated. With a run, Dice is that of its prediction;
"true field" is the same volume corrected by the true field with the same bounded gain and the same statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cspine_data import bias_parameters
from cspine_data.preprocessing.bias_field import BiasEstimate, correct, estimate_bias
from cspine_data.preprocessing.normalisation import TissueStatistics, normalisation_of

Image = NDArray[np.float32]
Spacing = tuple[float, float, float]
REACHES_MM = (60, 40, 25, 15)
NOISES = (1, 2, 4)


@dataclass(frozen=True, eq=False)
class CoilVolume:
    """A simulated volume, (x, y, z), and the logarithm of the coil's field."""

    image: Image
    log_field: Image


def without_offset(image: Image) -> Image:
    """Return intensities above those of air."""
    return np.maximum(image - np.percentile(image, 5), 0)


def simulate(image: Image, spacing_mm: Spacing, reach_mm: float, noise: float, seed: int = 0) -> CoilVolume:
    """Return a volume as a coil behind the patient acquires it.

    Parameters
    ----------
    image : ndarray
        Intensities, (x, y, z), y growing to the back.
    spacing_mm : tuple of float
        Voxel spacing.
    reach_mm : float
        Distance over which the signal falls to 1/e.
    noise : float
        Standard deviation of the noise in each of the two channels, of 255.
    seed : int
        Of the noise.
    """
    signal = without_offset(image)
    tissue = signal > 0.15 * np.percentile(signal, 99)
    last = signal.shape[1] - 1 - tissue[:, ::-1].argmax(1)
    back = np.median(last[tissue.any(1)])
    depth_mm = np.maximum(back - np.arange(signal.shape[1]), 0) * spacing_mm[1]
    log_field = np.broadcast_to((-depth_mm / reach_mm)[None, :, None].astype(np.float32), signal.shape)
    signal = signal * np.exp(log_field)
    signal *= 255 / np.percentile(signal, 99.95)
    channels = np.random.default_rng(seed).normal(0, noise, (2, *signal.shape)).astype(np.float32)
    magnitude = np.hypot(signal + channels[0], channels[1])
    return CoilVolume(np.clip(np.rint(magnitude), 0, 255).astype(np.float32), log_field)


Dice = Callable[[Image, NDArray[np.bool_]], float]


def dice_of(run_folder: str, spacing_mm: Spacing, label: NDArray[np.bool_]) -> Dice:
    """Return what gives the Dice of a run's prediction of a corrected volume, given which voxels are tissue."""
    from cspine_train import load_run

    run = load_run(run_folder)

    def dice(corrected: Image, tissue: NDArray[np.bool_]) -> float:
        normalised = normalisation_of(TissueStatistics.of(corrected, tissue), "zscore", None, "x").apply(corrected)
        found = run.probabilities(np.clip(normalised, -32, 32), spacing_mm) > run.record.threshold
        return float(2 * (found & label).sum() / (found.sum() + label.sum()))

    return dice


def rows(
    image: Image, spacing_mm: Spacing, ways: Mapping[str, Callable[[Image, Spacing], Image]], dice: Dice | None
) -> Iterator[str]:
    """Yield the lines of the table: for each reach and noise what each way leaves, and Dice where there is a run."""
    heads = ["reach, mm", "noise", "field's deviation", *(f"{name}: left" for name in ways)]
    heads += ["Dice: uncorrected", "ours", "true field"] if dice else []
    yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    own = estimate_bias(without_offset(image), spacing_mm, bias_parameters()).log_bias_xyz
    for reach_mm, noise in itertools.product(REACHES_MM, NOISES):
        coil = simulate(image, spacing_mm, reach_mm, noise)
        found = estimate_bias(coil.image, spacing_mm, bias_parameters())
        tissue = found.tissue_xyz
        true = own + coil.log_field
        true -= true[tissue].mean()
        deviation = true[tissue].std()
        left = [(way(coil.image, spacing_mm) - true)[tissue].std() / deviation for way in ways.values()]
        cells = [str(reach_mm), str(noise), f"{deviation:.2f}", *(f"{share:.2f}" for share in left)]
        if dice:
            cells += [f"{value:.3f}" for value in _dices(coil, found, true, dice)]
        yield f"| {' | '.join(cells)} |"


def _dices(coil: CoilVolume, found: BiasEstimate, true: Image, dice: Dice) -> tuple[float, float, float]:
    by_true_field = correct(coil.image, true, found.air_level, found.noise_ratio)
    return (
        dice(coil.image, found.tissue_xyz),
        dice(found.corrected_xyz, found.tissue_xyz),
        dice(by_true_field, found.tissue_xyz),
    )
