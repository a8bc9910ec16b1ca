"""Training and evaluation of the cells of a study, in parallel processes, resumable."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspine_data import open_cohort
from cspine_data.tools import Workers, make_folder, side_by_side, usable_cores
from cspine_train.errors import CspineTrainError, RunError, error_message
from cspine_train.run.evaluations import recorded_evaluations
from cspine_train.run.folder import METRICS_NAME, is_in_use, only_writer, read_rows, write_rows
from cspine_train.run.record import RunRecord, load_record, save_record
from cspine_train.run.settings import RunSettings
from cspine_train.study.plan import PLAN_NAME, Cell, Plan, plan_study, save_plan, without_weights_path

if TYPE_CHECKING:
    from distributed import Worker

#: Run folders of a study's cells, and logs of their processes.
RUNS_FOLDER, LOGS_FOLDER = "runs", "logs"
#: Cells that failed in the last run of the study, and why.
FAILURES_NAME = "failures.csv"
_GPU = "GPU"
# PyTorch prefers the second.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell: its time, and why it failed, if it did."""

    cell: Cell
    seconds: float
    failure: str | None = None


def check_output(study: Path) -> None:
    """Refuse, with a `RunError`, an output that is a file, or a folder that is not empty and no study."""
    if study.is_file() or (is_in_use(study) and not (study / PLAN_NAME).exists()):
        raise RunError(f"{study}: exists and is no study; choose another folder with -o")


def check_not_run(study: Path) -> None:
    """Refuse, with a `RunError`, a study that another process is running."""
    if study.is_dir():
        with _lock(study):
            pass


def _lock(study: Path) -> AbstractContextManager[None]:
    return only_writer(study, "is being run")


def cells_of_others(study: Path, plan: Plan) -> int:
    """Return the number of a study's run folders that are not in a plan."""
    folder = study / RUNS_FOLDER
    there = {path.name for path in folder.glob("[!.]*") if is_in_use(path)}
    return len(there - {cell.name for cell in plan.cells})


def is_done(study: Path, cell: Cell) -> bool:
    """Return whether a cell is trained and evaluated."""
    return cell_result(study, cell) is not None


def cell_result(study: Path, cell: Cell) -> tuple[RunRecord, dict[str, Any]] | None:
    """Return the record of a cell's run and the evaluation of its test patients; None if the cell is not done."""
    folder = study / RUNS_FOLDER / cell.name
    # A study may come from anywhere: files outside it must not be read.
    if not folder.resolve().is_relative_to(study.resolve()):
        raise RunError(f"{folder}: leads out of the study's folder; copy the study whole, without links")
    try:
        record = load_record(folder)
    except RunError:
        return None
    # The settings differ if defaults have changed since training.
    if not record.finished or without_weights_path(record.settings) != without_weights_path(cell.settings):
        return None
    evaluation = _test_scores(folder, record)
    return None if evaluation is None else (record, evaluation)


def _test_scores(run: Path, record: RunRecord) -> dict[str, Any] | None:
    found = (one for name, one in recorded_evaluations(run, record) if name == "test" and not one.get("failed"))
    return next(found, None)


def epochs_trained(study: Path, cells: Sequence[Cell]) -> int:
    """Return the number of epochs of these cells that are trained by now; a cell of `minutes` counts as one epoch."""
    return sum(
        min(epochs_of(cell), len(read_rows(study / RUNS_FOLDER / cell.name / METRICS_NAME, {}))) for cell in cells
    )


def epochs_of(cell: Cell) -> int:
    """Return the largest number of epochs of a cell, 1 for one that trains for a time."""
    return cell.settings.epochs or 1


