"""Change the list of cases in a store's root: publish, replace and remove cases.

Each change is one atomic replacement of the root's metadata under the store's lock. A killed run leaves nothing that a
reader can see. Published cases survive a power failure, because all their files and folders are on disk before.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cspine_data.errors import NewerSchemaError, NotInStoreError, StoreError, describe_os_error
from cspine_data.files import exclusive_lock, make_folder, replace_file, sync_folder
from cspine_data.names import as_known
from cspine_data.store import schema
from cspine_data.store.identities import Identity
from cspine_data.store.location import refuse_url
from cspine_data.store.records import ROOT_COPY, read_metadata, read_root, stored_record
from cspine_data.store.schema import CaseRecord, RootRecord, Standard
from cspine_data.store.writer import METADATA

#: Prefixes of hidden files and folders: being written, temporary, and renamed before deletion.
UNFINISHED, TEMPORARY, REMOVED = ".unfinished-", f".{METADATA}-", ".removed-"
_LOCK = ".lock"
_PATIENCE_S = 60


class Replacement(NamedTuple):
    """A written digest to publish for a case, in place of another digest, or of none."""

    case: str
    variant: str
    digest: str
    instead_of: str | None


class Refused(NamedTuple):
    """The cases that `publish` did not change."""

    overtaken: set[str]
    """Cases that must be planned again: a concurrent run has published another digest, or the written data have been
    collected as garbage."""
    duplicates: dict[str, str]
    """Cases with the volume of another case, and that case."""


def create_store(path: Path, *, neutral_ids: bool = False) -> None:
    """Create an empty store; an existing one is not changed, and must have case ids of the same kind."""
    refuse_url(path)
    if not _is_a_store(path):
        could = not path.exists() or _could_become_a_store(path, neutral_ids=neutral_ids)
        # Checked again, since a concurrent run may just have created it.
        if not could and not _is_a_store(path):
            raise StoreError(f"{path}: exists and is no cspine store; choose another --store")
        make_folder(path)
        with locked(path):
            if not (path / METADATA).exists():
                _write_root(path, RootRecord(neutral_ids=neutral_ids))
                sync_folder(path.parent)
    # This cannot be changed later: the ids of removed cases remain in the order of the splits.
    if read_root(path).neutral_ids != neutral_ids:
        problem = "their files' names; choose another --store" if neutral_ids else "neutral ids; give --anonymise"
        raise StoreError(f"{path}: its cases have {problem}")


def _is_a_store(path: Path) -> bool:
    return any((path / name).exists() for name in (METADATA, ROOT_COPY))


def _could_become_a_store(path: Path, *, neutral_ids: bool) -> bool:
    """Return whether a folder is empty except for hidden files, or is a store without its root."""
    if not path.is_dir():
        return False
    visible = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    if not visible:
        return True
    if visible != {schema.CASES} or not (path / schema.CASES / METADATA).is_file():
        return False
    left = (folder.name for folder in (path / schema.CASES).iterdir() if folder.is_dir() and folder.name[0] != ".")
    return not neutral_ids or all(map(schema.NEUTRAL_ID.fullmatch, left))


def refuse_links(*folders: Path) -> None:
    """Raise an error for a link, through which nothing is written."""
    for folder in folders:
        if folder.is_symlink():
            raise StoreError(f"{folder}: is a link; replace it by the folder itself")


def sync_above(path: Path, case: str) -> None:
    """Synchronise the folders from a case up to the store to disk."""
    for folder in (path / schema.CASES / case, path / schema.CASES, path):
        sync_folder(folder)


def publish(path: Path, made: Iterable[Replacement]) -> Refused:
    """Make written digests the current ones of their cases, in one step; return the unchanged cases."""
    wanted = list(made)
    overtaken: set[str] = set()
    duplicates: dict[str, str] = {}

    def name_digests(root: RootRecord) -> RootRecord:
        named = [one for one in wanted if _can_be_published(path, root, one)]
        overtaken.update({one.case for one in wanted} - {one.case for one in named})
        records = {one.digest: stored_record(path, one.case, one.digest) for one in named}
        voxels = {**root.voxels, **{digest: record.voxels_sha256 for digest, record in records.items() if record}}
        while True:
            cases = _with_named(root.cases, named)
            duplicate = _find_duplicate(cases, voxels, named)
            if duplicate is None:
                break
            one, other = duplicate
            duplicates[one.case] = other
            named.remove(one)
        for one in named:
            if one.instead_of not in (one.digest, None):
                mark_in_use(path, one.case, one.instead_of)
        return _with_cases(root, cases, voxels)

    _update_root(path, name_digests)
    return Refused(overtaken, duplicates)


def _with_cases(root: RootRecord, cases: dict[str, dict[str, str]], voxels: dict[str, str]) -> RootRecord:
    """Return a root with other cases, and the voxel digests of these."""
    named = {digest for variants in cases.values() for digest in variants.values()}
    known = {digest: voxels[digest] for digest in sorted(named & set(voxels))}
    return root.model_copy(update={"cases": cases, "voxels": known})


def _can_be_published(path: Path, root: RootRecord, one: Replacement) -> bool:
    """Return whether a written digest exists and the case is unchanged since it was planned."""
    current = root.cases.get(one.case, {}).get(one.variant)
    written = (path / schema.case_path(one.case, one.digest) / METADATA).is_file()
    return written and current in (one.digest, one.instead_of)


def _with_named(cases: dict[str, dict[str, str]], named: Iterable[Replacement]) -> dict[str, dict[str, str]]:
    after = dict(cases)
    for one in named:
        after[one.case] = dict(sorted({**after.get(one.case, {}), one.variant: one.digest}.items()))
    return dict(sorted(after.items()))


def _find_duplicate(
    cases: dict[str, dict[str, str]], voxels: dict[str, str], named: Iterable[Replacement]
) -> tuple[Replacement, str] | None:
    """Return a replacement whose volume is also that of another case, and that case."""
    # Within a variant: swapped volumes are swapped in the other variant when that is prepared.
    owners: dict[tuple[str, str], list[str]] = {}
    for case, variants in cases.items():
        for variant, digest in variants.items():
            owners.setdefault((variant, voxels.get(digest, digest)), []).append(case)
    for one in named:
        others = [case for case in owners[one.variant, voxels.get(one.digest, one.digest)] if case != one.case]
        if others:
            return one, others[0]
    return None


def mark_in_use(path: Path, case: str, digest: str) -> None:
    """Restart the grace period of an unlisted digest, because it is in use."""
    folder = path / schema.case_path(case, digest)
    # If it is gone, publishing it will fail.
    with suppress(FileNotFoundError):
        os.utime(folder)
        sync_folder(folder)


def remove_cases(path: Path, cases: Iterable[str], variant: str | None = None) -> None:
    """Remove cases, or one variant of them, from a store; their files remain until garbage is collected.

    Their place in the splits is kept, so that the parts of the other cases do not change. If the store lacks one of
    them, `NotInStoreError` is raised and none is removed.
    """
    asked = list(dict.fromkeys(cases))

    def without(root: RootRecord) -> RootRecord:
        kept = {case: dict(variants) for case, variants in root.cases.items()}
        for case in [as_known(name, kept) for name in asked]:
            named = [name for name in kept.get(case, {}) if variant in (None, name)]
            if not named:
                what = f"case {case!r}" + (f" as {variant}" if variant else "")
                raise NotInStoreError(f"{path}: holds no {what}; cspine-data info lists what it holds")
            for name in named:
                mark_in_use(path, case, kept[case].pop(name))
        return _with_cases(root, {case: variants for case, variants in kept.items() if variants}, root.voxels)

    _update_root(path, without)


def enrol(
    path: Path, labelled: Iterable[str], note: str | None = None, identities: Mapping[str, Identity] | None = None
) -> None:
    """Add the new labelled cases as one batch, so that later additions do not change their splits.

    A note describes stand-in data. The identities of cases are added or replaced.
    """
    wanted = set(labelled)

    def add_batch(root: RootRecord) -> RootRecord:
        known = {case for batch in root.enrolled for case in batch}
        batch = tuple(sorted(wanted - known))
        notes = tuple(sorted({*root.notes, note})) if note else root.notes
        enrolled = (*root.enrolled, batch) if batch else root.enrolled
        known_identities = root.identities | {
            case: identity for case, identity in (identities or {}).items() if identity != root.identity(case)
        }
        ordered = dict(sorted(known_identities.items()))
        return root.model_copy(update={"enrolled": enrolled, "notes": notes, "identities": ordered})

    root = read_root(path)
    # Without a change no lock is needed, so that the store may be read-only.
    if add_batch(root) != root or not _copy_is_current(path):
        _update_root(path, add_batch)


def keep_standard(path: Path, key: str, standard: Standard) -> Standard:
    """Store a standard of Nyul's method unless there is one; return the stored one."""

    def add_standard(root: RootRecord) -> RootRecord:
        return root.model_copy(update={"standards": {key: standard, **root.standards}})

    _update_root(path, add_standard)
    return read_root(path).standards[key]


