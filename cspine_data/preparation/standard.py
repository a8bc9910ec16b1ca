"""The standard of Nyul's method: the mean histogram of a cohort, computed once and kept in its store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cspine_data.errors import Problem
from cspine_data.parallel.workers import Workers
from cspine_data.preparation.case_writer import stored_volume
from cspine_data.preparation.jobs import run_in_worker, run_jobs
from cspine_data.preparation.plan import Job, plan_jobs
from cspine_data.preparation.source_digests import Digested
from cspine_data.preprocessing.normalisation import standard_landmarks
from cspine_data.preprocessing.parameters import Preprocessing
from cspine_data.preprocessing.steps import correct_volume
from cspine_data.sources.cases import Case
from cspine_data.store.publishing import keep_standard
from cspine_data.store.records import read_root
from cspine_data.store.schema import Standard, standard_key
from cspine_data.volumes.io import read_volume

# N4 runs once more for each of these cases. They are enough for a mean histogram.
_STANDARD_CASES = 32


def cohort_standard(
    cases: Sequence[Case],
    store: Path,
    preprocessing: Preprocessing,
    workers: Workers,
    sources: Mapping[Path, Digested | Problem],
) -> Standard | None:
    """Return the standard in the store, or one computed from a few cases, spread evenly; None where none is needed.

    None also if none of these cases can be used.
    """
    if preprocessing.normalisation != "nyul" or preprocessing.standard is not None:
        return None
    key = standard_key(preprocessing)
    known = read_root(store).standards.get(key)
    if known is not None:
        return known
    jobs, _ = plan_jobs(cases[:: max(1, -(-len(cases) // _STANDARD_CASES))], store, preprocessing, (), sources)
    outcomes = run_jobs(_landmarks, jobs, store, workers)
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
