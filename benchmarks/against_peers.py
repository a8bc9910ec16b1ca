"""cspine beside nnU-Net, MONAI's UNet and a plain SMP loop: same patients, same training time, same measures.

Run as ``python benchmarks/against_peers.py STORE --work FOLDER --minutes 30``, on a machine that does nothing else. The
same command again goes on where it stopped. docs/benchmarks.md says what is equal and what is not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np

from cspine_data import Cohort, export_cohort, open_cohort, read_volume, write_volume
from cspine_data.terminal import print_table
from cspine_train.metrics.overlap import MEASURES, agreement
from cspine_train.metrics.statistics import (
    holm,
    mean_interval,
    of_patients,
    paired_differences,
    signed_rank_p,
    too_few,
)

HERE = Path(__file__).parent
SCORES = [one for one in MEASURES if one.name in ("dice", "surface_dice_1mm", "hausdorff95_mm")]
COSTS = ("prepare_s", "train_s", "predict_s", "disk_mb", "memory_mb")
COLUMNS = ("peer", "fold", "case", "patient", *(score.name for score in SCORES), *COSTS)


@dataclass(frozen=True)
class Peer:
    """A module of `peers` with its first options, and the library that its environment needs."""

    module: str
    options: tuple[str, ...]
    library: str = ""
    own_schedule: bool = False


class PeerError(Exception):
    """A peer failed; the others go on."""


PEERS = {
    "cspine, one plane": Peer("cspine_runs", ("0",)),
    "cspine, three planes": Peer("cspine_runs", ("012",)),
    "plain SMP loop": Peer("smp_loop", ()),
    "MONAI UNet 2-D": Peer("monai_unet", ("2",), "monai"),
    "MONAI UNet 3-D": Peer("monai_unet", ("3",), "monai"),
    "nnU-Net 2d": Peer("nnunet", ("2d",), "nnunetv2"),
    "nnU-Net 3d_fullres": Peer("nnunet", ("3d_fullres",), "nnunetv2"),
    "nnU-Net 2d, own schedule": Peer("nnunet", ("2d",), "nnunetv2", own_schedule=True),
    "nnU-Net 3d_fullres, own schedule": Peer("nnunet", ("3d_fullres",), "nnunetv2", own_schedule=True),
}


def export(cohort: Cohort, variant: str, data: Path) -> None:
    """Write the cohort in nnU-Net's layout, with 1 for all labels: those of instances have no meaning to learn."""
    if data.exists():
        return
    if any(record.ignored_values for record in cohort.records(variant)):
        raise SystemExit(f"{cohort.path}: has ignored voxels, which not all peers can leave out; prepare it without")
    unfinished = data.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    export_cohort(cohort, unfinished, "nnunet", variant)
    for path in (unfinished / "labelsTr").iterdir():
        label = read_volume(path)
        write_volume(path, replace(label, array=(label.array != 0).astype(np.uint8)))
    description = unfinished / "dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps(content | {"labels": {"background": 0, "vertebra": 1}}))
    unfinished.rename(data)


