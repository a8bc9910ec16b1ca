"""Zarr attributes for other programs: OME-Zarr 0.5, CF conventions, position of the slices."""

from __future__ import annotations

from typing import Any

import numpy as np

from cspine_data.preprocessing.normalisation import Levels
from cspine_data.store.schema import AXES_XYZ, CaseRecord
from cspine_data.volumes.geometry import Orientation, Triple


def slice_grid(record: CaseRecord) -> dict[str, Any]:
    """Return the grid of a case's slices: x, y, z in mm, LPS."""
    grid = Orientation.of(record.geometry).geometry_xyz(record.geometry)
    centre = (np.array(grid.size) - 1) / 2
    steps = np.array(record.sliced_spacing_xyz_mm) / np.array(grid.spacing_mm)
    first = centre - (np.array(record.sliced_size_xyz) - 1) / 2 * steps
    return {
        "spacing_xyz_mm": list(record.sliced_spacing_xyz_mm),
        "origin_xyz_mm": grid.positions_mm(first[None])[0].tolist(),
        "directions_xyz": [list(row) for row in grid.directions],
    }


def level_attributes(levels: Levels) -> dict[str, Any]:
    """Return the scale of an array's integers (CF conventions)."""
    return {"scale_factor": levels.scale, "add_offset": 0.0}


def image_metadata(spacing_mm: Triple, origin_mm: Triple) -> dict[str, Any]:
    """Return OME-Zarr 0.5 attributes of an image or label map with a single resolution, the array ``0``."""
    return {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": name, "type": "space", "unit": "millimeter"} for name in AXES_XYZ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": list(spacing_mm)},
                            {"type": "translation", "translation": list(origin_mm)},
                        ],
                    }
                ],
            }
        ],
    }


def averaged_metadata(spacing_mm: Triple, origin_mm: Triple, factors: tuple[int, int, int]) -> dict[str, Any]:
    """Return OME-Zarr attributes of an image that averages blocks of voxels of another."""
    x, y, z = ((mm * n, first + (n - 1) / 2 * mm) for mm, first, n in zip(spacing_mm, origin_mm, factors, strict=True))
    return image_metadata((x[0], y[0], z[0]), (x[1], y[1], z[1]))
