"""How long a network takes to reach a Dice: `cspine-train run` beside a plain float32 loop of the same recipe.

Run as ``python benchmarks/time_to_dice.py STORE [--epochs N]``, on a machine that does nothing else. Both train the
README's network on the same slices with the same loss, optimiser, schedule and changes, and are validated by the same
count; the peer is what one writes with SMP in an afternoon: whole slices, float32, PyTorch's own memory layout and
allocator, slices decoded beforehand and kept in memory, which costs it nothing here. ``--ways`` names what is run.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REACHED = (0.85, 0.90, 0.92)
#: What `cspine-train run` is asked for, beside the recipe.
WAYS: dict[str, list[str]] = {
    "the recipe": [],
    "float32": ["--precision", "32"],
    "cosine": ["--schedule", "cosine"],
    "clipped": ["--clip-norm", "1"],
    "averaged": ["--average", "0.98"],
    "compiled": ["--compile"],
    "coarse at first": ["--coarse-share", "0.4"],
    "pixels of 3 mm": ["--pixel-mm", "3"],
    "pixels of 4 mm": ["--pixel-mm", "4"],
}
RECIPE = {
    "model": "linknet", "encoder": "tu-resnet10t", "weights": "none", "pixel_mm": 2.0, "context": 1,
    "schedule": "onecycle", "learning_rate": 1e-2,
}  # fmt: skip
Row = tuple[float, float]


def plain_loop(store: str, epochs: int) -> None:
    """Train as one does with SMP and PyTorch alone; print seconds of training and validation Dice after each epoch."""
    import torch
    from peers.smp_loop import in_memory, passes

    from cspine_data import open_cohort
    from cspine_train.data.datamodule import CohortSlices
    from cspine_train.data.transforms import inside
    from cspine_train.models.build import build_model, sides_of
    from cspine_train.run.settings import RunSettings
    from cspine_train.training.segmentation_module import THRESHOLDS, best_threshold

    torch.manual_seed(0)
    settings = RunSettings(**RECIPE, epochs=epochs)
    cohort = open_cohort(store)
    network = build_model(settings.model, settings.encoder, "none", settings.channels)[0]
    data = CohortSlices(cohort, cohort.split(variant="n4"), settings, 0, sides_of(network))
    validation = [
        (batch.intensities(), batch.masks, inside(batch.shapes_hw, data.sizes.slice_hw))
        for batch in data.val_dataloader()
    ]
    images, masks = in_memory(data)
    steps = epochs * math.ceil(len(images) / settings.batch_size)
    started = time.perf_counter()
    for _ in passes(network, images, masks, settings, lambda step: step / steps):
        counts = torch.zeros(1, 2, len(THRESHOLDS) + 1, dtype=torch.int64)
        with torch.inference_mode():
            for seen, truth, shown in validation:
                above = torch.bucketize(torch.sigmoid(network(seen)), torch.tensor(THRESHOLDS))
                bins = (truth > 0.5) * (len(THRESHOLDS) + 1) + above
                counts += torch.bincount(bins[shown], minlength=counts.numel()).view_as(counts)
        print(f"{time.perf_counter() - started:.2f},{best_threshold(counts)[0]:.4f}", flush=True)


def of_plain_loop(store: str, epochs: int) -> list[Row]:
    command = [sys.executable, __file__, store, "--epochs", str(epochs), "--plain-loop"]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [(float(seconds), float(dice)) for seconds, dice in (line.split(",") for line in lines)]


def of_run(store: str, epochs: int, options: list[str]) -> list[Row]:
    recipe = [part for name, value in RECIPE.items() for part in ("--" + name.replace("_", "-"), str(value))]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [
            sys.executable, "-m", "cspine_train", "run", "--store", store, *recipe, "--crop-margin-mm", "40",
            "--epochs", str(epochs), "-o", str(run), *options,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            rows = [(float(row["seconds"]), float(row["valid_dice"])) for row in csv.DictReader(file)]
    passed = 0.0
    return [((passed := passed + seconds), dice) for seconds, dice in rows]


def told(name: str, rows: list[Row], plain: list[Row] | None) -> str:
    """Return a line of the table; how many times the plain loop's speed it is comes last."""
    seconds, dice = rows[-1]
    reached = [next((f"{s:.0f}" for s, d in rows if d >= wanted), "never") for wanted in REACHED]
    times = f"{plain[-1][0] / seconds:.2f}" if plain else ""
    # The first epoch holds what is done once, such as compiling.
    epoch = (seconds - rows[0][0]) / max(1, len(rows) - 1)
    return f"| {name} | {seconds:.0f} | {epoch:.1f} | {dice:.3f} | {' | '.join(reached)} | {times} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--plain-loop", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_loop:
        plain_loop(arguments.store, arguments.epochs)
        return
    heads = " | ".join(f"s to {dice:.2f}" for dice in REACHED)
    print(f"| | s | s an epoch | validation Dice | {heads} | times the plain loop |\n|---|---|---|---|---|---|---|---|")
    plain = None if arguments.no_peer else of_plain_loop(arguments.store, arguments.epochs)
    if plain:
        print(told("plain float32 loop", plain, plain), flush=True)
    for way in arguments.ways.split(","):
        print(told(way, of_run(arguments.store, arguments.epochs, WAYS[way]), plain), flush=True)


if __name__ == "__main__":
    main()