def train_and_predict(peer: Peer, fold: int, masks: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run a peer on a fold in a process of its own; return its costs."""
    work = arguments.work
    options = {
        "cspine_runs": (*peer.options, arguments.store, arguments.variant, *shlex.split(arguments.cspine)),
        "smp_loop": (str(work / "cspine_runs"),),
    }.get(peer.module, peer.options)
    minutes = [] if peer.own_schedule else ["--minutes", str(arguments.minutes)]
    command = [
        arguments.python if peer.library else sys.executable, "-m", f"peers.{peer.module}",
        "--data", str(work / "data"), "--work", str(work / peer.module), "--masks", str(masks), "--fold", str(fold),
        "--spacing-mm", str(arguments.spacing_mm), *minutes, "--", *options,
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    shutil.rmtree(masks, ignore_errors=True)
    masks.mkdir(parents=True)
    with masks.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log)
        # Unlike `Popen.wait`, this reports memory: of the largest process among this one and those that it started.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = Path(log.name).read_text(errors="replace").strip().rpartition("\n")[2]
        raise PeerError(f"{last} (all in {log.name})")
    costs: dict[str, float] = json.loads((masks / "costs.json").read_text())
    return costs | {"memory_mb": usage.ru_maxrss * 1024 / 1e6}


def scores(data: Path, fold: int, masks: Path) -> dict[str, dict[str, float]]:
    """Return the scores of the test cases of a fold, on the grids of their files."""
    found = {}
    for case in json.loads((data / "splits_final.json").read_text())[fold]["val"]:
        mask, truth = read_volume(masks / f"{case}.nii.gz"), read_volume(data / "labelsTr" / f"{case}.nii.gz")
        ours, theirs = truth.geometry, mask.geometry
        if ours.size != theirs.size or not all(
            np.allclose(getattr(ours, part), getattr(theirs, part), atol=1e-3)
            for part in ("spacing_mm", "directions", "origin_mm")
        ):
            raise PeerError(f"{masks}: the mask of {case} is on another grid than its label map")
        figures = agreement(mask.array != 0, truth.array != 0, ours.spacing_mm).figures
        found[case] = {score.name: round(figures[score.name], 6) for score in SCORES}
    return found


def measure(name: str, fold: int, patients: dict[str, str], arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Run a peer on a fold, append its rows to the results, and return them."""
    peer, work = PEERS[name], arguments.work
    masks = work / "masks" / f"{name.replace(', ', '-').replace(' ', '-')}-fold{fold}"
    costs = train_and_predict(peer, fold, masks, arguments)
    rows = [
        {"peer": name, "fold": fold, "case": case, "patient": patients[case], **figures}
        | {cost: round(costs[cost], 1) for cost in COSTS}
        for case, figures in scores(work / "data", fold, masks).items()
    ]
    results = work / "results.csv"
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return [{key: str(value) for key, value in row.items()} for row in rows]


def show(rows: list[dict[str, str]]) -> None:
    """Print a table for each score, with differences from the first peer over the patients of all, and the costs."""
    names = [name for name in PEERS if any(row["peer"] == name for row in rows)]
    of_peer = {name: [row for row in rows if row["peer"] == name] for name in names}
    patients = set.intersection(*({row["patient"] for row in own} for own in of_peer.values()))
    for score in SCORES:
        figures = {
            name: of_patients(
                [float(row[score.name]) for row in own if row["patient"] in patients],
                [row["patient"] for row in own if row["patient"] in patients],
            )
            for name, own in of_peer.items()
        }
        first = next(iter(figures.values()))
        differences = {name: paired_differences([of[p] for p in first], first.values()) for name, of in figures.items()}
        tests = dict(zip(names[1:], holm([signed_rank_p(differences[name]) for name in names[1:]]), strict=True))
        table = []
        for name, of in figures.items():
            row = [name, mean_interval([*of.values()], score.within).text(score.digits)]
            if name in tests:
                p = tests[name]
                row += [mean_interval(differences[name]).text(score.digits, sign=True), "" if p is None else f"{p:.2g}"]
            table.append(row + [""] * (4 - len(row)))
        print_table([f"{len(first)} patients", f"mean {score.heading}", "difference", "p"], table)
        print()
    cells = {name: [*{row["fold"]: row for row in own}.values()] for name, own in of_peer.items()}
    means = [[name, *(f"{mean(float(row[cost]) for row in own):.0f}" for cost in COSTS)] for name, own in cells.items()]
    print_table(["mean of a fold", *COSTS], means)
    if few := too_few(len(patients)):
        print(f"note: {few}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--work", type=Path, required=True, help="folder of all files, and of results.csv")
    parser.add_argument("--minutes", type=float, required=True, help="of each training; three planes share them")
    parser.add_argument("--folds", default="0,1,2,3,4", help="folds to run, of those that an export makes")
    parser.add_argument("--only", choices=[*PEERS], action="append", help="run this peer; may be given several times")
    parser.add_argument("--python", default=sys.executable, help="Python of an environment with nnU-Net and MONAI")
    parser.add_argument("--spacing-mm", type=float, default=2.0, help="voxels of MONAI and nnU-Net at equal time")
    parser.add_argument("--variant", default="n4", help="variant of the volumes that all peers get")
    parser.add_argument("--cspine", default="", metavar="OPTIONS", help="further options of cspine-train run")
    return parser.parse_args()


def usable(name: str, python: str) -> bool:
    """Return whether a peer can run here; say why not."""
    peer = PEERS[name]
    if peer.own_schedule:
        cuda = "import torch, sys; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([python, "-c", cuda], check=False).returncode:
            print(f"skipped: {name}: needs a GPU")
            return False
    search = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.library!r}) is None)"
    if peer.library and subprocess.run([python, "-c", search], check=False).returncode:
        print(f"skipped: {name}: {python} lacks {peer.library}; name an environment that has it with --python")
        return False
    return True


def main() -> None:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    conditions = {key: str(getattr(arguments, key)) for key in ("store", "minutes", "spacing_mm", "variant", "cspine")}
    recorded = arguments.work / "conditions.json"
    if recorded.exists() and json.loads(recorded.read_text()) != conditions:
        raise SystemExit(f"{arguments.work}: holds results of other options ({recorded.name}); choose another --work")
    recorded.write_text(json.dumps(conditions, indent=1))
    cohort = open_cohort(arguments.store)
    export(cohort, arguments.variant, arguments.work / "data")
    results, rows = arguments.work / "results.csv", []
    if results.exists():
        with results.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    peers = [name for name in arguments.only or PEERS if usable(name, arguments.python)]
    failed: list[str] = []
    folds = [*map(int, arguments.folds.split(","))]
    known = len(json.loads((arguments.work / "data" / "splits_final.json").read_text()))
    if not set(folds) <= set(range(known)):
        raise SystemExit(f"--folds {arguments.folds}: the export of this store has the folds 0 to {known - 1}")
    for fold in folds:
        for name in peers:
            if any(row["peer"] == name and int(row["fold"]) == fold for row in rows):
                continue
            try:
                rows += measure(name, fold, cohort.patients, arguments)
            except PeerError as error:
                failed.append(f"failed: {name}, fold {fold}: {error}")
                print(failed[-1], flush=True)
                continue
            own = [row for row in rows if row["peer"] == name and int(row["fold"]) == fold]
            print(f"{name}, fold {fold}: Dice {mean(float(row['dice']) for row in own):.4f}", flush=True)
    if rows:
        show(rows)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
