"""From files to a store: what is new is corrected and sliced in parallel with Dask, what is there is reused."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.cases import (
    Case,
    Listing,
    LoadedCase,
    Problem,
    cohort_note,
    copy_problem,
    describe_problem,
    find_cases,
    load_case,
)
from cspine_data.cluster import Result, check_workers, run_jobs
from cspine_data.errors import DamagedStoreError, InputError
from cspine_data.geometry import Orientation
from cspine_data.intensity import standard_landmarks
from cspine_data.jobs import Job, file_digests, is_current, plan_jobs, planned_anew
from cspine_data.preprocess import CorrectedVolume, PreparedVolume, Preprocessing, correct_volume, normalise_volume
from cspine_data.pseudonyms import with_neutral_ids
from cspine_data.publishing import (
    LabelMap,
    Refused,
    create_store,
    enrol,
    keep_standard,
    mark_in_use,
    publish,
    sync_above,
    write_case,
)
from cspine_data.schema import CaseRecord, RootRecord, Standard, case_path, standard_key
from cspine_data.store import read_corrected, read_root, stored_record
from cspine_data.volumes import Volume, read_volume

# Of each, N4 runs once more: enough for a mean of histograms, few beside a large cohort.
_CASES_OF_A_STANDARD = 32


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
    replaced : tuple of str
        Of those that are done, the cases that the store held prepared in another way.
    standard_cases : tuple of str
        The cases whose histograms Nyul's method matched the others to.
    seconds : float
        How long it took.
    written_bytes : int
        Size on disk of what was computed.
    """

    done: tuple[str, ...]
    reused: tuple[str, ...]
    failed: tuple[Problem, ...]
    replaced: tuple[str, ...]
    standard_cases: tuple[str, ...]
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
    anonymise: bool = False,
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
    anonymise : bool
        Call the cases ``case0001`` and so on instead of by their files' names. Which is which stands in `key_file`,
        beside the store.
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
    check_workers(workers)
    if preprocessing is None:
        preprocessing = Preprocessing() if n4 else Preprocessing(bias=None)
    listing = find_cases(source, pairs)
    store = Path(store).resolve()
    if key_file(store).exists() and not anonymise:
        raise InputError(key_file(store), "lies beside the store: its cases have neutral ids", "give --anonymise")
    create_store(store, neutral_ids=anonymise)
    if anonymise:
        listing = listed_neutrally(listing, store)
    standard = None
    if preprocessing.normalisation == "nyul" and preprocessing.standard is None:
        standard = _standard(listing.cases, store, preprocessing, workers, scheduler)
        preprocessing = preprocessing.model_copy(update={"standard": standard.landmarks if standard else None})
    jobs, failed = plan_jobs(listing.cases, store, preprocessing, wanted_axes)
    failed = [*listing.problems, *failed]
    to_do = [job for job in jobs if not is_current(store, job)]
    outcomes = do_jobs(to_do, store, workers, scheduler, progress)
    failed += [outcome for outcome in outcomes.values() if isinstance(outcome, Problem)]
    written = {case: outcome for case, outcome in outcomes.items() if not isinstance(outcome, Problem)}
    reused = [job.case.id for job in jobs if job.case.id not in outcomes]
    enrol(
        store,
        [job.case.id for job in jobs if job.label_sha256 and (job.case.id in written or job.case.id in reused)],
        note or cohort_note(Path(pairs).parent if pairs else source),
    )
    return PrepareSummary(
        done=tuple(sorted(written)),
        reused=tuple(reused),
        failed=tuple(sorted(failed, key=lambda problem: problem.case)),
        replaced=tuple(
            sorted(job.case.id for job in to_do if job.case.id in written and job.held not in (None, preprocessing))
        ),
        standard_cases=standard.cases if standard else (),
        seconds=time.perf_counter() - started,
        written_bytes=sum(written.values()),
    )


def key_file(store: str | Path) -> Path:
    """Return the file beside a store that says which neutral id is which case: `prepare` with `anonymise` makes it."""
    store = Path(store).resolve()
    return store.with_name(f"{store.name}.key.csv")


