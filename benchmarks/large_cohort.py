"""What a cohort of ten thousand cases costs: opening it, adding to it, a dataset of its slices, and what workers hold.

Run as ``python benchmarks/large_cohort.py STORE --work FOLDER``. STORE is any store of one variant. Its first case is
put ten thousand times into another, each with a record of its own; the slices themselves are hard links, so FOLDER must
be on the same disk. Every random slice is then of another case than the one before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cspine_data import Geometry, Volume, open_cohort, prepare, write_volume
from cspine_data.store import schema
from cspine_data.store.publishing import write_record
from cspine_data.store.records import read_root


def write_large(store: Path, large: Path, cases: int) -> None:
    """Write a store that holds one case of another many times."""
    record = open_cohort(store).records()[0]
    source = store / schema.case_path(record.case, record.digest)
    files = [name for name in record.files if name.startswith("axis")]
    digests = {f"C{number:05d}": hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(cases)}
    for case, digest in digests.items():
        folder = large / schema.case_path(case, digest)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, folder / name)
        write_record(folder, record.model_copy(update={"case": case, "digest": digest}))
    named = {case: {record.variant: digest} for case, digest in digests.items()}
    voxels = {digest: hashlib.sha256(digest.encode()).hexdigest() for digest in digests.values()}
    root = read_root(store).model_copy(update={"cases": named, "voxels": voxels, "enrolled": (tuple(digests),)})
    write_record(large, root)


def timed(title: str, do: Callable[[], Any]) -> Any:
    """Do something, and print a row: how long it took, and what the process holds then."""
    started = time.perf_counter()
    result = do()
    milliseconds = (time.perf_counter() - started) * 1e3
    print(f"| {title} | {milliseconds:.0f} ms | {psutil.Process().memory_info().rss / 1e6:.0f} MB |", flush=True)
    return result


def without_torch(large: Path) -> None:
    """Measure what a notebook, or a worker, does first."""
    cohort = timed("open the cohort", lambda: open_cohort(large))
    timed("list its cases", lambda: cohort.cases)
    for axes in ((0,), (0, 1, 2)):
        slices = timed(f"a dataset of the slices along {len(axes)} axes", lambda axes=axes: cohort.slices(axis=axes))
        content = timed("pickle it", lambda slices=slices: pickle.dumps(slices))
        timed(f"unpickle it ({len(content) / 1e6:.0f} MB)", lambda content=content: pickle.loads(content))  # noqa: S301
    slices = cohort.slices(axis=0)
    order = np.random.default_rng(0).permutation(len(slices))[:4000].tolist()
    images = np.empty((8, 1, *slices.shape(0)), np.int16)
    labels = np.empty((8, 1, *slices.shape(0)), np.uint8)

    def read() -> None:
        for start in range(0, len(order), 8):
            slices.read_into(order[start : start + 8], images, labels)

    timed("4000 random slices of axis 0", read)
    print(f"open files: {sum(1 for _ in Path('/proc/self/fd').iterdir())}")


def in_workers(large: Path) -> None:
    """Measure what the workers of a training run hold."""
    from cspine_train.data.batches import BatchLoader, SliceBatches

    slices = open_cohort(large).slices(axis=(0, 1, 2))
    batches = SliceBatches(slices, None, (384, 384))
    order = np.random.default_rng(0).permutation(len(slices))[:4000].tolist()
    for method in ("fork", "spawn"):
        loader = BatchLoader(batches, 8, sampler=order, num_workers=2, multiprocessing_context=method)
        started = time.perf_counter()
        coming = iter(loader)
        next(coming)
        seconds = time.perf_counter() - started
        for _ in range(len(loader) - 20):
            next(coming)
        for child in psutil.Process().children():
            held = child.memory_full_info()
            if held.rss > 100e6:
                own, shared = held.uss / 1e6, held.rss / 1e6
                print(f"| {method}: a worker, first batch after {seconds:.1f} s | {own:.0f} MB own | {shared:.0f} MB |")
        del coming, loader


def adding(large: Path) -> None:
    """Measure what it takes to add 50 small cases, and the same once more."""
    rng = np.random.default_rng(0)
    grid = Geometry(
        size=(24, 24, 24), spacing_mm=(1.0, 1.0, 1.0), directions=((1, 0, 0), (0, 1, 0), (0, 0, 1)), origin_mm=(0, 0, 0)
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in range(50):
            write_volume(Path(folder) / f"new{number}.nrrd", Volume(rng.integers(0, 900, grid.size, np.int16), grid))
        for title in ("prepare 50 small cases into it", "and again, with nothing to do"):
            done = timed(title, lambda: prepare(folder, large, n4=False, workers=2))
            assert not done.failed


PARTS = {"notebook": without_torch, "workers": in_workers, "adding": adding}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--work", type=Path, help="where to write, on the store's disk")
    parser.add_argument("--only", choices=tuple(PARTS), help="measure this part only")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments.store)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        large = Path(folder) / "large.zarr"
        large.mkdir()
        write_large(arguments.store, large, arguments.cases)
        print("| | | resident |\n|---|---|---|", flush=True)
        for part in [arguments.only] if arguments.only else PARTS:
            subprocess.run([sys.executable, __file__, str(large), "--part", part], check=True)


if __name__ == "__main__":
    main()
