"""Preprocessing of one volume: anatomical order, bias field correction, resampling, normalisation.

The same functions with the same recorded parameters are used for the store and for prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError
from cspine_data.preprocessing.bias_field import estimate_bias, field_factors
from cspine_data.preprocessing.normalisation import Levels, Normalisation, TissueStatistics, normalisation_of
from cspine_data.preprocessing.parameters import BiasParameters, Preprocessing
from cspine_data.preprocessing.resampling import resample_image, resample_label, resampled_size
from cspine_data.preprocessing.threads import one_blas_thread
from cspine_data.preprocessing.tissue import air_level, average_down, looks_like_ct, tissue_threshold
from cspine_data.volumes.geometry import Geometry, Orientation, Triple
from cspine_data.volumes.image_checks import usable_image
from cspine_data.volumes.volume import Volume

# About 4 GB per worker, at 14 to 20 bytes per voxel: a mistyped spacing must not exhaust memory.
_MOST_VOXELS = 2**28
# Resampling needs a matrix of old by new voxels for each axis.
_MOST_ALONG_AXIS = 2**13
_SHOWN_PERCENTILES = (2, 10, 25, 50, 75, 90, 98)
# Limits of plausible estimates: the log field of real scans has a standard deviation of 0.2 to 1.0, that of a simulated
# coil with a range of 25 mm 1.2; see docs/bias-field.md.
_LARGEST_LOG_DEVIATION = 1.5
_LEAST_TISSUE_FRACTION = 0.03
_LARGEST_NOISE_SHARE = 0.25
# With fewer voxels nothing is visible; the unit is probably wrong.
_FEWEST_ALONG_AXIS = 4


@dataclass(frozen=True, eq=False)
class CorrectedVolume:
    """A volume in anatomical order, after bias field correction."""

    image_xyz: NDArray[Any]
    """Intensities in the file's units, (x, y, z): float32 after correction, else as in the file."""
    geometry: Geometry
    """Grid of the source file."""
    air_level: float
    """Intensity of air; 0 without air."""
    tissue_threshold: float
    """Intensity of `image_xyz` above which a voxel is tissue."""
    tissue: TissueStatistics
    """Intensity statistics of tissue."""
    log_bias_deviation: float = 0.0
    """Standard deviation of the log field over tissue; 0 without an estimate."""
    noise_ratio: float = 0.0
    noise_share: float = 0.0
    """See `BiasEstimate`; 0 without an estimate."""
    log_bias_xyz: NDArray[np.float32] | None = None
    """Natural logarithm of the field, (x, y, z), averaged to voxels of about 8 mm; None without an estimate."""
    name: str = "volume"
    """Name in messages."""

    @property
    def spacing_mm(self) -> Triple:
        """Voxel spacing along x, y and z."""
        return self.geometry_xyz.spacing_mm

    @property
    def geometry_xyz(self) -> Geometry:
        """The grid of `image_xyz`."""
        return Orientation.of(self.geometry).geometry_xyz(self.geometry)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warnings about an implausible bias field."""
        return doubts(self.log_bias_deviation, self.tissue.fraction, self.noise_share)


def doubts(log_bias_deviation: float, tissue_fraction: float, noise_share: float) -> tuple[str, ...]:
    """Return warnings about an implausible bias field; see `CorrectedVolume`."""
    found = []
    if log_bias_deviation > _LARGEST_LOG_DEVIATION:
        found.append(f"its bias field varies implausibly (log deviation {log_bias_deviation:.2f})")
    if tissue_fraction < _LEAST_TISSUE_FRACTION:
        found.append(f"only {tissue_fraction:.1%} of it was found to be tissue")
    if noise_share > _LARGEST_NOISE_SHARE:
        found.append(f"{noise_share:.0%} of what would be tissue is no brighter than the noise; is the coil far away?")
    return tuple(f"{one}: look at the corrected volume (cspine-data export)" for one in found)


@dataclass(frozen=True, eq=False)
class PreparedVolume:
    """A volume as input of a network, with the mapping back to the grid of its source.

    Attributes
    ----------
    corrected : CorrectedVolume
        The corrected volume.
    normalisation : Normalisation
        The intensity normalisation.
    spacing_mm : tuple of float
        Voxel spacing of the network's input along x, y and z.
    levels_xyz : ndarray of int16
        The network's input as 16-bit integers, (x, y, z), as in the store's slices.
    levels : Levels
        Scale of these integers.
    """

    corrected: CorrectedVolume
    normalisation: Normalisation
    spacing_mm: Triple
    levels_xyz: NDArray[np.int16]
    levels: Levels

    @property
    def tissue_percentiles(self) -> tuple[float, ...]:
        """Percentiles 2, 10, 25, 50, 75, 90 and 98 of tissue, in standard deviations from the mean.

        They do not depend on the normalisation, since after histogram matching all volumes would be equal. Empty
        without tissue.
        """
        tissue = self.corrected.tissue
        if not tissue.deviation:
            return ()
        at = (np.array(tissue.at(_SHOWN_PERCENTILES)) - tissue.mean) / tissue.deviation
        return tuple(round(float(value), 4) for value in at)

    def normalised_xyz(self) -> NDArray[np.float32]:
        """Return the network's input: float32, (x, y, z), exactly as in the store's slices."""
        return self.levels.decode(self.levels_xyz)

    def without_intensities(self) -> PreparedVolume:
        """Return a copy without the source's intensities, which are not needed for prediction."""
        # Same shape, without memory.
        nothing = np.broadcast_to(np.float32(0), self.corrected.image_xyz.shape)
        return replace(self, corrected=replace(self.corrected, image_xyz=nothing))

    def label_on_network_grid(self, label_xyz: NDArray[Any]) -> NDArray[Any]:
        """Resample a label map from the source's grid to the network's grid, (x, y, z), without new values."""
        return resample_label(label_xyz, self.corrected.spacing_mm, self.levels_xyz.shape, self.spacing_mm)

    def to_source_grid(self, values_xyz: NDArray[np.float32]) -> NDArray[np.float32]:
        """Resample an array, such as probabilities, from the network's grid to the source's grid, (x, y, z)."""
        size = self.corrected.image_xyz.shape
        return resample_image(values_xyz, self.spacing_mm, size, self.corrected.spacing_mm, order=1)

    def to_file_grid(self, array_xyz: NDArray[Any]) -> Volume:
        """Return an array on the source's grid, (x, y, z), as a volume in the file's order."""
        geometry = self.corrected.geometry
        return Volume(array=np.ascontiguousarray(Orientation.of(geometry).to_file(array_xyz)), geometry=geometry)


