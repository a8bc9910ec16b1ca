"""Prepare a store from a folder of volumes: new cases are computed in parallel, stored ones are reused."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cspine_data.errors import InputError
from cspine_data.preparation.jobs import do_jobs
from cspine_data.preparation.options import PrepareOptions
from cspine_data.preparation.plan import plan_jobs
from cspine_data.preparation.pseudonyms import key_file, listed_neutrally
from cspine_data.preparation.source_digests import digest_files
from cspine_data.preparation.standard import with_standard
from cspine_data.preparation.summary import PrepareSummary, summarise
from cspine_data.preprocessing.parameters import checked
from cspine_data.progress import Progress
from cspine_data.sources.cases import cohort_note
from cspine_data.store.identities import identity_of
from cspine_data.store.publishing import create_store, enrol


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
    chosen = checked(PrepareOptions, "", options)
    listing = chosen.find_cases(source)
    note = chosen.note or cohort_note(chosen.pairs.parent if chosen.pairs else source)
    store = Path(store).resolve()
    if key_file(store).exists() and not chosen.anonymise:
        raise InputError(key_file(store), "exists beside the store: its cases have neutral ids", "give --anonymise")
    create_store(store, neutral_ids=chosen.anonymise)
    sources = digest_files(listing.cases, store, chosen.processes, rehash=chosen.rehash)
    if chosen.anonymise:
        listing = listed_neutrally(listing, store, sources)
    jobs, failed = plan_jobs(listing.cases, store, chosen.parameters, chosen.axes, sources, chosen.label_options)
    jobs, standard_cases = with_standard(jobs, store, chosen.processes)
    to_do = [replace(job, neutral=chosen.anonymise) for job in jobs if not job.is_current]
    outcomes = do_jobs(to_do, store, chosen.processes, progress)
    summary = summarise(jobs, outcomes, [*listing.problems, *failed])
    stored = {*summary.done, *summary.reused}
    enrol(store, summary.labelled, note, {case.id: identity_of(case) for case in listing.cases if case.id in stored})
    seconds = time.perf_counter() - started
    notes = (*listing.notes, *summary.source_notes)
    return replace(summary, standard_cases=standard_cases, seconds=seconds, source_notes=notes)
