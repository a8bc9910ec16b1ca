"""Plan which cases to prepare: each job has a case's files and the digest of its result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cspine_data.errors import Problem
from cspine_data.preparation.source_digests import Digested, files_of
from cspine_data.preprocessing.parameters import Preprocessing
from cspine_data.sources.cases import Case, copy_problem
from cspine_data.sources.duplicates import Fingerprint
from cspine_data.store.publishing import Replacement
from cspine_data.store.records import read_root, stored_record
from cspine_data.store.schema import CaseRecord, case_digest, case_path, volume_digest
from cspine_data.volumes.io import SEGMENTATION_SUFFIX
from cspine_data.volumes.label_options import DEFAULT_LABELS, LabelOptions

#: Part of the digest of cases with segments: raise it when their label maps get other values.
SEGMENTS_REVISION = 1


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
    label_options: LabelOptions = DEFAULT_LABELS
    """How the label map is read."""
    neutral: bool = False
    """Whether the store has neutral ids, so that free text is not stored."""
    states: tuple[str | None, ...] = (None, None)
    """State of the volume and of the label map when they were hashed, see `Digested`. By default unknown."""

    @property
    def volume_digest(self) -> str:
        """Digest of the corrected volume of this job."""
        return volume_digest(self.image_sha256, self.preprocessing)

    @property
    def digest(self) -> str:
        """Digest of the stored case of this job."""
        return case_digest(self.volume_digest, self.label_sha256, self.preprocessing, self.axes, self._label_parameters)

    @property
    def _label_parameters(self) -> dict[str, Any]:
        """What changes the stored label map, beside its file; other options only decide whether it is refused."""
        options = self.label_options.model_dump(mode="json", include={"label_values", "ignore_label"})
        given = {name: value for name, value in options.items() if value is not None}
        if self.case.label_names:
            given |= {"names": self.case.label_names}
        named = self.case.label is not None and self.case.label.name.lower().endswith(SEGMENTATION_SUFFIX)
        return given | ({"segments": SEGMENTS_REVISION} if named or self.case.label_names else {})

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
    label_options: LabelOptions = DEFAULT_LABELS,
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
        job = replace(job, label_options=label_options if job.label_sha256 else DEFAULT_LABELS)
        jobs.append(_with_current(job, store, published))
    return jobs, problems


def planned_anew(jobs: Sequence[Job], store: Path) -> list[Job]:
    """Plan jobs again after a concurrent run has published their cases, with the axes that the store has now."""
    published = read_root(store).cases
    return [_with_current(job, store, published) for job in jobs]


def _with_current(job: Job, store: Path, published: dict[str, dict[str, str]]) -> Job:
    """Add the case's state in the store to a job; its stored axes and label options are kept."""
    current = published.get(job.case.id, {}).get(job.preprocessing.variant)
    record = stored_record(store, job.case.id, current) if current else None
    kept = record.axes if record else ()
    if current and record is None:
        # The record is damaged, so the axes are taken from the folders.
        kept = tuple(a for a in range(3) if (store / case_path(job.case.id, current) / f"axis{a}").is_dir())
    stored = Stored.of(record) if record else None
    job = replace(job, axes=tuple(sorted({*job.axes, *kept})), current=current, stored=stored)
    return replace(job, label_options=_kept_options(job, store, published)) if job.label_sha256 else job


def _kept_options(job: Job, store: Path, published: dict[str, dict[str, str]]) -> LabelOptions:
    """Return a job's label options, with those that the store has of the same label map, in any variant, if not given.

    If an option were forgotten once, ignored voxels or discs would become vertebrae.
    """
    digests = published.get(job.case.id, {}).values()
    records = [record for digest in digests if (record := stored_record(store, job.case.id, digest))]
    kept = {}
    for name in ("label_values", "ignore_label"):
        before = (getattr(record, name) for record in records if record.label_sha256 == job.label_sha256)
        if getattr(job.label_options, name) is None:
            kept[name] = next((value for value in before if value is not None), None)
    return job.label_options.model_copy(update=kept)


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
