"""What `cspine-data prepare` costs beside SimpleITK's N4 alone, and whether a larger cohort costs more a voxel.

Run as ``python benchmarks/prepare_cohort.py COHORT [--phantoms 64] [--work FOLDER]``. SimpleITK's N4 takes one volume
of the cohort at shrink 8 with four levels of 50 iterations, Otsu's mask and one thread, and evaluates its field;
prepare takes all of them, N4 and slices along three axes. The phantoms are 176 x 256 x 256 voxels. Memory is what the
largest process held, in the first and in the last third of the time. FOLDER takes some 10 GB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk
from bias_accuracy import simpleitk_log_bias

from cspine_data import Geometry, Volume, find_cases, open_cohort, read_volume, write_volume
from cspine_data.phantom.anatomy import make_case

_SIZE = (176, 256, 256)
_ANATOMIES = 8


def seconds_of_itk(path: Path) -> float:
    """Return what SimpleITK's N4 at shrink 8 takes for one volume, its field on the full grid included."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.ReadImage(str(path), sitk.sitkFloat32)
    started = time.perf_counter()
    simpleitk_log_bias(image, 8, otsu=True)
    return time.perf_counter() - started


def make_phantoms(folder: Path, count: int) -> None:
    """Write large phantoms: some anatomies, each with noise of its own many times."""
    extent_mm = (72.0, 120.0, 136.0)
    spacing_mm = tuple(extent / n for extent, n in zip(extent_mm, _SIZE, strict=True))
    anatomy = cache(lambda number: make_case(1, number, spacing_mm))
    for index in range(count):
        path = folder / f"CS_{index + 1:03d}.nrrd"
        if path.exists():
            continue
        case = anatomy(index % _ANATOMIES)
        noise = np.random.default_rng(index).standard_normal(case.image_xyz.shape, np.float32)
        geometry = Geometry(
            size=case.image_xyz.shape,
            spacing_mm=case.spacing_mm,
            directions=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
            origin_mm=(0, 0, 0),
        )
        image = np.maximum(case.image_xyz + 3 * noise, 0).astype(np.int16)
        write_volume(path, Volume(image, geometry))
        write_volume(folder / f"CS_{index + 1:03d}S-label.nrrd", Volume(case.label_xyz, geometry))


@dataclass
class Cost:
    """What preparing a cohort took."""

    seconds: float
    voxels: int
    store_share: float
    first_third_mb: float
    last_third_mb: float

    def row(self, name: str, itk: float) -> str:
        """Return a line of the table."""
        cells = (
            name, f"{self.seconds:.1f}", f"{self.seconds / itk:.1f}", f"{self.seconds / self.voxels * 1e9:.0f}",
            f"{self.store_share:.2f}", f"{self.first_third_mb:.0f} / {self.last_third_mb:.0f}",
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def prepare(cohort: Path, store: Path) -> Cost:
    """Prepare a cohort in a process of its own, as a user would, and watch its memory."""
    shutil.rmtree(store, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "cspine_data", "prepare", str(cohort), "--store", str(store)]
    process = psutil.Popen([*command, "--n4", "--axes", "012"], stdout=subprocess.DEVNULL)
    largest = []
    while process.poll() is None:
        sizes = [0]
        for one in (process, *process.children(recursive=True)):
            try:
                sizes.append(one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        largest.append(max(sizes) / 1e6)
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    assert process.returncode == 0
    records = open_cohort(store).records()
    voxels = sum(int(np.prod(record.size_xyz)) for record in records)
    stored = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    third = len(largest) // 3
    return Cost(seconds, voxels, stored / (voxels * 4 * 4), max(largest[:third]), max(largest[-third:]))


def main() -> None:
    """Print a row a cohort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path, help="folder of real volumes")
    parser.add_argument("--phantoms", type=int, default=64, help="how many large phantoms")
    parser.add_argument("--work", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=3, help="of the real cohort; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if arguments.phantoms:
            make_phantoms(work / "phantoms", arguments.phantoms)
        volume = find_cases(arguments.cohort).cases[0].volume
        itk = float(np.median([seconds_of_itk(volume) for _ in range(3)]))
        size = " x ".join(map(str, read_volume(volume).array.shape))
        print(f"SimpleITK's N4 of {volume.name} ({size}), shrink 8, 4 x 50, Otsu's mask, one thread: {itk:.2f} s\n")
        print("| cohort | s | times SimpleITK's one | ns a voxel | share of raw float32 | MB, first / last third |")
        print("|---|---|---|---|---|---|")
        costs = [prepare(arguments.cohort, work / "real.zarr") for _ in range(arguments.repeats)]
        median = sorted(costs, key=lambda cost: cost.seconds)[len(costs) // 2]
        print(median.row(str(arguments.cohort.name), itk), flush=True)
        if arguments.phantoms:
            print(prepare(work / "phantoms", work / "phantoms.zarr").row(f"{arguments.phantoms} phantoms", itk))


if __name__ == "__main__":
    main()
