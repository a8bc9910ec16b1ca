"""What a study costs over the plain commands: the same cells by `run` and `evaluate`, and by `study`, one at a time.

Run as ``python benchmarks/study_overhead.py STORE [--epochs N]``, on a machine that does nothing else. Planning, the
timed steps and the study's tables and page are counted with it. A cell is one process, and plain commands are two: the
study may take less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS, VARIANTS = ("linknet", "fpn"), ("n4", "raw")
RECIPE = [
    "--pixel-mm", "4", "--context", "1", "--crop-margin-mm", "40", "--schedule", "cosine", "--learning-rate", "1e-2",
]  # fmt: skip
ENCODER = "tu-resnet10t"


def seconds_of(*arguments: str) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "cspine_train", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    recipe = [*RECIPE, "--store", arguments.store, "--epochs", str(arguments.epochs)]
    with tempfile.TemporaryDirectory() as folder:
        plain = 0.0
        for model in MODELS:
            for variant in VARIANTS:
                run = str(Path(folder, f"{model}-{variant}"))
                one = ["--model", model, "--encoder", ENCODER, "--weights", "none", "--variant", variant]
                plain += seconds_of("run", *recipe, *one, "-o", run) + seconds_of("evaluate", run)
        grid = ["--models", ",".join(MODELS), "--encoders", f"{ENCODER}:random", "--axes", "0", "--workers", "1"]
        study = seconds_of("study", *recipe, *grid, "-o", str(Path(folder, "study")))
        again = seconds_of("study", *recipe, *grid, "-o", str(Path(folder, "study")))
    print("| | s | beside the plain commands |\n|---|---|---|")
    print(f"| run and evaluate, {len(MODELS) * len(VARIANTS)} cells | {plain:.0f} | |")
    print(f"| study | {study:.0f} | {100 * (study / plain - 1):+.1f} % |")
    print(f"| the same study again | {again:.1f} | |")


if __name__ == "__main__":
    main()
