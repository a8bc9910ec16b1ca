"""Read the records and volumes of a store.

Damage raises an error: records and array metadata are checked against their checksums, voxels chunk by chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cspine_data.errors import DamagedStoreError, NewerSchemaError, NotInStoreError, StoreError
from cspine_data.names import as_known
from cspine_data.preprocessing.bias_field import field_factors
from cspine_data.preprocessing.normalisation import TissueStatistics
from cspine_data.preprocessing.steps import CorrectedVolume
from cspine_data.store import schema
from cspine_data.store.location import is_local, refuse_url
from cspine_data.store.schema import CaseRecord, RootRecord
from cspine_data.store.shards import open_file, read_whole
from cspine_data.store.writer import METADATA

#: The copy of the root's metadata.
ROOT_COPY = f".{METADATA}.copy"
#: The problem of a digest that is no longer in the store.
REPLACED = "was replaced or removed: open the cohort again"
#: Exceptions that damaged metadata can cause.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
# About a hundred times the size of a root with ten thousand cases.
_MOST_METADATA_BYTES = 1 << 28
_LAST_REMEDY = "delete it and prepare again: complete cases are reused, but splits, notes and standards are lost"


def repair_hint(path: Path) -> str:
    """Return the remedy for a damaged store."""
    if not is_local(path):
        return "repair it where it was prepared, or use a server that answers range requests"
    return f"repair it with cspine-data verify {path} --repair SOURCE"


def read_root(path: Path, name: str = METADATA) -> RootRecord:
    """Read the record of a store's root, or of its copy.

    Raises `StoreError` if there is no store, `NewerSchemaError` if a newer version has written it, and
    `DamagedStoreError` if its metadata are damaged.
    """
    refuse_url(path)
    try:
        attributes = _attributes(path, name)
        if attributes is not None:
            return RootRecord.model_validate(attributes)
    except (DamagedStoreError, ValidationError) as error:
        problem = str(error) if isinstance(error, DamagedStoreError) else f"{path / name}: is damaged ({_first(error)})"
        raise DamagedStoreError(f"{problem}; {_remedy(path, name)}") from None
    if name == METADATA and (path / ROOT_COPY).is_file():
        raise DamagedStoreError(f"{path / name}: is missing; {_remedy(path, name)}")
    if not is_local(path):
        raise StoreError(f"{path}: is no cspine store, or cannot be reached; check the address")
    raise StoreError(f"{path}: is no cspine store; make one with cspine-data prepare")


def _remedy(path: Path, name: str) -> str:
    return repair_hint(path) if name == METADATA and (path / ROOT_COPY).is_file() else _LAST_REMEDY


def records(path: Path, root: RootRecord, variant: str) -> Iterable[CaseRecord]:
    """Iterate over the records of a variant, in order of case ids."""
    for case in sorted(root.cases):
        if variant in root.cases[case]:
            yield record_of(path, root, case, variant)


def record_of(path: Path, root: RootRecord, case: str, variant: str) -> CaseRecord:
    """Read the record of one variant of a case.

    Raises `NotInStoreError` if the root does not list it, `StoreError` if it has been replaced since the root was
    read and collected as garbage, and `DamagedStoreError` if its record is missing or damaged.
    """
    case = as_known(case, root.cases)
    variants = root.cases.get(case)
    if variants is None:
        raise NotInStoreError(f"{path}: holds no case {case!r}; cspine-data info lists what it holds")
    if variant not in variants:
        known = ", ".join(sorted(variants))
        raise NotInStoreError(f"{path}: holds case {case!r} as {known}, not as {variant}; prepare it so")
    record = stored_record(path, case, variants[variant])
    if record is None and read_root(path).cases.get(case, {}).get(variant) != variants[variant]:
        raise StoreError(f"{path}: {case} ({variant}) {REPLACED}")
    if record is None or record.variant != variant:
        raise DamagedStoreError(f"{path}: the record of {case} ({variant}) is missing or damaged; {repair_hint(path)}")
    return record


def stored_record(path: Path, case: str, digest: str) -> CaseRecord | None:
    """Return the record of a completely written digest, published or not; None if there is none."""
    try:
        attributes = _attributes(path / schema.case_path(case, digest))
        record = CaseRecord.model_validate(attributes) if attributes is not None else None
    except (ValidationError, DamagedStoreError):
        return None
    return record if record and (record.case, record.digest) == (case, digest) else None


def read_volume_xyz(path: Path, record: CaseRecord) -> NDArray[Any]:
    """Read the image of a case, (x, y, z), in the units of its source."""
    return _read_array(path, record, schema.VOLUME_IMAGE)


def read_corrected(path: Path, record: CaseRecord) -> CorrectedVolume:
    """Read the volume of a case with its statistics, for normalisation."""
    image_xyz = read_volume_xyz(path, record)
    return CorrectedVolume(
        image_xyz=image_xyz,
        geometry=record.geometry,
        air_level=record.air_level,
        tissue_threshold=record.tissue_threshold,
        tissue=record.tissue or TissueStatistics.of(image_xyz, image_xyz > record.tissue_threshold),
        log_bias_deviation=record.log_bias_deviation,
        noise_ratio=record.noise_ratio,
        noise_share=record.noise_share,
        log_bias_xyz=read_log_bias_xyz(path, record),
        name=f"{record.case} ({record.variant})",
    )


def read_label_xyz(path: Path, record: CaseRecord) -> NDArray[Any]:
    """Read the label map of a case, (x, y, z), as it was prepared."""
    if not record.labelled:
        raise NotInStoreError(f"{path}: case {record.case!r} has no label map")
    return _read_array(path, record, schema.VOLUME_LABEL)


def read_log_bias_xyz(path: Path, record: CaseRecord) -> NDArray[np.float32] | None:
    """Read the logarithm of the bias field; None without correction, and in stores of schema version 7 or older."""
    if f"{schema.BIAS_FIELD}/{METADATA}" not in record.files:
        return None
    factors = field_factors(record.size_xyz, record.spacing_xyz_mm)
    size = tuple(-(-n // factor) for n, factor in zip(record.size_xyz, factors, strict=True))
    return _read_array(path, record, schema.BIAS_FIELD, size)


def _read_array(path: Path, record: CaseRecord, name: str, size: tuple[int, ...] | None = None) -> NDArray[Any]:
    size = size or record.size_xyz
    case_folder = path / schema.case_path(record.case, record.digest)
    folder = case_folder / name
    try:
        metadata = read_array_metadata(folder, record.files.get(f"{name}/{METADATA}", ""))
        if tuple(metadata["shape"]) != size:
            raise ValueError("its shape is not the volume's")
        chunks = schema.volume_chunks(size)
        if not is_local(path) or not schema.is_own_layout(metadata, chunks):
            from cspine_data.store.zarr_fallback import ForeignArray

            return ForeignArray(folder, metadata).read()
        dtype = schema.DTYPES[metadata["data_type"]]
        return read_whole(folder / "c" / "0" / "0" / "0", size, dtype, chunks)
    except (FileNotFoundError, NotADirectoryError):
        if is_local(path) and not case_folder.is_dir():
            raise StoreError(f"{path}: {record.case} ({record.variant}) {REPLACED}") from None
        raise DamagedStoreError(f"{folder}: is missing from the store; {repair_hint(path)}") from None
    except MALFORMED as error:
        raise DamagedStoreError(f"{folder}: is damaged ({error}); {repair_hint(path)}") from None


def read_metadata(folder: Path, name: str = METADATA) -> bytes:
    """Read a metadata file of an untrusted store: not through a link or pipe, and only up to a limit."""
    with os.fdopen(open_file(folder / name), "rb") if is_local(folder) else (folder / name).open("rb") as file:
        if file.seek(0, os.SEEK_END) > _MOST_METADATA_BYTES:
            raise ValueError("is far too long for metadata")
        file.seek(0)
        return file.read()


def read_array_metadata(folder: Path, sha256: str | None) -> Any:
    """Read the metadata of an array and check them against the checksum in the case's record, if given."""
    content = read_metadata(folder)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("its metadata is not what was written")
    return json.loads(content)


def metadata_is_intact(folder: Path, name: str = METADATA) -> bool:
    """Return whether a group's readable metadata file has exactly the bytes that were written."""
    content = read_metadata(folder, name)
    return content == schema.group_bytes(json.loads(content)["attributes"])


def _attributes(folder: Path, name: str = METADATA) -> dict[str, Any] | None:
    """Return the record in a group's attributes, after checking its checksum; None if there is none."""
    try:
        content = json.loads(read_metadata(folder, name))["attributes"]
        record, checksum = content.get(schema.ATTRIBUTE), content.get(schema.CHECKSUM_ATTRIBUTE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedStoreError(f"{folder / name}: is not what was written (cannot be understood)") from None
    if record is None and checksum is None:
        return None
    if not isinstance(record, dict) or checksum != schema.record_checksum(record):
        raise DamagedStoreError(f"{folder / name}: is not what was written (does not fit its checksum)")
    version = record.get("schema_version")
    if isinstance(version, int) and version > schema.SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{folder}: has schema version {version}, this cspine knows {schema.SCHEMA_VERSION}; install a newer cspine"
        )
    return record


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
