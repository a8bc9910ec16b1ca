"""Run the jobs of a cohort in parallel and publish their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cspine_data.errors import Problem, describe_lost
from cspine_data.parallel.workers import Result, Workers, run_in_worker, side_by_side
from cspine_data.preparation.case_writer import prepare_case
from cspine_data.preparation.plan import Job, Stored, planned_anew
from cspine_data.progress import Progress
from cspine_data.sources.cases import copy_problem
from cspine_data.store.publishing import Refused, publish
from cspine_data.volumes.io import size_bytes

# A job is planned again when a concurrent run has published the same case; this many times at most.
_MOST_ROUNDS = 6
# The time of a publication grows with the number of cases in the store. This limits its share of the run time.
_PUBLISH_EVERY_S, _PUBLISH_SHARE = 2.0, 0.05


def do_jobs(
    jobs: Sequence[Job], store: Path, workers: Workers, progress: Progress | None
) -> dict[str, Stored | Problem]:
    """Run jobs and publish their results; return what is stored of each case, or its problem.

    If a concurrent run has published the same case, for example with other axes, the job is planned and run again, so
    that neither run undoes the other. Results are published every few seconds, and also when an exception or Ctrl-C
    ends the run. Results that a killed run has not published are published by the next run without recomputing them.
    """
    total = len(jobs)
    outcomes: dict[str, Stored | Problem] = {}
    waiting: dict[str, tuple[Job, Stored]] = {}
    duplicates: dict[str, str] = {}
    rounds = 0

    def finish(case: str, outcome: Stored | Problem) -> None:
        outcomes[case] = outcome
        if progress:
            progress(len(outcomes), total, case)

    while jobs:
        rounds += 1
        overtaken: list[Job] = []
        for finished in _batches_by_time(run_jobs(_prepare_in_worker, jobs, store, workers, True)):
            made = {job.case.id: (job, done) for job, done in finished if not isinstance(done, Problem)} | waiting
            refused = publish(store, [job.replacement for job, _ in made.values()]) if made else Refused(set(), {})
            # Two cases whose volumes were swapped can only be published together.
            waiting, duplicates = {case: made[case] for case in refused.duplicates}, refused.duplicates
            for job, outcome in finished:
                if isinstance(outcome, Problem):
                    finish(job.case.id, outcome)
            for case, (job, done) in made.items():
                if case in waiting:
                    continue
                problem = _final_problem(job, store, rounds) if case in refused.overtaken else None
                if case in refused.overtaken and problem is None:
                    overtaken.append(job)
                else:
                    finish(case, problem or done)
        jobs = planned_anew(overtaken, store)
    for case, (job, _) in waiting.items():
        finish(case, copy_problem(job.case, duplicates[case]))
    return outcomes


def run_jobs(
    work: Callable[[Job, str], Result | Problem],
    jobs: Sequence[Job],
    store: Path,
    workers: Workers,
    ticks: bool = False,
) -> Iterator[list[tuple[Job, Result | Problem]]]:
    """Run jobs in parallel, the largest file first, and yield finished jobs with their results or problems.

    `work` runs one job in a worker: it takes the job and the store, returns a small result or a problem, and never
    raises.
    """
    ordered = sorted(jobs, key=lambda job: size_bytes(job.case.volume), reverse=True)

    def do(job: Job) -> Result | Problem:
        return work(job, str(store))

    yield from side_by_side(do, ordered, _lost_job, workers, ticks=ticks)


def _prepare_in_worker(job: Job, store: str) -> Stored | Problem:
    return run_in_worker(job.case.id, lambda: prepare_case(job, Path(store)))


def _lost_job(job: Job, reason: str | Exception) -> Problem:
    return describe_lost(job.case.id, job.case.volume, reason)


def _batches_by_time(
    results: Iterator[list[tuple[Job, Stored | Problem]]],
) -> Iterator[list[tuple[Job, Stored | Problem]]]:
    """Collect results and yield them every few seconds, and once more when the iteration ends or fails."""
    held: list[tuple[Job, Stored | Problem]] = []
    due = time.monotonic()
    try:
        for finished in results:
            held += finished
            now = time.monotonic()
            if held and now >= due:
                batch, held = held, []
                yield batch
                published = time.monotonic()
                due = published + max(_PUBLISH_EVERY_S, (published - now) / _PUBLISH_SHARE)
    except BaseException:
        if held:
            yield held
        raise
    if held:
        yield held


def _final_problem(job: Job, store: Path, rounds: int) -> Problem | None:
    """Return why an overtaken job is not planned again; None if it is planned again."""
    case = job.case.id
    if job.overwrite:
        # A repair must not replace what a concurrent run has published.
        return Problem(case, f"{store}: {case} was prepared again or removed during the repair")
    if rounds >= _MOST_ROUNDS:
        problem = "the worker's output is missing, or other runs keep replacing it; do all workers see this store?"
        return Problem(case, f"{store}: {case}: {problem}")
    return None
