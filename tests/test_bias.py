from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cspine_data._anatomy import make_case
from cspine_data.bias import (
    BiasParameters,
    average_down,
    correct,
    estimate_log_bias,
    tissue_threshold,
    working_factors,
)


@given(st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_averaging_keeps_constants_and_block_means(size: tuple[int, int, int], factors: tuple[int, int, int]) -> None:
    assert (average_down(np.full(size, 5), factors) == 5).all()
    array = np.arange(np.prod(size), dtype=np.float32).reshape(size)
    found = average_down(array, factors)
    assert found.shape == tuple(-(-n // f) for n, f in zip(size, factors, strict=True))
    first = array[tuple(slice(0, f) for f in factors)]
    if all(f <= n for f, n in zip(factors, size, strict=True)):
        np.testing.assert_allclose(found[0, 0, 0], first.mean(), rtol=1e-5)


def test_thick_slices_are_not_averaged_away() -> None:
    assert working_factors((0.4, 0.4, 6.0), 6.0) == (15, 15, 1)
    assert working_factors((9.0, 1.0, 2.0), 4.0) == (1, 4, 2)


@pytest.mark.parametrize("air", [0, 30, 200])
def test_tissue_is_told_from_air_whatever_the_air_level(air: int) -> None:
    case = make_case(1, 0)
    body = make_case(1, 0).image_xyz * np.exp(-case.log_bias_xyz) > 60
    shifted = case.image_xyz + air
    tissue = shifted > tissue_threshold(shifted, case.spacing_mm)
    assert (tissue & body).sum() / body.sum() > 0.9
    assert (tissue & ~body).sum() / (~body).sum() < 0.2
    labelled = case.label_xyz > 0
    assert tissue[labelled].mean() > 0.9


@pytest.mark.parametrize("index", range(4))
def test_a_crop_without_air_keeps_every_voxel(index: int) -> None:
    case = make_case(1, index)
    inside = case.image_xyz[10:-10, 45:75, 20:-40]
    assert (inside > tissue_threshold(inside, case.spacing_mm)).all()


def test_exact_zeros_around_the_patient_do_not_mislead() -> None:
    case = make_case(1, 1)
    masked = np.where(case.image_xyz > 60, case.image_xyz, 0)
    tissue = masked > tissue_threshold(masked, case.spacing_mm)
    assert tissue[case.label_xyz > 0].mean() > 0.85
    assert not tissue[masked == 0].any()


def test_n4_recovers_most_of_a_known_field() -> None:
    case = make_case(0, 0)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    found = estimate_log_bias(case.image_xyz, tissue, case.spacing_mm, BiasParameters())
    before, left = case.log_bias_xyz[tissue].std(), (case.log_bias_xyz - found)[tissue].std()
    assert left < 0.5 * before
    assert abs(found[tissue].mean()) < 1e-3
    corrected = correct(case.image_xyz, found)
    # Without the rim of cortical bone, whose darkness is anatomy.
    vertebrae = ndimage.binary_erosion(case.label_xyz > 0, iterations=2)

    def variation(image: np.ndarray) -> float:
        return float(image[vertebrae].std() / image[vertebrae].mean())

    assert variation(corrected) < 0.7 * variation(case.image_xyz)


def test_the_field_does_not_depend_on_a_label_or_on_the_air() -> None:
    case = make_case(0, 1)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    quick = BiasParameters(resolution_mm=12, iterations=(5, 5))
    found = estimate_log_bias(case.image_xyz, tissue, case.spacing_mm, quick)
    other_air = np.where(tissue, case.image_xyz, 3)
    np.testing.assert_array_equal(found, estimate_log_bias(other_air, tissue, case.spacing_mm, quick))


def test_tissue_without_contrast_has_no_field() -> None:
    image = np.zeros((20, 20, 20), np.int16)
    image[5:15, 5:15, 5:15] = 100
    assert not estimate_log_bias(image, image > 0, (1, 1, 1), BiasParameters(resolution_mm=2)).any()
    assert not estimate_log_bias(image, image > 200, (1, 1, 1), BiasParameters(resolution_mm=2)).any()


def test_correcting_divides_by_the_field() -> None:
    image = np.full((2, 2, 2), 10, np.int16)
    corrected = correct(image, np.full((2, 2, 2), np.log(2), np.float32))
    assert corrected.dtype == np.float32
    np.testing.assert_allclose(corrected, 5, rtol=1e-6)
