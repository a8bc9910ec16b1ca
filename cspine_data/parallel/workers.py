"""Work side by side on a Dask cluster: local processes that only this process can use, or a running scheduler's."""

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

from cspine_data.errors import InputError

_THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)  # fmt: skip
Task = TypeVar("Task")
Result = TypeVar("Result")
# With 2 workers Dask opens some 45 files in this process.
_FILES, _FILES_A_WORKER = 64, 16
_STARTS = 3
_DIED = "its worker process died (out of memory?); use fewer --workers, or a machine with more memory"
_NO_WORKER = "no worker process is left to do it; see what ended them, then run it again"
# Looked for more and more seldom while nothing ends: a hundred times a second is a tenth of a core.
_POLL_S, _LONGEST_POLL_S, _LOOK_S, _PATIENCE_S = 0.01, 0.5, 2.0, 60.0


@dataclass(frozen=True)
class Workers:
    """Who works.

    Attributes
    ----------
    number : int or None
        Local worker processes; by default one a core.
    scheduler : str or None
        Address of a running scheduler, whose workers are used instead.
    threads : int
        Of numeric libraries in each local worker. One, where parallelism is over cases.
    resource : str or None
        What a task takes one of, where any worker of the scheduler has it (``dask worker --resources``).
    """

    number: int | None = None
    scheduler: str | None = None
    threads: int = 1
    resource: str | None = None


def side_by_side(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    lost: Callable[[Task, str | Exception], Result],
    workers: Workers,
    *,
    ticks: bool = False,
) -> Iterator[list[tuple[Task, Result]]]:
    """Do tasks on a Dask cluster, in their order, and yield those that ended, each with its result.

    A task whose worker died is done once more, alone, when the others have ended.

    Parameters
    ----------
    work : callable
        Does one task in a worker; both are sent there. It returns something small, and never raises.
    tasks : sequence
        What to do.
    lost : callable
        The result of a task that could not be done, given the task and the reason, as a sentence or an exception.
    workers : Workers
        Who does it.
    ticks : bool
        Yield an empty list, too, about twice a second while no task ends.

    Raises
    ------
    InputError
        If the scheduler cannot be reached, or has no workers; if local ones cannot be started.
    """
    if not tasks:
        return
    from distributed.scheduler import KilledWorker

    with _cluster(workers, len(tasks)) as client:
        resource = _resource(client, workers.resource)
        submit = partial(client.submit, work, pure=False, resources={resource: 1} if resource else None)
        suspects = []
        for ended in _as_they_end(client, submit, tasks, lost, resource):
            if not (ended or ticks):
                continue
            suspects += [task for task, outcome in ended if isinstance(outcome, KilledWorker)]
            yield [(task, outcome) for task, outcome in ended if not isinstance(outcome, KilledWorker)]
        # Dask blames every task that waited on a worker that died. Alone, only the guilty one dies again.
        for suspect in suspects:
            for ended in _as_they_end(client, submit, [suspect], lost, resource):
                if not (ended or ticks):
                    continue
                yield [
                    (task, lost(task, _DIED) if isinstance(outcome, KilledWorker) else outcome)
                    for task, outcome in ended
                ]


def _resource(client: Any, wanted: str | None) -> str | None:
    """Return what a task is to ask of a worker: what is wanted, where any has it."""
    return wanted if wanted and _has_worker_with(client, wanted) else None


def _has_worker_with(client: Any, resource: str | None) -> bool:
    """Return whether any worker could do a task that asks for a resource, or for none."""
    if resource is None:
        return bool(client.scheduler_info(n_workers=1)["workers"])
    return any(resource in worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())


