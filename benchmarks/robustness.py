"""What a trained run loses on scans that look otherwise: contrasts, fields, noise, resolutions, motion.

Run as ``python benchmarks/robustness.py COHORT RUN [RUN ...] [--messy FOLDER]``. The volumes of each run's test cases,
taken from their files, are disturbed in fixed ways, predicted as any file is, and held against their label maps.
``--messy`` adds a lumbar scan of another scanner, whose bodies are scored in front of the canal, and a brain, in which
there is nothing to find. None of it is to choose a final model by: it is what a method is developed on.

The expected Dice of all these predictions is held against the true Dice, with Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import spearmanr

from cspine_data import Volume, find_cases, read_volume
from cspine_data.preprocessing.tissue import tissue_threshold
from cspine_data.sources.cases import load_case
from cspine_data.volumes.geometry import Orientation
from cspine_train import LoadedRun, load_run, predict
from cspine_train.metrics.overlap import overlap

Image = NDArray[np.float32]
SEED = 20_260


def of_tissue(change: Callable[[Image], Image]) -> Callable[[Image, float], Image]:
    """Change tissue alone, as another sequence does: `change` maps its intensities from 0 to 1; air stays as it is."""

    def disturbed(image: Image, air: float) -> Image:
        brightest = np.float32(np.percentile(image, 99.5))
        span = brightest - np.float32(air)
        shares = np.clip((image - air) / span, 0, 1)
        mapped = np.float32(air) + span * np.clip(change(shares), 0, 1)
        # Where air ends is a matter of degree, or there would be an edge of the disturbance's own.
        tissue = np.clip((image - air) / (0.08 * span), 0, 1)
        return image + tissue * (mapped.astype(np.float32) - image)

    return disturbed


def random_map(number: int) -> Callable[[Image], Image]:
    values = np.random.default_rng(SEED + number).random(7)
    return lambda shares: np.interp(shares, np.linspace(0, 1, 7), values).astype(np.float32)


def coil_at_the_back(image: Image, air: float) -> Image:
    """Multiply by a surface coil's field: its logarithm falls from back to front by 2.4, and off the middle."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape), indexing="ij")
    return image * np.exp(1.2 * y - 0.3 * x**2 - 0.4 * z**2)


def smooth_field(deviation: float) -> Callable[[Image, float], Image]:
    def disturbed(image: Image, air: float) -> Image:
        knots = np.random.default_rng(SEED).normal(size=(3, 4, 5)).astype(np.float32)
        field = ndimage.zoom(knots, [n / k for n, k in zip(image.shape, knots.shape, strict=True)], order=3)
        return image * np.exp(deviation * (field - field.mean()) / field.std())

    return disturbed


def noise(share: float) -> Callable[[Image, float], Image]:
    """Rician noise, its deviation as a share of the tissue's mean."""

    def disturbed(image: Image, air: float) -> Image:
        sigma = share * float(image[image > air].mean())
        real, imaginary = np.random.default_rng(SEED).normal(0, sigma, (2, *image.shape)).astype(np.float32)
        return np.hypot(image + real, imaginary)

    return disturbed


