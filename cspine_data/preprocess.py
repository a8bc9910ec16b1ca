"""One volume, from its file's order to what a network sees: anatomical order, bias field corrected, normalised.

The same function of the same recorded parameters makes the store and prepares a volume for prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cspine_data.bias import BiasParameters, correct, estimate_bias
from cspine_data.errors import InputError
from cspine_data.geometry import Geometry, Orientation
from cspine_data.intensity import Normalisation, tissue_zscore
from cspine_data.tissue import air_level, looks_like_ct, tissue_threshold
from cspine_data.volumes import Volume, check_image


class Preprocessing(BaseModel):
    """What is done to every volume of a variant; each parameter is part of a case's digest.

    Attributes
    ----------
    bias : BiasParameters or None
        How the bias field is estimated; None leaves it in (the variant ``raw``).
    normalisation : str
        ``zscore`` over the tissue.
    """

    model_config = ConfigDict(frozen=True)

    bias: BiasParameters | None = BiasParameters()
    normalisation: str = "zscore"

    @property
    def variant(self) -> str:
        """The name under which the result is kept: ``n4`` or ``raw``."""
        return "raw" if self.bias is None else "n4"


@dataclass(frozen=True, eq=False)
class CorrectedVolume:
    """A volume in anatomical order, its bias field corrected, and how to normalise it.

    Attributes
    ----------
    image_xyz : ndarray
        Intensities in the file's units, (x, y, z): float32 where the bias field was corrected, else as in the file.
    geometry : Geometry
        The grid of the file it came from.
    normalisation : Normalisation
        Brings `image_xyz` to the scale that networks are trained on.
    air_level : float
        Intensity of air; 0 where there is none.
    tissue_threshold : float
        Intensity of `image_xyz` above which a voxel counted as tissue.
    tissue_fraction : float
        Share of the voxels that counted as tissue.
    log_bias_deviation : float
        Standard deviation, over the tissue, of the logarithm of the field; 0 where none was estimated.
    """

    image_xyz: NDArray[Any]
    geometry: Geometry
    normalisation: Normalisation
    air_level: float
    tissue_threshold: float
    tissue_fraction: float
    log_bias_deviation: float

    def normalised_xyz(self) -> NDArray[np.float32]:
        """Return what a network sees: float32, (x, y, z), tissue of mean 0 and deviation 1."""
        return self.normalisation.apply(self.image_xyz)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing along x, y and z."""
        return Orientation.of(self.geometry).geometry_xyz(self.geometry).spacing_mm

    def to_file_grid(self, array_xyz: NDArray[Any]) -> Volume:
        """Return an array (x, y, z), a predicted label map for example, as a volume on the file's own grid."""
        array = np.ascontiguousarray(Orientation.of(self.geometry).to_file(array_xyz))
        return Volume(array=array, geometry=self.geometry)


def preprocess_volume(volume: Volume, parameters: Preprocessing) -> CorrectedVolume:
    """Turn a volume to anatomical order, correct its bias field and find its normalisation.

    Parameters
    ----------
    volume : Volume
        As `read_volume` gives it. No label map is needed, by design.
    parameters : Preprocessing
        What to do.

    Raises
    ------
    InputError
        If the image holds NaN or infinity, or is constant, or its tissue holds no contrast; if it is to be corrected
        and is CT.
    """
    check_image(volume)
    if parameters.bias is not None and looks_like_ct(volume.array):
        raise InputError(
            volume.name,
            "is dark as CT is dark (air near -1000), and N4 corrects MRI",
            "leave it out, or prepare it with --no-n4",
        )
    geometry = volume.geometry
    orientation = Orientation.of(geometry)
    image = np.ascontiguousarray(orientation.to_anatomical(volume.array))
    spacing_mm = orientation.geometry_xyz(geometry).spacing_mm
    if parameters.bias is None:
        threshold, deviation = tissue_threshold(image, spacing_mm), 0.0
        tissue = image > threshold
        air = air_level(image, threshold)
    else:
        bias = estimate_bias(image, spacing_mm, parameters.bias)
        tissue, threshold, air = bias.tissue_xyz, bias.tissue_threshold, bias.air_level
        deviation = float(bias.log_bias_xyz[tissue].std(dtype=np.float64)) if tissue.any() else 0.0
        image = correct(image, bias.log_bias_xyz, air)
    return CorrectedVolume(
        image_xyz=image,
        geometry=geometry,
        normalisation=tissue_zscore(image, tissue, volume.name),
        air_level=air,
        tissue_threshold=threshold,
        tissue_fraction=float(tissue.mean()),
        log_bias_deviation=deviation,
    )
