from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cspine_data.errors import InputError
from cspine_data.preprocessing.bias_field import correct, estimate_bias, estimate_log_bias
from cspine_data.preprocessing.parameters import BiasParameters, bias_parameters
from cspine_data.preprocessing.resampling import resample_image
from cspine_data.preprocessing.tissue import average_down, tissue_threshold, working_factors
from tests.conftest import phantom


@given(st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_averaging_keeps_constants_and_block_means(size: tuple[int, int, int], factors: tuple[int, int, int]) -> None:
    assert (average_down(np.full(size, 5), factors) == 5).all()
    array = np.arange(np.prod(size), dtype=np.float32).reshape(size)
    found = average_down(array, factors)
    assert found.shape == tuple(-(-n // f) for n, f in zip(size, factors, strict=True))
    first = array[tuple(slice(0, f) for f in factors)]
    if all(f <= n for f, n in zip(factors, size, strict=True)):
        np.testing.assert_allclose(found[0, 0, 0], first.mean(), rtol=1e-5)


def test_a_block_is_never_larger_than_the_image() -> None:
    array = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    found = average_down(array, (100, 100, 100))
    assert found.shape == (1, 1, 1)
    assert found[0, 0, 0] == pytest.approx(array.mean())


@pytest.mark.parametrize("millimetres", [0.02, 0.05, 0.2])
def test_an_image_that_is_one_voxel_of_the_working_grid_has_no_field(millimetres: float) -> None:
    image = np.random.default_rng(0).integers(1, 900, (24, 20, 12)).astype(np.int16)
    found = estimate_bias(image, (millimetres,) * 3, BiasParameters())
    assert np.isfinite([found.tissue_threshold, found.air_level]).all()
    assert found.tissue_xyz.any()
    assert np.ptp(found.log_bias_xyz) == 0


def test_thick_slices_are_not_averaged_away() -> None:
    assert working_factors((0.4, 0.4, 6.0), 6.0) == (15, 15, 1)
    assert working_factors((9.0, 1.0, 2.0), 4.0) == (1, 4, 2)


@pytest.mark.parametrize("air", [0, 30, 200])
def test_tissue_is_told_from_air_whatever_the_air_level(air: int) -> None:
    case = phantom(1, 0)
    body = phantom(1, 0).image_xyz * np.exp(-case.log_bias_xyz) > 60
    shifted = case.image_xyz + air
    tissue = shifted > tissue_threshold(shifted, case.spacing_mm)
    assert (tissue & body).sum() / body.sum() > 0.9
    assert (tissue & ~body).sum() / (~body).sum() < 0.2
    labelled = case.label_xyz > 0
    assert tissue[labelled].mean() > 0.9


@pytest.mark.parametrize("index", range(4))
def test_a_crop_without_air_keeps_every_voxel(index: int) -> None:
    case = phantom(1, index)
    inside = case.image_xyz[10:-10, 45:75, 20:-40]
    assert (inside > tissue_threshold(inside, case.spacing_mm)).all()


def test_exact_zeros_around_the_patient_do_not_mislead() -> None:
    case = phantom(1, 1)
    masked = np.where(case.image_xyz > 60, case.image_xyz, 0)
    tissue = masked > tissue_threshold(masked, case.spacing_mm)
    assert tissue[case.label_xyz > 0].mean() > 0.85
    assert not tissue[masked == 0].any()


@pytest.mark.parametrize("brighter", [2, 5, 8, 15])
@pytest.mark.parametrize("index", range(3))
def test_bright_fat_beside_the_coil_does_not_hide_the_rest(index: int, brighter: float) -> None:
    """A band of tissue many times as bright, as fat beside a surface coil is."""
    case = phantom(0, index)
    image = case.image_xyz.astype(np.float32)
    tissue = image > tissue_threshold(image, case.spacing_mm)
    image[:, -12:][tissue[:, -12:]] *= brighter
    found = image > tissue_threshold(image, case.spacing_mm)
    assert found[tissue].mean() > 0.93
    assert found[~tissue].mean() < 0.2
    assert found[case.label_xyz > 0].mean() > 0.85


@pytest.mark.parametrize("noise", [0, 1e-3, 0.5])
@pytest.mark.parametrize("margin", [0, 60, 120])
def test_a_small_patient_in_a_padded_field_of_view_keeps_its_air(margin: int, noise: float) -> None:
    case = phantom(0, 1)
    alone = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    padded = np.pad(case.image_xyz.astype(np.float32), ((0, 0), (margin, margin), (margin, margin)))
    padded[padded == 0] += np.abs(np.random.default_rng(0).normal(0, noise, np.count_nonzero(padded == 0)))
    tissue = padded > tissue_threshold(padded, case.spacing_mm)
    inside = tissue[:, margin : margin + case.image_xyz.shape[1], margin : margin + case.image_xyz.shape[2]]
    assert tissue.sum() == inside.sum()
    assert inside[alone].mean() > 0.95
    assert inside[~alone].mean() < 0.25


@pytest.mark.parametrize(
    ("spacing_mm", "tolerance"), [((0.6, 0.6, 0.6), 0.04), ((3.5, 0.6, 0.6), 0.1), ((6.0, 0.8, 0.8), 0.2)]
)
def test_another_scan_of_the_same_neck_has_the_same_field(spacing_mm: tuple, tolerance: float) -> None:
    """Millimetres, not voxels: finer voxels, and thick slices."""
    first, second = phantom(0, 0, (1.0, 1.0, 1.0)), phantom(0, 0, spacing_mm)
    expected, found = (
        estimate_bias(case.image_xyz, case.spacing_mm, BiasParameters()).log_bias_xyz for case in (first, second)
    )
    there = resample_image(found, spacing_mm, first.image_xyz.shape, (1.0, 1.0, 1.0), order=1)
    tissue = first.image_xyz > tissue_threshold(first.image_xyz, (1.0, 1.0, 1.0))
    assert (there - expected)[tissue].std() < tolerance * expected[tissue].std()


def test_n4_recovers_most_of_a_known_field() -> None:
    case = phantom(0, 0)
    found = estimate_bias(case.image_xyz, case.spacing_mm, BiasParameters())
    tissue = found.tissue_xyz
    before, left = case.log_bias_xyz[tissue].std(), (case.log_bias_xyz - found.log_bias_xyz)[tissue].std()
    assert left < 0.5 * before
    assert abs(found.log_bias_xyz[tissue].mean()) < 1e-3
    corrected = correct(case.image_xyz, found.log_bias_xyz, found.air_level)
    # Without the rim of cortical bone, whose darkness is anatomy.
    vertebrae = ndimage.binary_erosion(case.label_xyz > 0, iterations=2)

    def variation(image: np.ndarray) -> float:
        return float(image[vertebrae].std() / image[vertebrae].mean())

    assert variation(corrected) < 0.7 * variation(case.image_xyz)


def test_the_field_does_not_depend_on_a_label_or_on_the_air() -> None:
    case = phantom(0, 1)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    quick = BiasParameters(resolution_mm=12, iterations=(5, 5))
    found = estimate_log_bias(case.image_xyz, tissue, case.spacing_mm, quick)
    other_air = np.where(tissue, case.image_xyz, 3)
    np.testing.assert_array_equal(found, estimate_log_bias(other_air, tissue, case.spacing_mm, quick))


def behind_a_coil(image: np.ndarray, deviation: float) -> np.ndarray:
    """An image of air at 0 times a field that falls off from behind, as that of a coil under the back does."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in image.shape], indexing="ij", sparse=True)
    field = -np.log(0.2 + ((axes[1] - 1.2) / 1.5) ** 2 + 0.4 * axes[2] ** 2) + 0 * axes[0]
    return image * np.exp(field * deviation / field.std())


def test_an_offset_changes_neither_field_nor_tissue() -> None:
    """A multiplicative field holds above the level of air; somebody's rescaling moves that level."""
    case = phantom(0, 2)
    quick = BiasParameters(iterations=(30, 30, 30))
    plain = estimate_bias(case.image_xyz, case.spacing_mm, quick)
    moved = estimate_bias(case.image_xyz * 0.5 + 40, case.spacing_mm, quick)
    assert moved.air_level == pytest.approx(plain.air_level * 0.5 + 40, abs=0.5)
    both = plain.tissue_xyz & moved.tissue_xyz
    assert both.sum() > 0.98 * plain.tissue_xyz.sum()
    assert (plain.log_bias_xyz - moved.log_bias_xyz)[both].std() < 0.02 * plain.log_bias_xyz[both].std() + 0.002


def test_the_level_that_n4_leaves_open_does_not_reach_tissue_or_field() -> None:
    """In a small crop the field's level drifts far over many iterations; SimpleITK's does too."""
    case = phantom(0, 1)
    crop = case.image_xyz[10:26, 50:90, 60:90]
    found = estimate_bias(crop, case.spacing_mm, BiasParameters())
    assert found.tissue_xyz.mean() > 0.8
    assert abs(found.log_bias_xyz[found.tissue_xyz].mean()) < 1e-3
    assert np.abs(found.log_bias_xyz).max() < 3


def test_tissue_that_a_weak_field_darkens_is_found_again() -> None:
    case = phantom(0, 3)
    clean = case.image_xyz * np.exp(-case.log_bias_xyz)
    biased = behind_a_coil(clean, 0.6)
    tissue = clean > tissue_threshold(clean, case.spacing_mm)

    def disagreement(passes: int) -> float:
        quick = BiasParameters(iterations=(100, 100, 100), mask_passes=passes)
        return float((estimate_bias(biased, case.spacing_mm, quick).tissue_xyz != tissue).mean())

    assert disagreement(3) < 0.8 * disagreement(0)


def test_both_engines_estimate_alike_from_air_to_field() -> None:
    case = phantom(2, 1)
    ours, itks = (
        estimate_bias(
            case.image_xyz, case.spacing_mm, BiasParameters(engine=engine, iterations=(10, 10), spline_mm=0, stride=1)
        )
        for engine in ("separable", "itk")
    )
    assert (ours.air_level, ours.tissue_threshold) == (itks.air_level, itks.tissue_threshold)
    both = ours.tissue_xyz & itks.tissue_xyz
    difference = (ours.log_bias_xyz - itks.log_bias_xyz)[both]
    assert difference.std() < 0.02 * itks.log_bias_xyz[both].std() + 0.003


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
    np.testing.assert_allclose(correct(image, np.full((2, 2, 2), np.log(2), np.float32), air=4), 7, rtol=1e-6)
    np.testing.assert_allclose(correct(image, np.full((2, 2, 2), np.log(2), np.float32), air=10), 10, rtol=1e-6)


def test_what_lies_below_air_is_left_alone() -> None:
    image = np.array([[[0.0, 20.0, 35.0, 135.0]]], np.float32)
    found = correct(image, np.full(image.shape, np.log(0.1), np.float32), air=35.0)
    np.testing.assert_allclose(found, [[[0.0, 20.0, 35.0, 1035.0]]], rtol=1e-5)


def test_a_preset_is_changed_by_name() -> None:
    assert bias_parameters() == BiasParameters()
    changed = bias_parameters("fast", iterations="30,20", resolution_mm=8.0)
    assert (changed.iterations, changed.resolution_mm) == ((30, 20), 8.0)
    assert changed.mask_passes == bias_parameters("fast").mask_passes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "itk", "spline_mm": 40}, "supported by SimpleITK's filter"),
        ({"preset": "best"}, "N4 preset 'best'"),
        ({"iterations": "20,many"}, "N4 parameter iterations"),
        ({"resolution_mm": 0.0}, "N4 parameter resolution_mm 0.0"),
        ({"spline_mm": -1.0}, "N4 parameter spline_mm -1.0"),
    ],
)
def test_meaningless_parameters_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bias_parameters(**changes)
