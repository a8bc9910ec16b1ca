"""Microseconds of a random slice, image and mask: through `SliceDataset`, and through zarr-python.

Run as ``python benchmarks/reader.py STORE [--variant n4]``; warm page cache, one process, the same slices in turn.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import zarr

from cspine_data import open_cohort


def main() -> None:
    """Print a row an axis."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--variant", default="n4")
    parser.add_argument("--slices", type=int, default=200)
    arguments = parser.parse_args()
    cohort = open_cohort(arguments.store)
    record = cohort.records(arguments.variant)[0]
    folder = f"{arguments.store}/cases/{record.case}/{record.digest}"
    print("| axis | ours, us | zarr-python, us | times faster |")
    print("|---|---|---|---|")
    for axis in record.axes:
        slices = cohort.slices(axis=axis, variant=arguments.variant, cases=[record.case])
        image, label = (zarr.open_array(f"{folder}/axis{axis}/{kind}", mode="r") for kind in ("image", "label"))
        chosen = np.random.default_rng(0).integers(0, len(slices), arguments.slices).tolist()
        ours, theirs = [], []
        for position in chosen:
            started = time.perf_counter()
            found = slices[position]
            between = time.perf_counter()
            expected = record.levels.decode(image[position]), label[position]
            ours.append(between - started)
            theirs.append(time.perf_counter() - between)
            assert np.array_equal(found[0][0], expected[0])
        fast, slow = np.median(ours) * 1e6, np.median(theirs) * 1e6
        print(f"| {axis} | {fast:.0f} | {slow:.0f} | {slow / fast:.0f} |")


if __name__ == "__main__":
    main()
