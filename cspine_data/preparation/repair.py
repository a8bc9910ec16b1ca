"""Mending a damaged store from the files that it was made of, to the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cspine_data.errors import DamagedStoreError, InputError, Problem, describe_problem
from cspine_data.parallel.workers import check_workers
from cspine_data.preparation.hashing import digest_files
from cspine_data.preparation.jobs import do_jobs
from cspine_data.preparation.pipeline import existing_key
from cspine_data.preparation.plan import Job, new_job
from cspine_data.preparation.pseudonyms import read_key
from cspine_data.preparation.source_digests import Digested
from cspine_data.preprocessing.steps import Preprocessing
from cspine_data.progress import Progress
from cspine_data.sources.cases import Case
from cspine_data.sources.pairing import find_cases
from cspine_data.store.publishing import mend_root
from cspine_data.store.records import read_root, stored_record
from cspine_data.store.schema import CaseRecord, RootRecord
from cspine_data.store.verification import STRAY, Damage, mend_groups, verify, verify_case
from cspine_data.store.writer import METADATA

Way = tuple[Preprocessing, tuple[int, ...], int | None]


@dataclass(frozen=True)
class RepairSummary:
    """What was damaged and what became of it.

    Attributes
    ----------
    damages : tuple of Damage
        What was not what had been written.
    mended : tuple of tuple of str
        Each case and variant that was made anew, and verified.
    differing : tuple of tuple of str
        Of these, those whose bytes are not those of before, which another version of a library may bring with it.
    failed : tuple of Problem
        Cases that could not be made anew, and why.
    """

    damages: tuple[Damage, ...]
    mended: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, str], ...]
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
    check_workers(workers, scheduler)
    store = Path(store).resolve()
    lost = _lost_root(store)
    verified = read_root(store)
    damages = (*lost, *verify(store))
    if not damages:
        return RepairSummary((), (), (), ())
    root = read_root(store)
    files = _files(store, root, find_cases(source, pairs).cases)
    mend_groups(store)
    damaged = [files[case] for case in {damage.case for damage in damages if damage.variant} if case in files]
    sources = digest_files(damaged, store, workers, scheduler, rehash=True)
    ways = {variant: _ways(store, root, variant) for variant in {damage.variant for damage in damages}}
    jobs, failed = [], []
    strays = {(damage.case, damage.variant): damage for damage in damages if damage.problem == STRAY}
    for case, variant in sorted({(damage.case, damage.variant) for damage in damages if damage.variant}):
        if (case, variant) in strays:
            failed.append(Problem(case, f"{strays[case, variant]}; move it away, then mend the case"))
            continue
        if root.cases.get(case, {}).get(variant) != verified.cases.get(case, {}).get(variant):
            failed.append(Problem(case, f"{store}: {case} was prepared anew or removed meanwhile; verify again"))
            continue
        try:
            job = _job(store, root, files, sources, case, variant, ways[variant])
        except InputError as error:
            job = describe_problem(case, error)
        if isinstance(job, Problem):
            failed.append(job)
        else:
            jobs.append(job)
    mended, differing = [], []
    for variant in sorted({job.preprocessing.variant for job in jobs}):
        of_variant = [job for job in jobs if job.preprocessing.variant == variant]
        before = {job.digest: stored_record(store, job.case.id, job.digest) for job in of_variant}
        outcomes = do_jobs(of_variant, store, workers, scheduler, progress)
        for job in of_variant:
            problem = _problem_after(store, job, outcomes[job.case.id])
            if problem:
                failed.append(problem)
                continue
            mended.append((job.case.id, variant))
            old, new = before[job.digest], stored_record(store, job.case.id, job.digest)
            if old and new and old.files != new.files:
                differing.append((job.case.id, variant))
    return RepairSummary(damages, tuple(sorted(mended)), tuple(sorted(differing)), tuple(failed))


def _problem_after(store: Path, job: Job, outcome: int | Problem) -> Problem | None:
    """Tell why a case that was to be made anew is not sound; None where it is."""
    if isinstance(outcome, Problem):
        return outcome
    still = verify_case(store, job.case.id, job.preprocessing.variant, job.digest)
    return Problem(job.case.id, str(still[0])) if still else None


def _lost_root(store: Path) -> tuple[Damage, ...]:
    """Bring back a root that is lost or damaged from its copy, where there is one."""
    try:
        read_root(store)
    except DamagedStoreError:
        problem = "is not what was written" if (store / METADATA).exists() else "is missing"
        mend_root(store)
        return (Damage("", "", METADATA, problem),)
    return ()


def _files(store: Path, root: RootRecord, cases: Iterable[Case]) -> dict[str, Case]:
    """Return a source's cases by the ids that the store knows them by."""
    if not root.neutral_ids:
        return {case.id: case for case in cases}
    ids = read_key(existing_key(store, root))
    return {ids[case.id]: replace(case, id=ids[case.id]) for case in cases if case.id in ids}


def _job(
    store: Path,
    root: RootRecord,
    files: dict[str, Case],
    sources: Mapping[Path, Digested | Problem],
    case: str,
    variant: str,
    ways: Sequence[Way],
) -> Job | Problem:
    """Return the job whose digest is the damaged one: made of the same files in the same way."""
    if case not in files:
        raise InputError(f"case {case!r}", "is damaged, and not in the source", "give the folder that holds its files")
    digest = root.cases[case][variant]
    record = stored_record(store, case, digest)
    for preprocessing, axes, ignored in [_way(record)] if record else ways:
        job = new_job(files[case], preprocessing, axes, sources)
        if isinstance(job, Problem):
            return job
        # The damaged case was made of these very files, so its label map was trusted where it had to be.
        job = replace(job, current=digest, held=preprocessing, anew=True, trust_voxels=True, ignore_label=ignored)
        if job.digest == digest:
            return job
    raise InputError(
        files[case].volume, "is not what the damaged case was made of, or was prepared in a way that is lost",
        "run cspine-data prepare with the options that you want",
    )  # fmt: skip


def _ways(store: Path, root: RootRecord, variant: str) -> list[Way]:
    """Return in which ways a store's cases were prepared: those that records tell, and the default."""
    found: list[Way] = [(Preprocessing() if variant == "n4" else Preprocessing(bias=None), (0, 1, 2), None)]
    for case, variants in root.cases.items():
        record = stored_record(store, case, variants[variant]) if variant in variants else None
        if record and _way(record) not in found:
            found.append(_way(record))
    return found


def _way(record: CaseRecord) -> Way:
    return record.preprocessing, record.axes, record.ignore_label