def voxels(*factors: int) -> Callable[[Image, float], Image]:
    """Acquired with voxels larger by these factors, and interpolated to the old ones."""

    def disturbed(image: Image, air: float) -> Image:
        small = ndimage.uniform_filter(image, factors, mode="nearest")[tuple(slice(f // 2, None, f) for f in factors)]
        at = np.meshgrid(
            *((np.arange(n) - f // 2) / f for n, f in zip(image.shape, factors, strict=True)),
            indexing="ij",
            sparse=True,
        )
        return ndimage.map_coordinates(small, np.broadcast_arrays(*at), order=1, mode="nearest").astype(np.float32)

    return disturbed


def ghosts(strength: float) -> Callable[[Image, float], Image]:
    def disturbed(image: Image, air: float) -> Image:
        shift = image.shape[1] // 5
        copies = np.roll(image, shift, 1) + np.roll(image, -shift, 1)
        return ((image + strength * copies) / (1 + 2 * strength)).astype(np.float32)

    return disturbed


DISTURBANCES: dict[str, Callable[[Image, float], Image]] = {
    "as it is": lambda image, air: image,
    "contrast: gamma 0.5": of_tissue(lambda shares: shares**0.5),
    "contrast: gamma 2": of_tissue(lambda shares: shares**2),
    "contrast: inverted, air dark": of_tissue(lambda shares: 1 - shares),
    "contrast: inverted, air too": lambda image, air: np.float32(np.percentile(image, 99.5)) - image,
    **{f"contrast: random map {number}": of_tissue(random_map(number)) for number in range(1, 5)},
    "field: surface coil": coil_at_the_back,
    "field: smooth, log deviation 0.3": smooth_field(0.3),
    "field: smooth, log deviation 0.6": smooth_field(0.6),
    "noise: 10 %": noise(0.1),
    "noise: 25 %": noise(0.25),
    "voxels: 2 x in plane": voxels(1, 2, 2),
    "voxels: 3 x in plane": voxels(1, 3, 3),
    "voxels: 4 x across": voxels(4, 1, 1),
    "motion: ghosts": ghosts(0.2),
    "inverted and surface coil": lambda image, air: coil_at_the_back(
        of_tissue(lambda shares: 1 - shares)(image, air), air
    ),
}


def disturbed_volume(volume: Volume, change: Callable[[Image, float], Image]) -> Volume:
    """Return a volume changed in anatomical order, on its own grid."""
    orientation = Orientation.of(volume.geometry)
    image = np.ascontiguousarray(orientation.to_anatomical(volume.array), np.float32)
    air = tissue_threshold(image, orientation.geometry_xyz(volume.geometry).spacing_mm)
    changed = change(image, max(air, float(image.min())))
    return Volume(np.ascontiguousarray(orientation.to_file(changed)), volume.geometry)


def scores(run: LoadedRun, cohort: Path, part: str, pairs: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Return the mean Dice over a part's patients under each disturbance; add expected and true Dice to `pairs`."""
    wanted = set(run.record.split.cases(part))
    loaded = [load_case(case) for case in find_cases(cohort).cases if case.id in wanted]
    found = {}
    for name, change in DISTURBANCES.items():
        dice = []
        for case in loaded:
            prediction = predict([run], disturbed_volume(case.image, change))
            dice.append(overlap(prediction.label.array > 0, case.label.array != 0).dice)
            if prediction.expected_dice is not None:
                pairs.setdefault(name, []).append((prediction.expected_dice, dice[-1]))
        found[name] = mean(dice)
        print(f"{run.path.name}: {name}: {found[name]:.3f}", file=sys.stderr, flush=True)
    return found


def messy_scores(run: LoadedRun, folder: Path) -> dict[str, float]:
    """Return Dice of the bodies of a lumbar scan, and how much of a brain is taken for vertebra."""
    image, label = (read_volume(folder / f"lumbar_pir{suffix}.nii.gz") for suffix in ("", "-label"))
    orientation = Orientation.of(image.geometry)
    truth = orientation.to_anatomical(label.array)
    found = orientation.to_anatomical(run.predict(image).array)
    # Discs and end plates have labels from 100 on; the arches behind the canal are no bodies.
    counted = (truth < 200) & (np.arange(truth.shape[1]) < 34)[:, None]
    dice = overlap((found > 0) & counted, (truth > 0) & (truth < 100) & counted).dice
    brain = run.predict(read_volume(folder / "brain.nrrd"))
    litres = float(np.prod(brain.geometry.spacing_mm)) * np.count_nonzero(brain.array) / 1e3
    return {"lumbar_pir, bodies": dice, "brain, ml marked": litres}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--messy", type=Path)
    parser.add_argument("--part", default="test")
    parser.add_argument("-o", "--output", type=Path, help="CSV")
    arguments = parser.parse_args()
    columns, pairs = {}, dict[str, list[tuple[float, float]]]()
    for path in arguments.runs:
        run = load_run(path)
        columns[path.name] = scores(run, arguments.cohort, arguments.part, pairs)
        columns[path.name]["mean of all disturbances"] = mean(list(columns[path.name].values())[1:])
        if arguments.messy:
            columns[path.name] |= messy_scores(run, arguments.messy)
    rows = [(name, *(f"{column[name]:.3f}" for column in columns.values())) for name in next(iter(columns.values()))]
    print("| disturbance | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    together = [pair for of_one in pairs.values() for pair in of_one]
    for what, some in (("as it is", pairs.get("as it is", [])), ("all", together)):
        if len(some) > 2:
            expected, true = np.transpose(some)
            off, rank = np.abs(expected - true), spearmanr(expected, true).statistic
            print(
                f"expected Dice, {what}: {len(some)} predictions, rank correlation {rank:.2f}, "
                f"mean difference {off.mean():.3f}, at most {off.max():.3f}"
            )
    if arguments.output:
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("disturbance", *columns), *rows])


if __name__ == "__main__":
    main()