def run_study(
    plan: Plan,
    study: str | Path,
    workers: int | None = None,
    scheduler: str | None = None,
    ended: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Train and evaluate the cells of a plan that are not done, and return their outcomes.

    A cell that fails is recorded in `failures.csv`, and the others go on. The same call resumes a stopped study.

    Parameters
    ----------
    plan : Plan
        The cells, and the store as all workers see it.
    study : str or Path
        The study's folder.
    workers : int, optional
        Runs at a time, each in its own process; default: see `processes_here`.
    scheduler : str, optional
        Address of a running Dask scheduler, to use its workers instead; they must see the same paths. If workers have
        the resource ``GPU``, each cell takes one.
    ended : callable, optional
        Called with each outcome.

    Raises
    ------
    RunError
        If another process runs this study, or `workers` and `scheduler` are both given.
    CspineDataError
        If workers cannot be started.
    """
    if workers is not None and scheduler is not None:
        raise RunError("workers and scheduler: exclude each other, as a scheduler has its own workers; give one")
    check_output(Path(study))
    folder = Path(study).resolve()
    make_folder(folder)
    with _lock(folder):
        save_plan(folder, plan)
        _record_failures(folder, [])
        to_do = [cell for cell in plan.cells if not is_done(folder, cell)]
        number, threads, gpus = processes_here(workers, len(to_do))
        how = CellWork(str(folder), plan.store, () if scheduler else gpus, shares_cores=scheduler is not None)
        processes = Workers(None if scheduler else number, scheduler, threads, resource=_GPU)
        outcomes: list[Outcome] = []
        for batch in side_by_side(how, to_do, _lost, processes):
            for _, outcome in batch:
                outcomes.append(outcome)
                if outcome.failure:
                    _record_failures(folder, outcomes)
                if ended:
                    ended(outcome)
        return outcomes


def processes_here(workers: int | None, cells: int) -> tuple[int, int, tuple[str, ...]]:
    """Return the number of parallel runs on this machine, the threads of each, and the GPUs.

    By default there is a run for each GPU, or else for four cores: more threads wait for each other.
    """
    gpus = _gpus()
    cores = usable_cores()
    number = max(1, min(workers or len(gpus) or -(-cores // 4), cells))
    return number, max(1, cores // number), gpus


def _gpus() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))


@dataclass(frozen=True)
class CellWork:
    """Runs a cell in a process of a worker, so that memory is freed, and running out of it ends only this cell.

    Attributes
    ----------
    study, store : str
        The study's folder, and the store.
    gpus : tuple of str
        GPUs of this machine, one for each local worker.
    shares_cores : bool
        Whether the worker belongs to a scheduler, see `threads_of_cell`.
    """

    study: str
    store: str
    gpus: tuple[str, ...]
    shares_cores: bool

    def __call__(self, cell: Cell) -> Outcome:
        """Train and evaluate a cell."""
        started = time.monotonic()
        log = Path(self.study, LOGS_FOLDER, f"{cell.name}.txt")
        make_folder(log.parent)
        run = Path(self.study, RUNS_FOLDER, cell.name)
        request = {"store": self.store, "run": str(run), "settings": cell.settings.model_dump(mode="json")}
        with log.open("ab") as errors:
            command = [sys.executable, "-m", "cspine_train", "cell"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=self.environment()
            )
            with process:
                assert process.stdin and process.stdout  # noqa: S101, PT018
                # The cell ends when this pipe is closed, also if the worker is killed.
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.read()
        return Outcome(cell, time.monotonic() - started, _failure(answer, process.returncode, log))

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a cell: its GPU, or its number of threads."""
        if self.shares_cores:
            return os.environ | dict.fromkeys(_THREADS, str(threads_of_cell()))
        if not self.gpus:
            return dict(os.environ)
        from distributed import get_worker

        worker: Worker = get_worker()
        return os.environ | {"CUDA_VISIBLE_DEVICES": self.gpus[int(worker.name) % len(self.gpus)]}


def threads_of_cell() -> int:
    """Return the number of threads of a cell on the machine of the calling Dask worker.

    It is OMP_NUM_THREADS if above 1 (1 is Dask's default), else the cores divided by the cells at a time.
    """
    from distributed import get_client, get_worker

    given = os.environ.get("OMP_NUM_THREADS", "1")
    if given.isdecimal() and int(given) > 1:
        return int(given)
    known = get_client().scheduler_info(n_workers=-1)["workers"]
    here = [one for one in known.values() if one["host"] == known[get_worker().address]["host"]]
    gpus = sum(int(one["resources"].get(_GPU, 0)) for one in here)
    at_once = gpus or sum(int(one["nthreads"]) for one in here)
    return max(1, usable_cores() // max(1, at_once))


def _failure(answer: bytes, status: int, log: Path) -> str | None:
    # Native code may print, too, or crash after the answer.
    for line in reversed(answer.splitlines()):
        with suppress(ValueError, LookupError, TypeError):
            return json.loads(line)["failure"]  # type: ignore[no-any-return]
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name} (out of memory?); use fewer --workers"
    return f"its process ended with status {status}; {log} may say why"


def do_cell(request: dict[str, Any]) -> str | None:
    """Train and evaluate a cell in its own process; return why it failed, or None."""
    from cspine_data import CspineDataError

    run = Path(request["run"])
    make_folder(run)
    try:
        # After a command was killed, a scheduler's worker may still train this cell: wait for it.
        with _turn_of(run):
            return _done(run, request)
    except (CspineTrainError, CspineDataError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - one cell fails, the others go on
        import traceback

        traceback.print_exc()
        return error_message(run.name, error)


@contextmanager
def _turn_of(run: Path) -> Iterator[None]:
    with ExitStack() as turn:
        try:
            turn.enter_context(only_writer(run))
        except RunError:
            print(f"{run.name}: waiting for another process that trains it", file=sys.stderr, flush=True)
            turn.enter_context(only_writer(run, patience_s=math.inf))
        yield


def _done(run: Path, request: dict[str, Any]) -> str | None:
    from cspine_train.evaluation.scoring import evaluate
    from cspine_train.training.pipeline import train

    settings = RunSettings(**request["settings"])
    (cell,) = plan_study(open_cohort(request["store"]), [settings]).cells
    if cell.name != run.name:
        return "its data or weights file have changed since the plan was made; run the command again"
    if reason := _update_weights_path(run, settings):
        return reason
    record = train(request["store"], run, settings)
    if _test_scores(run, record) is None:
        failed = evaluate(run, ("test",), request["store"]).failed
        return failed[0].message if failed else None
    return None


def _update_weights_path(run: Path, settings: RunSettings) -> str | None:
    """Update the path of the weights file in an unfinished run; return why it cannot be resumed, or None."""
    try:
        begun = load_record(run)
    except RunError:
        return None
    if begun.settings == settings:
        return None
    if without_weights_path(begun.settings) != without_weights_path(settings):
        return f"{run}: was trained with other defaults of cspine; delete this folder to train it again"
    save_record(run, begun.model_copy(update={"settings": settings}))
    return None


def _lost(cell: Cell, reason: str | Exception) -> Outcome:
    return Outcome(cell, 0.0, reason if isinstance(reason, str) else error_message(cell.name, reason))


def _record_failures(study: Path, outcomes: Sequence[Outcome]) -> None:
    failed = [{"cell": one.cell.name, "reason": one.failure} for one in outcomes if one.failure]
    write_rows(study / FAILURES_NAME, ("cell", "reason"), failed)
