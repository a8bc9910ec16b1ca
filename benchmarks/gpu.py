"""Fills every figure of a GPU that the docs still lack, in one call: ``python benchmarks/gpu.py``.

Training steps, plain and as `cspine-train run` does them, and the slices a second that FPN-inceptionv4 takes at
512 x 512, beside those that the loader gives, and what random changes take of a step.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

CALLS = (
    ("training_step.py",),
    ("training_step.py", "--model", "fpn", "--encoder", "inceptionv4", "--size", "512"),
    ("feeding.py",),
    ("augmentation.py",),
)


def main() -> None:
    """Call them one after the other."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    print(torch.cuda.get_device_name(), flush=True)
    for script, *options in CALLS:
        print(f"\n{' '.join((script, *options))}\n", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *options], check=True)


if __name__ == "__main__":
    main()
