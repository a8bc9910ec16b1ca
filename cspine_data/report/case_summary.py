"""What the dataset report shows of one case: measures and pictures, from its files or from a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.normalisation import Normalisation, TissueStatistics, normalisation_of
from cspine_data.preprocessing.tissue import tissue_threshold
from cspine_data.report.label_fit import LabelFit, label_fit, surroundings
from cspine_data.report.pictures import Picture, correction_rows, draw_slices, image_row
from cspine_data.sources.cases import Case, ScannedCase, describe_case, load_case, voxels_digest
from cspine_data.sources.duplicates import Fingerprint, fingerprint
from cspine_data.store.identities import Identity, identity_of
from cspine_data.store.records import read_corrected, read_label_xyz, read_root, record_of
from cspine_data.volumes.cohort_labels import LabelledCase
from cspine_data.volumes.geometry import Orientation, Triple
from cspine_data.volumes.instances import Instance, find_instances
from cspine_data.volumes.label_options import LabelOptions
from cspine_data.volumes.volume import Volume

_BINS = 48
# Percentiles between which intensities are shown.
_SHOWN_SHARE = (0.5, 99.5)
# The unit of most methods is a standard deviation of the tissue.
_NORMALISED_RANGES = {"percentile": (-0.5, 1.5)}
_NORMALISED_RANGE = (-3.0, 5.0)


@dataclass(frozen=True)
class Histogram:
    """Number of voxels in equal bins between two values, as a share of the largest number."""

    low: float
    high: float
    heights: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[Any], low: float, high: float) -> Histogram:
        """Return the histogram of values in a range."""
        counts, _ = np.histogram(values, _BINS, (low, high if high > low else low + 1))
        return cls(low, high, tuple((counts / max(1, counts.max())).round(3).tolist()))


@dataclass(frozen=True, eq=False)
class LabelSummary:
    """What the page shows of a label map that is not empty."""

    instances: tuple[Instance, ...]
    """Its label values, from head to feet."""
    names: Mapping[int, str]
    """Names of label values, if the file has them."""
    fit: LabelFit
    surroundings: NDArray[np.float32]
    """The image around the labelled voxels."""

    @classmethod
    def of(
        cls,
        image_xyz: NDArray[Any],
        label_xyz: NDArray[Any] | None,
        spacing_mm: Triple,
        ignore_label: int | None,
        instances: tuple[Instance, ...],
        names: Mapping[int, str],
    ) -> LabelSummary | None:
        """Return the summary of a label map; None if there is none, or it is empty."""
        if label_xyz is None or not instances:
            return None
        labelled = label_xyz != 0
        if ignore_label is not None:
            labelled &= label_xyz != ignore_label
        fit = label_fit(image_xyz, labelled, spacing_mm)
        return cls(instances, names, fit, surroundings(image_xyz, labelled, spacing_mm))

    @property
    def volumes_ml(self) -> dict[int, float]:
        """Volume of each label value, in ascending order."""
        return {one.value: one.volume_ml for one in sorted(self.instances, key=lambda one: one.value)}


@dataclass(frozen=True, eq=False)
class CaseSummary:
    """What the page shows of a case."""

    identity: Identity
    fingerprint: Fingerprint
    """Case id, patient and grid, and what identifies other scans of the same patient."""
    orientation: str
    """The file's axes, such as LPS."""
    intensity: float
    """Median of the tissue, in the file's units."""
    before: Histogram
    after: Histogram
    """Intensities before and after normalisation."""
    picture: Picture
    label: LabelSummary | None
    notes: tuple[str, ...] = ()
    """Notes on the files."""
    doubts: tuple[str, ...] = ()
    """Warnings about the bias field."""
    log_bias_deviation: float | None = None
    """Standard deviation of the log bias field over tissue; None without correction."""

    @property
    def case(self) -> str:
        """Case id."""
        return self.fingerprint.case

    @property
    def labels(self) -> LabelledCase:
        """Its labels, for `cohort_labels`."""
        return (
            LabelledCase.of(self.case, self.label.instances, self.label.names)
            if self.label
            else LabelledCase(self.case)
        )

    @property
    def size_xyz(self) -> tuple[int, ...]:
        """Number of voxels along x, y and z."""
        return self.fingerprint.size_xyz

    @property
    def spacing_mm(self) -> Triple:
        """Voxel size along x, y and z."""
        return self.fingerprint.spacing_xyz_mm

    @property
    def field_of_view_mm(self) -> Triple:
        """Extent along x, y and z."""
        x, y, z = (n * mm for n, mm in zip(self.size_xyz, self.spacing_mm, strict=True))
        return x, y, z


