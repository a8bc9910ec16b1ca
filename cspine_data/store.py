"""Writing cases, publishing them at once, opening a store.

A case is written to a folder of its own that nothing names, moved to its digest's place in one step, and published
by one atomic replacement of the root's metadata. A run that is killed leaves nothing that a reader can see.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cspine_data import schema
from cspine_data.errors import DamagedStoreError, NewerSchemaError, NotInStoreError, StoreError
from cspine_data.geometry import Orientation
from cspine_data.preprocess import CorrectedVolume, PreparedVolume
from cspine_data.schema import CaseRecord, RootRecord, Standard
from cspine_data.writer import METADATA, CaseWriter, sync_folder


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A case's label map: on the volume's own grid, and on the slices', both (x, y, z)."""

    volume_xyz: NDArray[Any]
    sliced_xyz: NDArray[Any]


def create_store(path: Path) -> None:
    """Make an empty store; one that is there already is left as it is.

    Raises
    ------
    StoreError
        If something else than a store is at that place.
    """
    if (path / METADATA).exists():
        read_root(path)
        return
    # A run killed in this function leaves hidden files; they are no reason to refuse the place.
    if path.exists() and (not path.is_dir() or any(not file.name.startswith(".") for file in path.iterdir())):
        raise StoreError(f"{path}: is there and is no cspine store; choose another --store")
    path.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if not (path / METADATA).exists():
            _write_record(path, RootRecord())


def read_root(path: Path) -> RootRecord:
    """Read what a store holds; one small file, whatever the store's size.

    Raises
    ------
    StoreError
        If there is no store.
    NewerSchemaError
        If it was written by a newer version.
    DamagedStoreError
        If its metadata cannot be understood.
    """
    attributes = _attributes(path)
    if attributes is None:
        raise StoreError(f"{path}: is no cspine store; make one with cspine-data prepare")
    try:
        return RootRecord.model_validate(attributes)
    except ValidationError as error:
        raise DamagedStoreError(f"{path}: its metadata is damaged ({_first(error)}); prepare it anew") from None


def read_record(path: Path, case: str, variant: str) -> CaseRecord:
    """Read the record of the current digest of one variant of a case.

    Raises
    ------
    NotInStoreError
        If the store does not hold it.
    DamagedStoreError
        If its record is missing or damaged.
    """
    return _record_of(path, read_root(path), case, variant)


def records(path: Path, root: RootRecord, variant: str) -> Iterable[CaseRecord]:
    """Iterate over the records of a variant, by case id."""
    for case in sorted(root.cases):
        if variant in root.cases[case]:
            yield _record_of(path, root, case, variant)


def _record_of(path: Path, root: RootRecord, case: str, variant: str) -> CaseRecord:
    variants = root.cases.get(case)
    if variants is None:
        raise NotInStoreError(f"{path}: holds no case {case!r}; cspine-data info lists what it holds")
    if variant not in variants:
        known = ", ".join(sorted(variants))
        raise NotInStoreError(f"{path}: holds case {case!r} as {known}, not as {variant}; prepare it so")
    record = stored_record(path, case, variants[variant])
    if record is None and is_older(path, case, variants[variant]):
        raise StoreError(f"{path}: was written by an older cspine; run cspine-data prepare again to renew its cases")
    if record is None or record.variant != variant:
        raise DamagedStoreError(f"{path}: the record of {case} ({variant}) is missing or damaged; prepare it anew")
    return record


def stored_record(path: Path, case: str, digest: str) -> CaseRecord | None:
    """Return the record of a digest that was written completely, published or not; None where there is none."""
    try:
        attributes = _attributes(path / schema.case_path(case, digest))
        record = CaseRecord.model_validate(attributes) if attributes is not None else None
    except (ValidationError, DamagedStoreError):
        return None
    return record if record and (record.case, record.digest) == (case, digest) else None


def is_older(path: Path, case: str, digest: str) -> bool:
    """Tell whether a case was written by an older cspine, whose records are no longer read."""
    try:
        attributes = _attributes(path / schema.case_path(case, digest))
    except DamagedStoreError:
        return False
    version = attributes.get("schema_version") if attributes else None
    return isinstance(version, int) and version < schema.SCHEMA_VERSION


def write_case(path: Path, record: CaseRecord, prepared: PreparedVolume, label: LabelMap | None) -> CaseRecord:
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

    Returns
    -------
    CaseRecord
        With the checksums of its files.
    """
    target = path / schema.case_path(record.case, record.digest)
    for group in (target.parent.parent, target.parent):
        _write_group(group, {})
    unfinished = target.parent / f".unfinished-{uuid.uuid4().hex}"
    try:
        writer = CaseWriter(unfinished)
        _write_arrays(writer, record, prepared, label)
        writer.finish()
        record = record.model_copy(update={"files": writer.checksums})
        _write_record(unfinished, record)
        if target.exists() and stored_record(path, record.case, record.digest) is None:
            shutil.rmtree(target)
        try:
            unfinished.rename(target)
        except OSError:
            # Another run wrote the same digest meanwhile: the same bytes, so its copy serves.
            if stored_record(path, record.case, record.digest) is None:
                raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return record


def publish(path: Path, case: str, variant: str, digest: str) -> None:
    """Make a written digest the current one of a case's variant."""

    def name_digest(root: RootRecord) -> RootRecord:
        cases = {**root.cases, case: {**root.cases.get(case, {}), variant: digest}}
        return root.model_copy(update={"cases": {name: cases[name] for name in sorted(cases)}})

    _update_root(path, name_digest)


