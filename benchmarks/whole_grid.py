"""The reference study's 72 cells, each for one step, on a synthetic cohort: that all can be done, and what it costs.

Run as ``python benchmarks/whole_grid.py [--workers N] [-o STUDY]``. Pretrained weights cannot be had everywhere, so the
encoders start from files, each with random tensors by its name; figures of Dice are of no meaning.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch

from cspine_data.phantom.cohort import make_phantom_cohort
from cspine_train.study.report import write_outcome

# A batch larger than an epoch makes one step of it.
RECIPE = ["--epochs", "1", "--batch-size", "4096", "--pixel-mm", "8", "--empty-share", "0"]


def command(module: str, *arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="2")
    parser.add_argument("-o", "--output", help="Where to leave the study; nowhere by default.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw, store = Path(folder, "raw"), str(Path(folder, "s.zarr"))
        study = Path(arguments.output or Path(folder, "study"))
        make_phantom_cohort(raw, cases=3)
        for variant in ("--n4", "--no-n4"):
            command("cspine_data", "prepare", str(raw), "--store", store, variant, "--axes", "012")
        weights = []
        for number, name in enumerate(("resnet50", "inceptionv4")):
            torch.manual_seed(number)
            file = Path(folder, f"{name}-random.pth")
            torch.save(smp.encoders.get_encoder(name, weights=None).state_dict(), file)
            weights += ["--weights", f"{name}={file}"]
        asked = ["--store", store, *weights, *RECIPE, "--workers", arguments.workers, "-o", str(study)]
        first = command("cspine_train", "study", *asked)
        again = command("cspine_train", "study", *asked)
        started = time.perf_counter()
        write_outcome(study)
        writing = time.perf_counter() - started
        print(
            f"72 cells: {first / 60:.1f} min; the same command again: {again:.1f} s; tables and page: {writing:.2f} s"
        )


if __name__ == "__main__":
    main()
