"""Plan which cases to prepare: each job has a case's files and the digest of its result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cspine_data.errors import Problem
from cspine_data.preparation.source_digests import Digested, files_of
from cspine_data.preprocessing.parameters import Preprocessing
from cspine_data.sources.cases import Case, copy_problem
from cspine_data.sources.duplicates import Fingerprint
from cspine_data.store.publishing import Replacement
from cspine_data.store.records import read_root, stored_record
from cspine_data.store.schema import CaseRecord, case_digest, case_path, volume_digest


@dataclass(frozen=True)
class Stored:
    """What the summary of a run needs of a stored case, without its record."""

    preprocessing: Preprocessing
    notes: tuple[str, ...]
    labelled: bool
    """Whether any voxel has a label."""
    written_bytes: int = 0
    """Its size on disk, if this run has written it; else 0."""
    fingerprint: Fingerprint | None = None
    """Of its volume, if this run has read it."""

    @classmethod
    def of(cls, record: CaseRecord, written_bytes: int = 0, fingerprint: Fingerprint | None = None) -> Stored:
        """Return what is needed of a record."""
        return cls(record.preprocessing, record.warnings, bool(record.labels), written_bytes, fingerprint)


@dataclass(frozen=True)
class Job:
    """One case to prepare: its files, parameters, and what the store has of it now. Small, to be sent to workers."""

    case: Case
    image_sha256: str
    label_sha256: str | None
    """Digests of the files when the job was planned."""
    preprocessing: Preprocessing
    axes: tuple[int, ...]
    current: str | None = None
    """The case's digest in the store."""
    stored: Stored | None = None
    """The case in the store; None if there is none, or its record is damaged."""
    overwrite: bool = False
    """Prepare the case although the store has it, because it is damaged."""
    trust_voxels: bool = False
    """See `load_case`. It does not change the result, only whether files are refused."""
    ignore_label: int | None = None
    """The label value of voxels to ignore."""
    states: tuple[str | None, ...] = (None, None)
    """State of the volume and of the label map when they were hashed, see `Digested`. By default unknown."""

    @property
    def volume_digest(self) -> str:
        """Digest of the corrected volume of this job."""
        return volume_digest(self.image_sha256, self.preprocessing)

    @property
    def digest(self) -> str:
        """Digest of the stored case of this job."""
        return case_digest(self.volume_digest, self.label_sha256, self.preprocessing, self.axes, self.ignore_label)

    @property
    def is_current(self) -> bool:
        """Whether the store already has the result."""
        return self.current == self.digest and self.stored is not None

    @property
    def replacement(self) -> Replacement:
        """The change to publish when the job is finished."""
        return Replacement(self.case.id, self.preprocessing.variant, self.digest, self.current)


def plan_jobs(
    cases: Sequence[Case],
    store: Path,
    preprocessing: Preprocessing,
    axes: tuple[int, ...],
    sources: Mapping[Path, Digested | Problem],
    ignore_label: int | None = None,
) -> tuple[list[Job], list[Problem]]:
    """Return a job for each case, or a problem; `sources` has the digest of each file."""
    published = read_root(store).cases
    jobs, problems = [], []
    # A listed case may have another file now, so only the other cases of the store are searched for copies.
    listed = {case.id for case in cases}
    seen = _stored_images(store, published, listed)
    for case in cases:
        job = new_job(case, preprocessing, axes, sources)
        if isinstance(job, Problem):
            problems.append(job)
            continue
        first = seen.setdefault(job.image_sha256, case.id)
        if first != case.id:
            problems.append(copy_problem(case, first, only_in_store=first not in listed))
            continue
        job = replace(job, ignore_label=ignore_label if job.label_sha256 else None)
        jobs.append(_with_current(job, store, published))
    return jobs, problems


def planned_anew(jobs: Sequence[Job], store: Path) -> list[Job]:
    """Plan jobs again after a concurrent run has published their cases, with the axes that the store has now."""
    published = read_root(store).cases
    return [_with_current(job, store, published) for job in jobs]


def _with_current(job: Job, store: Path, published: dict[str, dict[str, str]]) -> Job:
    """Add the case's state in the store to a job; its stored axes and ignored value are kept."""
    current = published.get(job.case.id, {}).get(job.preprocessing.variant)
    record = stored_record(store, job.case.id, current) if current else None
    kept = record.axes if record else ()
    if current and record is None:
        # The record is damaged, so the axes are taken from the folders.
        kept = tuple(a for a in range(3) if (store / case_path(job.case.id, current) / f"axis{a}").is_dir())
    stored = Stored.of(record) if record else None
    job = replace(job, axes=tuple(sorted({*job.axes, *kept})), current=current, stored=stored)
    if job.label_sha256 and job.ignore_label is None:
        job = replace(job, ignore_label=_ignored_before(job, store, published))
    return job


def _ignored_before(job: Job, store: Path, published: dict[str, dict[str, str]]) -> int | None:
    """Return the value that the store ignores in the same label map, in any variant of the case.

    If the option were forgotten once, the ignored voxels would become a vertebra.
    """
    records = (stored_record(store, job.case.id, digest) for digest in published.get(job.case.id, {}).values())
    found = (record.ignore_label for record in records if record and record.label_sha256 == job.label_sha256)
    return next((value for value in found if value is not None), None)


def _stored_images(store: Path, published: dict[str, dict[str, str]], without: Collection[str]) -> dict[str, str]:
    """Return the case of each stored image, by the digest of its source file, without some cases."""
    images = {}
    for case, variants in published.items():
        if case in without:
            continue
        for digest in variants.values():
            record = stored_record(store, case, digest)
            if record is not None:
                images[record.image_sha256] = case
    return images


def new_job(
    case: Case,
    preprocessing: Preprocessing,
    axes: tuple[int, ...],
    sources: Mapping[Path, Digested | Problem],
) -> Job | Problem:
    """Return the job for a case, regardless of the store, or the first problem with its files."""
    digested: list[Digested] = []
    for path in files_of(case):
        one = sources[path]
        if isinstance(one, Problem):
            return replace(one, case=case.id)
        digested.append(one)
    image, label = digested[0], digested[1] if case.label else None
    states = (image.state, label.state if label else None)
    return Job(case, image.sha256, label.sha256 if label else None, preprocessing, axes, states=states)


def is_unchanged(job: Job) -> bool:
    """Return whether a job's files are unchanged since it was planned."""
    of_image, of_label = job.states
    planned = Digested(job.image_sha256, of_image), Digested(job.label_sha256 or "", of_label)
    return all(digested.is_still(path) for digested, path in zip(planned, files_of(job.case), strict=False))
