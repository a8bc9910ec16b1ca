"""From files to a store: what is new is corrected and sliced in parallel with Dask, what is there is reused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.cases import (
    Case,
    LoadedCase,
    Problem,
    cohort_note,
    copy_problem,
    describe_problem,
    find_cases,
    load_case,
)
from cspine_data.errors import DamagedStoreError, InputError
from cspine_data.geometry import Orientation
from cspine_data.preprocess import CorrectedVolume, Preprocessing, preprocess_volume
from cspine_data.schema import CaseRecord, case_digest, volume_digest
from cspine_data.store import (
    create_store,
    enrol,
    publish,
    read_root,
    read_volume_xyz,
    stored_record,
    write_case,
)
from cspine_data.volumes import content_digest

# Rule of the house: parallelism is over cases, so everything below a worker runs on one thread.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "NUMEXPR_NUM_THREADS",
     "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One case to prepare, and by what it will be known: small enough to send to any worker."""

    case: Case
    image_sha256: str
    label_sha256: str | None
    preprocessing: Preprocessing
    axes: tuple[int, ...]
    current: str | None = None

    @property
    def volume_digest(self) -> str:
        """Digest of the corrected volume that this job makes."""
        return volume_digest(self.image_sha256, self.preprocessing)

    @property
    def digest(self) -> str:
        """Digest of the stored case that this job makes."""
        return case_digest(self.volume_digest, self.label_sha256, self.axes)


@dataclass(frozen=True)
class PrepareSummary:
    """What a run of `prepare` did.

    Attributes
    ----------
    done : tuple of str
        Cases that were computed.
    reused : tuple of str
        Cases that the store held already.
    failed : tuple of Problem
        Cases and files that could not be used, and why.
    seconds : float
        How long it took.
    written_bytes : int
        Size on disk of what was computed.
    """

    done: tuple[str, ...]
    reused: tuple[str, ...]
    failed: tuple[Problem, ...]
    seconds: float
    written_bytes: int


Progress = Callable[[int, int, str], None]


def parse_axes(axes: str | Sequence[int]) -> tuple[int, ...]:
    """Turn ``"012"`` or ``[0, 1, 2]`` into sorted axis numbers.

    Raises
    ------
    InputError
        If there is none, or one that is not 0, 1 or 2.
    """
    known = {"0": 0, "1": 1, "2": 2}
    digits = [str(axis) for axis in axes]
    if not digits or any(digit not in known for digit in digits):
        raise InputError(f"axes {''.join(digits)!r}", "are not known", "give some of 0, 1 and 2, as in 012")
    return tuple(sorted({known[digit] for digit in digits}))


