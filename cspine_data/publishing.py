"""Changing a store: writing cases, publishing them at once, replacing and removing them.

A case is written to a folder of its own that nothing names, moved to its digest's place in one step, and published
by one atomic replacement of the root's metadata. A run that is killed leaves nothing that a reader can see, and what
is published survives a power failure: every file and every folder on the way to it was made durable before.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cspine_data import schema
from cspine_data.errors import NotInStoreError, StoreError, describe_os_error
from cspine_data.geometry import Orientation
from cspine_data.preprocess import PreparedVolume
from cspine_data.schema import CaseRecord, RootRecord, Standard
from cspine_data.store import read_root, stored_record
from cspine_data.writer import METADATA, CaseWriter, make_folder, sync_folder, write_file

#: How the folders and files begin that no reader looks at: being written, and set aside to be deleted.
UNFINISHED, TEMPORARY, REMOVED = ".unfinished-", f".{METADATA}-", ".removed-"
_LOCK = ".lock"
_PATIENCE_S = 60


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A case's label map: on the volume's own grid, and on the slices', both (x, y, z)."""

    volume_xyz: NDArray[Any]
    sliced_xyz: NDArray[Any]


class Replacement(NamedTuple):
    """A written digest that is to be the current one of a case, in the place of another or, for None, of none."""

    case: str
    digest: str
    instead_of: str | None


def create_store(path: Path, *, neutral_ids: bool = False) -> None:
    """Make an empty store; one that is there already is left as it is.

    Raises
    ------
    StoreError
        If something else than a store is at that place, or it holds cases under ids of the other kind.
    """
    if not (path / METADATA).exists():
        if path.exists() and not _could_become_a_store(path):
            raise StoreError(f"{path}: is there and is no cspine store; choose another --store")
        make_folder(path)
        with locked(path):
            if not (path / METADATA).exists():
                write_record(path, RootRecord(neutral_ids=neutral_ids))
                sync_folder(path.parent)
    # For good: names that a store once held stay in the order of its splits, also when the cases are gone.
    if read_root(path).neutral_ids != neutral_ids:
        told = "their files' names; choose another --store" if neutral_ids else "neutral ids; give --anonymise"
        raise StoreError(f"{path}: its cases have {told}")


def _could_become_a_store(path: Path) -> bool:
    """Whether a folder is empty but for what a killed run hid, or what is left of a store whose root was deleted."""
    if not path.is_dir():
        return False
    visible = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    return not visible or (visible == {"cases"} and (path / "cases" / METADATA).is_file())


def write_case(
    path: Path, record: CaseRecord, prepared: PreparedVolume, label: LabelMap | None, *, anew: bool = False
) -> CaseRecord:
    """Write one case into its digest's place, complete or not at all; it is not published yet.

    Parameters
    ----------
    path : Path
        The store.
    record : CaseRecord
        What is to be known of the case; its `files` are filled in here.
    prepared : PreparedVolume
        The image.
    label : LabelMap or None
        Its label map.
    anew : bool
        Replace what is in that place, since it is damaged, even where its record is not.

    Returns
    -------
    CaseRecord
        With the checksums of its files.
    """
    target = path / schema.case_path(record.case, record.digest)
    case_folder, cases_folder = target.parent, target.parent.parent
    refuse_links(cases_folder, case_folder)
    make_folder(case_folder)
    unfinished, aside = (case_folder / f"{begin}{uuid.uuid4().hex}" for begin in (UNFINISHED, REMOVED))
    try:
        writer = CaseWriter(unfinished)
        _write_arrays(writer, record, prepared, label)
        writer.finish()
        record = record.model_copy(update={"files": writer.checksums})
        write_record(unfinished, record)
        for group in (cases_folder, case_folder):
            write_empty_group(group)
        with locked(path):
            if target.exists() and (anew or stored_record(path, record.case, record.digest) is None):
                target.rename(aside)
            # Else another run wrote the same digest meanwhile: the same bytes, so its copy serves.
            if not target.exists():
                unfinished.rename(target)
        sync_above(path, record.case)
    finally:
        for folder in (unfinished, aside):
            shutil.rmtree(folder, ignore_errors=True)
    return record


