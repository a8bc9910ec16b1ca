"""Make a small synthetic cohort, prepare it, read slices and summarise them.

Run ``python examples/look_at_slices.py FOLDER``. PyTorch is not needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cspine_data
from cspine_data.phantom.cohort import make_phantom_cohort


def main(folder: Path) -> None:
    """Make, prepare and read three synthetic necks."""
    make_phantom_cohort(folder / "raw", cases=3)
    summary = cspine_data.prepare(folder / "raw", folder / "cspine.zarr", n4=True, axes="02")
    print(f"prepared {', '.join(summary.done)} in {summary.seconds:.0f} s")
    cohort = cspine_data.open_cohort(folder / "cspine.zarr")
    for axis, name in ((0, "sagittal"), (2, "axial")):
        slices = cohort.slices(axis=axis, split="train", only_labelled=True)
        image, mask = slices[len(slices) // 2]
        content = f"shape {image.shape}, {mask.mean():.1%} vertebra"
        print(f"{len(slices)} labelled {name} slices to train on; the middle one: {content}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
