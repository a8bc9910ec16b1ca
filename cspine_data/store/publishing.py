"""Changing what a store names: cases published at once, replaced, removed.

All of it is one atomic replacement of the root's metadata under the store's lock. A run that is killed leaves nothing
that a reader can see, and what is published survives a power failure: every file and every folder on the way to it
was made durable before.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cspine_data.errors import NewerSchemaError, NotInStoreError, StoreError, describe_os_error
from cspine_data.files import exclusive_lock, make_folder, replace_file, sync_folder
from cspine_data.names import as_known
from cspine_data.store import schema
from cspine_data.store.location import refuse_url
from cspine_data.store.records import ROOT_COPY, read_metadata, read_root, stored_record
from cspine_data.store.schema import CaseRecord, RootRecord, Standard
from cspine_data.store.writer import METADATA

#: How the folders and files begin that no reader looks at: being written, and set aside to be deleted.
UNFINISHED, TEMPORARY, REMOVED = ".unfinished-", f".{METADATA}-", ".removed-"
_LOCK = ".lock"
_PATIENCE_S = 60


class Replacement(NamedTuple):
    """A written digest that is to be the current one of a case, in the place of another or, for None, of none."""

    case: str
    variant: str
    digest: str
    instead_of: str | None


class Refused(NamedTuple):
    """What `publish` left as it was.

    Attributes
    ----------
    overtaken : set of str
        Cases that must be planned anew: another run published another digest in place of the one that was planned
        with, or what was written was collected as garbage meanwhile.
    duplicates : dict
        Cases whose volume is that of another case, and which.
    """

    overtaken: set[str]
    duplicates: dict[str, str]


def create_store(path: Path, *, neutral_ids: bool = False) -> None:
    """Make an empty store; one that is there already is left as it is.

    Raises
    ------
    StoreError
        If something else than a store is at that place, or it holds cases under ids of the other kind.
    """
    refuse_url(path)
    if not _is_a_store(path):
        could = not path.exists() or _could_become_a_store(path, neutral_ids=neutral_ids)
        # Looked for again: another run may have made it since, and that is what stood in the way.
        if not could and not _is_a_store(path):
            raise StoreError(f"{path}: is there and is no cspine store; choose another --store")
        make_folder(path)
        with locked(path):
            if not (path / METADATA).exists():
                _write_root(path, RootRecord(neutral_ids=neutral_ids))
                sync_folder(path.parent)
    # For good: names that a store once held stay in the order of its splits, also when the cases are gone.
    if read_root(path).neutral_ids != neutral_ids:
        told = "their files' names; choose another --store" if neutral_ids else "neutral ids; give --anonymise"
        raise StoreError(f"{path}: its cases have {told}")


def _is_a_store(path: Path) -> bool:
    return any((path / name).exists() for name in (METADATA, ROOT_COPY))


def _could_become_a_store(path: Path, *, neutral_ids: bool) -> bool:
    """Whether a folder is empty but for what a killed run hid, or what is left of a store whose root was deleted."""
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
    for folder in (path / schema.CASES / case, path / schema.CASES, path):
        sync_folder(folder)


def publish(path: Path, made: Iterable[Replacement]) -> Refused:
    """Make written digests the current ones of their cases, all at once.

    Returns
    -------
    Refused
        The cases that were left as they are.
    """
    wanted = list(made)
    overtaken: set[str] = set()
    duplicates: dict[str, str] = {}

    def name_digests(root: RootRecord) -> RootRecord:
        named = [one for one in wanted if _is_still_wanted(path, root, one)]
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
    """Return a root that names other cases, with what is known of the voxels of these and of no others."""
    named = {digest for variants in cases.values() for digest in variants.values()}
    known = {digest: voxels[digest] for digest in sorted(named & set(voxels))}
    return root.model_copy(update={"cases": cases, "voxels": known})


def _is_still_wanted(path: Path, root: RootRecord, one: Replacement) -> bool:
    """Whether the store holds what a replacement was planned with, and what it is to name."""
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
    """Find a replacement whose volume is another case's too, and that case."""
    # Within a variant, since a run changes one: what has exchanged its volumes does so in the other when that is run.
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
    if add_batch(root) != root or not _copy_is_current(path):
        _update_root(path, add_batch)


def keep_standard(path: Path, key: str, standard: Standard) -> Standard:
    """Enter what Nyul's method matches a store's volumes to, unless it is known; return what is known then."""

    def add_standard(root: RootRecord) -> RootRecord:
        return root.model_copy(update={"standards": {key: standard, **root.standards}})

    _update_root(path, add_standard)
    return read_root(path).standards[key]


def write_record(folder: Path, record: RootRecord | CaseRecord, name: str = METADATA) -> None:
    """Write a record into its group's attributes, with its checksum, in one step."""
    _write_metadata(folder, _record_bytes(record), name)


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


def mend_root(path: Path) -> None:
    """Write the root's metadata as it is to be, to the last byte; where it is lost, from its copy.

    The copy may be one publication older; what it does not name is found again by its digest.

    Raises
    ------
    StoreError
        If the copy cannot be read either.
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
    # Once for both: with ten thousand cases this takes longer than all else.
    content = _record_bytes(root)
    _write_metadata(path, content)
    # The one file of a store that nothing else could bring back. Where it cannot be written, the next change does it.
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
