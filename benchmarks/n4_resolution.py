"""N4 at working resolutions against N4 at full resolution: seconds, and how the fields differ.

Run as ``python benchmarks/n4_resolution.py [--volume FILE]``. On a phantom the true field is known, so what each
resolution leaves of it is printed; on a real volume only the difference from full resolution can be. Seconds are of
one processor, on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from cspine_data import BiasParameters, Orientation, read_volume
from cspine_data._anatomy import make_case
from cspine_data.bias import estimate_log_bias, tissue_threshold

RESOLUTIONS_MM = (12.0, 10.0, 8.0, 6.0, 4.0)
FULL_RESOLUTION = 1e-3


def measured(
    image_xyz: NDArray[np.generic], spacing_mm: tuple[float, float, float], resolution_mm: float
) -> tuple[float, NDArray[np.float32], NDArray[np.bool_]]:
    """Estimate the field at one resolution; return processor seconds, log field, tissue."""
    tissue = image_xyz > tissue_threshold(image_xyz, spacing_mm)
    started = time.process_time()
    log_bias = estimate_log_bias(image_xyz, tissue, spacing_mm, BiasParameters(resolution_mm=resolution_mm))
    return time.process_time() - started, log_bias, tissue


def compare(
    name: str,
    image_xyz: NDArray[np.generic],
    spacing_mm: tuple[float, float, float],
    true_log_bias: NDArray[np.float32] | None = None,
) -> None:
    """Print a table for one volume."""
    full_seconds, full, tissue = measured(image_xyz, spacing_mm, FULL_RESOLUTION)
    size = " x ".join(map(str, image_xyz.shape))
    print(f"\n{name}: {size} voxels; deviation of the log field at full resolution {full[tissue].std():.4f}")
    if true_log_bias is not None:
        print(f"deviation of the true log field {true_log_bias[tissue].std():.4f}")
    print("| working mm | seconds | times faster | difference from full | left of the true field | of full's |")
    print("|---|---|---|---|---|---|")
    left_by_full = None if true_log_bias is None else (full - true_log_bias)[tissue].std()
    for resolution in (FULL_RESOLUTION, *RESOLUTIONS_MM):
        if resolution == FULL_RESOLUTION:
            seconds, field, label = full_seconds, full, "full"
        else:
            (seconds, field, _), label = measured(image_xyz, spacing_mm, resolution), f"{resolution:g}"
        left, share = "", ""
        if true_log_bias is not None and left_by_full is not None:
            value = (field - true_log_bias)[tissue].std()
            left, share = f"{value:.4f}", f"{value / left_by_full:.3f}"
        difference = (field - full)[tissue].std()
        print(
            f"| {label} | {seconds:.2f} | {full_seconds / seconds:.0f} | {difference:.4f} | {left} | {share} |",
            flush=True,
        )


def main() -> None:
    """Compare on phantoms, and on a real volume where one is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume", type=Path, help="a real volume, besides the phantoms")
    parser.add_argument("--phantoms", type=int, default=2, help="how many phantoms")
    arguments = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for index in range(arguments.phantoms):
        case = make_case(0, index)
        compare(f"phantom {index + 1} (synthetic)", case.image_xyz, case.spacing_mm, case.log_bias_xyz)
    if arguments.volume:
        volume = read_volume(arguments.volume)
        orientation = Orientation.of(volume.geometry)
        image_xyz = np.ascontiguousarray(orientation.to_anatomical(volume.array))
        compare(arguments.volume.name, image_xyz, orientation.geometry_xyz(volume.geometry).spacing_mm)


if __name__ == "__main__":
    main()
