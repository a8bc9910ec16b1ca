"""Grids of volumes, and conversion between file order and anatomical order.

World coordinates are LPS in millimetres, as in ITK and NRRD: they increase to the patient's left, back (posterior) and
head (superior).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_serializer

Triple = tuple[float, float, float]
Row = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
Numbers = tuple[FiniteFloat, FiniteFloat, FiniteFloat]

_LETTERS = ("LR", "PA", "SI")
# Of unit vectors: below this volume they lie in a plane.
_FLATTEST = 1e-3
_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
#: Largest cosine between two axes of a grid: 0.06 degrees off a right angle, for headers with three decimals. Distances
#: assume right angles; the error at a corner of a spine volume is then at most 0.3 mm.
MOST_SKEW = 1e-3
_COSINE_DIGITS = 6


class NiftiForms(BaseModel):
    """The two forms of position in a NIfTI header: the qform, a rotation, and the sform, any matrix.

    Both are in the header's RAS coordinates and in millimetres. Programs use one or the other, so both are kept and
    written back.
    """

    model_config = ConfigDict(frozen=True)

    qform_code: int
    sform_code: int
    """Reference of each form: 1 scanner, 2 another scan, 4 a template; 0 or less if the form is not set."""
    quaternion: Numbers
    """Parts b, c and d of the qform's unit quaternion."""
    qfac: FiniteFloat
    """-1 if the third axis is inverted, else 1."""
    qoffset_mm: Numbers
    """Position of the first voxel in the qform."""
    srow_mm: tuple[Row, Row, Row]
    """The sform: the first three rows of its 4 x 4 matrix."""

    def qform(self, spacing_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the qform as a matrix, (3, 4): steps to the next voxel along each axis, and the first voxel."""
        steps = rotation(np.array(self.quaternion)) * spacing_mm * (1.0, 1.0, self.qfac)
        return np.column_stack([steps, self.qoffset_mm])

    def sform(self) -> NDArray[np.float64]:
        """Return the sform as a matrix, (3, 4)."""
        return np.array(self.srow_mm)


class Geometry(BaseModel):
    """The grid of a volume: size, spacing, directions and origin.

    Attributes
    ----------
    size : tuple of int
        Voxels along each index axis (i, j, k), in the order of the file.
    spacing_mm : tuple of float
        Distance between neighbouring voxels along each index axis.
    directions : tuple of three tuples of float
        3 x 3 matrix, row-major; column c is the unit vector, in LPS, along which index axis c grows.
    origin_mm : tuple of float
        LPS position of the centre of voxel (0, 0, 0).
    nifti : NiftiForms or None
        Both forms of the source's NIfTI header, if they differ or have other codes than the scanner's. `write_volume`
        keeps them.
    """

    model_config = ConfigDict(frozen=True)

    size: tuple[int, int, int]
    spacing_mm: Triple
    directions: tuple[Triple, Triple, Triple]
    origin_mm: Triple
    nifti: NiftiForms | None = None

    @model_serializer(mode="wrap")
    def _without_absent_forms(self, handler: Callable[[Geometry], dict[str, Any]]) -> dict[str, Any]:
        content = handler(self)
        return content if self.nifti else {name: value for name, value in content.items() if name != "nifti"}

    @property
    def direction_matrix(self) -> NDArray[np.float64]:
        """The directions as an array, (3, 3)."""
        return np.array(self.directions, dtype=np.float64)

    @property
    def orientation_code(self) -> str:
        """Three letters for the directions in which the index axes increase, such as ``LPS`` or ``PIR``."""
        axes, flips = _nearest_axes(self.direction_matrix)
        letters = [""] * 3
        for anatomical, (index_axis, flipped) in enumerate(zip(axes, flips, strict=True)):
            letters[index_axis] = _LETTERS[anatomical][int(flipped)]
        return "".join(letters)

    def same_grid(self, other: Geometry, tolerance_mm: float = 0.05) -> bool:
        """Whether both grids have the same size and every corner within a tolerance of the other's.

        Parameters
        ----------
        other : Geometry
            The grid to compare with.
        tolerance_mm : float
            Largest distance of corresponding corners. Formats round their headers differently.
        """
        if self.size != other.size:
            return False
        return bool(np.abs(self._corners_mm() - other._corners_mm()).max() <= tolerance_mm)

    def same_place(self, other: Geometry) -> bool:
        """Return whether the grids are the same in any form of their NIfTI headers."""
        return any(ours.same_grid(theirs) for ours in self.places() for theirs in other.places())

    def places(self) -> tuple[Geometry, ...]:
        """Return this grid and the grids of both forms of its NIfTI header."""
        if self.nifti is None:
            return (self,)
        forms = (
            (self.nifti.qform_code, self.nifti.qform(np.array(self.spacing_mm))),
            (self.nifti.sform_code, self.nifti.sform()),
        )
        return (
            self,
            *(by_affine(self.size, matrix) for code, matrix in forms if code > 0 and _spans_space(matrix)),
        )

    def _corners_mm(self) -> NDArray[np.float64]:
        last = np.array(self.size) - 1
        corners = np.array([[0, 0, 0], [last[0], 0, 0], [0, last[1], 0], [0, 0, last[2]], last])
        return self.positions_mm(corners)

    def positions_mm(self, indices: NDArray[Any]) -> NDArray[np.float64]:
        """World positions, (n, 3) LPS millimetres, of index positions (n, 3)."""
        steps = self.direction_matrix * np.array(self.spacing_mm)
        return np.asarray(np.array(self.origin_mm) + np.asarray(indices, dtype=np.float64) @ steps.T)


@dataclass(frozen=True)
class Orientation:
    """Conversion of an array from file order to anatomical order (x: left, y: back, z: head), and back.

    Attributes
    ----------
    axes : tuple of int
        ``axes[a]`` is the file's index axis that runs along anatomical axis ``a``.
    flips : tuple of bool
        Whether anatomical axis ``a`` is opposite to its index axis.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def of(cls, geometry: Geometry) -> Orientation:
        """Return the orientation that brings a grid nearest to anatomical order.

        An oblique grid is not resampled: each index axis is assigned to the nearest anatomical axis, the largest
        direction cosine first, as in ITK.
        """
        return cls(*_nearest_axes(geometry.direction_matrix))

    def to_anatomical(self, array_ijk: NDArray[Any]) -> NDArray[Any]:
        """View an array (i, j, k) of the file's order in anatomical order (x, y, z); no copy."""
        return np.transpose(array_ijk, self.axes)[self._slices()]

    def to_file(self, array_xyz: NDArray[Any]) -> NDArray[Any]:
        """View an array (x, y, z) in the file's own order (i, j, k); no copy."""
        return np.transpose(array_xyz[self._slices()], np.argsort(self.axes))

    def geometry_xyz(self, geometry: Geometry) -> Geometry:
        """Return the grid of the array returned by `to_anatomical`."""
        return _turned(geometry, self.axes, tuple(self.flips[self.axes.index(i)] for i in range(3)))

    def geometry_in_file(self, geometry_xyz: Geometry) -> Geometry:
        """Return the grid of the array returned by `to_file`."""
        return _turned(geometry_xyz, tuple(self.axes.index(i) for i in range(3)), self.flips)

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)