def refuse_links(*folders: Path) -> None:
    """Refuse to write through a link: what lies behind it is not this store's.

    Raises
    ------
    StoreError
        If one of them is a link.
    """
    for folder in folders:
        if folder.is_symlink():
            raise StoreError(f"{folder}: is a link to elsewhere; put the folder itself there")


def sync_above(path: Path, case: str) -> None:
    """Make the way from a store down to what its case's folder holds durable."""
    for folder in (path / "cases" / case, path / "cases", path):
        sync_folder(folder)


def publish(path: Path, variant: str, made: Iterable[Replacement]) -> set[str]:
    """Make written digests the current ones of their cases, all at once.

    Returns
    -------
    set of str
        The cases that were left as they are, and must be planned anew: another run published another digest in
        place of the one that was planned with, or what was written was collected as garbage meanwhile.
    """
    left: set[str] = set()

    def name_digests(root: RootRecord) -> RootRecord:
        cases = dict(root.cases)
        for case, digest, instead_of in made:
            current = cases.get(case, {}).get(variant)
            if current not in (digest, instead_of) or not (path / schema.case_path(case, digest) / METADATA).is_file():
                left.add(case)
                continue
            if current not in (digest, None):
                mark_in_use(path, case, current)
            cases[case] = dict(sorted({**cases.get(case, {}), variant: digest}.items()))
        return root.model_copy(update={"cases": dict(sorted(cases.items()))})

    _update_root(path, name_digests)
    return left


def mark_in_use(path: Path, case: str, digest: str) -> None:
    """Note on a digest that nothing names, or soon, that somebody uses it: its time of grace starts now."""
    folder = path / schema.case_path(case, digest)
    # Where it is gone, whoever wanted to use it finds out when publishing it.
    with suppress(FileNotFoundError):
        os.utime(folder)
        sync_folder(folder)


def remove_cases(path: Path, cases: Iterable[str], variant: str | None = None) -> None:
    """Take cases, or one variant of them, out of a store; their bytes stay until garbage is collected.

    Their place in the splits is kept for them, so that the other cases keep theirs.

    Raises
    ------
    NotInStoreError
        If the store does not hold one of them; then none is removed.
    """
    wanted = list(dict.fromkeys(cases))

    def without(root: RootRecord) -> RootRecord:
        kept = {case: dict(variants) for case, variants in root.cases.items()}
        for case in wanted:
            named = [name for name in kept.get(case, {}) if variant in (None, name)]
            if not named:
                what = f"case {case!r}" + (f" as {variant}" if variant else "")
                raise NotInStoreError(f"{path}: holds no {what}; cspine-data info lists what it holds")
            for name in named:
                mark_in_use(path, case, kept[case].pop(name))
        return root.model_copy(update={"cases": {case: variants for case, variants in kept.items() if variants}})

    _update_root(path, without)


def enrol(path: Path, labelled: Iterable[str], note: str | None = None) -> None:
    """Enter the labelled cases that are new as one batch, so that later additions leave their splits alone.

    A note says what the cohort is, where it stands in for something else.
    """
    wanted = set(labelled)

    def add_batch(root: RootRecord) -> RootRecord:
        known = {case for batch in root.enrolled for case in batch}
        batch = tuple(sorted(wanted - known))
        notes = tuple(sorted({*root.notes, note})) if note else root.notes
        enrolled = (*root.enrolled, batch) if batch else root.enrolled
        return root.model_copy(update={"enrolled": enrolled, "notes": notes})

    root = read_root(path)
    # Nothing new needs no lock, and so no place that can be written to.
    if add_batch(root) != root:
        _update_root(path, add_batch)