@dataclass(frozen=True, eq=False)
class Examined:
    """A case of a source: its row for the terminal, its summary for the page, the digest of its voxels."""

    scanned: ScannedCase
    summary: CaseSummary
    voxels_sha256: str


def examine_source_case(case: Case, options: LabelOptions) -> Examined:
    """Read, check, measure and draw a case of a source; raises what `load_case` raises."""
    loaded = load_case(case, options)
    orientation = Orientation.of(loaded.image.geometry)
    image_xyz = np.ascontiguousarray(orientation.to_anatomical(loaded.image.array))
    label_xyz = None if loaded.label is None else orientation.to_anatomical(loaded.label.array)
    spacing_mm = orientation.geometry_xyz(loaded.image.geometry).spacing_mm
    tissue = TissueStatistics.of(image_xyz, image_xyz > tissue_threshold(image_xyz, spacing_mm))
    before, after = _histograms(image_xyz, normalisation_of(tissue, "zscore", None, loaded.image.name))
    scanned = describe_case(loaded, options.ignore_label)
    summary = CaseSummary(
        identity=identity_of(case),
        fingerprint=scanned.fingerprint or Fingerprint.of(case.id, case.patient, loaded.image),
        orientation=loaded.image.geometry.orientation_code,
        intensity=tissue.at((50,))[0],
        before=before,
        after=after,
        picture=draw_slices((image_row(image_xyz),), label_xyz, image_xyz.shape, spacing_mm),
        label=LabelSummary.of(image_xyz, label_xyz, spacing_mm, options.ignore_label, scanned.instances, scanned.names),
        notes=loaded.notes,
    )
    return Examined(scanned, summary, voxels_digest(loaded.image))


def summarise_stored_case(case: str, store: Path, variant: str) -> CaseSummary:
    """Measure and draw a case of a store; raises `StoreError` if it is damaged."""
    root = read_root(store)
    record = record_of(store, root, case, variant)
    corrected = read_corrected(store, record)
    label_xyz = read_label_xyz(store, record) if record.labelled else None
    image_xyz, spacing_mm = corrected.image_xyz, corrected.spacing_mm
    before, after = _histograms(image_xyz, record.normalisation)
    instances: tuple[Instance, ...] = ()
    if label_xyz is not None:
        geometry_xyz = Orientation.of(record.geometry).geometry_xyz(record.geometry)
        instances = find_instances(Volume(label_xyz, geometry_xyz), record.ignore_label)
    identity = root.identity(case)
    with_bias = record.preprocessing.bias is not None
    return CaseSummary(
        identity=identity,
        fingerprint=Fingerprint(case, identity.patient, image_xyz.shape, spacing_mm, fingerprint(image_xyz)),
        orientation=record.geometry.orientation_code,
        intensity=corrected.tissue.at((50,))[0],
        before=before,
        after=after,
        picture=draw_slices(correction_rows(corrected), label_xyz, image_xyz.shape, spacing_mm),
        label=LabelSummary.of(image_xyz, label_xyz, spacing_mm, record.ignore_label, instances, record.segments),
        notes=record.notes,
        doubts=corrected.doubts if with_bias else (),
        log_bias_deviation=record.log_bias_deviation if with_bias else None,
    )


def _histograms(image_xyz: NDArray[Any], normalisation: Normalisation) -> tuple[Histogram, Histogram]:
    """Return the histograms of the intensities and of their normalised values."""
    some = image_xyz[::2, ::2, ::2]
    low, high = (float(value) for value in np.percentile(some, _SHOWN_SHARE))
    shown = _NORMALISED_RANGES.get(normalisation.method, _NORMALISED_RANGE)
    return Histogram.of(some, low, high), Histogram.of(normalisation.apply(some), *shown)
