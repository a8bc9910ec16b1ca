"""Preprocessing cache and dataset library for spine MRI: bias field corrected once, slices streamed from Zarr.

The names below are the public API. They do not need PyTorch. Each is imported when first used, so that the command
line starts quickly. `cspine_data.tools` has helpers for programs that write their own folders.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cspine_data.datasets.cohort import Cohort, open_cohort
    from cspine_data.datasets.export import ExportSummary, export_cohort
    from cspine_data.datasets.given_splits import GivenSplit, read_splits
    from cspine_data.datasets.slices import IGNORE_INDEX, SliceDataset, SlicePlace, VolumeDataset
    from cspine_data.datasets.splits import Split
    from cspine_data.datasets.tables import labels_of_records
    from cspine_data.errors import (
        CspineDataError,
        DamagedStoreError,
        InputError,
        NewerSchemaError,
        NotInStoreError,
        Problem,
        StoreError,
    )
    from cspine_data.preparation.options import PrepareOptions, parse_axes
    from cspine_data.preparation.pipeline import prepare
    from cspine_data.preparation.relabelling import RelabelSummary, relabel
    from cspine_data.preparation.repair import RepairSummary, repair
    from cspine_data.preparation.source_digests import Digested, digest_source
    from cspine_data.preparation.summary import PrepareSummary
    from cspine_data.preprocessing.parameters import (
        BiasParameters,
        Preprocessing,
        RecordedPreprocessing,
        bias_parameters,
    )
    from cspine_data.preprocessing.steps import PreparedVolume, preprocess_volume
    from cspine_data.report.dataset import DatasetReport, report_source, report_store
    from cspine_data.sources.cases import Case, Listing
    from cspine_data.sources.layout import Found, Layout
    from cspine_data.sources.listing import find_cases, find_volumes, volumes_in
    from cspine_data.store.garbage import Garbage, collect_garbage
    from cspine_data.store.publishing import remove_cases
    from cspine_data.store.schema import CaseRecord
    from cspine_data.store.verification import Damage, verify
    from cspine_data.volumes.cohort_labels import CohortLabels
    from cspine_data.volumes.formats.dicom_segmentation import SegmentationSource, segmentation_source
    from cspine_data.volumes.geometry import Geometry, Orientation, as_seen
    from cspine_data.volumes.image_checks import usable_image
    from cspine_data.volumes.instances import GAP_RATIO, usual_distances
    from cspine_data.volumes.io import (
        content_digest,
        label_name,
        read_volume,
        volume_stem,
        volume_suffix,
        write_segmentation,
        write_volume,
    )
    from cspine_data.volumes.levels import (
        LEVEL_NAMES,
        SACRUM,
        SPINE,
        T13,
        consecutive_levels,
        level_colour,
        level_value,
    )
    from cspine_data.volumes.volume import Volume

_HOME = {
    "preprocessing.parameters": ("BiasParameters", "Preprocessing", "RecordedPreprocessing", "bias_parameters"),
    "sources.cases": ("Case", "Listing"),
    "datasets.cohort": ("Cohort", "open_cohort"),
    "datasets.export": ("ExportSummary", "export_cohort"),
    "datasets.slices": ("IGNORE_INDEX", "SliceDataset", "SlicePlace", "VolumeDataset"),
    "preparation.source_digests": ("Digested", "digest_source"),
    "errors": (
        "CspineDataError", "DamagedStoreError", "InputError", "NewerSchemaError", "NotInStoreError", "Problem",
        "StoreError",
    ),
    "store.garbage": ("Garbage", "collect_garbage"),
    "volumes.geometry": ("Geometry", "Orientation", "as_seen"),
    "volumes.image_checks": ("usable_image",),
    "preparation.relabelling": ("RelabelSummary", "relabel"),
    "preparation.repair": ("RepairSummary", "repair"),
    "sources.listing": ("find_cases", "find_volumes", "volumes_in"),
    "sources.layout": ("Found", "Layout"),
    "preparation.options": ("PrepareOptions", "parse_axes"),
    "preparation.pipeline": ("prepare",),
    "preparation.summary": ("PrepareSummary",),
    "preprocessing.steps": ("PreparedVolume", "preprocess_volume"),
    "report.dataset": ("DatasetReport", "report_source", "report_store"),
    "store.publishing": ("remove_cases",),
    "store.schema": ("CaseRecord",),
    "datasets.given_splits": ("GivenSplit", "read_splits"),
    "datasets.splits": ("Split",),
    "datasets.tables": ("labels_of_records",),
    "store.verification": ("Damage", "verify"),
    "volumes.formats.dicom_segmentation": ("SegmentationSource", "segmentation_source"),
    "volumes.cohort_labels": ("CohortLabels",),
    "volumes.instances": ("GAP_RATIO", "usual_distances"),
    "volumes.io": (
        "content_digest", "label_name", "read_volume", "volume_stem", "volume_suffix", "write_segmentation",
        "write_volume",
    ),
    "volumes.levels": ("LEVEL_NAMES", "SACRUM", "SPINE", "T13", "consecutive_levels", "level_colour", "level_value"),
    "volumes.volume": ("Volume",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "GAP_RATIO",
    "IGNORE_INDEX",
    "LEVEL_NAMES",
    "SACRUM",
    "SPINE",
    "T13",
    "BiasParameters",
    "Case",
    "CaseRecord",
    "Cohort",
    "CohortLabels",
    "CspineDataError",
    "Damage",
    "DamagedStoreError",
    "DatasetReport",
    "Digested",
    "ExportSummary",
    "Found",
    "Garbage",
    "Geometry",
    "GivenSplit",
    "InputError",
    "Layout",
    "Listing",
    "NewerSchemaError",
    "NotInStoreError",
    "Orientation",
    "PrepareOptions",
    "PrepareSummary",
    "PreparedVolume",
    "Preprocessing",
    "Problem",
    "RecordedPreprocessing",
    "RelabelSummary",
    "RepairSummary",
    "SegmentationSource",
    "SliceDataset",
    "SlicePlace",
    "Split",
    "StoreError",
    "Volume",
    "VolumeDataset",
    "__version__",
    "as_seen",
    "bias_parameters",
    "collect_garbage",
    "consecutive_levels",
    "content_digest",
    "digest_source",
    "export_cohort",
    "find_cases",
    "find_volumes",
    "label_name",
    "labels_of_records",
    "level_colour",
    "level_value",
    "open_cohort",
    "parse_axes",
    "prepare",
    "preprocess_volume",
    "read_splits",
    "read_volume",
    "relabel",
    "remove_cases",
    "repair",
    "report_source",
    "report_store",
    "segmentation_source",
    "usable_image",
    "usual_distances",
    "verify",
    "volume_stem",
    "volume_suffix",
    "volumes_in",
    "write_segmentation",
    "write_volume",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("cspine")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