def listed_neutrally(listing: Listing, store: Path) -> Listing:
    """Give the cases of a listing the ids by which an anonymised store knows them.

    Raises
    ------
    InputError
        If the store holds cases and their key is missing or damaged: others would be given their ids.
    """
    return with_neutral_ids(listing, existing_key(store, read_root(store)))


def existing_key(store: Path, root: RootRecord) -> Path:
    """Return the key of an anonymised store; where its ids were given to cases, it must be there."""
    key = key_file(store)
    if (root.cases or root.enrolled or root.standards) and not key.exists():
        raise InputError(key, "is missing, and only it says which case is which", "bring it back to that place")
    return key


def do_jobs(
    jobs: Sequence[Job], store: Path, workers: int | None, scheduler: str | None, progress: Progress | None
) -> dict[str, int | Problem]:
    """Do jobs and publish what they make: the bytes written for each case, or its problem.

    Where another run published the same case meanwhile, with other axes for example, the job is planned and done
    again, so that neither undoes what the other did.
    """
    total = len(jobs)
    outcomes: dict[str, int | Problem] = {}
    while jobs:
        overtaken: list[Job] = []
        waiting: dict[str, tuple[Job, int]] = {}
        refused = Refused(set(), {})
        for ended in run_jobs(_work, jobs, store, workers, scheduler):
            made = {job.case.id: (job, size) for job, size in ended if not isinstance(size, Problem)} | waiting
            refused = publish(store, [job.replacement for job, _ in made.values()])
            # Two cases that have exchanged their volumes can only be published together.
            waiting = {case: made[case] for case in refused.twice}
            finished: dict[str, int | Problem] = {
                job.case.id: outcome for job, outcome in ended if isinstance(outcome, Problem)
            }
            for case, (job, size) in made.items():
                if case in refused.overtaken and not job.anew:
                    overtaken.append(job)
                elif case in refused.overtaken:
                    # What was to be mended is not what is wanted any more.
                    finished[case] = Problem(case, f"{store}: {case} was prepared anew or removed meanwhile")
                elif case not in waiting:
                    finished[case] = size
            for case, outcome in finished.items():
                outcomes[case] = outcome
                if progress:
                    progress(len(outcomes), total, case)
        outcomes |= {case: copy_problem(job.case, refused.twice[case]) for case, (job, _) in waiting.items()}
        jobs = planned_anew(overtaken, store)
    return outcomes


