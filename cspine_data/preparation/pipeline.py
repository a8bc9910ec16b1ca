"""Prepare a store from a folder of volumes: new cases are computed in parallel, stored ones are reused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cspine_data.errors import InputError, Problem, with_causes
from cspine_data.preparation.jobs import do_jobs
from cspine_data.preparation.options import PrepareOptions
from cspine_data.preparation.plan import Job, Stored, plan_jobs
from cspine_data.preparation.pseudonyms import key_file, listed_neutrally
from cspine_data.preparation.source_digests import digest_files
from cspine_data.preparation.standard import cohort_standard
from cspine_data.preprocessing.parameters import checked
from cspine_data.progress import Progress
from cspine_data.sources.cases import cohort_note
from cspine_data.sources.pairing import find_cases
from cspine_data.store.publishing import create_store, enrol


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
    labelled : tuple of str
        Cases with labelled voxels that were computed or reused.
    """

    done: tuple[str, ...]
    reused: tuple[str, ...]
    failed: tuple[Problem, ...]
    replaced: tuple[str, ...]
    standard_cases: tuple[str, ...] = ()
    seconds: float = 0.0
    written_bytes: int = 0
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labelled: tuple[str, ...] = ()


def prepare(
    source: str | Path = "data/raw",
    store: str | Path = "data/cspine.zarr",
    *,
    progress: Progress | None = None,
    **options: Any,
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
    progress : callable, optional
        Called with (cases finished, cases to compute, case id) after each case.
    **options
        Fields of `PrepareOptions`, such as ``n4=False``, ``axes="0"`` or ``workers=4``.

    Raises
    ------
    InputError
        If the source is missing or empty, or an option is out of range or contradicts another one.
    StoreError
        If the path exists and is not a store, or a newer cspine wrote it.
    """
    started = time.perf_counter()
    chosen = checked(PrepareOptions, "", options)
    listing = find_cases(source, chosen.pairs)
    note = chosen.note or cohort_note(chosen.pairs.parent if chosen.pairs else source)
    store = Path(store).resolve()
    if key_file(store).exists() and not chosen.anonymise:
        raise InputError(key_file(store), "exists beside the store: its cases have neutral ids", "give --anonymise")
    create_store(store, neutral_ids=chosen.anonymise)
    sources = digest_files(listing.cases, store, chosen.processes, rehash=chosen.rehash)
    if chosen.anonymise:
        listing = listed_neutrally(listing, store, sources)
    preprocessing = chosen.parameters
    standard = cohort_standard(listing.cases, store, preprocessing, chosen.processes, sources)
    if standard is not None:
        preprocessing = preprocessing.model_copy(update={"standard": standard.landmarks})
    jobs, failed = plan_jobs(listing.cases, store, preprocessing, chosen.axes, sources, chosen.ignore_label)
    to_do = [replace(job, trust_voxels=chosen.trust_voxels) for job in jobs if not job.is_current]
    outcomes = do_jobs(to_do, store, chosen.processes, progress)
    summary = _summary(jobs, outcomes, [*listing.problems, *failed])
    enrol(store, summary.labelled, note)
    return replace(summary, standard_cases=standard.cases if standard else (), seconds=time.perf_counter() - started)


def _summary(
    jobs: Sequence[Job], outcomes: Mapping[str, Stored | Problem], failed: Sequence[Problem]
) -> PrepareSummary:
    """Return the summary of a run; cases without an outcome are reused."""
    stored = {job.case.id: outcomes.get(job.case.id, job.stored) for job in jobs}
    usable = {case: one for case, one in sorted(stored.items()) if isinstance(one, Stored)}
    others = {job.case.id for job in jobs if job.stored and job.stored.preprocessing != job.preprocessing}
    failed = with_causes([*failed, *(one for one in outcomes.values() if isinstance(one, Problem))])
    return PrepareSummary(
        done=tuple(case for case in usable if case in outcomes),
        reused=tuple(job.case.id for job in jobs if job.case.id not in outcomes),
        failed=tuple(sorted(failed, key=lambda problem: problem.case)),
        replaced=tuple(case for case in usable if case in outcomes and case in others),
        written_bytes=sum(one.written_bytes for one in usable.values()),
        notes={case: one.notes for case, one in usable.items() if one.notes},
        labelled=tuple(case for case, one in usable.items() if one.labelled),
    )
