"""Studies: what is planned, what is done once, what goes on where something was killed."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from click.testing import Result
from distributed import Client, LocalCluster
from filelock import FileLock
from pyarrow import parquet

from cspine_data import Cohort, Preprocessing, open_cohort, prepare
from cspine_data.tools import Workers, side_by_side, usable_cores
from cspine_train import RunError, RunSettings, evaluate, train
from cspine_train.metrics.overlap import MEASURES
from cspine_train.run.patient_split import cohort_fields
from cspine_train.run.record import RunRecord, load_record, save_record
from cspine_train.study.cost import costs
from cspine_train.study.plan import Cell, Grid, Plan, load_plan, plan_study, queued
from cspine_train.study.results import tidy, write_results
from cspine_train.study.runner import (
    CellWork,
    check_output,
    do_cell,
    is_done,
    processes_here,
    run_study,
    threads_of_cell,
)
from tests.conftest import QUICK_N4
from tests.processes import Command, busy
from tests.test_report import Page

PATIENCE_S = 240
RECIPE = RunSettings(
    epochs=1, pixel_mm=12.0, learning_rate=3e-3, schedule="onecycle", precision="32", context=0, crop_margin_mm=None
)
TINY = ("--epochs", 1, "--pixel-mm", 12, "--learning-rate", 3e-3, "--schedule", "onecycle", "--precision", "32")
#: Two cells: with N4 and without.
SMALLEST = "tu-test_resnet:random"
ASKED = ("--models", "unet", "--encoders", SMALLEST, "--axes", "2", *TINY)


@pytest.fixture(scope="module")
def cohort(phantom_store: Path) -> Cohort:
    return open_cohort(phantom_store)


def names(cohort: Cohort, grid: Grid, recipe: RunSettings = RECIPE) -> set[str]:
    return {cell.name for cell in plan_study(cohort, grid.settings(recipe)).cells}


# Planned


def test_the_default_grid_is_the_72_cells_of_the_reference_study(cohort: Cohort) -> None:
    plan = plan_study(cohort, Grid().settings(RECIPE))
    cells = [(c.settings.axes, c.settings.model, c.settings.encoder, c.settings.variant) for c in plan.cells]
    assert (len(plan.cells), len(set(cells))) == (72, 48)
    started = {(cell.settings.encoder, cell.settings.weights) for cell in plan.cells}
    assert started == {("resnet50", "none"), ("resnet50", "imagenet"), ("inceptionv4", "imagenet")}
    # Random and resnet50 are the same then, and done once.
    assert len(names(cohort, Grid(weights={"": "none"}))) == 48
    assert len(names(cohort, Grid(folds=4, seeds=2))) == 72 * 8


def test_a_changed_parameter_touches_what_it_changes(cohort: Cohort, phantom_folder: Path, tmp_path: Path) -> None:
    grid = Grid(models=("unet", "fpn"), encoders=("random",))
    planned = names(cohort, grid)
    assert not planned & names(cohort, grid, RECIPE.model_copy(update={"epochs": 2}))
    assert planned < names(cohort, Grid(models=("unet", "fpn", "linknet"), encoders=("random",), seeds=2))
    # Uncorrected volumes prepared in another way.
    store = shutil.copytree(cohort.path, tmp_path / "s.zarr")
    prepare(phantom_folder, store, preprocessing=Preprocessing(bias=None, normalisation="percentile"))
    kept = planned & names(open_cohort(store), grid)
    assert kept == {name for name in planned if "-n4-" in name}
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"one")
    from_file = Grid(models=("unet",), weights={"resnet50": str(weights)}, encoders=("resnet50",))
    before = names(cohort, from_file)
    assert all("-resnet50-weights.pth-" in name for name in before)
    # The same file elsewhere is the same.
    moved = tmp_path / "moved" / "weights.pth"
    moved.parent.mkdir()
    moved.write_bytes(b"one")
    assert before == names(cohort, Grid(("unet",), ("resnet50",), {"resnet50": str(moved)}))
    weights.write_bytes(b"two")
    assert not before & names(cohort, from_file)
    # No file is taken for what its name says.
    moved = moved.rename(moved.with_name("imagenet"))
    assert all("-file_imagenet-" in name for name in names(cohort, Grid(("unet",), ("resnet50",), {"": str(moved)})))


def test_a_queue_of_the_reference_study(cohort: Cohort, tmp_path: Path) -> None:
    queue = tmp_path / "pipeline.csv"
    queue.write_text(
        "done,model,encoder,axis,epochs,batch\nno,fpn,inceptionv4,0,100,8\nyes,unet,resnet50,1,100,8\nno, unet,,2,3,4\n"
    )
    settings, done = queued(queue, Grid(variants=("n4",)), RECIPE)
    assert done == 1
    first, second = settings
    assert (first.model, first.encoder, first.weights, first.axes) == ("fpn", "inceptionv4", "imagenet", (0,))
    assert (first.epochs, first.batch_size, first.pixel_mm) == (100, 8, 12)
    assert (second.encoder, second.weights, second.axes, second.epochs, second.batch_size) == (
        "resnet50", "none", (2,), 3, 4,
    )  # fmt: skip
    assert len(plan_study(cohort, settings).cells) == 2


def test_a_queue_that_is_done_leaves_nothing_to_do(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    (tmp_path / "q.csv").write_text("done,model,encoder,axis,epochs,batch\nyes,unet,resnet50,1,100,8\n")
    told = run_train("study", "--store", phantom_store, "--from", tmp_path / "q.csv", "-o", tmp_path / "study")
    assert told.exit_code == 0
    note = f"note: 1 line of {tmp_path / 'q.csv'} marked as done left out"
    assert told.output.splitlines() == [note, "nothing to do: all lines are marked as done"]
    twice = run_train("study", "--store", phantom_store, "--from", tmp_path / "q.csv", "-o", tmp_path, "--epochs", 3)
    assert "file of --from" in twice.output
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is no queue"),
        ("model,axis\nunet,0\n", "is no queue"),
        (
            "done,model,encoder,axis,epochs,batch\nmaybe,unet,resnet50,0,1,1\n",
            "2: done is 'maybe'",
        ),
        ("done,model,encoder,axis,epochs,batch\nno,unet,resnet50,3,1,1\n", "2: axis is '3'"),
        (
            "done,model,encoder,axis,epochs,batch\nno,unet,resnet50,0,many,1\n",
            "2: --epochs: Input should",
        ),
        ("done,model,encoder,axis,epochs,batch\nno,unet,resnet50,0\n", "2: --epochs: Input should"),
    ],
)
def test_what_is_no_queue_is_told_by_its_line(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(content)
    with pytest.raises(RunError, match=f"q.csv: .*{told}"):
        queued(tmp_path / "q.csv", Grid(), RECIPE)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--axes", "0,3"), "0, 1, 2, 012"),
        (("--axes", "02"), "0, 1, 2, 012"),
        (
            ("--encoders", "resnet18:random", "--weights", "resnet18=w.pth"),
            "study starts from",
        ),
        (("--encoders", "tu-resnet10tt:random"), "(did you mean tu-resnet10t?)"),
        (("--models", "unet,,fpn"), "'unet,,fpn' is not A,B,..."),
        (("--folds", "2"), "'2' is neither reference"),
        (("--weights", "resnet50"), "imagenet, none nor ENCODER=FILE"),
        (("--variants", "n5"), "holds no variant 'n5'"),
        (("--encoders", "resnet50:none"), "neither NAME nor NAME:random"),
        (("--weights", "resnet50=nowhere.pth"), "such file or directory)"),
        (
            ("--weights", "resnet18=w.pth"),
            "--weights resnet18=...: no encoder",
        ),
        (("--weights", "resnet50=a=b/c.pth"), "such file or directory)"),
        (("--folds", "9"), "9 folds: cannot be made of 4 labelled cases"),
        (("--models", "linknett"), "'linknett': is not known"),
        (("--encoders", "resnet51:random"), "(did you mean resnet50?)"),
        (("--labels", "stored", "--fill-holes"), "--fill-holes is for binary"),
    ],
)
def test_what_cannot_be_planned_is_told_and_nothing_is_written(
    options: tuple[str, ...], told: str, phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    refused = run_train("study", "--store", phantom_store, "-o", tmp_path / "study", *options)
    assert refused.exit_code != 0
    assert told in " ".join(refused.output.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    (tmp_path / "raw.nrrd").touch()
    refused = run_train("study", "--store", phantom_store, "-o", tmp_path, *ASKED)
    assert refused.exit_code == 1
    assert f"{tmp_path}: exists and is no study" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["raw.nrrd"]
    # Killed at its beginning, a study has left its lock.
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").touch()
    check_output(tmp_path / "begun")


def test_variants_of_other_patients_are_not_compared(
    phantom_folder: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    store = tmp_path / "s.zarr"
    some = shutil.copytree(phantom_folder, tmp_path / "some", ignore=shutil.ignore_patterns("CS_01*"))
    prepare(phantom_folder, store, preprocessing=Preprocessing(bias=None), axes="2")
    prepare(some, store, preprocessing=Preprocessing(bias=None, normalisation="percentile"), axes="2")
    told = "holds CS_02 and CS_01 as raw, prepared in different ways|holds CS_01 and CS_02 as raw, prepared"
    with pytest.raises(RunError, match=told):
        plan_study(open_cohort(store), Grid(variants=("raw",), axes=((2,),)).settings(RECIPE))
    store = tmp_path / "fewer.zarr"
    prepare(phantom_folder, store, preprocessing=QUICK_N4, axes="2")
    prepare(some, store, preprocessing=Preprocessing(bias=None), axes="2")
    told = "raw than as n4"
    with pytest.raises(RunError, match=told):
        plan_study(open_cohort(store), Grid(axes=((2,),)).settings(RECIPE))


def test_the_same_patients_dealt_in_another_way_are_another_cell(phantom_folder: Path, tmp_path: Path) -> None:
    raw = Preprocessing(bias=None)
    prepare(phantom_folder, tmp_path / "once.zarr", preprocessing=raw, axes="2")
    first = shutil.copytree(phantom_folder, tmp_path / "first", ignore=shutil.ignore_patterns("CS_01*"))
    for folder in (first, phantom_folder):
        prepare(folder, tmp_path / "twice.zarr", preprocessing=raw, axes="2")
    grid = Grid(("unet",), ("random",), variants=("raw",), axes=((2,),))
    once, twice = (open_cohort(tmp_path / name) for name in ("once.zarr", "twice.zarr"))
    assert once.split(variant="raw") != twice.split(variant="raw")
    assert names(once, grid) != names(twice, grid)


def test_weights_that_cannot_be_had_are_told_before_anything_starts(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = ("study", "--store", phantom_store, "-o", tmp_path / "study", "--models", "unet", *TINY)
    refused = run_train(*asked, "--encoders", "random,tu-test_vit:random,tu-resnet10t", "--plan")
    assert refused.exit_code == 1
    assert "'tu-resnet10t': its ImageNet weights" in refused.output
    assert "weights of tu-resnet10t" in refused.output
    assert "--weights tu-resnet10t=FILE for each" in refused.output
    assert not list(tmp_path.iterdir())
    allowed = run_train(*asked, "--encoders", "tu-tf_efficientnet_lite0", "--axes", "2", "--plan")
    assert allowed.exit_code == 0, allowed.output


def test_costs_are_the_time_of_a_step_times_steps_and_epochs(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = ("tu-test_resnet:random",)
    grid = Grid(("unet",), encoders, variants=("n4", "raw"), axes=((2,),))
    cells = [
        *plan_study(cohort, grid.settings(RECIPE)).cells,
        *plan_study(cohort, grid.settings(RECIPE.model_copy(update={"epochs": 9}))).cells,
        *plan_study(cohort, Grid(("nosuch",), encoders, axes=((2,),)).settings(RECIPE)).cells,
    ]
    timed: list[tuple[int, ...]] = []
    monkeypatch.setattr("cspine_train.study.cost._step_seconds", lambda _, shape, *more: timed.append(shape) or 10.0)
    once, _, nine, _, none, _ = costs(cohort, cells, threads=1).values()
    # The same network on images of one size.
    assert len(timed) == 1
    assert once.slices % RECIPE.batch_size == 0
    assert once.seconds == 10 * once.slices / RECIPE.batch_size > 0
    assert (nine.slices, nine.seconds) == (once.slices, 9 * once.seconds)
    assert once.failure is nine.failure is None
    assert "'nosuch': is not known" in str(none.failure)


def test_costs_of_steps_that_fail_or_do_not_fit_into_memory(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(("unet",), (SMALLEST,), variants=("raw",), axes=((2,),))
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    (timed,) = costs(cohort, plan_study(cohort, grid.settings(RECIPE)).cells, threads=1).values()
    assert timed.seconds > 0
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    huge = RECIPE.model_copy(update={"size_hw": (2**17, 2**17)})
    (too_large,) = costs(cohort, plan_study(cohort, grid.settings(huge)).cells, threads=1).values()
    assert "GiB" in str(too_large.failure)

    def fail(*_: object) -> float:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("cspine_train.study.cost._step_seconds", fail)
    (failed,) = costs(cohort, plan_study(cohort, grid.settings(RECIPE)).cells, threads=1).values()
    assert "out of memory" in str(failed.failure)


# Done


def cells_of(study: Path) -> dict[str, Path]:
    return {cell.settings.variant: study / "runs" / cell.name for cell in load_plan(study).cells}


def command(store: Path, study: Path, *options: Any) -> list[str]:
    asked = ("study", "--store", store, "--workers", 2, "-o", study, *ASKED, *options)
    return [sys.executable, "-m", "cspine_train", *map(str, asked)]


def cells_running(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        # It may end while it is looked at.
        with suppress(psutil.Error):
            found += [child] if child.cmdline()[-1:] == ["cell"] else []
    return found


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def what_comes(terminal: int) -> Iterator[bytes]:
    # Linux says that nobody writes any more as an error.
    with suppress(OSError):
        while some := os.read(terminal, 4096):
            yield some


def training(study: Path) -> list[Path]:
    return list((study / "runs").glob("*/run.json"))


def test_killed_anywhere_a_study_goes_on_and_gives_what_single_runs_give(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    """SIGKILL of the command, whose processes end with it; of one worker and of another's run; then undisturbed."""
    study = tmp_path / "study"
    terminal, screen = os.openpty()
    first = subprocess.Popen(command(phantom_store, study), stdout=subprocess.DEVNULL, stderr=screen)
    os.close(screen)
    shown: list[bytes] = []
    reading = Thread(target=lambda: shown.extend(what_comes(terminal)))
    reading.start()
    wait_until(lambda: len(training(study)) == 2)
    everybody = psutil.Process(first.pid).children(recursive=True)
    assert len(cells_running(psutil.Process(first.pid))) == 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    reading.join()
    os.close(terminal)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert re.search(r"epochs .* 0/2 .*0 of 2 cells", plain)
    wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in everybody))

    second = Command("cspine-train", *command(phantom_store, study)[3:], errors_apart=True)
    one, other = wait_until(lambda: (found := cells_running(psutil.Process(second.pid)))[1:] and found)
    refused = run_train("study", "--store", phantom_store, *ASKED, "-o", study)
    assert "being run by another" in refused.output
    worker = one.parent()
    other.kill()
    worker.kill()
    # A run ends with its worker, and another worker does it again.
    wait_until(lambda: not one.is_running() or one.status() == psutil.STATUS_ZOMBIE)
    output, errors = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 1, output + errors
    assert "SIGKILL (out of memory?)" in errors
    assert "1 of 2 cells failed" in errors
    with (study / "failures.csv").open() as file:
        (failure,) = csv.DictReader(file)
    (done,) = (cell for cell in load_plan(study).cells if is_done(study, cell))
    assert failure["cell"] in {cell.name for cell in load_plan(study).cells} - {done.name}
    before = {path: path.stat().st_mtime_ns for path in (study / "runs" / done.name).rglob("*") if path.is_file()}

    third = run_train(*command(phantom_store, study)[3:])
    assert third.exit_code == 0, third.output
    assert "2 cells, 1 of them done" in third.output
    assert "done 2 of 2: " in third.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (study / "failures.csv").read_text().splitlines() == ["cell,reason"]

    # What a run and an evaluation by hand give. The last cell to be trained was alone, with more threads.
    settings = done.settings
    threads = torch.get_num_threads()
    # As many as each of two workers has on this machine: sums of another order end elsewhere.
    torch.set_num_threads(processes_here(2, 2)[1])
    train(phantom_store, tmp_path / "alone", settings)
    scores = evaluate(tmp_path / "alone").scores
    torch.set_num_threads(threads)
    with (study / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {"n4", "raw"}
    for score in scores:
        (row,) = (r for r in rows if (r["patient"], r["variant"]) == (score.case, settings.variant))
        for measure in MEASURES:
            assert float(row[measure.name]) == pytest.approx(getattr(score.whole, measure.name), abs=1e-6)
        assert row["note"].startswith("encoder tu-test_resnet started from")
    assert parquet.read_table(study / "results.parquet").num_rows == len(rows)

    told = run_train("table", study)
    assert told.exit_code == 0
    assert "N4 help? The evidence" in told.output
    assert "Axis 2 (axial slices)" in told.output
    page = Page(study / "report.html")
    assert len(page.of("img")) == 9
    # A network that cannot be built, on a cluster whose worker has a GPU: what is done stays, failures are told.
    with LocalCluster(
        n_workers=1, threads_per_worker=1, resources={"GPU": 1}, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        more = run_train(
            "study", "--store", phantom_store, *ASKED, "--encoders", f"{SMALLEST},tu-test_vit:random", "-o", study,
            "--variants", "raw", "--scheduler", cluster.scheduler_address,
        )  # fmt: skip
    assert more.exit_code == 1
    assert "2 cells, 1 of them done" in more.output
    assert f"note: {study} holds 1 cell of other grids, which stay and are in no table" in more.output
    assert more.output.count("warning: unet with encoder 'tu-test_vit': cannot be built (") == 1
    assert re.search("failed: unet-tu-test_vit-.*: unet with encoder 'tu-test_vit': cannot be built", more.output)
    assert "cell is not done" in (study / "tables.md").read_text()
    assert "tu-test_vit" in (study / "report.html").read_text()


def weighed(cohort: Cohort, weights: Path) -> Cell:
    grid = Grid(("unet",), ("resnet50",), {"resnet50": str(weights)}, variants=("raw",), axes=((2,),))
    return plan_study(cohort, grid.settings(RECIPE)).cells[0]


def asked_of_a_cell(cohort: Cohort, run: Path, cell: Cell) -> dict[str, Any]:
    return {"store": cohort.location, "run": str(run), "settings": cell.settings.model_dump(mode="json")}


def test_a_cell_waits_for_its_turn_and_is_not_trained_on_what_was_not_planned(
    cohort: Cohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"one")
    cell = weighed(cohort, tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"two")
    run = tmp_path / "runs" / cell.name
    run.mkdir(parents=True)
    told: list[str | None] = []
    with FileLock(run / ".lock") as others:
        turn = Thread(target=lambda: told.append(do_cell(asked_of_a_cell(cohort, run, cell))))
        turn.start()
        # A worker of a command that was killed may still be at this cell.
        wait_until(lambda: f"{run.name}: waiting for another process" in capfd.readouterr().err)
        others.release()
        turn.join()
    assert told[0].startswith("its data or weights")
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_cell_goes_on_when_its_weights_have_moved_and_not_with_other_defaults(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"one")
    moved = tmp_path / "moved" / "weights.pth"
    before = weighed(cohort, tmp_path / "weights.pth")
    run = tmp_path / "runs" / before.name
    (run / "evaluation").mkdir(parents=True)
    known = cohort_fields(cohort, cohort.split(variant="raw"), "raw")
    result = {
        "weights_used": "",
        "size_hw": (32, 32),
        "versions": {},
        "finished": True,
        "kept_epoch": 0,
        "kept_dice": 0.5,
    }
    record = RunRecord(settings=before.settings, **known, **result)
    save_record(run, record)
    scores = {"patients": [{"case": case, "split": "test", "dice": 0.5} for case in record.test], "kept_epoch": 0}
    (run / "evaluation" / "test.json").write_text(json.dumps(scores))
    moved.parent.mkdir()
    (tmp_path / "weights.pth").rename(moved)
    after = weighed(cohort, moved)
    assert after.name == before.name
    assert is_done(tmp_path, after)
    assert do_cell(asked_of_a_cell(cohort, run, after)) is None
    assert load_record(run) == record.model_copy(update={"settings": after.settings})
    other = after.settings.model_copy(update={"empty_share": 0.123})
    save_record(run, record.model_copy(update={"settings": other}))
    assert "other defaults of cspine" in do_cell(asked_of_a_cell(cohort, run, after))


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        # Native code that prints, and that dies at the end of a process.
        ("echo native; echo '{\"failure\": null}'; echo native; kill -SEGV $$", None),
        ('echo \'{"failure": "no such model"}\'', "no such model"),
        ("kill -KILL $$", "SIGKILL (out of memory?)"),
        ("echo native; exit 3", "ended with status 3"),
    ],
)
def test_what_a_cells_process_says_counts_before_how_it_ends(
    script: str, failure: str | None, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = plan_study(cohort, Grid(("unet",), ("random",), axes=((2,),)).settings(RECIPE)).cells[0]
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nread request\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    outcome = CellWork(str(tmp_path), cohort.location, (), shares_cores=False)(cell)
    assert outcome.failure == failure if failure is None else failure in outcome.failure


def test_a_scheduler_takes_no_number_of_workers(phantom_store: Path, tmp_path: Path, run_train) -> None:
    told = run_train(
        "study", "--store", phantom_store, "--workers", "2", "--scheduler", "tcp://127.0.0.1:9", "-o", tmp_path / "s"
    )
    assert told.exit_code == 2
    assert "--workers and --scheduler: exclude" in told.output
    with pytest.raises(RunError, match="exclude each other"):
        run_study(Plan(store=str(phantom_store), cells=()), tmp_path / "s", workers=2, scheduler="tcp://127.0.0.1:9")
    assert not (tmp_path / "s").exists()


def test_cells_of_a_scheduler_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # Dask allows one thread for each of two cells at a time.
    options = {"processes": False, "dashboard_address": None, "n_workers": 1, "threads_per_worker": 2}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        assert client.submit(threads_of_cell).result() == max(1, usable_cores() // 2)
        told = client.submit(CellWork("study", "store", (), shares_cores=True).environment).result()
        assert told["OMP_NUM_THREADS"] == told["MKL_NUM_THREADS"] == str(max(1, usable_cores() // 2))
        # Workers here are named by their number.
        told = client.submit(CellWork("study", "store", ("3", "5"), shares_cores=False).environment).result()
        assert told["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with (
        LocalCluster(**options, resources={"GPU": 1}) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert client.submit(threads_of_cell).result() == usable_cores()
        assert client.submit(with_threads_allowed, 7).result() == 7


def test_tasks_take_a_workers_gpu_in_turns_and_are_lost_when_no_worker_has_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cspine_data.parallel.workers._PATIENCE_S", 0.0)
    monkeypatch.setattr("cspine_data.parallel.workers._CHECK_S", 0.5)
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None))
        gpu, _ = (
            stack.enter_context(worker_process(cluster.scheduler_address, name, *more))
            for name, more in (("gpu", ("--resources", "GPU=1")), ("cpu", ()))
        )
        with Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE_S)
        who = Workers(scheduler=cluster.scheduler_address, resource="GPU")
        spans = [span for ended in side_by_side(busy, [0.3] * 3, lambda _, why: why, who) for _, span in ended]
        assert {name for _, _, name in spans} == {"gpu"}
        times = [time_s for begun, ended, _ in sorted(spans) for time_s in (begun, ended)]
        assert times == sorted(times)
        doing = side_by_side(busy, [0.0, 3600.0], lambda _, why: why, who)
        next(doing)
        gpu.kill()
        (((_, told),),) = list(doing)
        assert "worker process is left" in told


@contextmanager
def worker_process(scheduler: str, name: str, *options: str) -> Iterator[subprocess.Popen]:
    told = ("--name", name, "--nthreads", "2", "--no-nanny", "--no-dashboard", *options)
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, *told]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def with_threads_allowed(number: int) -> int:
    os.environ["OMP_NUM_THREADS"] = str(number)
    return threads_of_cell()


def test_an_interrupted_study_says_that_it_can_go_on(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cspine_train.study.cost._step_seconds", lambda *_: 1.0)
    monkeypatch.setattr("cspine_train.study.runner.run_study", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    study = tmp_path / "study"
    told = run_train("study", "--store", phantom_store, "-o", study, *ASKED)
    assert told.exit_code == 1
    assert "1 min of training" in told.output
    assert f"{study}: interrupted" in told.output.splitlines()[-1]


def test_a_plan_that_was_tampered_with_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no study"):
        load_plan(tmp_path)
    plan = plan_study(cohort, Grid(("unet",), ("random",), axes=((2,),)).settings(RECIPE))
    name = plan.cells[0].name
    for content, told in (
        (plan.model_dump_json().replace(name, "../../elsewhere"), "is damaged .*; run the study command again"),
        (plan.model_dump_json().replace(name, ".."), "is damaged"),
        (plan.model_dump_json().replace(name, ""), "is damaged"),
        (plan.model_dump_json().replace(name, "a\\u0000b"), "is damaged"),
        (plan.model_dump_json()[:100], "is damaged"),
        (
            plan.model_dump_json().replace('"plan_version":1', '"plan_version":9'),
            "was written by a newer cspine; install",
        ),
    ):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(RunError, match=told):
            load_plan(tmp_path)


def test_an_empty_table_has_its_columns(tmp_path: Path) -> None:
    written = write_results(tmp_path, tidy([]))
    assert "dice" in written[0].read_text().split(",")
    assert "dice" in parquet.read_table(written[1]).column_names