def enrol(path: Path, labelled: Iterable[str], note: str | None = None) -> None:
    """Enter the labelled cases that are new as one batch, so that later additions leave their splits alone.

    A note says what the cohort is, where it stands in for something else.
    """

    def add_batch(root: RootRecord) -> RootRecord:
        known = {case for batch in root.enrolled for case in batch}
        batch = tuple(sorted(set(labelled) - known))
        notes = tuple(sorted({*root.notes, note})) if note else root.notes
        enrolled = (*root.enrolled, batch) if batch else root.enrolled
        return root.model_copy(update={"enrolled": enrolled, "notes": notes})

    _update_root(path, add_batch)


def keep_standard(path: Path, key: str, standard: Standard) -> Standard:
    """Enter what Nyul's method matches a store's volumes to, unless it is known; return what is known then."""

    def add_standard(root: RootRecord) -> RootRecord:
        return root.model_copy(update={"standards": {key: standard, **root.standards}})

    _update_root(path, add_standard)
    return read_root(path).standards[key]


def read_volume_xyz(path: Path, record: CaseRecord) -> NDArray[Any]:
    """Read a case's whole image, (x, y, z), in the units of its source.

    Raises
    ------
    DamagedStoreError
        If its bytes are not what was written.
    """
    return _read_array(path / schema.case_path(record.case, record.digest), schema.VOLUME_IMAGE)


def read_corrected(path: Path, record: CaseRecord) -> CorrectedVolume:
    """Read a case's volume with what is known of it, ready to be normalised anew.

    Raises
    ------
    DamagedStoreError
        If its bytes are not what was written.
    """
    return CorrectedVolume(
        image_xyz=read_volume_xyz(path, record),
        geometry=record.geometry,
        air_level=record.air_level,
        tissue_threshold=record.tissue_threshold,
        log_bias_deviation=record.log_bias_deviation,
        name=f"{record.case} ({record.variant})",
    )


def read_label_xyz(path: Path, record: CaseRecord) -> NDArray[Any]:
    """Read a case's whole label map, (x, y, z), label values as in its source.

    Raises
    ------
    NotInStoreError
        If it has none.
    DamagedStoreError
        If its bytes are not what was written.
    """
    if not record.labelled:
        raise NotInStoreError(f"{path}: case {record.case!r} has no label map")
    return _read_array(path / schema.case_path(record.case, record.digest), schema.VOLUME_LABEL)


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


def _read_array(folder: Path, name: str) -> NDArray[Any]:
    import zarr

    # zarr reads a shard that is not there as zeros.
    if not (folder / name / "c" / "0" / "0" / "0").is_file():
        raise DamagedStoreError(f"{folder / name}: is missing from the store; delete {folder} and prepare again")
    try:
        return np.asarray(zarr.open_array(str(folder / name), mode="r")[...])
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise DamagedStoreError(f"{folder / name}: is damaged ({error}); delete {folder} and prepare again") from None


def _attributes(folder: Path) -> dict[str, Any] | None:
    """Return the record in a group's attributes, once it was held against its checksum; None where there is none."""
    try:
        content = json.loads((folder / METADATA).read_bytes())["attributes"]
        record, checksum = content.get(schema.ATTRIBUTE), content.get(schema.CHECKSUM_ATTRIBUTE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedStoreError(f"{folder / METADATA}: cannot be understood; prepare the store anew") from None
    if not isinstance(record, dict):
        return None
    version = record.get("schema_version")
    if isinstance(version, int) and version > schema.SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{folder}: has schema version {version}, this cspine knows {schema.SCHEMA_VERSION}; install a newer cspine"
        )
    if checksum != schema.record_checksum(record):
        raise DamagedStoreError(f"{folder / METADATA}: is not what was written; prepare the store anew")
    return record


def _update_root(path: Path, change: Callable[[RootRecord], RootRecord]) -> None:
    with _lock(path):
        before = read_root(path)
        after = change(before).model_copy(update={"schema_version": schema.SCHEMA_VERSION})
        if after != before:
            _write_record(path, after)


def _write_record(folder: Path, record: RootRecord | CaseRecord) -> None:
    content = record.model_dump(mode="json")
    _write_group(folder, {schema.ATTRIBUTE: content, schema.CHECKSUM_ATTRIBUTE: schema.record_checksum(content)})


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Write a group's metadata in one step; an empty group that is there already is left alone."""
    file = folder / METADATA
    if not attributes and file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{METADATA}-{uuid.uuid4().hex}"
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            json.dump(schema.group_metadata(attributes), handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


@cache
def _lock(path: Path) -> Any:
    """Lock a store against other writers of its root; the kernel frees it when its holder dies.

    Kept, since dropping it runs its destructor, and Python loses a Ctrl-C that arrives within a destructor.
    """
    from filelock import FileLock

    return FileLock(path.parent / f".{path.name}.lock", timeout=60)


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
