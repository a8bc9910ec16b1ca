"""From files to a store: what is new is corrected and sliced in parallel with Dask, what is there is reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.cases import LoadedCase, Problem, cohort_note, describe_problem, find_cases, load_case
from cspine_data.cluster import run_jobs
from cspine_data.errors import DamagedStoreError, InputError
from cspine_data.geometry import Orientation
from cspine_data.jobs import Job, file_digests, is_current, plan_jobs
from cspine_data.preprocess import CorrectedVolume, Preprocessing, preprocess_volume
from cspine_data.schema import CaseRecord
from cspine_data.store import create_store, enrol, publish, read_volume_xyz, stored_record, write_case


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
    jobs, failed = plan_jobs(listing.cases, store, preprocessing, wanted_axes)
    failed = [*listing.problems, *failed]
    to_do = [job for job in jobs if not is_current(store, job)]
    done, written = [], 0
    for number, (job, outcome) in enumerate(run_jobs(_work, to_do, store, workers, scheduler), start=1):
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
    if file_digests(job.case) != (job.image_sha256, job.label_sha256):
        raise InputError(job.case.volume, "changed while it was read", "run it again when nothing writes there")
    if stored_record(store, job.case.id, job.digest) is None:
        volume = _stored_volume(job, store, loaded) or preprocess_volume(loaded.image, job.preprocessing)
        label_xyz = _label_xyz(loaded)
        write_case(store, _record(job, loaded, volume, label_xyz), volume, label_xyz)
    folder = store / "cases" / job.case.id / job.digest
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
        values, counts = np.unique(label_xyz[label_xyz != 0], return_counts=True)
        label_voxels = {int(value): int(n) for value, n in zip(values, counts, strict=True)}
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
