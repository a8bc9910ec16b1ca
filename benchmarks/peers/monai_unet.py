"""MONAI's UNet on random patches, as in its tutorials on organs: option ``2`` or ``3`` dimensions.

Volumes are oriented, resampled, normalised and cached. Patches are drawn around labelled and unlabelled voxels in equal
numbers. Prediction slides a window over the volume, or over each of its sagittal slices, and is resampled back to the
grid of the file. Deviations from the tutorials: normalisation for MRI, flips and changes of intensity, and a larger
learning rate with a schedule by the clock, since they train for hundreds of epochs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from monai import transforms as t
from monai.data import CacheDataset, DataLoader, Dataset, decollate_batch
from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.utils import set_determinism

from peers.task import TICKS, Clock, Task, given_task

_LEARNING_RATE = 1e-3
_BOTH = ["image", "label"]
#: Patch, patches per volume, and volumes per step, by number of dimensions.
_PATCHES: dict[int, tuple[tuple[int, ...], int, int]] = {2: ((1, 96, 96), 8, 2), 3: ((32, 96, 96), 2, 1)}


def preprocessing(task: Task, dimensions: int, keys: list[str]) -> list[Any]:
    """Return the transforms from a file to a normalised volume (1, right-left, back-front, feet-head)."""
    # -1 keeps the distance of slices.
    spacing = (task.spacing_mm if dimensions == 3 else -1, task.spacing_mm, task.spacing_mm)
    modes = ["bilinear", "nearest"][: len(keys)]
    return [
        t.LoadImaged(keys, image_only=True),
        t.EnsureChannelFirstd(keys),
        t.Orientationd(keys, axcodes="RAS", labels=None),
        t.Spacingd(keys, spacing, mode=modes),
        t.NormalizeIntensityd("image"),
    ]


def training_patches(task: Task, dimensions: int) -> DataLoader:
    """Return random patches of the training cases, whose volumes are cached in memory."""
    patch, patches, volumes = _PATCHES[dimensions]
    chain = [
        *preprocessing(task, dimensions, _BOTH),
        t.SpatialPadd(_BOTH, patch),
        t.RandCropByPosNegLabeld(_BOTH, "label", patch, num_samples=patches),
        *(t.RandFlipd(_BOTH, 0.5, axis) for axis in range(3)),
        t.RandScaleIntensityd("image", 0.1, prob=0.5),
        t.RandShiftIntensityd("image", 0.1, prob=0.5),
        *([t.SqueezeDimd(_BOTH, 1)] if dimensions == 2 else []),
    ]
    files = [{"image": task.image(case), "label": task.label(case)} for case in task.cases("train")]
    return DataLoader(CacheDataset(files, t.Compose(chain), progress=False), batch_size=volumes, shuffle=True)


def train(task: Task, network: UNet, dimensions: int, device: torch.device) -> None:
    if task.minutes is None:
        raise SystemExit("MONAI's recipe has no schedule of its own: give --minutes")
    with task.timed("prepare_s"):
        batches = training_patches(task, dimensions)
    task.reads(task.data / "imagesTr", task.data / "labelsTr")
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=TICKS)
    network.train()
    steps, tick, clock = 0, 0, Clock(task.minutes)
    with task.timed("train_s"):
        while clock.share() < 1:
            for batch in batches:
                loss = loss_of(network(batch["image"].to(device)), batch["label"].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
                while tick < int((TICKS - 1) * clock.share()):
                    schedule.step()
                    tick += 1
                if clock.share() == 1:
                    break
    print(f"{steps} steps, last loss {loss.item():.3f}")


def predict(task: Task, network: UNet, dimensions: int, device: torch.device) -> None:
    patch, _, _ = _PATCHES[dimensions]
    window: Inferer = SlidingWindowInferer(patch, 4, overlap=0.5, mode="gaussian")
    if dimensions == 2:
        window = SliceInferer(0, roi_size=patch[1:], sw_batch_size=8, overlap=0.5, mode="gaussian")
    chain = t.Compose(preprocessing(task, dimensions, ["image"]))
    # Probabilities are resampled, then thresholded.
    back = t.Compose([
        t.Activationsd("mask", softmax=True),
        t.Invertd("mask", chain, orig_keys="image", nearest_interp=False),
        t.AsDiscreted("mask", argmax=True),
        t.SaveImaged("mask", output_dir=task.masks, output_postfix="", separate_folder=False, print_log=False,
                     output_dtype="uint8"),
    ])  # fmt: skip
    network.eval()
    with task.timed("predict_s"), torch.inference_mode():
        for case in task.cases("test"):
            for batch in DataLoader(Dataset([{"image": task.image(case)}], chain)):
                batch["mask"] = window(batch["image"].to(device), network)
                for one in decollate_batch(batch):
                    back(one)
            (task.masks / task.image(case).name).rename(task.mask(case))


def main() -> None:
    set_determinism(0)
    with given_task() as task:
        dimensions = int(*task.options)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = UNet(dimensions, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
        network.to(device)
        train(task, network, dimensions, device)
        predict(task, network, dimensions, device)


if __name__ == "__main__":
    sys.exit(main())
