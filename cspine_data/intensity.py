"""Bringing intensities of different scanners to one scale, with the statistics that undo or repeat it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cspine_data.errors import InputError


class Normalisation(BaseModel):
    """A z-score and the statistics it was made with.

    Attributes
    ----------
    method : str
        ``zscore``: subtract the mean of the tissue, divide by its standard deviation.
    mean, std : float
        Of the tissue voxels, in the units of the image.
    """

    model_config = ConfigDict(frozen=True)

    method: Literal["zscore"] = "zscore"
    mean: float
    std: float

    def apply(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Normalise an image of any shape; float32."""
        scale = np.float32(1 / self.std)
        return np.asarray((image.astype(np.float32) - np.float32(self.mean)) * scale)

    def undo(self, normalised: NDArray[Any]) -> NDArray[np.float32]:
        """Give an image its own units back; float32."""
        return np.asarray(normalised * np.float32(self.std) + np.float32(self.mean), dtype=np.float32)


def tissue_zscore(image: NDArray[Any], tissue: NDArray[np.bool_], name: str) -> Normalisation:
    """Return the z-score of an image over its tissue.

    Parameters
    ----------
    image : ndarray
        Intensities.
    tissue : ndarray of bool
        Which voxels are tissue, same shape; needs no label map.
    name : str
        What to call the image in an error.

    Raises
    ------
    InputError
        If the tissue holds no contrast to scale by.
    """
    values = image[tissue]
    if values.size == 0 or not (std := float(values.std(dtype=np.float64))) > 0:
        raise InputError(name, "has no contrast within its tissue", "is it a mask or a label map? leave it out")
    return Normalisation(mean=float(values.mean(dtype=np.float64)), std=std)
