"""A training loop as one writes it with SMP and PyTorch in an afternoon: float32, whole slices, all of them in memory.

It trains the network of cspine's run of one plane and the same fold, with the same pixel size, loss, optimiser,
schedule and augmentation. It has no crops, no chosen memory layout, no average of weights, and chooses neither epoch
nor threshold. So it trains on the validation patients, too. Decoding and resampling slices is not part of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cspine_data import Split, open_cohort, write_volume
from cspine_train import RunSettings, load_run
from cspine_train.data.augmentation import Augmentation, sample_seeds
from cspine_train.data.datamodule import CohortSlices
from cspine_train.models.build import build_model, sides_of
from cspine_train.training.losses import SegmentationLoss
from peers.cspine_runs import RUN_OF_ONE_PLANE
from peers.task import TICKS, Clock, Task, given_task


def in_memory(data: CohortSlices) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and masks of one epoch."""
    batches = list(data.train_dataloader())
    return torch.cat([batch.intensities() for batch in batches]), torch.cat([batch.shares(1) for batch in batches])


def passes(
    network: Any, images: torch.Tensor, masks: torch.Tensor, settings: RunSettings, share: Callable[[int], float]
) -> Iterator[int]:
    """Train until all of the training is over; yield the number of steps after each pass over the slices.

    `share` returns the share of the training that is over after a number of steps.
    """
    loss_of, augment = SegmentationLoss(settings.loss), Augmentation(settings.augment)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=TICKS)
    step = tick = 0
    while share(step) < 1:
        network.train()
        for chosen in torch.randperm(len(images)).split(settings.batch_size):
            axes, seeds = torch.zeros(len(chosen), dtype=torch.int64), sample_seeds(0, step, len(chosen))
            seen, truth = augment(images[chosen], masks[chosen], axes, seeds)
            loss = loss_of(network(seen), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            while tick < int((TICKS - 1) * share(step)):
                schedule.step()
                tick += 1
            if share(step) >= 1:
                break
        network.eval()
        yield step


def train_and_predict(task: Task) -> None:
    torch.manual_seed(0)
    path = Path(task.options[0], RUN_OF_ONE_PLANE.format(fold=task.fold))
    if task.minutes is None or not path.exists():
        raise SystemExit(f"{path}: the plain loop needs cspine's run of one plane, and --minutes")
    run = load_run(path)
    settings = run.record.settings.model_copy(update={"crop_margin_mm": None})
    cohort = open_cohort(run.record.store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network: Any = build_model(settings.model, settings.encoder, settings.weights, settings.channels)[0]
    with task.timed("prepare_s"):
        split = Split(tuple(task.cases("train")), run.record.validation, run.record.test)
        data = CohortSlices(cohort, split, settings, 0, sides_of(network))
        images, masks = (part.to(device) for part in in_memory(data))
    task.reads(Path(run.record.store))
    clock = Clock(task.minutes)
    with task.timed("train_s"):
        steps = [*passes(network.to(device), images, masks, settings, lambda step: clock.share())][-1]
    print(f"{steps} steps")
    # Only to predict and resample as cspine does.
    record = run.record.model_copy(update={"settings": settings, "size_hw": data.sizes.slice_hw})
    trained = replace(run, network=network, record=record)
    with task.timed("predict_s"):
        for case in task.cases("test"):
            prepared = cohort.prepared(case, settings.variant)
            found = trained.on_source_grid(prepared)[0] > 0.5
            write_volume(task.mask(case), prepared.to_file_grid(found.astype("uint8")))


if __name__ == "__main__":
    with given_task() as given:
        train_and_predict(given)
