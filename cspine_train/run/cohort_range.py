"""Differences of a volume from a run's training volumes; a network marks something in any volume, of any organ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict

from cspine_data import CaseRecord, Geometry, PreparedVolume

_SIDES = ("left-right", "front-back", "feet-head")
# Sizes may be outside the range of training volumes by this factor.
_FACTOR = 1.5
# Distance of tissue intensities from their range, in widths of the range. In leave-one-out over the 14 volumes of
# spine14 it is at most 0.25, and over the 12 of spine_t1 at most 0.45; benchmarks/unlike_volumes.py measures more.
_WIDTHS = 0.75
# The smallest width: volumes of one protocol hardly differ.
_LEAST_WIDTH = 0.5
_TILTED_DEGREES = 15.0
_LIKE_CT = -500.0


class CohortLooks(BaseModel):
    """Ranges of the properties of a run's training volumes, apart from their label maps, by the names of `looks_of`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ranges: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, records: Iterable[CaseRecord]) -> CohortLooks:
        """Return the ranges over volumes of a store."""
        looks = [looks_of_record(record) for record in records]
        names = set.intersection(*(set(one) for one in looks)) if looks else set()
        values = {name: [one[name] for one in looks] for name in sorted(names)}
        return cls(ranges={name: (min(of_name), max(of_name)) for name, of_name in values.items()})


def looks_of(prepared: PreparedVolume) -> dict[str, float]:
    """Return the properties of a volume: voxel sizes, extents, tilt, and percentiles of its tissue's intensities."""
    corrected = prepared.corrected
    shape = corrected.image_xyz.shape
    return _looks(
        corrected.geometry, corrected.spacing_mm, shape, corrected.air_level, corrected.tissue.fraction,
        prepared.tissue_percentiles,
    )  # fmt: skip


def looks_of_record(record: CaseRecord) -> dict[str, float]:
    """Return the properties of a stored case; older stores hold no intensities."""
    return _looks(
        record.geometry, record.spacing_xyz_mm, record.size_xyz, record.air_level, record.tissue_fraction,
        record.tissue_percentiles,
    )  # fmt: skip


def _looks(
    geometry: Geometry,
    spacing_mm: Iterable[float],
    shape: Iterable[int],
    air_level: float,
    tissue_fraction: float,
    percentiles: Iterable[float],
) -> dict[str, float]:
    looks = {f"voxel {side}": mm for side, mm in zip(_SIDES, spacing_mm, strict=True)}
    looks |= {f"extent {side}": mm * n for side, mm, n in zip(_SIDES, spacing_mm, shape, strict=True)}
    cosines = np.abs(geometry.direction_matrix).max(0)
    looks["tilt"] = float(np.degrees(np.arccos(np.clip(cosines.min(), 0, 1))))
    looks["air"] = air_level
    values = list(percentiles)
    if values:
        looks["tissue"] = tissue_fraction
        looks |= {f"intensity {number}": value for number, value in enumerate(values)}
    return looks


def differences(cohort: CohortLooks | None, looks: Mapping[str, float], robust: bool = False) -> tuple[str, ...]:
    """Describe how a volume, with the properties of `looks_of`, differs from a run's training volumes, a line each.

    Old records have no ranges, which gives no lines. Unless the run is `robust` already, trained with strong
    augmentation, the line about other intensities suggests it.
    """
    return tuple(_differences(cohort.ranges, looks, robust)) if cohort else ()


def _differences(ranges: Mapping[str, tuple[float, float]], looks: Mapping[str, float], robust: bool) -> Iterator[str]:
    if looks["air"] < _LIKE_CT <= ranges.get("air", (0.0, 0.0))[0]:
        yield "its air is as dark as in CT, unlike training volumes"
    for name in (f"{what} {side}" for what in ("voxel", "extent") for side in _SIDES):
        low, high = ranges.get(name, (0.0, np.inf))
        if not low / _FACTOR <= looks[name] <= high * _FACTOR:
            what, side = name.split()
            start = "voxels measure" if what == "voxel" else "it reaches over"
            yield f"{start} {looks[name]:.3g} mm {side}, in training {low:.3g} to {high:.3g} mm"
    if looks["tilt"] > ranges.get("tilt", (0.0, np.inf))[1] + _TILTED_DEGREES:
        yield f"its grid is tilted by {looks['tilt']:.0f} degrees, in training by at most {ranges['tilt'][1]:.0f}"
    of_tissue = (name for name in looks if name == "tissue" or name.startswith("intensity"))
    if any(_beyond(ranges[name], looks[name]) > _WIDTHS for name in of_tissue if name in ranges):
        yield (
            "its tissue's intensities have another distribution than in training (another contrast, sequence, field "
            "or noise)" + ("" if robust else "; a model trained with --recipe robust depends less on them")
        )


def _beyond(within: tuple[float, float], value: float) -> float:
    """Return how far a value is outside a range, in widths of the range."""
    low, high = within
    return max(low - value, value - high) / max(high - low, _LEAST_WIDTH)
