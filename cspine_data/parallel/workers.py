"""Run tasks in parallel on a Dask cluster: private local processes, or the workers of a running scheduler."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from cspine_data.errors import InputError, Problem, describe_problem

_THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)  # fmt: skip
Task = TypeVar("Task")
Result = TypeVar("Result")
# With 2 workers Dask opens about 45 files in this process.
_FILES, _FILES_A_WORKER = 64, 16
_STARTS = 3
_DIED = "its worker process died (out of memory?); use fewer --workers, or a machine with more memory"
_NO_WORKER = "no worker process is left to do it; find out what ended them, then run it again"
# The polling interval grows while no task finishes: polling a hundred times a second takes a tenth of a core.
_POLL_S, _LONGEST_POLL_S, _CHECK_S, _PATIENCE_S = 0.01, 0.5, 2.0, 60.0


@dataclass(frozen=True)
class Workers:
    """The processes that run tasks.

    Raises
    ------
    InputError
        If the number is less than one, or given together with a scheduler.
    """

    number: int | None = None
    """Number of local worker processes; by default one per core."""
    scheduler: str | None = None
    """Address of a running scheduler whose workers are used instead."""
    threads: int = 1
    """Threads of numeric libraries in each local worker; 1 if parallelism is over cases."""
    resource: str | None = None
    """Resource that each task needs one unit of, if a worker of the scheduler offers it; see Dask's ``--resources``."""

    def __post_init__(self) -> None:
        if self.number is not None and self.scheduler is not None:
            raise InputError("workers and scheduler", "exclude each other", "a scheduler has its own workers: give one")
        if self.number is not None and self.number < 1:
            raise InputError(f"workers {self.number}", "are too few", "give 1 or more")


def side_by_side(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    lost: Callable[[Task, str | Exception], Result],
    workers: Workers,
    *,
    ticks: bool = False,
) -> Iterator[list[tuple[Task, Result]]]:
    """Run tasks on a Dask cluster and yield finished tasks with their results.

    `work` runs one task in a worker. The function and the task are sent there; it returns a small result and never
    raises. `lost` returns the result of a task that could not be run, given the task and the reason: a sentence or
    an exception. Tasks start in the given order. A task whose worker died is repeated alone after all others have
    finished. With `ticks`, an empty list is yielded about twice a second while no task finishes.
    """
    if not tasks:
        return
    from distributed.scheduler import KilledWorker

    with _cluster(workers, len(tasks)) as client:
        resource = _resource(client, workers.resource)
        submit = partial(client.submit, work, pure=False, resources={resource: 1} if resource else None)
        to_repeat = []
        for finished in _as_completed(client, submit, tasks, lost, resource):
            if not (finished or ticks):
                continue
            to_repeat += [task for task, outcome in finished if isinstance(outcome, KilledWorker)]
            yield [(task, outcome) for task, outcome in finished if not isinstance(outcome, KilledWorker)]
        # Dask reports every task that waited at a worker that died. Alone, only the task that caused it fails again.
        for task in to_repeat:
            for finished in _as_completed(client, submit, [task], lost, resource):
                if not (finished or ticks):
                    continue
                yield [
                    (task, lost(task, _DIED) if isinstance(outcome, KilledWorker) else outcome)
                    for task, outcome in finished
                ]


def run_in_worker(case_id: str, function: Callable[[], Result]) -> Result | Problem:
    """Call a function on one thread and convert any exception to a one-line problem of a case."""
    from numcodecs import blosc

    blosc.use_threads = False
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - a failed case does not stop the others
        return describe_problem(case_id, error)


def _resource(client: Any, wanted: str | None) -> str | None:
    """Return the resource that tasks need, if any worker offers it."""
    return wanted if wanted and _has_worker_with(client, wanted) else None


def _has_worker_with(client: Any, resource: str | None) -> bool:
    """Return whether any worker could run a task that needs a resource, or none."""
    if resource is None:
        return bool(client.scheduler_info(n_workers=1)["workers"])
    return any(resource in worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())


def _as_completed(
    client: Any,
    submit: Callable[[Task], Any],
    tasks: Sequence[Task],
    lost: Callable[[Task, str | Exception], Any],
    resource: str | None,
) -> Iterator[list[tuple[Task, Any]]]:
    """Run tasks and yield finished ones, or an empty list, until none is left or no worker for the rest."""
    from distributed import as_completed

    futures = {submit(task): task for task in tasks}
    completed = as_completed(futures, loop=client.loop)
    without_workers_since: float | None = None
    checked, pause = time.monotonic(), _POLL_S
    while futures:
        batch = completed.next_batch(block=False)
        if batch:
            pause = _POLL_S
            yield [(futures[future], _outcome(future, futures[future], lost)) for future in batch]
            for future in batch:
                del futures[future]
                future.release()
            continue
        yield []
        time.sleep(pause)
        pause = min(1.1 * pause, _LONGEST_POLL_S)
        if time.monotonic() - checked < _CHECK_S:
            continue
        checked = time.monotonic()
        if _has_worker_with(client, resource):
            without_workers_since = None
        elif without_workers_since is None:
            without_workers_since = checked
        elif checked - without_workers_since > _PATIENCE_S:
            yield [(task, lost(task, _NO_WORKER)) for task in futures.values()]
            return


