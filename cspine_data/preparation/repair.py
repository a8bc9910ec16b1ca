"""Repair a damaged store from its source files, to the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cspine_data.errors import DamagedStoreError, InputError, Problem, describe_problem
from cspine_data.parallel.workers import Workers
from cspine_data.preparation.jobs import do_jobs
from cspine_data.preparation.options import Selection
from cspine_data.preparation.plan import Job, Stored, new_job
from cspine_data.preparation.pseudonyms import existing_key, read_key
from cspine_data.preparation.source_digests import Digested, digest_files
from cspine_data.preprocessing.parameters import Preprocessing, checked
from cspine_data.progress import Progress
from cspine_data.sources.cases import Case
from cspine_data.store.publishing import repair_root
from cspine_data.store.records import read_root, stored_record
from cspine_data.store.schema import CaseRecord, RootRecord
from cspine_data.store.verification import STRAY, Damage, repair_groups, verify, verify_case
from cspine_data.store.writer import METADATA
from cspine_data.volumes.label_options import LabelOptions

# A damaged case was prepared from the same files, so its label map was accepted.
_ACCEPTING = LabelOptions(trust_voxels=True, resample_labels=True)
Parameters = tuple[Preprocessing, tuple[int, ...], LabelOptions]


@dataclass(frozen=True)
class RepairSummary:
    """The result of `repair`.

    Attributes
    ----------
    damages : tuple of Damage
        The damage that was found.
    mended : tuple of tuple of str
        Cases and variants that were prepared again and verified.
    differing : tuple of tuple of str
        Repaired cases whose bytes differ from before, for example because a library has another version.
    failed : tuple of Problem
        Cases that could not be repaired, with the reasons.
    """

    damages: tuple[Damage, ...]
    mended: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, str], ...]
    failed: tuple[Problem, ...]


def repair(
    store: str | Path,
    source: str | Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
    **selection: Any,
) -> RepairSummary:
    """Find damaged cases of a store and prepare them again from their source; sound cases are not changed.

    A case is replaced only by one with the same digest, that is, from the same files with the same parameters.

    Parameters
    ----------
    store, source, workers, scheduler
        As in `prepare`.
    progress : callable, optional
        Called with (cases finished, cases to repair, case id).
    **selection
        Fields of `Selection`, such as ``pairs`` and ``layout``: as the cases were prepared.

    Raises
    ------
    InputError
        If the source is missing or empty.
    StoreError
        If there is no store, its root is damaged, or it cannot be written to.
    """
    processes = Workers(workers, scheduler)
    chosen = checked(Selection, "", selection)
    store = Path(store).resolve()
    lost = _lost_root(store)
    verified = read_root(store)
    damages = (*lost, *verify(store))
    if not damages:
        return RepairSummary((), (), (), ())
    root = read_root(store)
    files = _files(store, root, chosen.find_cases(source).cases)
    repair_groups(store)
    in_source = [files[case] for case in {damage.case for damage in damages if damage.variant} if case in files]
    sources = digest_files(in_source, store, processes, rehash=True)
    planned = _plan(store, verified, root, files, sources, damages)
    jobs = [job for job in planned if isinstance(job, Job)]
    failed = [problem for problem in planned if isinstance(problem, Problem)]
    mended, differing = [], []
    for variant in sorted({job.preprocessing.variant for job in jobs}):
        of_variant = [job for job in jobs if job.preprocessing.variant == variant]
        before = {job.digest: stored_record(store, job.case.id, job.digest) for job in of_variant}
        outcomes = do_jobs(of_variant, store, processes, progress)
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


def _plan(
    store: Path,
    verified: RootRecord,
    root: RootRecord,
    files: dict[str, Case],
    sources: Mapping[Path, Digested | Problem],
    damages: Sequence[Damage],
) -> list[Job | Problem]:
    """Return a job for each damaged case and variant, or why it cannot be repaired."""
    candidates = {variant: _all_parameters(store, root, variant) for variant in {damage.variant for damage in damages}}
    strays = {(damage.case, damage.variant): damage for damage in damages if damage.problem == STRAY}
    planned: list[Job | Problem] = []
    for case, variant in sorted({(damage.case, damage.variant) for damage in damages if damage.variant}):
        if (case, variant) in strays:
            planned.append(Problem(case, f"{strays[case, variant]}; move it away, then repair the case"))
        elif root.cases.get(case, {}).get(variant) != verified.cases.get(case, {}).get(variant):
            problem = f"{store}: {case} was prepared again or removed during the repair; verify again"
            planned.append(Problem(case, problem))
        else:
            try:
                planned.append(_job(store, root, files, sources, case, variant, candidates[variant]))
            except InputError as error:
                planned.append(describe_problem(case, error))
    return planned


def _problem_after(store: Path, job: Job, outcome: Stored | Problem) -> Problem | None:
    """Return why a repaired case is still not sound; None if it is."""
    if isinstance(outcome, Problem):
        return outcome
    still = verify_case(store, job.case.id, job.preprocessing.variant, job.digest)
    return Problem(job.case.id, str(still[0])) if still else None


def _lost_root(store: Path) -> tuple[Damage, ...]:
    """Restore a missing or damaged root from its copy."""
    try:
        read_root(store)
    except DamagedStoreError:
        problem = "is not what was written" if (store / METADATA).exists() else "is missing"
        repair_root(store)
        return (Damage("", "", METADATA, problem),)
    return ()


def _files(store: Path, root: RootRecord, cases: Iterable[Case]) -> dict[str, Case]:
    """Return the cases of a source by their ids in the store."""
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
    candidates: Sequence[Parameters],
) -> Job | Problem:
    """Return the job with the digest of the damaged case."""
    if case not in files:
        raise InputError(f"case {case!r}", "is damaged, and not in the source", "give the folder with its files")
    digest = root.cases[case][variant]
    record = stored_record(store, case, digest)
    for preprocessing, axes, label_options in [_parameters(record)] if record else candidates:
        job = new_job(files[case], preprocessing, axes, sources)
        if isinstance(job, Problem):
            return job
        job = replace(job, current=digest, overwrite=True, neutral=root.neutral_ids)
        if job.label_sha256:
            job = replace(job, label_options=label_options)
        if job.digest == digest:
            return job
    raise InputError(
        files[case].volume, "differs from the source of the damaged case, or its parameters are lost",
        "run cspine-data prepare with the options you want",
    )  # fmt: skip


def _all_parameters(store: Path, root: RootRecord, variant: str) -> list[Parameters]:
    """Return the parameters used in a store: those in its records, and the default."""
    preprocessing = Preprocessing() if variant == "n4" else Preprocessing(bias=None)
    found: list[Parameters] = [(preprocessing, (0, 1, 2), _ACCEPTING)]
    for case, variants in root.cases.items():
        record = stored_record(store, case, variants[variant]) if variant in variants else None
        if record and _parameters(record) not in found:
            found.append(_parameters(record))
    return found


def _parameters(record: CaseRecord) -> Parameters:
    of_labels = {"label_values": record.label_values, "ignore_label": record.ignore_label}
    return record.preprocessing, record.axes, _ACCEPTING.model_copy(update=of_labels)
