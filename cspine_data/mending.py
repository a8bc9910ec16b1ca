"""Mending a damaged store from the files that it was made of, to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cspine_data.cases import Case, Problem, describe_problem, find_cases
from cspine_data.errors import InputError
from cspine_data.jobs import Job, file_digests
from cspine_data.pipeline import Progress, do_jobs, listed_neutrally
from cspine_data.preprocess import Preprocessing
from cspine_data.schema import RootRecord
from cspine_data.store import read_root, stored_record
from cspine_data.verification import STRAY, Damage, mend_groups, verify


@dataclass(frozen=True)
class RepairSummary:
    """What was damaged and what became of it.

    Attributes
    ----------
    damages : tuple of Damage
        What was not what had been written.
    mended : tuple of tuple of str
        Each case and variant that was made anew, to the bytes that it had.
    failed : tuple of Problem
        Cases that could not be made anew, and why.
    """

    damages: tuple[Damage, ...]
    mended: tuple[tuple[str, str], ...]
    failed: tuple[Problem, ...]


def repair(
    store: str | Path,
    source: str | Path,
    *,
    pairs: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> RepairSummary:
    """Find what is damaged in a store and make it anew from its source; what is sound is not touched.

    A case's digest tells whether the files are those that it was made of, and how: nothing else replaces it.

    Parameters
    ----------
    store, source, pairs, workers, scheduler
        As `prepare` takes them.
    progress : callable, optional
        Called with (cases finished, cases to mend, case id).

    Raises
    ------
    InputError
        If the source is missing or empty.
    StoreError
        If there is no store, its root is damaged, or it cannot be written to.
    """
    store = Path(store).resolve()
    damages = tuple(verify(store))
    if not damages:
        return RepairSummary((), (), ())
    root = read_root(store)
    listing = find_cases(source, pairs)
    if root.neutral_ids:
        listing = listed_neutrally(listing, store)
    mend_groups(store)
    files = {case.id: case for case in listing.cases}
    jobs, failed = [], []
    strays = {(damage.case, damage.variant): damage for damage in damages if damage.problem == STRAY}
    for case, variant in sorted({(damage.case, damage.variant) for damage in damages if damage.variant}):
        if (case, variant) in strays:
            failed.append(Problem(case, f"{strays[case, variant]}; move it away, then mend the case"))
            continue
        try:
            jobs.append(_job(store, root, files, case, variant))
        except (InputError, OSError) as error:
            failed.append(describe_problem(case, error))
    mended = []
    for variant in sorted({job.preprocessing.variant for job in jobs}):
        of_variant = [job for job in jobs if job.preprocessing.variant == variant]
        outcomes = do_jobs(of_variant, store, workers, scheduler, progress)
        failed += [outcome for outcome in outcomes.values() if isinstance(outcome, Problem)]
        mended += [(case, variant) for case, outcome in outcomes.items() if not isinstance(outcome, Problem)]
    return RepairSummary(damages, tuple(sorted(mended)), tuple(failed))


def _job(store: Path, root: RootRecord, files: dict[str, Case], case: str, variant: str) -> Job:
    """Return the job whose digest is the damaged one: made of the same files in the same way."""
    if case not in files:
        raise InputError(f"case {case!r}", "is damaged, and not in the source", "give the folder that holds its files")
    digest = root.cases[case][variant]
    image_sha256, label_sha256 = file_digests(files[case])
    for preprocessing, axes in _ways(store, root, case, variant):
        job = Job(files[case], image_sha256, label_sha256, preprocessing, axes, digest, preprocessing, anew=True)
        if job.digest == digest:
            return job
    raise InputError(
        files[case].volume, "is not what the damaged case was made of, or was prepared in a way that is lost",
        "run cspine-data prepare with the options that you want",
    )  # fmt: skip


def _ways(store: Path, root: RootRecord, case: str, variant: str) -> Iterator[tuple[Preprocessing, tuple[int, ...]]]:
    """Iterate over how a case may have been prepared: as its record says, else as other cases were."""
    others = sorted(root.cases, key=lambda other: other != case)
    for other in others:
        record = stored_record(store, other, root.cases[other][variant]) if variant in root.cases[other] else None
        if record is not None:
            yield record.preprocessing, record.axes
    yield Preprocessing() if variant == "n4" else Preprocessing(bias=None), (0, 1, 2)
