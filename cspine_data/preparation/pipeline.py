"""Prepare a store from a folder of volumes: new cases are computed in parallel, stored ones are reused."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cspine_data.errors import InputError, Problem, with_causes
from cspine_data.parallel.workers import check_workers
from cspine_data.preparation.case_writer import stored_volume
from cspine_data.preparation.hashing import digest_files
from cspine_data.preparation.jobs import do_jobs, run_in_worker, run_jobs
from cspine_data.preparation.plan import Job, is_current, plan_jobs
from cspine_data.preparation.pseudonyms import with_neutral_ids
from cspine_data.preparation.source_digests import Digested
from cspine_data.preprocessing.normalisation import standard_landmarks
from cspine_data.preprocessing.steps import Preprocessing, correct_volume
from cspine_data.progress import Progress
from cspine_data.sources.cases import Case, Listing, cohort_note
from cspine_data.sources.listing import find_cases
from cspine_data.store.publishing import (
    create_store,
    enrol,
    keep_standard,
)
from cspine_data.store.records import read_root, stored_record
from cspine_data.store.schema import RootRecord, Standard, standard_key
from cspine_data.volumes.io import read_volume

# N4 runs once more for each of these cases. They are enough for a mean histogram.
_STANDARD_CASES = 32


@dataclass(frozen=True)
class PrepareSummary:
    """The result of `prepare`.

    Attributes
    ----------
    done : tuple of str
        Cases that were computed.
    reused : tuple of str
        Cases that were stored already.
    failed : tuple of Problem
        Cases and files that could not be used, with the reasons.
    replaced : tuple of str
        Computed cases that replaced a case with other parameters.
    standard_cases : tuple of str
        The cases whose mean histogram Nyul's method matches all others to.
    seconds : float
        Run time.
    written_bytes : int
        Size of the computed cases on disk.
    notes : dict
        Notes on each case that was computed or reused, see `Volume`.
    """

    done: tuple[str, ...]
    reused: tuple[str, ...]
    failed: tuple[Problem, ...]
    replaced: tuple[str, ...]
    standard_cases: tuple[str, ...]
    seconds: float
    written_bytes: int
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def parse_axes(axes: str | Sequence[int]) -> tuple[int, ...]:
    """Convert ``"012"`` or ``[0, 1, 2]`` to sorted axis numbers.

    Raises
    ------
    InputError
        If there is no axis, or one that is not 0, 1 or 2.
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
    n4: bool | None = None,
    axes: str | Sequence[int] = "012",
    pairs: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    preprocessing: Preprocessing | None = None,
    note: str | None = None,
    anonymise: bool = False,
    trust_voxels: bool = False,
    ignore_label: int | None = None,
    rehash: bool = False,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Correct, normalise and slice every volume of a folder into a store, once, in parallel.

    Cases that the store has already, with the same source bytes and parameters, are reused. A case that fails does not
    stop the others. If a run is killed at any time and started again, the resulting store is the same. If two files
    hold the same volume, the one that is published first stays, and the other fails.

    Parameters
    ----------
    source : str or Path
        Folder of volumes and label maps; see `find_cases` for the supported names.
    store : str or Path
        The store to create or to add to.
    n4 : bool
        Correct the bias field (variant ``n4``), or do not (variant ``raw``). By default as in `preprocessing`, and
        without that, corrected.
    axes : str or sequence of int
        The axes to slice along; stored axes of a case are kept.
    pairs : str or Path, optional
        CSV file that lists the cases instead of the folder.
    workers : int, optional
        Number of worker processes; by default one per core. Excludes `scheduler`.
    scheduler : str, optional
        Address of a running Dask scheduler to use instead of local processes. Its workers must see the same paths.
    preprocessing : Preprocessing, optional
        Parameters other than the default ones.
    note : str, optional
        Description of stand-in data ("synthetic", "lumbar stand-in"): kept in the store and shown beside every figure.
        By default the first line of `COHORT.txt` in the source, if there is one.
    anonymise : bool
        Name the cases ``case0001`` and so on instead of by their files. The key is `key_file`, beside the store.
    trust_voxels : bool
        Assume that a label map without a position in its header is on its volume's grid, voxel for voxel.
    ignore_label : int, optional
        The label value of voxels to ignore in training, validation and evaluation. By default a stored case keeps its
        value.
    rehash : bool
        Hash all source files again, also those with unchanged size and times.
    progress : callable, optional
        Called with (cases finished, cases to compute, case id) after each case.

    Returns
    -------
    PrepareSummary
        Computed, reused and failed cases.

    Raises
    ------
    InputError
        If the source is missing or empty, or an option is out of range or contradicts another one.
    StoreError
        If the path exists and is not a store, or a newer cspine wrote it.
    """
    started = time.perf_counter()
    wanted_axes = parse_axes(axes)
    check_workers(workers, scheduler)
    if ignore_label == 0:
        raise InputError("ignore_label 0", "is the background", "give the label value of voxels to ignore")
    preprocessing = _parameters(n4, preprocessing)
    listing = find_cases(source, pairs)
    store = Path(store).resolve()
    if key_file(store).exists() and not anonymise:
        raise InputError(key_file(store), "exists beside the store: its cases have neutral ids", "give --anonymise")
    create_store(store, neutral_ids=anonymise)
    sources = digest_files(listing.cases, store, workers, scheduler, rehash=rehash)
    if anonymise:
        listing = listed_neutrally(listing, store, sources)
    standard = None
    if preprocessing.normalisation == "nyul" and preprocessing.standard is None:
        standard = _standard(listing.cases, store, preprocessing, workers, scheduler, sources)
        preprocessing = preprocessing.model_copy(update={"standard": standard.landmarks if standard else None})
    jobs, failed = plan_jobs(listing.cases, store, preprocessing, wanted_axes, ignore_label, sources)
    jobs = [replace(job, trust_voxels=trust_voxels) for job in jobs]
    failed = [*listing.problems, *failed]
    to_do = [job for job in jobs if not is_current(store, job)]
    outcomes = do_jobs(to_do, store, workers, scheduler, progress)
    failed += [outcome for outcome in outcomes.values() if isinstance(outcome, Problem)]
    failed = with_causes(failed)
    written = {case: outcome for case, outcome in outcomes.items() if not isinstance(outcome, Problem)}
    reused = [job.case.id for job in jobs if job.case.id not in outcomes]
    enrol(
        store,
        _labelled(store, [job for job in jobs if job.case.id in written or job.case.id in reused]),
        note or cohort_note(Path(pairs).parent if pairs else source),
    )
    return PrepareSummary(
        done=tuple(sorted(written)),
        reused=tuple(reused),
        failed=tuple(sorted(failed, key=lambda problem: problem.case)),
        replaced=_replaced(to_do, written, preprocessing),
        standard_cases=standard.cases if standard else (),
        seconds=time.perf_counter() - started,
        written_bytes=sum(written.values()),
        notes=_notes(store, jobs, written),
    )


def _replaced(jobs: Sequence[Job], written: Container[str], preprocessing: Preprocessing) -> tuple[str, ...]:
    """Return the cases that were stored with other parameters before."""
    others = (job for job in jobs if job.stored_preprocessing not in (None, preprocessing))
    return tuple(sorted(job.case.id for job in others if job.case.id in written))


def _parameters(n4: bool | None, preprocessing: Preprocessing | None) -> Preprocessing:
    if preprocessing is None:
        return Preprocessing(bias=None) if n4 is False else Preprocessing()
    if n4 not in (None, preprocessing.bias is not None):
        raise InputError(
            f"n4={n4}", f"contradicts preprocessing ({preprocessing.description})", "leave out one of them"
        )
    return preprocessing


def _labelled(store: Path, jobs: Sequence[Job]) -> list[str]:
    """Return the labelled cases; a case with an empty label map is not one of them."""
    enrolled = {case for batch in read_root(store).enrolled for case in batch}
    labelled = []
    for job in jobs:
        if job.label_sha256 and job.case.id not in enrolled:
            record = stored_record(store, job.case.id, job.digest)
            if record is not None and not record.labels:
                continue
            labelled.append(job.case.id)
    return labelled


def _notes(store: Path, jobs: Sequence[Job], written: Container[str]) -> dict[str, tuple[str, ...]]:
    """Return the notes on each case that was computed or reused."""
    notes: dict[str, tuple[str, ...]] = {}
    for job in jobs:
        if job.case.id in written:
            # A concurrent run may have replaced the case; then there is no record of this digest.
            record = stored_record(store, job.case.id, job.digest)
            notes[job.case.id] = record.warnings if record else ()
        elif job.current == job.digest:
            notes[job.case.id] = job.notes
    return {case: found for case, found in sorted(notes.items()) if found}


def key_file(store: str | Path) -> Path:
    """Return the key of an anonymised store: the file beside it that maps neutral ids to case names."""
    store = Path(store).resolve()
    return store.with_name(f"{store.name}.key.csv")


def listed_neutrally(
    listing: Listing, store: Path, sources: Mapping[Path, Digested | Problem] | None = None
) -> Listing:
    """Replace the case ids of a listing by the neutral ids of an anonymised store.

    Raises
    ------
    InputError
        If the store has cases and their key is missing or damaged, so that other cases could get their ids.
    """
    return with_neutral_ids(listing, existing_key(store, read_root(store)), sources)


def existing_key(store: Path, root: RootRecord) -> Path:
    """Return the key of an anonymised store; it must exist if any ids have been given out."""
    key = key_file(store)
    if (root.cases or root.enrolled or root.standards) and not key.exists():
        raise InputError(key, "is missing, and without it the cases cannot be identified", "restore it there")
    return key


def _standard(
    cases: Sequence[Case],
    store: Path,
    preprocessing: Preprocessing,
    workers: int | None,
    scheduler: str | None,
    sources: Mapping[Path, Digested | Problem],
) -> Standard | None:
    """Return the standard histogram of Nyul's method: the one in the store, or one computed from the cohort.

    It is computed from a few cases, spread evenly; None if none of them can be used.
    """
    key = standard_key(preprocessing)
    known = read_root(store).standards.get(key)
    if known is not None:
        return known
    jobs, _ = plan_jobs(cases[:: -(-len(cases) // _STANDARD_CASES)], store, preprocessing, (), sources=sources)
    outcomes = run_jobs(_landmarks, jobs, store, workers, scheduler)
    of_cases = {job.case.id: found for ended in outcomes for job, found in ended if isinstance(found, tuple) and found}
    if not of_cases:
        return None
    cases_used = tuple(sorted(of_cases))
    landmarks = standard_landmarks([of_cases[case] for case in cases_used])
    return keep_standard(store, key, Standard(landmarks=landmarks, cases=cases_used))


def _landmarks(job: Job, store: str) -> tuple[float, ...] | Problem:
    """Return the landmarks of one volume, in a worker; a case that fails here is reported when it is prepared."""

    def find() -> tuple[float, ...]:
        corrected = stored_volume(job, Path(store))
        return (corrected or correct_volume(read_volume(job.case.volume), job.preprocessing.bias)).tissue.landmarks

    return run_in_worker(job, find)