def write_record(folder: Path, record: RootRecord | CaseRecord, name: str = METADATA) -> None:
    """Write a record and its checksum into a group's attributes, in one step."""
    _write_metadata(folder, _record_bytes(record), name)


def write_empty_group(folder: Path, *, overwrite: bool = False) -> None:
    """Write the metadata of a group without attributes, if it is missing or `overwrite`."""
    make_folder(folder)
    if overwrite or not (folder / METADATA).exists():
        _write_metadata(folder, schema.group_bytes({}))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a store for writing, waiting up to a minute; the kernel releases the lock when its holder dies."""
    try:
        held = exclusive_lock(path / _LOCK, _PATIENCE_S)
    except TimeoutError:
        raise StoreError(
            f"{path}: another run has been writing to it for {_PATIENCE_S} s; run it again when that has ended"
        ) from None
    except OSError as error:
        raise StoreError(describe_os_error(error)) from None
    with held:
        yield


def repair_root(path: Path) -> None:
    """Write the root's metadata again, from its copy if it is damaged.

    The copy may be one publication older; the next `prepare` finds unlisted cases by their digests.
    """
    with locked(path):
        try:
            root = read_root(path)
        except NewerSchemaError:
            raise
        except StoreError:
            root = read_root(path, ROOT_COPY)
        _write_root(path, root)


def _update_root(path: Path, change: Callable[[RootRecord], RootRecord]) -> None:
    with locked(path):
        before = read_root(path)
        after = change(before).model_copy(update={"schema_version": schema.SCHEMA_VERSION})
        if after != before or not _copy_is_current(path):
            _write_root(path, after)


def _record_bytes(record: RootRecord | CaseRecord) -> bytes:
    content = record.model_dump(mode="json")
    return schema.group_bytes({schema.ATTRIBUTE: content, schema.CHECKSUM_ATTRIBUTE: schema.record_checksum(content)})


def _write_root(path: Path, root: RootRecord) -> None:
    # Serialised once for both: with ten thousand cases this takes most of the time.
    content = _record_bytes(root)
    _write_metadata(path, content)
    # Only the root cannot be computed again. If the copy cannot be written, the next change writes it.
    with suppress(OSError):
        _write_metadata(path, content, ROOT_COPY)


def _copy_is_current(path: Path) -> bool:
    try:
        return read_metadata(path, ROOT_COPY) == read_metadata(path)
    except (OSError, ValueError):
        return False


def _write_metadata(folder: Path, content: bytes, name: str = METADATA) -> None:
    file = folder / name
    if file.is_dir() and not file.is_symlink():
        file.rename(folder / f"{REMOVED}{uuid.uuid4().hex}")
    replace_file(file, content, folder / f"{TEMPORARY}{uuid.uuid4().hex}")
