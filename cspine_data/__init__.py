"""Preprocessing cache and dataset library for spine MRI: bias field corrected once, slices streamed from Zarr.

The names below are the public ones. None of them needs PyTorch. They are imported when first used, so that the
command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cspine_data.bias import BiasParameters, bias_parameters
    from cspine_data.cases import Case, Listing, Problem, describe_problem
    from cspine_data.cluster import Workers, side_by_side, usable_cores
    from cspine_data.cohort import Cohort, open_cohort
    from cspine_data.dataset import IGNORE_INDEX, SliceDataset, SlicePlace, VolumeDataset
    from cspine_data.digests import Digested, digest_source
    from cspine_data.durable import atomic_write, exclusive_lock, make_folder, remove_unfinished
    from cspine_data.errors import (
        CspineDataError,
        DamagedStoreError,
        InputError,
        NewerSchemaError,
        NotInStoreError,
        StoreError,
    )
    from cspine_data.extras import install_hint
    from cspine_data.garbage import Garbage, collect_garbage
    from cspine_data.geometry import Geometry, Orientation
    from cspine_data.images import usable_image
    from cspine_data.mending import RepairSummary, repair
    from cspine_data.pairing import find_cases, volumes_in
    from cspine_data.pipeline import PrepareSummary, parse_axes, prepare
    from cspine_data.preprocess import PreparedVolume, Preprocessing, RecordedPreprocessing, preprocess_volume
    from cspine_data.publishing import remove_cases
    from cspine_data.schema import CaseRecord
    from cspine_data.splits import Split
    from cspine_data.verification import Damage, verify
    from cspine_data.volumes import (
        Volume,
        content_digest,
        label_name,
        read_volume,
        volume_stem,
        volume_suffix,
        write_volume,
    )

_HOME = {
    "bias": ("BiasParameters", "bias_parameters"),
    "cases": ("Case", "Listing", "Problem", "describe_problem"),
    "cluster": ("Workers", "side_by_side", "usable_cores"),
    "cohort": ("Cohort", "open_cohort"),
    "dataset": ("IGNORE_INDEX", "SliceDataset", "SlicePlace", "VolumeDataset"),
    "digests": ("Digested", "digest_source"),
    "durable": ("atomic_write", "exclusive_lock", "make_folder", "remove_unfinished"),
    "errors": (
        "CspineDataError", "DamagedStoreError", "InputError", "NewerSchemaError", "NotInStoreError", "StoreError",
    ),
    "extras": ("install_hint",),
    "garbage": ("Garbage", "collect_garbage"),
    "geometry": ("Geometry", "Orientation"),
    "images": ("usable_image",),
    "mending": ("RepairSummary", "repair"),
    "pairing": ("find_cases", "volumes_in"),
    "pipeline": ("PrepareSummary", "parse_axes", "prepare"),
    "preprocess": ("PreparedVolume", "Preprocessing", "RecordedPreprocessing", "preprocess_volume"),
    "publishing": ("remove_cases",),
    "schema": ("CaseRecord",),
    "splits": ("Split",),
    "verification": ("Damage", "verify"),
    "volumes": (
        "Volume", "content_digest", "label_name", "read_volume", "volume_stem", "volume_suffix", "write_volume",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "IGNORE_INDEX",
    "BiasParameters",
    "Case",
    "CaseRecord",
    "Cohort",
    "CspineDataError",
    "Damage",
    "DamagedStoreError",
    "Digested",
    "Garbage",
    "Geometry",
    "InputError",
    "Listing",
    "NewerSchemaError",
    "NotInStoreError",
    "Orientation",
    "PrepareSummary",
    "PreparedVolume",
    "Preprocessing",
    "Problem",
    "RecordedPreprocessing",
    "RepairSummary",
    "SliceDataset",
    "SlicePlace",
    "Split",
    "StoreError",
    "Volume",
    "VolumeDataset",
    "Workers",
    "__version__",
    "atomic_write",
    "bias_parameters",
    "collect_garbage",
    "content_digest",
    "describe_problem",
    "digest_source",
    "exclusive_lock",
    "find_cases",
    "install_hint",
    "label_name",
    "make_folder",
    "open_cohort",
    "parse_axes",
    "prepare",
    "preprocess_volume",
    "read_volume",
    "remove_cases",
    "remove_unfinished",
    "repair",
    "side_by_side",
    "usable_cores",
    "usable_image",
    "verify",
    "volume_stem",
    "volume_suffix",
    "volumes_in",
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
