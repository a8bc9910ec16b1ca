"""The two forms of position in a NIfTI header: the qform, a rotation, and the sform, any matrix.

Programs use one or the other, so both are kept and written back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat

Row = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
Numbers = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class NiftiForms(BaseModel):
    """Both forms of a header, in its own RAS coordinates and in millimetres.

    Attributes
    ----------
    qform_code, sform_code : int
        Reference of each form: 1 scanner, 2 another scan, 4 a template; 0 or less if the form is not set.
    quaternion : tuple of float
        Parts b, c and d of the qform's unit quaternion.
    qfac : float
        -1 if the third axis is inverted, else 1.
    qoffset_mm : tuple of float
        Position of the first voxel in the qform.
    srow_mm : tuple of three tuples of float
        The sform: the first three rows of its 4 x 4 matrix.
    """

    model_config = ConfigDict(frozen=True)

    qform_code: int
    sform_code: int
    quaternion: Numbers
    qfac: FiniteFloat
    qoffset_mm: Numbers
    srow_mm: tuple[Row, Row, Row]

    def qform(self, spacing_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the qform as a matrix, (3, 4): steps to the next voxel along each axis, and the first voxel."""
        steps = rotation(np.array(self.quaternion)) * spacing_mm * (1.0, 1.0, self.qfac)
        return np.column_stack([steps, self.qoffset_mm])

    def sform(self) -> NDArray[np.float64]:
        """Return the sform as a matrix, (3, 4)."""
        return np.array(self.srow_mm)


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