def _outcome(future: Any, task: Task, lost: Callable[[Task, str | Exception], Any]) -> Any:
    """Return a task's result, the result of a lost task, or Dask's error if its worker died."""
    from distributed import CancelledError
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        return error
    except CancelledError:
        return lost(task, "the scheduler stopped; run it again when it is back")
    except Exception as error:  # noqa: BLE001 - a worker of another version, for example
        return lost(task, error)


@contextmanager
def _cluster(workers: Workers, tasks: int) -> Iterator[Any]:
    """Connect to a running scheduler, or start local worker processes."""
    import dask
    from distributed import Client

    scheduler = workers.scheduler
    if scheduler is not None:
        client = _client(scheduler)
        with client:
            if not _has_worker_with(client, None):
                message = f"scheduler {scheduler}: has no workers yet; waiting for one ({_PATIENCE_S:.0f} s)"
                warnings.warn(message, stacklevel=2)
            try:
                client.wait_for_workers(1, timeout=_PATIENCE_S)
            except TimeoutError:
                raise InputError(f"scheduler {scheduler}", "has no workers", "start some, then run it again") from None
            yield client
        return
    number = min(workers.number or usable_cores(), tasks)
    settings = {
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(_THREADS, str(workers.threads)),
        "distributed.scheduler.allowed-failures": 0,
        # No task waits at a busy worker while others are free.
        "distributed.scheduler.worker-saturation": 1.0,
        # A worker holds only its task, so that pausing it would wait forever. Above its limit the nanny ends it.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        # Dask's clocks and profilers take a tenth of a core with two workers.
        "distributed.admin.tick.interval": "1s",
        "distributed.worker.profile.enabled": False,
        "distributed.admin.log-format": "%(message)s",
        "logging": {"distributed": "critical"},
    }
    with _open_file_limit(number), dask.config.set(settings):
        with _blocked_interrupts():
            cluster = _local_cluster(number)
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


def _client(scheduler: str) -> Any:
    """Connect to a running scheduler; TLS uses the certificate of Dask's configuration."""
    from distributed import Client
    from distributed.comm.addressing import get_address_host_port
    from distributed.security import Security

    try:
        # A Client with an invalid address takes 20 s to close.
        get_address_host_port(scheduler)
        security = Security()
        encrypted = scheduler.startswith("tls://")
        if encrypted and security.get_connection_args("client")["ssl_context"] is None:
            raise ValueError("no certificate is configured")
        if security.require_encryption and not encrypted:
            raise ValueError("Dask's configuration requires encryption")
        return Client(scheduler, timeout=10, security=security, set_as_default=False)
    except (OSError, ValueError) as error:
        remedy = (
            "check its address, and for tls:// CA_FILE, CLIENT__CERT and CLIENT__KEY of DASK_DISTRIBUTED__COMM__TLS__*"
        )
        raise InputError(f"scheduler {scheduler}", f"cannot be reached ({error})", remedy) from None


def _local_cluster(workers: int) -> Any:
    from cspine_data.parallel.local_cluster import local_cluster

    reason: BaseException | None = None
    # Dask restarts a worker that dies while running, but not one that dies while starting.
    for _ in range(_STARTS):
        try:
            return local_cluster(workers)
        except (OSError, RuntimeError) as error:
            reason = error.__cause__ or error
    remedy = "use fewer, or free memory and processes"
    raise InputError(f"workers {workers}", f"cannot be started ({reason})", remedy)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Block Ctrl-C while processes and threads start; a signal that arrives meanwhile is delivered afterwards.

    A terminal sends Ctrl-C to every process, and this one ends the others in order. The signal stays blocked in the
    processes that the cluster's thread starts, also in those that replace a dead worker.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Its start unblocks the signal, so it is started before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _open_file_limit(workers: int) -> Iterator[None]:
    """Raise the limit of open files for this process and its workers; with too few, Dask waits forever."""
    try:
        import resource
    except ImportError:
        yield
        return
    needed = _FILES + _FILES_A_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            remedy = f"raise their limit to {needed} (ulimit -n), or use fewer --workers"
            raise InputError(f"workers {workers}", f"need more than the allowed {hard} open files", remedy)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
