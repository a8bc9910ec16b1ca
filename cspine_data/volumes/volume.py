"""A volume in memory: voxels and geometry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cspine_data.volumes.geometry import Geometry
from cspine_data.volumes.segments import Overlap, Segment


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image or label map in its file's index order, with its geometry.

    Attributes
    ----------
    array : ndarray
        Voxels, (i, j, k), in the file's dtype.
    geometry : Geometry
        The grid of `array`.
    path : Path or None
        The source file.
    assumed_orientation : bool
        True if the file does not define its orientation, so that LPS was assumed.
    notes : tuple of str
        Notes for the user on a usable file, one sentence each, without the file name.
    intensity_step : float
        Distance between neighbouring intensities if the file scales integers, such as by NIfTI's slope; else 0.
    usable : bool
        True after `usable_image` has checked it.
    segments : tuple of Segment
        The named structures of a label map.
    overlaps : tuple of Overlap
        Segments with common voxels; in `array` such a voxel has the value of the last one.
    layers : ndarray or None
        The layers of a file of overlapping segments, (layers, i, j, k).
    """

    array: NDArray[Any]
    geometry: Geometry
    path: Path | None = None
    assumed_orientation: bool = False
    notes: tuple[str, ...] = ()
    intensity_step: float = 0.0
    usable: bool = False
    segments: tuple[Segment, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    layers: NDArray[Any] | None = None

    @property
    def name(self) -> str:
        """Name of the volume in messages."""
        return str(self.path) if self.path else "volume"
