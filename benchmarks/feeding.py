"""Slices a second that the loader gives, beside those that one H100 would take.

Run as ``python benchmarks/feeding.py``. It makes two phantoms, resampled so that sagittal slices are some 512 x 512,
and reads them in random order in batches of 32: through a thread, and through workers. What a GPU would take is
estimated from the operations of a training step of FPN-inceptionv4; where there is one, the same step is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cspine_data import Preprocessing, SliceDataset, open_cohort, prepare
from cspine_data.phantom.cohort import make_phantom_cohort
from cspine_train.data.batches import BatchLoader, SliceBatches
from cspine_train.models.build import build_model
from cspine_train.training.allocator import keep_large_blocks

MODEL, ENCODER = "fpn", "inceptionv4"
SIZE = 512
BATCH = 32
# NVIDIA's H100 SXM data sheet: bfloat16, dense. Trained networks of this kind reach some 30 to 50 % of it.
H100_FLOPS = 989e12
UTILISATION = 0.4


def large_slices(folder: Path) -> SliceDataset:
    """Return sagittal slices of nearly 512 x 512."""
    make_phantom_cohort(folder / "raw", cases=2, seed=0)
    sizes_mm = [extent_mm(folder / "raw", folder / "first.zarr")]
    finest = max(sizes_mm[0]) / SIZE
    way = Preprocessing(bias=None, spacing_mm=(4.0, finest * 1.002, finest * 1.002))
    prepare(folder / "raw", folder / "s.zarr", preprocessing=way, axes="0")
    return open_cohort(folder / "s.zarr").slices(axis=0)


def extent_mm(raw: Path, store: Path) -> tuple[float, float]:
    """Return the largest extent of the phantoms along y and z."""
    prepare(raw, store, n4=False, axes="0")
    records = open_cohort(store).records()
    _, y, z = np.max([np.multiply(record.size_xyz, record.spacing_xyz_mm) for record in records], axis=0)
    return float(y), float(z)


def given(slices: SliceDataset, workers: int, batches: int) -> float:
    """Return slices a second that a loader gives to a loop that does nothing else."""
    order = np.random.default_rng(0).integers(0, len(slices), (batches + 4) * BATCH).tolist()
    loader = BatchLoader(SliceBatches(slices, None, (SIZE, SIZE)), BATCH, sampler=order, num_workers=workers)
    coming = iter(loader)
    for _ in range(4):
        next(coming)
    started = time.perf_counter()
    for _ in coming:
        pass
    return batches * BATCH / (time.perf_counter() - started)


def operations() -> float:
    """Return the floating-point operations of a training step, forward and backward, a slice."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build_model(MODEL, ENCODER)[0]
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(2, 1, SIZE, SIZE)).sum().backward()
    return counter.get_total_flops() / 2


def taken(steps: int = 20) -> float:
    """Return slices a second that this machine's GPU trains on: bfloat16, channels last, memory that is there."""
    network = build_model(MODEL, ENCODER)[0].to("cuda", memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    images = torch.randn(BATCH, 1, SIZE, SIZE, device="cuda").contiguous(memory_format=torch.channels_last)
    masks = (torch.rand_like(images) > 0.9).float()
    seconds = []
    for _ in range(steps + 3):
        started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return BATCH / statistics.median(seconds[3:])


def main() -> None:
    """Print what is given and what is taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=60)
    arguments = parser.parse_args()
    # As `cspine-train run` does.
    keep_large_blocks()
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        slices = large_slices(Path(name))
        shape = " x ".join(map(str, slices.shape(0)))
        print(f"slices of {shape}, image and mask, in batches of {BATCH} x {SIZE} x {SIZE}, warm page cache")
        for workers, told in ((0, "a thread, read ahead"), (1, "one worker process"), (2, "two")):
            print(f"| {told} | {given(slices, workers, arguments.batches):.0f} slices/s |", flush=True)
    flops = operations()
    need = H100_FLOPS * UTILISATION / flops
    print(f"{MODEL}-{ENCODER}: {flops / 1e9:.0f} GFLOP a slice and step")
    print(f"one H100 at {UTILISATION:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s: {need:.0f} slices/s")
    if torch.cuda.is_available():
        print(f"this GPU ({torch.cuda.get_device_name()}), measured: {taken():.0f} slices/s")


if __name__ == "__main__":
    main()
