"""The table of the cases of a store, with their levels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from cspine_data.store.schema import CaseRecord, RootRecord
from cspine_data.volumes.cohort_labels import CohortLabels, LabelledCase, cohort_labels
from cspine_data.volumes.levels import levels_text

if TYPE_CHECKING:
    from pandas import DataFrame


def labels_of_records(records: Iterable[CaseRecord]) -> CohortLabels:
    """Return what the label values of stored cases mean, see `cohort_labels`."""
    return cohort_labels([LabelledCase(one.case, one.label_centroids_mm, one.segments) for one in records])


def case_levels(record: CaseRecord, levels: Collection[int]) -> str:
    """Return the levels of a case, abbreviated such as ``T11-L5``; `levels` are those of the cohort."""
    return levels_text(set(record.labels) & set(levels))


def case_table(records: Collection[CaseRecord], root: RootRecord, part_of: Mapping[str, str]) -> DataFrame:
    """Return a table with one row per case; `part_of` gives the part of the split of each."""
    from pandas import DataFrame

    levels = labels_of_records(records).levels
    rows = [
        {
            "case": record.case,
            **root.identity(record.case).model_dump(),
            "split": part_of.get(record.case),
            "size_xyz": record.size_xyz,
            "spacing_xyz_mm": record.spacing_xyz_mm,
            "labels": record.labels,
            "levels": case_levels(record, levels),
            "log_bias_deviation": record.log_bias_deviation,
            "tissue_fraction": record.tissue_fraction,
            "warnings": record.warnings,
        }
        for record in records
    ]
    return DataFrame(rows).set_index("case")
