"""Prepare one case: read and check its files, correct, slice, and write it to the folder of its digest.

The case is written to a temporary folder, which is then renamed.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import DamagedStoreError, InputError
from cspine_data.files import make_folder
from cspine_data.preparation.plan import Job, Stored, is_unchanged
from cspine_data.preprocessing.bias_field import field_factors
from cspine_data.preprocessing.steps import CorrectedVolume, PreparedVolume, correct_volume, normalise_volume
from cspine_data.sources.cases import LoadedCase, load_case, voxels_digest
from cspine_data.sources.duplicates import Fingerprint
from cspine_data.store import schema
from cspine_data.store.attributes import averaged_metadata, image_metadata, level_attributes, slice_grid
from cspine_data.store.publishing import (
    REMOVED,
    UNFINISHED,
    locked,
    mark_in_use,
    refuse_links,
    sync_above,
    write_empty_group,
    write_record,
)
from cspine_data.store.records import read_corrected, stored_record
from cspine_data.store.schema import CaseRecord
from cspine_data.store.writer import CaseWriter
from cspine_data.volumes.geometry import Orientation
from cspine_data.volumes.instances import label_centroids_mm
from cspine_data.volumes.label_checks import value_counts


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A case's label map on the volume's grid and on the grid of the slices, both (x, y, z)."""

    volume_xyz: NDArray[Any]
    sliced_xyz: NDArray[Any]


def prepare_case(job: Job, store: Path) -> Stored:
    """Run one job: load, correct, slice and write a case. It is then complete in the store, but not published.

    Raises `InputError` if the case's files cannot be used, or have changed since the job was planned.
    """
    written = None if job.overwrite else stored_record(store, job.case.id, job.digest)
    if written is not None:
        mark_in_use(store, job.case.id, job.digest)
        # The run that wrote it may have been killed before it synchronised the folders to disk.
        sync_above(store, job.case.id)
        return Stored.of(written)
    loaded = load_case(job.case, job.label_options, neutral=job.neutral)
    if not is_unchanged(job):
        raise InputError(
            job.case.volume, "changed while it was read", "run it again when no other program writes to it"
        )
    # A repair does not reuse the stored volume: its record may have been damaged with its voxels.
    stored = None if job.overwrite else stored_volume(job, store)
    corrected = stored or correct_volume(loaded.image, job.preprocessing.bias)
    prepared = normalise_volume(corrected, job.preprocessing)
    label_xyz = _label_xyz(loaded)
    label = None if label_xyz is None else LabelMap(label_xyz, prepared.label_on_network_grid(label_xyz))
    record = _record(job, loaded, prepared, label)
    write_case(store, record, prepared, label, overwrite=job.overwrite)
    folder = store / schema.case_path(job.case.id, job.digest)
    written_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Stored.of(record, written_bytes, Fingerprint.of(job.case.id, job.case.patient, loaded.image))


def stored_volume(job: Job, store: Path) -> CorrectedVolume | None:
    """Return the corrected volume from the store, if it was made with the same parameters; else None."""
    record = stored_record(store, job.case.id, job.current) if job.current else None
    if record is None or record.volume_digest != job.volume_digest:
        return None
    try:
        return read_corrected(store, record)
    except DamagedStoreError:
        return None


