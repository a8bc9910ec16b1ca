"""Export of all cases of a store in the folder layout of another tool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cspine_data.datasets.cohort import Cohort
from cspine_data.datasets.export_layouts import (
    EXPORT_LAYOUTS,
    PAIRS,
    SPLITS,
    ExportLayout,
    LabelTable,
    label_table,
)
from cspine_data.errors import InputError, NotInStoreError, Problem, describe_problem
from cspine_data.files import exclusive_lock, make_folder, sync_folder, write_file
from cspine_data.parallel.workers import usable_cores
from cspine_data.progress import Progress
from cspine_data.sources.cases import NOTE_FILE, Case
from cspine_data.sources.pair_lists import write_pairs
from cspine_data.store.schema import CaseRecord
from cspine_data.volumes.io import write_volume

_FOLDS = 5
_FEWEST_FOLDS = 3
_LOCK = ".lock"


@dataclass(frozen=True)
class ExportSummary:
    """The result of an export.

    Attributes
    ----------
    cases : tuple of Case
        The written cases, with the paths of their files relative to the folder.
    problems : tuple of Problem
        The cases that could not be written; the folder has no files of them.
    folds : int
        Number of folds in ``splits_final.json``; 0 if there are too few patients.
    renumbered : dict
        Maps label values of the store to those of the files; empty if they are the same.
    """

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    folds: int
    renumbered: dict[int, int]


def export_cohort(
    cohort: Cohort, output: str | Path, layout: str, variant: str | None = None, progress: Progress | None = None
) -> ExportSummary:
    """Write all cases of a variant to a new folder in the layout of another tool, on the grids of their source files.

    Besides volumes and label maps, the folder has the tool's description, a cross-validation by patient in nnU-Net's
    format, and ``cases.csv``, a list for ``--pairs``. It appears only when it is complete.

    Parameters
    ----------
    cohort : Cohort
        The store.
    output : str or Path
        The folder, new or empty.
    layout : str
        ``nnunet``, ``bids`` or ``msd``; docs/layouts.md describes them.
    variant : str, optional
        ``n4`` or ``raw``; optional if the store has only one.
    progress : callable, optional
        Called with (cases finished, cases, case id) after each case.

    Returns
    -------
    ExportSummary
        What was written, and the cases that could not be.

    Raises
    ------
    InputError
        If the layout is unknown, the folder is not empty, or no case can be written.
    NotInStoreError
        If the store does not have this variant.
    """
    output = Path(output)
    if layout not in EXPORT_LAYOUTS:
        raise InputError(f"layout {layout!r}", "is not known", f"choose {', '.join(EXPORT_LAYOUTS)}")
    records = cohort.records(variant)
    kind = EXPORT_LAYOUTS[layout]
    if not any(record.labelled or not kind.for_training for record in records):
        raise NotInStoreError(f"{cohort.path}: holds no case{' with a label map' * kind.for_training}; prepare some")
    table = _table(records, kind)
    variant = records[0].variant
    names, cases = _planned(cohort, records, kind)
    with _atomic_folder(output) as folder:
        problems = _write_cases(cohort, variant, cases, folder, table, progress)
        failed = {problem.case for problem in problems}
        written = [case for case in cases if case.id not in failed]
        if not written:
            raise InputError(output, f"no case can be written ({problems[0].message})", "correct this first")
        for name in kind.folders:
            make_folder(folder / name)
        splits = _splits(cohort, variant, written, names)
        _write_texts(folder, kind.describe(written, table, variant), splits, cohort.notes)
        write_pairs(folder / PAIRS, [_within(folder, case) for case in written])
    renumbered = dict(table.numbers) if table.changes else {}
    return ExportSummary(tuple(written), tuple(problems), len(splits), renumbered)


def _table(records: Sequence[CaseRecord], kind: ExportLayout) -> LabelTable:
    labels = (value for record in records for value in record.labels)
    ignored = (value for record in records for value in record.ignored_values)
    named = (item for record in records for item in record.segments.items())
    return label_table(labels, ignored, named, consecutive=kind.consecutive)


def _planned(cohort: Cohort, records: Sequence[CaseRecord], kind: ExportLayout) -> tuple[dict[str, str], list[Case]]:
    """Return the names of the cases in a layout, and the cases with their paths in the folder."""
    identities = {record.case: cohort.identity(record.case) for record in records}
    names = kind.names(identities)
    cases = []
    for record in records:
        identity, name = identities[record.case], names[record.case]
        label = kind.label(name) if record.labelled else None
        volume = kind.image(name, record.labelled)
        cases.append(Case(record.case, volume, label, identity.patient, identity.site, identity.sequence))
    return names, cases


def _write_texts(
    folder: Path, descriptions: Mapping[str, str], splits: Sequence[dict[str, list[str]]], notes: Sequence[str]
) -> None:
    texts = dict(descriptions)
    if splits:
        texts[SPLITS] = json.dumps(splits, indent=2, ensure_ascii=False) + "\n"
    if notes:
        texts[NOTE_FILE] = "; ".join(notes) + "\n"
    for name, text in texts.items():
        make_folder((folder / name).parent)
        write_file(folder / name, [text.encode()])


def _within(folder: Path, case: Case) -> Case:
    return replace(case, volume=folder / case.volume, label=folder / case.label if case.label else None)


@contextmanager
def _atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to the new one when the block ends, or removed if the block raises.

    What a killed export left in it is removed first.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(output, "exists already", "remove it or choose another -o")
    unfinished = output.parent / f".unfinished-{output.name}"
    if unfinished.is_symlink():
        raise InputError(unfinished, "is a link", "remove it")
    make_folder(unfinished)
    lock = unfinished / _LOCK
    try:
        held = exclusive_lock(lock)
    except TimeoutError:
        raise InputError(output, "is being written by another export", "wait for it") from None
    with held:
        for left in [path for path in unfinished.iterdir() if path != lock]:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield unfinished
            lock.unlink()
            unfinished.replace(output)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    sync_folder(output.parent)


def _write_cases(
    cohort: Cohort, variant: str, cases: Sequence[Case], folder: Path, table: LabelTable, progress: Progress | None
) -> list[Problem]:
    """Write the files of all cases in threads: reading, and above all compressing, release Python's lock."""
    problems = []
    pool = ThreadPoolExecutor(usable_cores())
    try:
        futures = {pool.submit(_write_case, cohort, variant, _within(folder, case), table): case for case in cases}
        for number, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            if error is not None:
                problems.append(describe_problem(futures[future].id, error))
            if progress:
                progress(number, len(cases), futures[future].id)
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(problems, key=lambda problem: problem.case)


def _write_case(cohort: Cohort, variant: str, case: Case, table: LabelTable) -> None:
    try:
        if case.label:
            label = cohort.export(case.id, variant, label=True)
            write_volume(case.label, replace(label, array=table.apply(label.array)))
        write_volume(case.volume, cohort.export(case.id, variant))
    except BaseException:
        for path in (case.volume, case.label):
            if path:
                path.unlink(missing_ok=True)
        raise


def _splits(cohort: Cohort, variant: str, cases: Sequence[Case], names: dict[str, str]) -> list[dict[str, list[str]]]:
    """Return a cross-validation by patient: each fold of `Cohort.split` for validation, the others for training."""
    names = {case.id: names[case.id] for case in cases if case.label}
    folds = min(_FOLDS, len({case.patient for case in cases if case.label}))
    if folds < _FEWEST_FOLDS:
        return []
    splits = []
    for fold in range(folds):
        split = cohort.split(folds=folds, fold=fold, variant=variant)
        train, held_out = (
            sorted(names[case] for case in part if case in names)
            for part in ((*split.train, *split.validation), split.test)
        )
        splits.append({"train": train, "val": held_out})
    return [split for split in splits if split["train"] and split["val"]]
