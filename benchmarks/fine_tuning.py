"""Compare random, ImageNet and trained weights of a network on few patients of another cohort.

Run as ``python benchmarks/fine_tuning.py SOURCE_STORE STORE -o FOLDER``. A network is trained on SOURCE_STORE. Then
1, 2, 4 and 8 patients of STORE train it from each start, for the same number of steps, and three others test it. The
learning rate of each start is the one with the highest validation Dice for 2 patients. The same command again
resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from cspine_data import Cohort, GivenSplit, open_cohort
from cspine_train import Evaluation, RunRecord, RunSettings, evaluate, load_run, train
from cspine_train.metrics.overlap import overlap
from cspine_train.training.allocator import keep_large_blocks

NETWORK = {"model": "linknet", "encoder": "tu-tf_efficientnet_lite0", "pixel_mm": 3, "context": 1}
RECIPE = {"crop_margin_mm": 40, "batch_size": 8, "schedule": "onecycle"}
SOURCE = {"weights": "imagenet", "augment": "strong", "epochs": 6, "learning_rate": 1e-2}
PATIENTS = (1, 2, 4, 8)
# Of 8 patients.
EPOCHS = 6
RATES = (1e-3, 1e-2)
RATES_CHOSEN_WITH = 2


def train_one(
    store: Path, folder: Path, cases: tuple[str, ...], start: dict[str, Any], patients: int, rate: float
) -> tuple[Path, RunRecord]:
    """Train on the first patients; the last three of all test, and the one before them validates."""
    split = GivenSplit(train=cases[:patients], validation=cases[-4:-3], test=cases[-3:])
    epochs = EPOCHS * PATIENTS[-1] // patients
    settings = RunSettings(**NETWORK, **RECIPE, **start, split=split, epochs=epochs, learning_rate=rate)
    name = f"{folder.name}-{patients}-{rate:g}"
    run = folder.with_name(name)
    record = train(store, run, settings)
    print(f"{name}: validation Dice {record.kept_dice:.3f}", flush=True)
    return run, record


def dice_of(run: Path) -> Evaluation:
    evaluation = evaluate(run)
    print(f"{run.name}: {', '.join(f'{one.case} {one.dice:.3f}' for one in evaluation.scores)}", flush=True)
    return evaluation


def untrained_dice(source: Path, cohort: Cohort, cases: tuple[str, ...]) -> float:
    """Return the mean Dice of the source run on the test patients of the other store."""
    run = load_run(source)
    return mean(
        overlap(run.predict(cohort.export(case)).array > 0, cohort.export(case, label=True).array > 0).dice
        for case in cases
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source_store", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    keep_large_blocks()
    source = arguments.output / "source"
    train(arguments.source_store, source, RunSettings(**NETWORK, **RECIPE, **SOURCE))
    cohort = open_cohort(arguments.store)
    cases = cohort.cases
    starts: dict[str, dict[str, Any]] = {
        "random": {"weights": "none"},
        "imagenet": {"weights": "imagenet"},
        "source": {"from_run": str(source)},
    }
    rates = {}
    for name, start in starts.items():
        tried = {
            rate: train_one(arguments.store, arguments.output / name, cases, start, RATES_CHOSEN_WITH, rate)[1]
            for rate in RATES
        }
        rates[name] = max(tried, key=lambda one: tried[one].kept_dice or 0)
    runs = {
        name: [
            train_one(arguments.store, arguments.output / name, cases, start, number, rates[name])[0]
            for number in PATIENTS
        ]
        for name, start in starts.items()
    }
    rows = [
        [name, f"{rates[name]:g}", *(f"{dice_of(run).mean_dice:.3f}" for run in of_start)]
        for name, of_start in runs.items()
    ]
    print(f"source on its own test patient: {dice_of(source).mean_dice:.3f}")
    print(f"source, not trained on {arguments.store}: {untrained_dice(source, cohort, cases[-3:]):.3f}")
    print(f"| start | learning rate | {' | '.join(map(str, PATIENTS))} |\n|{'---|' * (2 + len(PATIENTS))}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
