"""Seconds of a training step: as PyTorch comes, and as `cspine-train run` does it.

Run as ``python benchmarks/training_step.py``. Each way runs in a process of its own, in turn, several times, because
the allocator is told once a process. On a GPU the same script fills the GPU's column.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

WAYS = ("plain float32", "allocator", "allocator, channels_last", "allocator, channels_last, bfloat16")


def step_seconds(way: str, model: str, encoder: str, size: int, steps: int) -> float:
    """Return the median seconds of a training step on random slices, eight a batch."""
    import torch

    from cspine_train.models.build import build_model
    from cspine_train.training.allocator import keep_large_blocks

    if "allocator" in way:
        keep_large_blocks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if "channels_last" in way else torch.contiguous_format
    network = build_model(model, encoder)[0].to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    images = torch.randn(8, 1, size, size, device=device).contiguous(memory_format=layout)
    masks = (torch.rand(8, 1, size, size, device=device) > 0.9).float()
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled="bfloat16" in way):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print a table of ways, or time one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--model", default="unet")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.way:
        print(step_seconds(arguments.way, arguments.model, arguments.encoder, arguments.size, arguments.steps))
        return
    print(f"{arguments.model}-{arguments.encoder}, 8 x {arguments.size} x {arguments.size}")
    print("| way | seconds a step | of plain |")
    print("|---|---|---|")
    plain = None
    for way in WAYS:
        options = ("--model", arguments.model, "--encoder", arguments.encoder)
        sizes = ("--size", str(arguments.size), "--steps", str(arguments.steps))
        command = [sys.executable, __file__, "--way", way, *options, *sizes]
        seconds = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        plain = plain or seconds
        print(f"| {way} | {seconds:.2f} | {seconds / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
