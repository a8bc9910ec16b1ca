"""N4 at working resolutions against ITK's N4 at full resolution: seconds, and how the fields differ.

Run as ``python benchmarks/n4_resolution.py [--volume FILE]``. On a phantom the true field is known, so what each way
leaves of it is printed; on a real volume only the difference from full resolution can be. Seconds are of one
processor, on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from cspine_data import BiasParameters, Orientation, read_volume
from cspine_data.phantom.anatomy import make_case
from cspine_data.preprocessing.bias_field import estimate_bias, estimate_log_bias
from cspine_data.preprocessing.tissue import tissue_threshold

FULL_RESOLUTION = 1e-3
# SimpleITK's own settings, as its tutorial has them, and the same run until nothing changes any more.
TUTORIAL: dict[str, Any] = {
    "iterations": (50, 50, 50, 50), "threshold": 1e-3, "spline_mm": 0.0, "width": 0.15, "noise": 0.01, "stride": 1.0,
}  # fmt: skip
CONVERGED: dict[str, Any] = {**TUTORIAL, "iterations": (200, 200, 200, 200), "threshold": 1e-6}
WAYS = (
    ("ITK, full resolution", BiasParameters(engine="itk", resolution_mm=FULL_RESOLUTION, **TUTORIAL)),
    ("ITK, full resolution, to convergence", BiasParameters(engine="itk", resolution_mm=FULL_RESOLUTION, **CONVERGED)),
    ("ITK, 8 mm", BiasParameters(engine="itk", resolution_mm=8, **TUTORIAL)),
    ("ours, full resolution", BiasParameters(resolution_mm=FULL_RESOLUTION, **TUTORIAL)),
    ("ours, full resolution, to convergence", BiasParameters(resolution_mm=FULL_RESOLUTION, **CONVERGED)),
    ("ours, 8 mm", BiasParameters(resolution_mm=8, **TUTORIAL)),
    ("ours, 4 mm", BiasParameters(resolution_mm=4, **TUTORIAL)),
    ("ours, as prepare does it, air and tissue found by itself", None),
)


def seconds_of(estimate: Callable[[], NDArray[np.float32]], times: int) -> tuple[NDArray[np.float32], float]:
    """Return what is estimated, and the median processor time of some repeats."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        field = estimate()
        seconds.append(time.process_time() - started)
    return field, float(np.median(seconds))


def compare(
    name: str,
    image_xyz: NDArray[np.generic],
    spacing_mm: tuple[float, float, float],
    true_log_bias: NDArray[np.float32] | None = None,
    *,
    converged: bool = False,
) -> None:
    """Print a table for one volume."""
    tissue = image_xyz > tissue_threshold(image_xyz, spacing_mm)
    size = " x ".join(map(str, image_xyz.shape))
    print(f"\n{name}: {size} voxels, {tissue.mean():.0%} tissue")
    if true_log_bias is not None:
        print(f"deviation of the true log field {true_log_bias[tissue].std():.4f}")
    print("| way | seconds | times faster | log field's deviation | difference from full | left of the true field |")
    print("|---|---|---|---|---|---|")
    full, full_seconds = None, 0.0
    for way, parameters in WAYS:
        if parameters is None:
            field, seconds = seconds_of(lambda: estimate_bias(image_xyz, spacing_mm, BiasParameters()).log_bias_xyz, 5)
        else:
            if "convergence" in way and parameters.engine == "itk" and not converged:
                continue
            estimate = partial(estimate_log_bias, image_xyz, tissue, spacing_mm, parameters)
            field, seconds = seconds_of(estimate, 1 if parameters.engine == "itk" else 3)
        if full is None:
            full, full_seconds = field, seconds
        left = "" if true_log_bias is None else f"{(field - true_log_bias)[tissue].std():.4f}"
        print(
            f"| {way} | {seconds:.2f} | {full_seconds / seconds:.0f} | {field[tissue].std():.4f} "
            f"| {(field - full)[tissue].std():.4f} | {left} |",
            flush=True,
        )


def main() -> None:
    """Compare on phantoms, and on a real volume where one is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume", type=Path, help="a real volume, besides the phantoms")
    parser.add_argument(
        "--converged", action="store_true", help="run ITK to convergence on phantoms too: four times as long"
    )
    parser.add_argument("--phantoms", type=int, default=1, help="how many phantoms")
    arguments = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for index in range(arguments.phantoms):
        case = make_case(0, index)
        compare(
            f"phantom {index + 1} (synthetic)",
            case.image_xyz,
            case.spacing_mm,
            case.log_bias_xyz,
            converged=arguments.converged,
        )
    if arguments.volume:
        volume = read_volume(arguments.volume)
        orientation = Orientation.of(volume.geometry)
        image_xyz = np.ascontiguousarray(orientation.to_anatomical(volume.array))
        compare(arguments.volume.name, image_xyz, orientation.geometry_xyz(volume.geometry).spacing_mm)


if __name__ == "__main__":
    main()