def write_case(
    path: Path, record: CaseRecord, prepared: PreparedVolume, label: LabelMap | None, *, overwrite: bool = False
) -> None:
    """Write one case to the folder of its digest, completely or not at all; it is not published yet.

    The `files` of the record are filled in. With `overwrite` an existing folder is replaced, because it is damaged,
    even if its record is not.
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
            if target.exists() and (overwrite or stored_record(path, record.case, record.digest) is None):
                target.rename(aside)
            # If a concurrent run has written the same digest, it has the same bytes.
            if not target.exists():
                unfinished.rename(target)
        sync_above(path, record.case)
    finally:
        for folder in (unfinished, aside):
            shutil.rmtree(folder, ignore_errors=True)


def _write_arrays(writer: CaseWriter, record: CaseRecord, prepared: PreparedVolume, label: LabelMap | None) -> None:
    origin_mm = Orientation.of(record.geometry).geometry_xyz(record.geometry).origin_mm
    ome = image_metadata(record.spacing_xyz_mm, origin_mm)
    writer.write_group("volume", {"ome": ome})
    chunks = schema.volume_chunks(record.size_xyz)
    writer.write_array(schema.VOLUME_IMAGE, prepared.corrected.image_xyz, chunks, schema.AXES_XYZ, {})
    log_bias = prepared.corrected.log_bias_xyz
    if log_bias is not None:
        factors = field_factors(record.size_xyz, record.spacing_xyz_mm)
        writer.write_group("bias_field", {"ome": averaged_metadata(record.spacing_xyz_mm, origin_mm, factors)})
        writer.write_array(schema.BIAS_FIELD, log_bias, schema.volume_chunks(log_bias.shape), schema.AXES_XYZ, {})
    sliced = {"image": (prepared.levels_xyz, level_attributes(prepared.levels))}
    if label is not None:
        writer.write_group("volume/labels", {"ome": {"version": "0.5", "labels": ["segmentation"]}})
        label_ome = {**ome, "image-label": {"source": {"image": "../../"}}}
        writer.write_group("volume/labels/segmentation", {"ome": label_ome})
        writer.write_array(schema.VOLUME_LABEL, label.volume_xyz, chunks, schema.AXES_XYZ, {})
        sliced["label"] = (label.sliced_xyz, {})
    grid = slice_grid(record)
    for axis in record.axes:
        writer.write_group(f"axis{axis}", grid)
        axes = schema.AXES_XYZ[axis] + schema.AXES_XYZ.replace(schema.AXES_XYZ[axis], "")
        for kind, (array_xyz, attributes) in sliced.items():
            slices = np.ascontiguousarray(np.moveaxis(array_xyz, axis, 0))
            writer.write_array(
                schema.slice_array(axis, kind), slices, schema.slice_chunks(slices.shape), axes, attributes
            )


def _label_xyz(loaded: LoadedCase) -> NDArray[Any] | None:
    """Return the label map in anatomical order, in the smallest dtype for its values."""
    if loaded.label is None:
        return None
    values = loaded.label.array
    smallest, largest = int(values.min()), int(values.max())
    dtype = np.promote_types(np.min_scalar_type(smallest), np.min_scalar_type(largest))
    if dtype.kind == "f":
        dtype = values.dtype
    return np.ascontiguousarray(Orientation.of(loaded.image.geometry).to_anatomical(values).astype(dtype))


def _record(job: Job, loaded: LoadedCase, prepared: PreparedVolume, label: LabelMap | None) -> CaseRecord:
    corrected = prepared.corrected
    geometry_xyz = Orientation.of(corrected.geometry).geometry_xyz(corrected.geometry)
    label_voxels: dict[int, int] = {}
    ignore_label, ignored_voxels = job.label_options.ignore_label, 0
    labelled_voxels: dict[int, tuple[int, ...]] = {}
    if label is not None:
        values, counts = value_counts(label.volume_xyz)
        label_voxels = {int(value): int(n) for value, n in zip(values, counts, strict=True) if value}
        ignored_voxels = label_voxels.pop(ignore_label, 0) if ignore_label is not None else 0
        counted = label.sliced_xyz != 0
        if ignored_voxels:
            counted &= label.sliced_xyz != ignore_label
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            labelled_voxels[axis] = tuple(np.count_nonzero(counted, axis=others).tolist())
    segments, overlaps = (loaded.label.segments, loaded.label.overlaps) if loaded.label else ((), ())
    # An overlapping segment may have lost all its voxels; messages name it.
    named = {*label_voxels, *(one.first.value for one in overlaps)}
    centroids = label_centroids_mm(label.volume_xyz, geometry_xyz) if label is not None else {}
    sliced_x, sliced_y, sliced_z = prepared.levels_xyz.shape
    return CaseRecord(
        case=job.case.id,
        variant=job.preprocessing.variant,
        digest=job.digest,
        volume_digest=job.volume_digest,
        image_sha256=job.image_sha256,
        label_sha256=job.label_sha256 if label is not None else None,
        voxels_sha256=voxels_digest(loaded.image),
        preprocessing=job.preprocessing,
        geometry=corrected.geometry,
        assumed_orientation=loaded.image.assumed_orientation,
        image_dtype=loaded.image.array.dtype.name,
        label_dtype=loaded.label_dtype,
        size_xyz=geometry_xyz.size,
        spacing_xyz_mm=geometry_xyz.spacing_mm,
        sliced_size_xyz=(sliced_x, sliced_y, sliced_z),
        sliced_spacing_xyz_mm=prepared.spacing_mm,
        normalisation=prepared.normalisation,
        levels=prepared.levels,
        air_level=corrected.air_level,
        tissue_threshold=corrected.tissue_threshold,
        tissue_fraction=corrected.tissue.fraction,
        tissue_percentiles=prepared.tissue_percentiles,
        log_bias_deviation=corrected.log_bias_deviation,
        noise_ratio=corrected.noise_ratio,
        noise_share=corrected.noise_share,
        tissue=corrected.tissue,
        axes=job.axes,
        label_voxels=label_voxels,
        labelled_voxels=labelled_voxels,
        notes=loaded.notes,
        ignore_label=ignore_label,
        ignored_voxels=ignored_voxels,
        label_values=job.label_options.label_values,
        segments={one.value: one.name for one in segments if one.value in named},
        label_centroids_mm={value: mm for value, mm in centroids.items() if value in label_voxels},
        overlaps=tuple((one.first.value, one.second.value) for one in overlaps),
    )