def prepare(
    source: str | Path = "data/raw",
    store: str | Path = "data/cspine.zarr",
    *,
    n4: bool = True,
    axes: str | Sequence[int] = "012",
    pairs: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    preprocessing: Preprocessing | None = None,
    note: str | None = None,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Correct, normalise and slice every volume of a folder into a store, once, in parallel.

    Cases that the store holds already, made from the same bytes with the same parameters, are reused. A case that
    fails does not stop the others. Killed at any instant and started again, it ends with the same store.

    Parameters
    ----------
    source : str or Path
        Folder of volumes and label maps; see `find_cases` for the naming that is understood.
    store : str or Path
        The store to make or to add to.
    n4 : bool
        Correct the bias field (variant ``n4``) or leave it in (variant ``raw``).
    axes : str or sequence of int
        The axes to slice along; axes that a case has already are kept.
    pairs : str or Path, optional
        CSV file that names the cases instead of the folder.
    workers : int, optional
        Worker processes; by default one a core.
    scheduler : str, optional
        Address of a running Dask scheduler to use instead of local processes. Its workers must see the same paths.
    preprocessing : Preprocessing, optional
        Parameters other than the default ones; `n4` is then ignored.
    note : str, optional
        What the data are, where they stand in for something else ("synthetic", "lumbar stand-in"): kept in the store
        and said beside every figure. By default the first line of `COHORT.txt` in the source, if there is one.
    progress : callable, optional
        Called with (cases finished, cases to compute, case id) each time a case is finished.

    Returns
    -------
    PrepareSummary
        Cases done, reused and failed.

    Raises
    ------
    InputError
        If the source is missing or empty, or an option is out of range.
    StoreError
        If something else is at the store's place, or a newer cspine wrote it.
    """
    started = time.perf_counter()
    wanted_axes = parse_axes(axes)
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}", "are too few", "give 1 or more")
    if preprocessing is None:
        preprocessing = Preprocessing() if n4 else Preprocessing(bias=None)
    listing = find_cases(source, pairs)
    store = Path(store).resolve()
    create_store(store)
    jobs, failed = _plan(listing.cases, store, preprocessing, wanted_axes)
    failed = [*listing.problems, *failed]
    to_do = [job for job in jobs if not _is_current(store, job)]
    done, written = [], 0
    for number, (job, outcome) in enumerate(_run(to_do, store, workers, scheduler), start=1):
        if isinstance(outcome, Problem):
            failed.append(outcome)
        else:
            publish(store, job.case.id, preprocessing.variant, job.digest)
            done.append(job.case.id)
            written += outcome
        if progress:
            progress(number, len(to_do), job.case.id)
    computed = {job.case.id for job in to_do}
    reused = [job.case.id for job in jobs if job.case.id not in computed]
    good = {*done, *reused}
    enrol(
        store,
        [job.case.id for job in jobs if job.label_sha256 and job.case.id in good],
        note or cohort_note(Path(pairs).parent if pairs else source),
    )
    return PrepareSummary(
        done=tuple(sorted(done)),
        reused=tuple(reused),
        failed=tuple(sorted(failed, key=lambda problem: problem.case)),
        seconds=time.perf_counter() - started,
        written_bytes=written,
    )


def prepare_case(job: Job, store: Path) -> int:
    """Do one job: load, correct, slice, write. The case is complete in the store then, but not yet published.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    InputError
        If the case's files cannot be used, or changed since the job was planned.
    OSError
        If the store cannot be written.
    """
    loaded = load_case(job.case)
    if _digests(job.case) != (job.image_sha256, job.label_sha256):
        raise InputError(job.case.volume, "changed while it was read", "run it again when nothing writes there")
    if stored_record(store, job.case.id, job.digest) is None:
        volume = _stored_volume(job, store, loaded) or preprocess_volume(loaded.image, job.preprocessing)
        label_xyz = _label_xyz(loaded)
        write_case(store, _record(job, loaded, volume, label_xyz), volume, label_xyz)
    folder = store / "cases" / job.case.id / job.digest
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _plan(
    cases: Sequence[Case], store: Path, preprocessing: Preprocessing, axes: tuple[int, ...]
) -> tuple[list[Job], list[Problem]]:
    """Digest every case's files and find out what each will be known by."""
    published = read_root(store).cases
    jobs, problems = [], []
    # A case that is listed now may have got another file since: only the store's other cases keep theirs.
    listed = {case.id for case in cases}
    seen = _stored_images(store, {case: digests for case, digests in published.items() if case not in listed})
    for case in cases:
        try:
            image_sha256, label_sha256 = _digests(case)
        except (InputError, OSError) as error:
            problems.append(describe_problem(case.id, error))
            continue
        first = seen.setdefault(image_sha256, case.id)
        if first != case.id:
            problems.append(copy_problem(case, first, only_in_store=first not in listed))
            continue
        current = published.get(case.id, {}).get(preprocessing.variant)
        record = stored_record(store, case.id, current) if current else None
        kept = record.axes if record else ()
        all_axes = tuple(sorted({*axes, *kept}))
        jobs.append(Job(case, image_sha256, label_sha256, preprocessing, all_axes, current))
    return jobs, problems


def _stored_images(store: Path, published: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return which case each stored image is of, by the digest of its file."""
    digests = ((case, digest) for case, variants in published.items() for digest in variants.values())
    found = ((case, stored_record(store, case, digest)) for case, digest in digests)
    return {record.image_sha256: case for case, record in found if record}


def _digests(case: Case) -> tuple[str, str | None]:
    for path in (case.volume, case.label):
        if path is not None and not path.is_file():
            raise InputError(path, "is no file", "check the path")
    return content_digest(case.volume), content_digest(case.label) if case.label else None


def _is_current(store: Path, job: Job) -> bool:
    return job.current == job.digest and stored_record(store, job.case.id, job.digest) is not None


def _stored_volume(job: Job, store: Path, loaded: LoadedCase) -> CorrectedVolume | None:
    """Return the corrected volume that the store holds, where only labels or axes have changed since."""
    record = stored_record(store, job.case.id, job.current) if job.current else None
    if record is None or record.volume_digest != job.volume_digest:
        return None
    try:
        image_xyz = read_volume_xyz(store, record)
    except DamagedStoreError:
        return None
    return CorrectedVolume(
        image_xyz=image_xyz,
        geometry=loaded.image.geometry,
        normalisation=record.normalisation,
        air_level=record.air_level,
        tissue_threshold=record.tissue_threshold,
        tissue_fraction=record.tissue_fraction,
        log_bias_deviation=record.log_bias_deviation,
    )


def _label_xyz(loaded: LoadedCase) -> NDArray[Any] | None:
    """Return the label map in anatomical order, in the smallest dtype that holds its values."""
    if loaded.label is None:
        return None
    values = loaded.label.array
    smallest, largest = int(values.min()), int(values.max())
    dtype = np.promote_types(np.min_scalar_type(smallest), np.min_scalar_type(largest))
    if dtype.kind == "f":
        dtype = values.dtype
    return np.ascontiguousarray(Orientation.of(loaded.image.geometry).to_anatomical(values).astype(dtype))


def _record(job: Job, loaded: LoadedCase, volume: CorrectedVolume, label_xyz: NDArray[Any] | None) -> CaseRecord:
    geometry = loaded.image.geometry
    geometry_xyz = Orientation.of(geometry).geometry_xyz(geometry)
    label_voxels: dict[int, int] = {}
    labelled_voxels: dict[int, tuple[int, ...]] = {}
    if label_xyz is not None:
        values, counts = np.unique(label_xyz, return_counts=True)
        label_voxels = {int(value): int(n) for value, n in zip(values, counts, strict=True) if value != 0}
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            labelled_voxels[axis] = tuple(np.count_nonzero(label_xyz, axis=others).tolist())
    return CaseRecord(
        case=job.case.id,
        variant=job.preprocessing.variant,
        digest=job.digest,
        volume_digest=job.volume_digest,
        image_sha256=job.image_sha256,
        label_sha256=job.label_sha256,
        preprocessing=job.preprocessing,
        geometry=geometry,
        assumed_orientation=loaded.image.assumed_orientation,
        image_dtype=loaded.image.array.dtype.name,
        label_dtype=loaded.label.array.dtype.name if loaded.label else None,
        size_xyz=geometry_xyz.size,
        spacing_xyz_mm=geometry_xyz.spacing_mm,
        normalisation=volume.normalisation,
        air_level=volume.air_level,
        tissue_threshold=volume.tissue_threshold,
        tissue_fraction=volume.tissue_fraction,
        log_bias_deviation=volume.log_bias_deviation,
        axes=job.axes,
        label_voxels=label_voxels,
        labelled_voxels=labelled_voxels,
    )


def _run(
    jobs: Sequence[Job], store: Path, workers: int | None, scheduler: str | None
) -> Iterator[tuple[Job, int | Problem]]:
    """Do the jobs on a Dask cluster, the largest first, and yield each as it ends: its bytes, or its problem."""
    if not jobs:
        return
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    ordered = sorted(jobs, key=lambda job: job.case.volume.stat().st_size, reverse=True)
    with _cluster(min(workers or _cores(), len(jobs)), scheduler) as client:
        futures = {client.submit(_work, job, str(store), pure=False): job for job in ordered}
        suspects = []
        for future in as_completed(futures, loop=client.loop):
            job = futures[future]
            outcome = _outcome(future, job)
            if isinstance(outcome, KilledWorker):
                suspects.append(job)
            else:
                yield job, outcome
            future.release()
        # Dask blames every case that waited on a worker that died. Alone, only the guilty one dies again.
        for job in suspects:
            outcome = _outcome(client.submit(_work, job, str(store), pure=False), job)
            if isinstance(outcome, KilledWorker):
                message = f"{job.case.volume}: its worker process died (out of memory?); use fewer --workers"
                outcome = Problem(job.case.id, message)
            yield job, outcome


def _outcome(future: Any, job: Job) -> Any:
    """Return a job's bytes, its problem, or Dask's word that its worker died."""
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        return error
    except Exception as error:  # noqa: BLE001 - a worker of another version, for example
        return describe_problem(job.case.id, error)


def _work(job: Job, store: str) -> int | Problem:
    """Do one job in a worker; whatever goes wrong is told in one line."""
    import SimpleITK as sitk  # noqa: N813
    from numcodecs import blosc

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    blosc.use_threads = False
    try:
        return prepare_case(job, Path(store))
    except Exception as error:  # noqa: BLE001 - one case fails, the others go on
        return describe_problem(job.case.id, error)


@contextmanager
def _cluster(workers: int, scheduler: str | None) -> Iterator[Any]:
    """Open a client of a running scheduler, or of local worker processes that listen on loopback only."""
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=10, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(f"scheduler {scheduler}", f"cannot be reached ({error})", "check its address") from None
        with client:
            yield client
        return
    settings = {
        "distributed.nanny.pre-spawn-environ": _ONE_THREAD,
        "distributed.scheduler.allowed-failures": 0,
        "distributed.admin.log-format": "%(message)s",
        "logging": {"distributed": "critical"},
    }
    with dask.config.set(settings):
        with _held_interrupts():
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None,
                silence_logs=50,
            )  # fmt: skip
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
