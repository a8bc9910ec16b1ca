"""Images with NaN, or of a size that no patient has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from cspine_data import (
    InputError,
    Preprocessing,
    Volume,
    open_cohort,
    prepare,
    preprocess_volume,
    usable_image,
    write_volume,
)
from tests.conftest import QUICK_N4, ball, geometry


def with_nan(where: Callable[[np.ndarray], np.ndarray]) -> Volume:
    """A ball in floats, with NaN where a function of voxel indices (i, j, k) says so."""
    image, _ = ball()
    array = image.array.astype(np.float32)
    array[where(np.indices(array.shape))] = np.nan
    return Volume(array, image.geometry, Path("x.nii"))


def margin(at: np.ndarray) -> np.ndarray:
    return at[0] < 3


def corners(at: np.ndarray) -> np.ndarray:
    """Outside a field of view that lies askew in the volume."""
    return np.abs(at[1] - at[2] * 0.3 - 7) > 12


@pytest.mark.parametrize("where", [margin, corners, lambda at: margin(at) | corners(at)])
def test_nan_outside_the_field_of_view_is_air(where) -> None:
    image = with_nan(where)
    found = usable_image(image)
    missing = np.isnan(image.array)
    assert missing.any()
    np.testing.assert_array_equal(found.array[~missing], image.array[~missing])
    assert found.array.dtype == np.float32
    assert found.array[missing].max() < 20
    (note,) = found.notes
    assert f"{np.count_nonzero(missing)} voxels" in note
    assert "NaN" in note
    assert usable_image(found) is found
    corrected = preprocess_volume(image, QUICK_N4).corrected
    assert corrected.image_xyz[missing].max() <= corrected.tissue_threshold


@pytest.mark.parametrize(
    "where",
    [
        lambda at: (at[0] == 8) & (at[1] == 10) & (at[2] == 12),
        # One voxel is damage, wherever it lies.
        lambda at: at.sum(0) == 0,
        # A slice that was lost reaches the border too.
        lambda at: at[0] == 8,
        lambda at: (at[2] > 5) & (at[2] < 9),
        lambda at: at[0] >= 0,
    ],
)
def test_nan_within_the_field_of_view_is_refused(where) -> None:
    with pytest.raises(InputError, match="NaN or infinite within"):
        usable_image(with_nan(where))


def test_infinity_is_refused_wherever_it_is() -> None:
    image, _ = ball()
    array = image.array.astype(np.float32)
    array[0] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        usable_image(Volume(array, image.geometry))


def test_a_case_with_nan_is_scanned_and_prepared_with_a_note(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    image, label = with_nan(margin), ball()[1]
    write_volume(tmp_path / "raw" / "A.nii.gz", image)
    # A label map that was resampled with its image misses the same voxels.
    unlabelled = np.where(np.isnan(image.array), np.nan, label.array.astype(np.float32))
    write_volume(tmp_path / "raw" / "A-label.nii.gz", Volume(unlabelled, label.geometry))
    scanned = run_data("scan", tmp_path / "raw")
    assert scanned.exit_code == 0
    assert "note: A: 1440 voxels" in scanned.stderr
    assert "label map: NaN" in scanned.stderr
    summary = prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False)
    assert summary.done == ("A",)
    assert len(summary.notes["A"]) == 2
    cohort = open_cohort(tmp_path / "s.zarr")
    assert cohort.record("A").notes == summary.notes["A"]
    assert np.isfinite(cohort.export("A").array).all()
    np.testing.assert_array_equal(cohort.export("A", label=True).array, np.where(np.isnan(unlabelled), 0, unlabelled))


@pytest.mark.parametrize("millimetres", [0.02, 0.05])
def test_an_image_smaller_than_a_vertebra_is_prepared_with_a_note(millimetres: float) -> None:
    image = Volume(ball()[0].array, geometry((16, 20, 24), (millimetres,) * 3))
    (note,) = usable_image(image).notes
    assert "unit of length" in note
    prepared = preprocess_volume(image, Preprocessing())
    assert np.isfinite(prepared.normalised_xyz()).all()


def test_an_image_longer_than_a_patient_is_refused() -> None:
    image = Volume(np.arange(600, dtype=np.int16).reshape(100, 3, 2), geometry((100, 3, 2), (80.0, 1.0, 1.0)))
    with pytest.raises(InputError, match=r"8e\+03 x.*xyzt_units"):
        usable_image(image)


def test_resampling_is_bounded_along_each_axis() -> None:
    image = Volume(np.arange(80, dtype=np.int16).reshape(20, 2, 2), geometry((20, 2, 2), (100.0, 0.05, 0.05)))
    with pytest.raises(InputError, match="5 x 5 voxels"):
        preprocess_volume(image, Preprocessing(bias=None, spacing_mm=(0.02, 0.02, 0.02)))