def _standard(
    cases: Sequence[Case], store: Path, preprocessing: Preprocessing, workers: int | None, scheduler: str | None
) -> Standard | None:
    """Return what Nyul's method matches the store's volumes to: what it holds, else what is learnt from the cohort.

    It is learnt from a few cases, spread evenly; None where none of them can be used.
    """
    key = standard_key(preprocessing)
    known = read_root(store).standards.get(key)
    if known is not None:
        return known
    jobs, _ = plan_jobs(cases[:: -(-len(cases) // _CASES_OF_A_STANDARD)], store, preprocessing, ())
    outcomes = run_jobs(_landmarks, jobs, store, workers, scheduler)
    of_cases = {job.case.id: found for ended in outcomes for job, found in ended if isinstance(found, tuple) and found}
    if not of_cases:
        return None
    cases_used = tuple(sorted(of_cases))
    landmarks = standard_landmarks([of_cases[case] for case in cases_used])
    return keep_standard(store, key, Standard(landmarks=landmarks, cases=cases_used))


def prepare_case(job: Job, store: Path) -> int:
    """Do one job: load, correct, slice, write. The case is complete in the store then, but not yet published.

    Returns
    -------
    int
        Bytes written; 0 where they had been before and were only not published.

    Raises
    ------
    InputError
        If the case's files cannot be used, or changed since the job was planned.
    OSError
        If the store cannot be written.
    """
    if not job.anew and stored_record(store, job.case.id, job.digest) is not None:
        mark_in_use(store, job.case.id, job.digest)
        # The run that wrote it may have been killed before its folders were durable.
        sync_above(store, job.case.id)
        return 0
    loaded = load_case(job.case)
    if file_digests(job.case) != (job.image_sha256, job.label_sha256):
        raise InputError(job.case.volume, "changed while it was read", "run it again when nothing writes there")
    # What is damaged may have lent its checksums to other voxels, so a case that is made anew takes nothing from it.
    stored = None if job.anew else _stored_volume(job, store)
    corrected = stored or correct_volume(loaded.image, job.preprocessing.bias)
    prepared = normalise_volume(corrected, job.preprocessing)
    label_xyz = _label_xyz(loaded)
    label = None if label_xyz is None else LabelMap(label_xyz, prepared.label_on_network_grid(label_xyz))
    write_case(store, _record(job, loaded, prepared, label), prepared, label, anew=job.anew)
    folder = store / case_path(job.case.id, job.digest)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _stored_volume(job: Job, store: Path) -> CorrectedVolume | None:
    """Return the corrected volume that the store holds, where only what comes after it has changed since."""
    record = stored_record(store, job.case.id, job.current) if job.current else None
    if record is None or record.volume_digest != job.volume_digest:
        return None
    try:
        return read_corrected(store, record)
    except DamagedStoreError:
        return None


def _voxels_sha256(image: Volume) -> str:
    """Digest a volume's voxels in anatomical order, whatever file they come from."""
    array_xyz = np.ascontiguousarray(Orientation.of(image.geometry).to_anatomical(image.array))
    digest = hashlib.sha256(f"{array_xyz.dtype.name} {array_xyz.shape}".encode())
    digest.update(array_xyz.data)
    return digest.hexdigest()


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


def _record(job: Job, loaded: LoadedCase, prepared: PreparedVolume, label: LabelMap | None) -> CaseRecord:
    corrected = prepared.corrected
    geometry_xyz = Orientation.of(corrected.geometry).geometry_xyz(corrected.geometry)
    label_voxels: dict[int, int] = {}
    labelled_voxels: dict[int, tuple[int, ...]] = {}
    if label is not None:
        values, counts = np.unique(label.volume_xyz[label.volume_xyz != 0], return_counts=True)
        label_voxels = {int(value): int(n) for value, n in zip(values, counts, strict=True)}
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            labelled_voxels[axis] = tuple(np.count_nonzero(label.sliced_xyz, axis=others).tolist())
    sliced_x, sliced_y, sliced_z = prepared.levels_xyz.shape
    return CaseRecord(
        case=job.case.id,
        variant=job.preprocessing.variant,
        digest=job.digest,
        volume_digest=job.volume_digest,
        image_sha256=job.image_sha256,
        label_sha256=job.label_sha256,
        voxels_sha256=_voxels_sha256(loaded.image),
        preprocessing=job.preprocessing,
        geometry=corrected.geometry,
        assumed_orientation=loaded.image.assumed_orientation,
        image_dtype=loaded.image.array.dtype.name,
        label_dtype=loaded.label_dtype,
        size_xyz=geometry_xyz.size,
        spacing_xyz_mm=geometry_xyz.spacing_mm,
        sliced_size_xyz=(sliced_x, sliced_y, sliced_z),
        sliced_spacing_xyz_mm=prepared.spacing_mm,
        normalisation=prepared.normalisation,
        levels=prepared.levels,
        air_level=corrected.air_level,
        tissue_threshold=corrected.tissue_threshold,
        tissue_fraction=prepared.tissue_fraction,
        log_bias_deviation=corrected.log_bias_deviation,
        axes=job.axes,
        label_voxels=label_voxels,
        labelled_voxels=labelled_voxels,
    )


def _work(job: Job, store: str) -> int | Problem:
    """Do one job in a worker."""
    return _in_worker(job, lambda: prepare_case(job, Path(store)))


def _landmarks(job: Job, store: str) -> tuple[float, ...] | Problem:
    """Find one volume's landmarks in a worker; a case that fails here fails again where it is prepared."""

    def find() -> tuple[float, ...]:
        corrected = _stored_volume(job, Path(store))
        return (corrected or correct_volume(read_volume(job.case.volume), job.preprocessing.bias)).landmarks

    return _in_worker(job, find)


def _in_worker(job: Job, do: Callable[[], Result]) -> Result | Problem:
    """Do something on one thread; whatever goes wrong is told in one line."""
    import SimpleITK as sitk  # noqa: N813
    from numcodecs import blosc

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    blosc.use_threads = False
    try:
        return do()
    except Exception as error:  # noqa: BLE001 - one case fails, the others go on
        return describe_problem(job.case.id, error)
