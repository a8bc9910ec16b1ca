"""The standard of Nyul's method: the mean histogram of a cohort, computed once and kept in its store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cspine_data.errors import Problem
from cspine_data.parallel.workers import Workers, run_in_worker
from cspine_data.preparation.case_writer import stored_volume
from cspine_data.preparation.jobs import run_jobs
from cspine_data.preparation.plan import Job
from cspine_data.preprocessing.normalisation import standard_landmarks
from cspine_data.preprocessing.steps import correct_volume
from cspine_data.store.publishing import keep_standard
from cspine_data.store.records import read_root
from cspine_data.store.schema import Standard, standard_key
from cspine_data.volumes.io import read_volume

# N4 runs once more for each of these cases. They are enough for a mean histogram.
_STANDARD_CASES = 32


def with_standard(jobs: Sequence[Job], store: Path, workers: Workers) -> tuple[list[Job], tuple[str, ...]]:
    """Return jobs with the standard, if they need one, and the cases that it was computed from.

    It is the one in the store, or computed from a few cases, spread evenly. If none of them can be used there is none,
    and the jobs fail.
    """
    if not jobs or jobs[0].preprocessing.normalisation != "nyul" or jobs[0].preprocessing.standard is not None:
        return list(jobs), ()
    preprocessing = jobs[0].preprocessing
    key = standard_key(preprocessing)
    standard = read_root(store).standards.get(key)
    if standard is None:
        some = jobs[:: math.ceil(len(jobs) / _STANDARD_CASES)]
        outcomes = [outcome for finished in run_jobs(_landmarks, some, store, workers) for outcome in finished]
        landmarks = {job.case.id: found for job, found in outcomes if isinstance(found, tuple) and found}
        if not landmarks:
            return list(jobs), ()
        cases = tuple(sorted(landmarks))
        mean = standard_landmarks([landmarks[case] for case in cases])
        standard = keep_standard(store, key, Standard(landmarks=mean, cases=cases))
    preprocessing = preprocessing.model_copy(update={"standard": standard.landmarks})
    return [replace(job, preprocessing=preprocessing) for job in jobs], standard.cases


def _landmarks(job: Job, store: str) -> tuple[float, ...] | Problem:
    """Return the landmarks of one volume, in a worker; a case that fails here is reported when it is prepared."""

    def find() -> tuple[float, ...]:
        corrected = stored_volume(job, Path(store))
        return (corrected or correct_volume(read_volume(job.case.volume), job.preprocessing.bias)).tissue.landmarks

    return run_in_worker(job.case.id, find)
