from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspine_data import BiasParameters, InputError, Preprocessing, Volume, preprocess_volume
from cspine_data.geometry import Orientation
from cspine_data.intensity import Normalisation, tissue_zscore
from tests.conftest import ball

N4 = Preprocessing(bias=BiasParameters(resolution_mm=3, iterations=(5, 5)))


@given(st.floats(-1e4, 1e4), st.floats(1e-2, 1e4))
def test_a_normalisation_is_undone_by_its_statistics(mean: float, std: float) -> None:
    image = np.linspace(mean - 3 * std, mean + 3 * std, 50).astype(np.float32)
    normalisation = Normalisation(mean=mean, std=std)
    np.testing.assert_allclose(normalisation.undo(normalisation.apply(image)), image, atol=1e-5 * (abs(mean) + 3 * std))


def test_zscore_is_over_the_tissue_only() -> None:
    image = np.array([0.0, 0.0, 10.0, 14.0])
    found = tissue_zscore(image, image > 5, "x")
    assert (found.mean, found.std) == (12.0, 2.0)
    with pytest.raises(InputError, match="x: has no contrast within its tissue"):
        tissue_zscore(image, image < 5, "x")
    with pytest.raises(InputError, match="no contrast"):
        tissue_zscore(image, image > 99, "x")


def test_raw_keeps_the_sources_values_and_n4_makes_floats() -> None:
    image, _ = ball()
    raw = preprocess_volume(image, Preprocessing(bias=None))
    assert raw.image_xyz.dtype == np.int16
    np.testing.assert_array_equal(raw.image_xyz, image.array)
    assert raw.log_bias_deviation == 0
    n4 = preprocess_volume(image, N4)
    assert n4.image_xyz.dtype == np.float32
    assert n4.log_bias_deviation > 0
    assert (Preprocessing(bias=None).variant, N4.variant) == ("raw", "n4")


def test_ct_is_not_corrected_as_if_it_were_mri() -> None:
    image, _ = ball()
    ct = Volume(array=(image.array.astype(np.int16) - 1024), geometry=image.geometry, path=Path("ct.nrrd"))
    with pytest.raises(InputError, match=r"ct\.nrrd: is dark as CT .* prepare it with --no-n4"):
        preprocess_volume(ct, N4)
    assert preprocess_volume(ct, Preprocessing(bias=None)).image_xyz.min() < -900


def test_what_is_air_and_what_is_tissue_is_recorded() -> None:
    image, _ = ball()
    for parameters in (Preprocessing(bias=None), N4):
        done = preprocess_volume(image, parameters)
        assert 0 <= done.air_level < 20
        assert done.air_level < done.tissue_threshold < 300
        assert done.tissue_fraction == pytest.approx((done.image_xyz > done.tissue_threshold).mean(), abs=1e-6)


def test_tissue_has_mean_zero_and_deviation_one() -> None:
    image, _ = ball()
    done = preprocess_volume(image, Preprocessing(bias=None))
    tissue = image.array > done.tissue_threshold
    normalised = done.normalised_xyz()[tissue]
    assert normalised.dtype == np.float32
    assert abs(normalised.mean()) < 1e-4
    assert abs(normalised.std() - 1) < 1e-4
    assert done.tissue_fraction == tissue.mean()


@pytest.mark.parametrize("preprocessing", [Preprocessing(bias=None), N4])
@pytest.mark.parametrize(
    "order", [Orientation((2, 0, 1), (True, False, True)), Orientation((1, 2, 0), (False, True, False))]
)
def test_the_order_a_file_stores_changes_nothing(preprocessing: Preprocessing, order: Orientation) -> None:
    image, _ = ball()
    stored = Volume(np.ascontiguousarray(order.to_file(image.array)), order.geometry_in_file(image.geometry))
    first, second = preprocess_volume(image, preprocessing), preprocess_volume(stored, preprocessing)
    np.testing.assert_array_equal(first.image_xyz, second.image_xyz)
    assert first.normalisation == second.normalisation
    assert second.spacing_mm == (1.5, 1.0, 1.0)
    back = second.to_file_grid(second.image_xyz > 100)
    np.testing.assert_array_equal(back.array, order.to_file(second.image_xyz > 100))
    assert back.geometry == stored.geometry
