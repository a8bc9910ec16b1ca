"""The result of `prepare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cspine_data.errors import Problem
from cspine_data.preparation.plan import Job, Stored
from cspine_data.sources.duplicates import look_alike_notes


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
    source_notes : tuple of str
        Notes on the source, see `Listing`, and on computed cases that look like one patient.
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
    source_notes: tuple[str, ...] = ()


def summarise(
    jobs: Sequence[Job], outcomes: Mapping[str, Stored | Problem], failed: Sequence[Problem]
) -> PrepareSummary:
    """Return the summary of a run; cases without an outcome are reused."""
    stored = {job.case.id: outcomes.get(job.case.id, job.stored) for job in jobs}
    usable = {case: one for case, one in sorted(stored.items()) if isinstance(one, Stored)}
    others = {job.case.id for job in jobs if job.stored and job.stored.preprocessing != job.preprocessing}
    failed = _with_causes([*failed, *(one for one in outcomes.values() if isinstance(one, Problem))])
    return PrepareSummary(
        done=tuple(case for case in usable if case in outcomes),
        reused=tuple(job.case.id for job in jobs if job.case.id not in outcomes),
        failed=tuple(sorted(failed, key=lambda problem: problem.case)),
        replaced=tuple(case for case in usable if case in outcomes and case in others),
        written_bytes=sum(one.written_bytes for one in usable.values()),
        notes={case: one.notes for case, one in usable.items() if one.notes},
        labelled=tuple(case for case, one in usable.items() if one.labelled),
        source_notes=tuple(look_alike_notes(one.fingerprint for one in usable.values() if one.fingerprint)),
    )


def _with_causes(problems: Sequence[Problem]) -> list[Problem]:
    """Return problems in which a copy of a case that failed has that case's cause: keeping one would not help."""
    causes = {problem.case: problem.message for problem in problems if problem.copy_of is None}
    return [
        Problem(problem.case, f"{problem.case}: is a copy of {causes[problem.copy_of]}")
        if problem.copy_of in causes
        else problem
        for problem in problems
    ]