def preprocess_volume(volume: Volume, parameters: Preprocessing) -> PreparedVolume:
    """Convert a volume to anatomical order, correct its bias field, resample and normalise it.

    Parameters
    ----------
    volume : Volume
        From `read_volume`. No label map is needed.
    parameters : Preprocessing
        The parameters.

    Raises
    ------
    InputError
        If the image is not usable (see `usable_image`), its tissue has no contrast, or it is CT and should be
        corrected.
    """
    return normalise_volume(correct_volume(volume, parameters.bias), parameters)


def correct_volume(volume: Volume, bias: BiasParameters | None) -> CorrectedVolume:
    """Convert a volume to anatomical order and correct its bias field: first half of `preprocess_volume`."""
    volume = usable_image(volume)
    if bias is not None and looks_like_ct(volume.array):
        raise InputError(
            volume.name,
            "is dark as CT is dark (air near -1000), and N4 corrects MRI",
            "leave it out, or prepare it with --no-n4",
        )
    geometry = volume.geometry
    orientation = Orientation.of(geometry)
    image = np.ascontiguousarray(orientation.to_anatomical(volume.array))
    spacing_mm = orientation.geometry_xyz(geometry).spacing_mm
    if bias is None:
        threshold = tissue_threshold(image, spacing_mm)
        tissue = TissueStatistics.of(image, image > threshold)
        return CorrectedVolume(image, geometry, air_level(image, threshold), threshold, tissue, name=volume.name)
    with one_blas_thread():
        found = estimate_bias(image, spacing_mm, bias)
    in_tissue = found.log_bias_xyz[found.tissue_xyz]
    image = found.corrected_xyz
    return CorrectedVolume(
        image_xyz=image,
        geometry=geometry,
        air_level=found.air_level,
        tissue_threshold=found.tissue_threshold,
        tissue=TissueStatistics.of(image, found.tissue_xyz),
        log_bias_deviation=float(in_tissue.std(dtype=np.float64)) if in_tissue.size else 0.0,
        noise_ratio=found.noise_ratio,
        noise_share=found.noise_share,
        log_bias_xyz=average_down(found.log_bias_xyz, field_factors(image.shape, spacing_mm)),
        name=volume.name,
    )


def normalise_volume(
    corrected: CorrectedVolume, parameters: Preprocessing, normalisation: Normalisation | None = None
) -> PreparedVolume:
    """Resample and normalise a corrected volume: second half of `preprocess_volume`.

    The statistics are computed before resampling, so that they do not depend on the spacing. A given normalisation,
    such as from a record, is used instead.
    """
    image = corrected.image_xyz
    if normalisation is None:
        method, standard = parameters.normalisation, parameters.standard
        normalisation = normalisation_of(corrected.tissue, method, standard, corrected.name)
    spacing_mm = corrected.spacing_mm
    if parameters.spacing_mm is not None:
        size = resampled_size(image.shape, spacing_mm, parameters.spacing_mm)
        of_size = f"would be {' x '.join(map(str, size))} voxels at that spacing"
        if math.prod(size) > _MOST_VOXELS or max(*image.shape, *size) > _MOST_ALONG_AXIS:
            raise InputError(corrected.name, of_size, "choose a coarser --spacing")
        if any(new_n < min(n, _FEWEST_ALONG_AXIS) for n, new_n in zip(image.shape, size, strict=True)):
            raise InputError(corrected.name, of_size, "choose a finer --spacing; it is in mm")
        image = resample_image(image, spacing_mm, size, parameters.spacing_mm)
        spacing_mm = parameters.spacing_mm
    normalised = normalisation.apply(image)
    levels = Levels.spanning(normalised)
    return PreparedVolume(
        corrected=corrected,
        normalisation=normalisation,
        spacing_mm=spacing_mm,
        levels_xyz=levels.encode(normalised),
        levels=levels,
    )
