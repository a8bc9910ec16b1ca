"""Milliseconds that random changes take of a training step, beside kornia's and torchvision's, and a picture of each.

Run as ``python benchmarks/augmentation.py [--picture FILE]``. Batches, 8 x 3 x 128 x 192 cut out of 192 x 192, and
networks are those of the README's recipe. Where there is a GPU the same script gives its figures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from cspine_data import Preprocessing, preprocess_volume, read_volume
from cspine_data.phantom.cohort import make_phantom_cohort
from cspine_data.volumes.geometry import Orientation
from cspine_train.data.augmentation import STRONG, Amounts, Augmentation, sample_seeds
from cspine_train.extensions import AUGMENTATIONS
from cspine_train.models.build import build_model
from cspine_train.training.allocator import keep_large_blocks

FULL, CROP, BATCH, CONTEXT = (192, 192), (128, 192), 8, 1
Pair = tuple[torch.Tensor, torch.Tensor]

#: Each change alone, at its strongest and always.
ALONE = {
    "as it is": Amounts(),
    "rotation, scale, shift": Amounts(degrees=15, scale=0.25, shift=0.08),
    "grid distortion": Amounts(distortion=0.3, chance=1),
    "contrast and gamma": Amounts(contrast=0.5),
    "random map": Amounts(remap=1),
    "random network": Amounts(convolve=1),
    "field": Amounts(field=0.6, chance=1),
    "blur": Amounts(blur=1.5, chance=1),
    "coarse pixels": Amounts(coarse=4, chance=1),
    "motion ghosts": Amounts(ghosts=0.3, chance=1),
    "noise": Amounts(noise=0.4),
    "small field of view": Amounts(window=1),
    "strong": STRONG,
    "strong, more of it": STRONG,
}


def milliseconds(work: Callable[[int], object], rounds: int, device: str) -> float:
    """Return the median time of some rounds."""
    taken = []
    for number in range(rounds + 2):
        started = time.perf_counter()
        work(number)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken[2:])


def with_kornia() -> Callable[[torch.Tensor, torch.Tensor], Pair]:
    """Return kornia's changes that come nearest to ours of level ``light``: per sample, image and mask together."""
    import kornia.augmentation as kornia

    change = kornia.AugmentationSequential(
        kornia.RandomAffine(12.0, (0.08, 0.08), (0.83, 1.2), p=1.0),
        kornia.RandomCrop(CROP),
        kornia.RandomContrast((0.7, 1.3), p=1.0, clip_output=False),
        kornia.RandomBrightness((0.7, 1.3), p=1.0, clip_output=False),
        kornia.RandomGaussianNoise(std=0.1, p=1.0),
        data_keys=["input", "mask"],
    )
    return lambda images, masks: tuple(change(images, masks))


def with_torchvision() -> Callable[[torch.Tensor, torch.Tensor], Pair]:
    """Return torchvision's; its transforms draw once a call, so each sample is a call."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    change = v2.Compose(
        [
            v2.RandomAffine(12, (0.08, 0.08), (0.83, 1.2), interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomCrop(CROP),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
            v2.GaussianNoise(sigma=0.1),
        ]
    )

    def changed(images: torch.Tensor, masks: torch.Tensor) -> Pair:
        pairs = [
            change(tv_tensors.Image(image), tv_tensors.Mask(mask)) for image, mask in zip(images, masks, strict=True)
        ]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    return changed


def times(device: str, rounds: int) -> dict[str, float]:
    """Return milliseconds of a training step without changes, and of each way to make changes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 2 * CONTEXT + 1, *FULL, generator=generator).to(device)
    masks = (functional.avg_pool2d(torch.rand(BATCH, 1, *FULL, generator=generator), 9, 1, 4) > 0.55).float()
    masks[:, :, :40], masks[:, :, -40:] = 0, 0
    masks, axes = masks.to(device), torch.zeros(BATCH, dtype=torch.int64)
    network = build_model("linknet", "mobilenet_v2", "none", 2 * CONTEXT + 1)[0]
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    cropped = images[..., : CROP[0], : CROP[1]].contiguous(memory_format=torch.channels_last)
    truth = masks[..., : CROP[0], : CROP[1]].contiguous()

    def step(_: int) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = functional.binary_cross_entropy_with_logits(network(cropped), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    found = {"training step": milliseconds(step, rounds, device)}
    for level in AUGMENTATIONS.names():
        augment = Augmentation(level, CROP)
        seeds = [sample_seeds(0, number, BATCH) for number in range(rounds + 2)]
        found[f"cspine, {level}"] = milliseconds(
            lambda number, augment=augment, seeds=seeds: augment(images, masks, axes, seeds[number]), rounds, device
        )
    for name, make in (("kornia, light", with_kornia), ("torchvision, light", with_torchvision)):
        change = make()
        found[name] = milliseconds(lambda _, change=change: change(images, masks), rounds, device)
    return found


def draw(file: Path) -> None:
    """Show each change alone, at its strongest, on slices of a phantom."""
    from matplotlib.figure import Figure

    with tempfile.TemporaryDirectory() as folder:
        make_phantom_cohort(folder, cases=1, seed=1)
        volume = read_volume(Path(folder, "CS_01.nrrd"))
        label = read_volume(Path(folder, "CS_01S-label.nrrd"))
    normalised = preprocess_volume(volume, Preprocessing()).normalised_xyz()
    truth = Orientation.of(label.geometry).to_anatomical(label.array) > 0
    middle = len(normalised) // 2
    image = torch.from_numpy(normalised[middle])[None, None]
    mask = torch.from_numpy(truth[middle].astype("float32"))[None, None]
    shown, across = 3, 2
    figure = Figure(figsize=(1.9 * shown * across, 2.2 * len(ALONE) / across), layout="constrained")
    panels = figure.subplots(len(ALONE) // across, shown * across).reshape(-1, shown)
    for number_of, (row, (name, amounts)) in enumerate(zip(panels, ALONE.items(), strict=True)):
        several = image.expand(shown, -1, -1, -1), mask.expand(shown, -1, -1, -1)
        axes = torch.zeros(shown, dtype=torch.int64)
        changed, moved = Augmentation(amounts)(*several, axes, sample_seeds(3, number_of, shown))
        for number, panel in enumerate(row):
            panel.imshow(changed[number, 0].T, cmap="gray", origin="lower", vmin=-1.5, vmax=3)
            panel.contour(moved[number, 0].T, [0.5], colors="#e69f00", linewidths=0.7)
            panel.set_axis_off()
        row[0].set_title(name, loc="left", fontsize=9)
    figure.savefig(file, dpi=48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.picture:
        draw(arguments.picture)
        return
    keep_large_blocks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = times(device, arguments.rounds)
    step = found["training step"]
    print(f"{device}, {torch.get_num_threads()} threads\n\n| | ms | of a step |\n|---|---|---|")
    for name, taken in found.items():
        print(f"| {name} | {taken:.1f} | {taken / step:.0%} |")


if __name__ == "__main__":
    main()