def _turned(geometry: Geometry, axes: tuple[int, ...], flips: tuple[bool, ...]) -> Geometry:
    """Return a grid with some index axes flipped, then reordered."""
    flipped = np.array(flips)
    first_voxel = np.where(flipped, np.array(geometry.size) - 1, 0)
    directions = geometry.direction_matrix * np.where(flipped, -1, 1)
    return Geometry(
        size=tuple(geometry.size[a] for a in axes),
        spacing_mm=tuple(geometry.spacing_mm[a] for a in axes),
        directions=as_rows(directions[:, list(axes)]),
        origin_mm=tuple(geometry.positions_mm(first_voxel[None])[0].tolist()),
    )


def as_seen(slice_ab: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a view of a slice in radiological orientation.

    Sagittal: head up, anterior left. Coronal: head up, patient's right on the left. Axial, seen from the feet: anterior
    up, patient's right on the left.

    Parameters
    ----------
    slice_ab : ndarray
        Slice along axis 0 (y, z), 1 (x, z) or 2 (x, y); x grows to the patient's left, y to the back, z to the head.
    axis : int
        Axis of the slice.
    """
    return slice_ab.T if axis == 2 else slice_ab.T[::-1]


def rotation(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation matrix, (3, 3), of a unit quaternion with parts b, c and d."""
    squares = float(quaternion @ quaternion)
    # Rounding may give slightly more than one.
    b, c, d = quaternion / max(1.0, squares**0.5)
    a = max(0.0, 1.0 - squares) ** 0.5
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def by_affine(size: tuple[int, int, int], matrix_ras: NDArray[np.float64]) -> Geometry:
    """Return the grid of a NIfTI affine: (3, 4), in RAS and millimetres, without zero columns."""
    matrix = matrix_ras * _RAS_TO_LPS[:, None]
    lengths = np.linalg.norm(matrix[:, :3], axis=0)
    first, second, third = lengths.tolist()
    return Geometry(
        size=size,
        spacing_mm=(first, second, third),
        directions=as_rows(matrix[:, :3] / lengths),
        origin_mm=tuple(matrix[:, 3].tolist()),
    )


def _spans_space(matrix: NDArray[np.float64]) -> bool:
    """Tell whether the columns of an affine are three independent directions."""
    lengths = np.linalg.norm(matrix[:, :3], axis=0)
    return bool(lengths.all() and abs(np.linalg.det(matrix[:, :3] / lengths)) > _FLATTEST)


def skew(axes: NDArray[Any]) -> float:
    """Return the largest cosine between two columns of a 3 x 3 array; NaN if they are no axes."""
    with np.errstate(all="ignore"):
        unit = axes / np.linalg.norm(axes, axis=0)
        return float(np.abs(unit.T @ unit - np.eye(3)).max())


def as_rows(matrix: NDArray[Any]) -> tuple[Triple, Triple, Triple]:
    """Return a 3 x 3 array as nested tuples, for `Geometry`."""
    first, second, third = (tuple(float(value) for value in row) for row in matrix)
    return first, second, third  # type: ignore[return-value]


def _nearest_axes(
    directions: NDArray[np.float64],
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    # Each file format rounds directions differently, and all must choose alike at 45 degrees.
    cosines = np.abs(directions).round(_COSINE_DIGITS)
    axes, flips = [0, 0, 0], [False, False, False]
    for _ in range(3):
        # The last of equal cosines, as in ITK.
        anatomical, index_axis = divmod(8 - int(np.argmax(cosines.ravel()[::-1])), 3)
        axes[anatomical] = index_axis
        flips[anatomical] = bool(directions[anatomical, index_axis] < 0)
        cosines[anatomical, :] = -1
        cosines[:, index_axis] = -1
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])
