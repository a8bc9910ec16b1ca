"""cspine: `cspine-train run` for one plane, or for three whose probabilities are averaged.

Options: planes (``0`` or ``012``), store, variant, and further options of `cspine-train run`. Three planes share the
training time.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import time
from functools import reduce
from operator import add
from pathlib import Path

from cspine_data import open_cohort, write_volume
from cspine_train import LoadedRun, load_run
from cspine_train.prediction.labelling import label_map
from peers.task import Task, given_task

#: Name of the run folder that other peers read.
RUN_OF_ONE_PLANE = "0-of-0-fold{fold}"


def train(task: Task, planes: str, store: str, variant: str, *options: str) -> list[LoadedRun]:
    runs = []
    minutes = [] if task.minutes is None else ["--minutes", f"{task.minutes / len(planes):g}"]
    for axis in planes:
        run = task.work / f"{axis}-of-{planes}-fold{task.fold}"
        command = [
            sys.executable, "-m", "cspine_train", "run", "--store", store, "--variant", variant, "--axis", axis,
            "--split", str(task.data / "splits_final.json"), "--fold", str(task.fold), *minutes, "-o", str(run),
            *options,
        ]  # fmt: skip
        # A run that goes on after a stop would not show its time.
        shutil.rmtree(run, ignore_errors=True)
        started = time.perf_counter()
        subprocess.run(command, check=True)
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
        # Nobody's training time has the start of a process.
        task.costs["train_s"] = task.costs.get("train_s", 0) + seconds
        task.costs["prepare_s"] += time.perf_counter() - started - seconds
        runs.append(load_run(run))
    task.reads(Path(store))
    return runs


def predict(task: Task, runs: list[LoadedRun], store: str, variant: str) -> None:
    """Write the masks, from the stored volumes: their files are corrected already, and must not be twice."""
    cohort, records = open_cohort(store), [run.record for run in runs]
    with task.timed("predict_s"):
        for case in task.cases("test"):
            prepared = cohort.prepared(case, variant)
            total = reduce(add, (run.on_source_grid(prepared) for run in runs))
            found = label_map(records, total, [1.0] * len(runs), prepared.corrected.geometry_xyz)
            write_volume(task.mask(case), prepared.to_file_grid(found.array_xyz))


if __name__ == "__main__":
    with given_task() as given:
        predict(given, train(given, *given.options), *given.options[1:3])
