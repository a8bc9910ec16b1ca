"""The dataset report of a source or a store: cases are examined in parallel, then the page is written."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cspine_data.datasets.cohort import Cohort, open_cohort
from cspine_data.datasets.splits import by_patient, reference_split
from cspine_data.errors import DamagedStoreError, Problem, count, describe_lost
from cspine_data.parallel.workers import Workers, run_in_worker, side_by_side
from cspine_data.progress import Progress
from cspine_data.report.case_summary import CaseSummary, Examined, examine_source_case, summarise_stored_case
from cspine_data.report.page import About, check_page, write_page
from cspine_data.sources.cases import Listing, ScannedCase, copy_problem
from cspine_data.store.records import read_root
from cspine_data.volumes.label_options import DEFAULT_LABELS, LabelOptions


@dataclass(frozen=True)
class DatasetReport:
    """The result of a report.

    Attributes
    ----------
    cases : tuple of ScannedCase
        The valid cases, by id.
    problems : tuple of Problem
        Cases and files that cannot be used.
    suspects : int
        Number of cases to look at, including those with problems.
    page : Path
        The page.
    """

    cases: tuple[ScannedCase, ...]
    problems: tuple[Problem, ...]
    suspects: int
    page: Path

    def __str__(self) -> str:
        looked = f"{count(self.suspects, 'case')} to look at"
        return f"wrote {self.page}: {looked}; the page shows patients, keep it confidential"


def report_source(
    listing: Listing,
    output: str | Path,
    options: LabelOptions = DEFAULT_LABELS,
    *,
    command: str = "SOURCE",
    workers: int | None = None,
    progress: Progress | None = None,
) -> DatasetReport:
    """Check every case of a source as `prepare` does, and write a page about the cases.

    Parameters
    ----------
    listing : Listing
        From `find_cases`.
    output : str or Path
        The page, an ``.html`` file; it is replaced if it exists. It shows patients.
    options : LabelOptions
        How label maps are read.
    command : str
        The arguments that name the source in commands on the page.
    workers : int, optional
        Number of worker processes; by default one per core.
    progress : callable, optional
        Called with (cases finished, cases, case id) after each case.

    Returns
    -------
    DatasetReport
        The valid cases and the problems.

    Raises
    ------
    InputError
        If `output` has another suffix.
    """
    check_page(Path(output))
    examine = partial(examine_source_case, options=options)
    found = _side_by_side(examine, listing.cases, [case.id for case in listing.cases], workers, progress)
    problems, seen = list(listing.problems), dict[str, str]()
    examined: list[Examined] = []
    for case, one in zip(listing.cases, found, strict=True):
        if isinstance(one, Problem):
            problems.append(one)
        elif (first := seen.setdefault(one.voxels_sha256, case.id)) != case.id:
            problems.append(copy_problem(case, first))
        else:
            examined.append(one)
    summaries = [one.summary for one in examined]
    about = About(
        title=f"Dataset report: {len(summaries)} cases before preparation",
        command=command,
        stored=False,
        notes=(*listing.notes, "the column split is the reference split of a new store with these cases"),
        part_of=_split_of(summaries),
    )
    suspects = write_page(Path(output), about, summaries, problems)
    return DatasetReport(tuple(one.scanned for one in examined), tuple(problems), suspects, Path(output))


def report_store(
    store: str | Path,
    output: str | Path,
    *,
    variant: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DatasetReport:
    """Write a page about the cases of a store, with the volumes before and after bias field correction.

    Parameters
    ----------
    store : str or Path
        The store.
    output : str or Path
        The page, an ``.html`` file; it is replaced if it exists. It shows patients.
    variant : str, optional
        ``n4`` or ``raw``; by default n4 if the store has it.
    workers, progress
        As for `report_source`.

    Returns
    -------
    DatasetReport
        The number of cases to look at, and the problems: damaged cases.

    Raises
    ------
    StoreError
        If there is no store, or it lacks the variant.
    InputError
        If `output` has another suffix.
    """
    check_page(Path(output))
    cohort = open_cohort(store)
    variant = variant or (cohort.variants[0] if cohort.variants else "n4")
    root = read_root(cohort.path)
    part_of = _parts(cohort, variant)
    cases = [case for case in cohort.cases if variant in root.cases[case]]
    summarise = partial(summarise_stored_case, store=cohort.path, variant=variant)
    found = _side_by_side(summarise, cases, cases, workers, progress)
    summaries = [one for one in found if not isinstance(one, Problem)]
    problems = tuple(one for one in found if isinstance(one, Problem))
    about = About(
        title=f"Dataset report: {len(summaries)} prepared cases ({variant})",
        command=shlex.quote(str(store)),
        stored=True,
        notes=cohort.notes,
        part_of=part_of,
    )
    suspects = write_page(Path(output), about, summaries, problems)
    return DatasetReport((), problems, suspects, Path(output))


def _parts(cohort: Cohort, variant: str) -> Mapping[str, str]:
    """Return the part of each case; none if a record is damaged, which leaves the split unknown."""
    try:
        return cohort.split(variant=variant).part_of
    except DamagedStoreError:
        return {}


def _split_of(cases: Sequence[CaseSummary]) -> dict[str, str]:
    """Return the part of each labelled case in the reference split of a new store."""
    patient_of = {case.case: case.identity.patient for case in cases if case.label}
    part_of = reference_split(by_patient([tuple(patient_of)], patient_of)).part_of if patient_of else {}
    return {case: part_of[patient] for case, patient in patient_of.items()}


def _side_by_side(
    work: Callable[[Any], Any],
    tasks: Sequence[Any],
    names: Sequence[str],
    workers: int | None,
    progress: Progress | None,
) -> list[Any]:
    """Run a function on each case in parallel; return results in order, a `Problem` for each case that failed."""
    found: dict[str, Any] = {}
    numbered = list(zip(names, tasks, strict=True))
    for finished in side_by_side(partial(_guarded, work), numbered, _lost, Workers(workers)):
        for (name, _), result in finished:
            found[name] = result
            if progress:
                progress(len(found), len(names), name)
    return [found[name] for name in names]


def _guarded(work: Callable[[Any], Any], task: tuple[str, Any]) -> Any:
    return run_in_worker(task[0], lambda: work(task[1]))


def _lost(task: tuple[str, Any], reason: str | Exception) -> Problem:
    return describe_lost(task[0], task[0], reason)
