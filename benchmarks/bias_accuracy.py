"""How much of a known bias field each way of N4 leaves: phantoms, and real volumes times a known field.

Run as ``python benchmarks/bias_accuracy.py [VOLUME ...]``. On a phantom the true field is known. On a real volume it
is not, so a known one is multiplied into what lies above air, and the difference of the two estimated fields is held
against it; each estimate finds its own air and tissue, as it would have to. What is left is given as a share of the
known field's deviation, over the tissue. An estimate that flattened everything would do well on real volumes, which is
why phantoms are beside them. Seconds are of one processor on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from cspine_data import Orientation, bias_parameters, read_volume
from cspine_data._anatomy import make_case
from cspine_data.bias import estimate_bias
from cspine_data.tissue import air_level, tissue_threshold

Image = NDArray[np.float32]
Spacing = tuple[float, float, float]
Way = Callable[[Image, Spacing], Image]


def ours(preset: str = "default", **changes: object) -> Way:
    """Return our estimate as a preset has it, with some parameters changed."""
    parameters = bias_parameters(preset, **changes)
    return lambda image, spacing_mm: estimate_bias(image, spacing_mm, parameters).log_bias_xyz


def tutorial(image_xyz: Image, spacing_mm: Spacing) -> Image:
    """Estimate as SimpleITK's tutorial does: Otsu's mask, every fourth voxel, four levels of 50 iterations."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(image_xyz.transpose()))
    image.SetSpacing(spacing_mm)
    mask = sitk.OtsuThreshold(image, 0, 1, 200)
    shrink = [min(4, max(1, size // 8)) for size in image.GetSize()]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([50] * 4)
    n4.Execute(sitk.Shrink(image, shrink), sitk.Shrink(mask, shrink))
    return np.ascontiguousarray(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).transpose())


WAYS: dict[str, Way] = {
    "SimpleITK, Otsu's mask, shrink 4, 4 x 50": tutorial,
    "4 x 50, 0.001, width 0.15, noise 0.01, one mask": ours(
        iterations=(50,) * 4, threshold=1e-3, width=0.15, noise=0.01, mask_passes=0
    ),
    "width 0.15, noise 0.01": ours(width=0.15, noise=0.01),
    "noise 0.01": ours(noise=0.01),
    "one mask": ours(mask_passes=0),
    "fast": ours("fast"),
    "default": ours(),
    "thorough": ours("thorough"),
    "4 x 100": ours(iterations=(100,) * 4),
    "4 x 400": ours(iterations=(400,) * 4),
    "40 mm": ours(spline_mm=40),
    "80 mm": ours(spline_mm=80),
    "on 9 mm": ours(resolution_mm=9),
}


def known_fields(shape: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
    """Return smooth fields of several shapes, of any deviation."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij", sparse=True)
    return {
        "linear": 0.5 * z + 0.3 * y + 0.2 * x,
        "quadratic": -((z - 0.2) ** 2) - 0.5 * (y + 0.1) ** 2 + 0.1 * x,
        "coil": -np.log(0.15 + ((y - 1.2) / 1.5) ** 2 + 0.4 * z**2 + 0.3 * x**2),
        "bumps": 0.4 * np.sin(2.2 * z + 0.5) * np.cos(1.7 * y) + 0.15 * x,
    }


def left_on_real(image_xyz: Image, spacing_mm: Spacing, way: Way, deviation: float) -> dict[str, float]:
    """Return the share of each known field that is left on one volume."""
    threshold = tissue_threshold(image_xyz, spacing_mm)
    air = np.float32(air_level(image_xyz, threshold))
    tissue = image_xyz > threshold
    without = way(image_xyz, spacing_mm)
    left = {}
    for name, field in known_fields(image_xyz.shape).items():
        log_bias = ((field - field[tissue].mean()) * deviation / field[tissue].std()).astype(np.float32)
        biased = np.where(image_xyz > air, air + (image_xyz - air) * np.exp(log_bias), image_xyz)
        difference = way(biased, spacing_mm) - without - log_bias
        left[name] = float(difference[tissue].std() / deviation)
    return left


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("volumes", type=Path, nargs="*", help="real volumes")
    parser.add_argument("--phantoms", type=int, default=4, help="how many phantoms")
    parser.add_argument("--deviation", type=float, default=0.244, help="of the known log fields")
    parser.add_argument("--only", help="only ways whose name holds this")
    arguments = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    real = []
    for path in arguments.volumes:
        volume = read_volume(path)
        orientation = Orientation.of(volume.geometry)
        image_xyz = np.ascontiguousarray(orientation.to_anatomical(volume.array)).astype(np.float32)
        real.append((image_xyz, orientation.geometry_xyz(volume.geometry).spacing_mm))
    kinds = tuple(known_fields((2, 2, 2)))
    print("| way | s a volume | phantoms: left, mean (worst) | real: left, mean (worst) | " + " | ".join(kinds) + " |")
    print("|---" * (4 + len(kinds)) + "|")
    for name, way in WAYS.items():
        if arguments.only and arguments.only not in name:
            continue
        on_phantoms = []
        for index in range(arguments.phantoms):
            case = make_case(0, index)
            tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
            difference = way(case.image_xyz.astype(np.float32), case.spacing_mm) - case.log_bias_xyz
            on_phantoms.append(float(difference[tissue].std() / case.log_bias_xyz[tissue].std()))
        cells = [f"{np.mean(on_phantoms):.2f} ({max(on_phantoms):.2f})"]
        started = time.process_time()
        by_volume = [left_on_real(image_xyz, spacing_mm, way, arguments.deviation) for image_xyz, spacing_mm in real]
        seconds = (time.process_time() - started) / max(len(real) * (1 + len(kinds)), 1)
        if by_volume:
            everything = [share for shares in by_volume for share in shares.values()]
            cells.append(f"{np.mean(everything):.2f} ({max(everything):.2f})")
            cells += [f"{np.mean([shares[kind] for shares in by_volume]):.2f}" for kind in by_volume[0]]
        print(f"| {name} | {seconds:.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