def _as_they_end(
    client: Any,
    submit: Callable[[Task], Any],
    tasks: Sequence[Task],
    lost: Callable[[Task, str | Exception], Any],
    resource: str | None,
) -> Iterator[list[tuple[Task, Any]]]:
    """Do tasks and yield those that ended, or an empty list, until there is none, or no worker for the rest."""
    from distributed import as_completed

    futures = {submit(task): task for task in tasks}
    ended = as_completed(futures, loop=client.loop)
    forsaken_since: float | None = None
    looked, pause = time.monotonic(), _POLL_S
    while futures:
        batch = ended.next_batch(block=False)
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
        if time.monotonic() - looked < _LOOK_S:
            continue
        looked = time.monotonic()
        if _has_worker_with(client, resource):
            forsaken_since = None
        elif forsaken_since is None:
            forsaken_since = looked
        elif looked - forsaken_since > _PATIENCE_S:
            yield [(task, lost(task, _NO_WORKER)) for task in futures.values()]
            return


def check_workers(workers: int | None, scheduler: str | None = None) -> None:
    """Refuse a number of workers that cannot be, or that a scheduler already has.

    Raises
    ------
    InputError
        If it is below one, or given together with a scheduler.
    """
    if workers is not None and scheduler is not None:
        raise InputError("workers and scheduler", "exclude each other", "a scheduler has its own workers: give one")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}", "are too few", "give 1 or more")


def _outcome(future: Any, task: Task, lost: Callable[[Task, str | Exception], Any]) -> Any:
    """Return a task's result, what it is when lost, or Dask's word that its worker died."""
    from distributed import CancelledError
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        return error
    except CancelledError:
        return lost(task, "the scheduler went away meanwhile; run it again when it is back")
    except Exception as error:  # noqa: BLE001 - a worker of another version, for example
        return lost(task, error)


@contextmanager
def _cluster(workers: Workers, tasks: int) -> Iterator[Any]:
    """Open a client of a running scheduler, or of local worker processes."""
    import dask
    from distributed import Client

    scheduler = workers.scheduler
    if scheduler is not None:
        client = _client(scheduler)
        with client:
            if not _has_worker_with(client, None):
                told = f"scheduler {scheduler}: has no workers yet; waiting for one ({_PATIENCE_S:.0f} s)"
                warnings.warn(told, stacklevel=2)
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
        # None waits at a worker, to be blamed or held up there while others are free.
        "distributed.scheduler.worker-saturation": 1.0,
        # A worker holds nothing but its one job: to pause it would be to wait for ever. Past its limit it is ended.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        # Clocks and samplers of its own, in every process, are a tenth of a core on two.
        "distributed.admin.tick.interval": "1s",
        "distributed.worker.profile.enabled": False,
        "distributed.admin.log-format": "%(message)s",
        "logging": {"distributed": "critical"},
    }
    with _more_open_files(number), dask.config.set(settings):
        with _held_interrupts():
            cluster = _local_cluster(number)
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


def _client(scheduler: str) -> Any:
    """Connect to a running scheduler; for TLS with the certificate that Dask's configuration names."""
    from distributed import Client
    from distributed.comm.addressing import get_address_host_port
    from distributed.security import Security

    try:
        # A Client that cannot even try to connect takes 20 s to close.
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
    # Dask renews a worker that dies at work, but not one that dies before it got there.
    for _ in range(_STARTS):
        try:
            return local_cluster(workers)
        except (OSError, RuntimeError) as error:
            reason = error.__cause__ or error
    remedy = "use fewer, or free memory and processes"
    raise InputError(f"workers {workers}", f"cannot be started ({reason})", remedy)


@contextmanager
def _held_interrupts() -> Iterator[None]:
    """Start processes and threads that Ctrl-C does not reach; what comes meanwhile reaches this thread afterwards.

    A terminal sends it to every process, and the first one ends the others in order. What is blocked stays so in the
    processes that the cluster's thread starts, those that replace a worker that died included.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Its start ends with interrupts let through again, whatever was before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _more_open_files(workers: int) -> Iterator[None]:
    """Let this process, and its workers, open as many files as they will; with too few, Dask waits for ever."""
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
            raise InputError(f"workers {workers}", f"need more than the {hard} open files that they may have", remedy)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