def keep_standard(path: Path, key: str, standard: Standard) -> Standard:
    """Enter what Nyul's method matches a store's volumes to, unless it is known; return what is known then."""

    def add_standard(root: RootRecord) -> RootRecord:
        return root.model_copy(update={"standards": {key: standard, **root.standards}})

    _update_root(path, add_standard)
    return read_root(path).standards[key]


def write_record(folder: Path, record: RootRecord | CaseRecord) -> None:
    """Write a record into its group's attributes, with its checksum, in one step."""
    content = record.model_dump(mode="json")
    attributes = {schema.ATTRIBUTE: content, schema.CHECKSUM_ATTRIBUTE: schema.record_checksum(content)}
    _write_metadata(folder, schema.group_bytes(attributes))


def write_empty_group(folder: Path, *, anew: bool = False) -> None:
    """Write the metadata of a group that says nothing; one that is there is left alone unless it is damaged."""
    make_folder(folder)
    if anew or not (folder / METADATA).exists():
        _write_metadata(folder, schema.group_bytes({}))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a store against others that write; the kernel frees it when its holder dies.

    Raises
    ------
    StoreError
        If the store cannot be written to, or somebody else has been writing for a minute.
    """
    from filelock import Timeout

    lock = _lock(path)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{path}: another run has been writing to it for {_PATIENCE_S} s; run it again when that has ended"
        ) from None
    except OSError as error:
        error.filename = error.filename or str(path / _LOCK)
        raise StoreError(describe_os_error(error)) from None
    try:
        yield
    finally:
        lock.release()


@cache
def _lock(path: Path) -> Any:
    """Return a store's lock, always the same one.

    Kept, since dropping it runs its destructor, and Python loses a Ctrl-C that arrives within a destructor.
    """
    from filelock import FileLock

    return FileLock(path / _LOCK, timeout=_PATIENCE_S)


def write_root_again(path: Path) -> None:
    """Write the root's metadata as it is to be, to the last byte; what it says stays."""
    with locked(path):
        write_record(path, read_root(path))


def _update_root(path: Path, change: Callable[[RootRecord], RootRecord]) -> None:
    with locked(path):
        before = read_root(path)
        after = change(before).model_copy(update={"schema_version": schema.SCHEMA_VERSION})
        if after != before:
            write_record(path, after)


def _write_arrays(writer: CaseWriter, record: CaseRecord, prepared: PreparedVolume, label: LabelMap | None) -> None:
    origin_mm = Orientation.of(record.geometry).geometry_xyz(record.geometry).origin_mm
    ome = schema.image_metadata(record.spacing_xyz_mm, origin_mm)
    writer.write_group("volume", {"ome": ome})
    chunks = schema.volume_chunks(record.size_xyz)
    writer.write_array(schema.VOLUME_IMAGE, prepared.corrected.image_xyz, chunks, schema.AXES_XYZ, {})
    sliced = {"image": (prepared.levels_xyz, schema.level_attributes(prepared.levels))}
    if label is not None:
        writer.write_group("volume/labels", {"ome": {"version": "0.5", "labels": ["segmentation"]}})
        label_ome = {**ome, "image-label": {"source": {"image": "../../"}}}
        writer.write_group("volume/labels/segmentation", {"ome": label_ome})
        writer.write_array(schema.VOLUME_LABEL, label.volume_xyz, chunks, schema.AXES_XYZ, {})
        sliced["label"] = (label.sliced_xyz, {})
    grid = schema.slice_grid(record)
    for axis in record.axes:
        writer.write_group(f"axis{axis}", grid)
        axes = schema.AXES_XYZ[axis] + schema.AXES_XYZ.replace(schema.AXES_XYZ[axis], "")
        for kind, (array_xyz, attributes) in sliced.items():
            slices = np.ascontiguousarray(np.moveaxis(array_xyz, axis, 0))
            writer.write_array(
                schema.slice_array(axis, kind), slices, schema.slice_chunks(slices.shape), axes, attributes
            )


def _write_metadata(folder: Path, content: bytes) -> None:
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        write_file(temporary, [content])
        temporary.replace(folder / METADATA)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
