"""Checks on the synthetic neck phantoms."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from cspine_data.phantom.anatomy import PhantomCase, make_case

SEED = 20
INDICES = range(4)
LEVELS = range(1, 8)


@cache
def case(index: int, spacing_mm: tuple[float, float, float] | None = None) -> PhantomCase:
    return make_case(SEED, index, spacing_mm)


def volumes_mm3(made: PhantomCase) -> NDArray[np.float64]:
    counts = np.bincount(made.label_xyz.ravel(), minlength=8)[1:]
    return np.asarray(counts * np.prod(made.spacing_mm), dtype=np.float64)


def same(first: PhantomCase, second: PhantomCase) -> bool:
    return (
        first.spacing_mm == second.spacing_mm
        and np.array_equal(first.image_xyz, second.image_xyz)
        and np.array_equal(first.label_xyz, second.label_xyz)
        and np.array_equal(first.log_bias_xyz, second.log_bias_xyz)
    )


def test_same_seed_and_index_give_the_same_case() -> None:
    assert same(case(0), make_case(SEED, 0))


def test_a_case_does_not_depend_on_the_cases_made_before_it() -> None:
    in_order = [make_case(SEED, index) for index in range(3)]
    backwards = [make_case(SEED, index) for index in (2, 1, 0)][::-1]
    assert all(same(a, b) for a, b in zip(in_order, backwards, strict=True))


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    np.random.seed(1)
    before = np.random.get_state(legacy=False)
    assert same(case(1), make_case(SEED, 1))
    assert np.array_equal(
        before["state"]["key"],
        np.random.get_state(legacy=False)["state"]["key"],
    )


def test_other_indices_and_seeds_differ() -> None:
    spacing = (1.5, 1.1, 1.1)
    assert not same(case(0), case(1))
    assert not same(case(0), make_case(SEED + 1, 0))
    # Same grid spacing, so it is the anatomy itself that must differ.
    assert not np.allclose(volumes_mm3(case(0, spacing)), volumes_mm3(case(1, spacing)), rtol=0.01)


@pytest.mark.parametrize("index", INDICES)
def test_types_and_shapes(index: int) -> None:
    made = case(index)
    assert made.image_xyz.dtype == np.int16
    assert made.label_xyz.dtype == np.uint8
    assert made.log_bias_xyz.dtype == np.float32
    assert made.image_xyz.shape == made.label_xyz.shape == made.log_bias_xyz.shape
    extent = np.array(made.image_xyz.shape) * made.spacing_mm
    assert np.all(np.abs(extent / [72, 120, 136] - 1) < 0.06)
    assert made.image_xyz.min() >= 0
    assert 500 < made.image_xyz.max() < 2200


@pytest.mark.parametrize("index", INDICES)
def test_every_vertebra_is_there_in_one_piece(index: int) -> None:
    label = case(index).label_xyz
    assert set(np.unique(label).tolist()) == {0, *LEVELS}
    pieces = {level: ndimage.label(label == level)[1] for level in LEVELS}
    assert pieces == dict.fromkeys(LEVELS, 1)


@pytest.mark.parametrize("index", INDICES)
def test_vertebrae_run_from_top_to_bottom_inside_the_field_of_view(index: int) -> None:
    label = case(index).label_xyz
    heights = [np.argwhere(label == level)[:, 2].mean() for level in LEVELS]
    assert np.all(np.diff(heights) < 0)
    for axis in range(3):
        ends = label.take([0, -1], axis=axis)
        assert not ends.any()


@pytest.mark.parametrize("index", INDICES)
def test_the_canal_is_open_and_the_spinous_processes_point_back(index: int) -> None:
    label = case(index).label_xyz
    for level in LEVELS:
        places = np.argwhere(label == level)
        assert np.ptp(places[:, 1]) * case(index).spacing_mm[1] > 30
        flat = (label == level).any(axis=2)  # seen from above, the canal is a hole
        assert ndimage.binary_fill_holes(flat).sum() > flat.sum()


@pytest.mark.parametrize("index", INDICES)
def test_the_bias_is_centred_and_of_the_stated_strength(index: int) -> None:
    made = case(index)
    # The exact tissue mask is not public; the bright voxels are nearly the same set.
    tissue = made.image_xyz * np.exp(-made.log_bias_xyz) > 90
    inside = made.log_bias_xyz[tissue]
    assert abs(inside.mean()) < 0.04
    assert 0.14 < inside.std() < 0.36
    step_mm = [np.abs(np.diff(made.log_bias_xyz, axis=a)).max() for a in range(3)]
    assert np.all(np.array(step_mm) / made.spacing_mm < 0.06)


@pytest.mark.parametrize("index", INDICES)
def test_the_spacing_only_samples_the_same_anatomy(index: int) -> None:
    coarse, fine = case(index, (1.5, 1.2, 1.2)), case(index, (1.0, 1.0, 1.0))
    assert coarse.spacing_mm == (1.5, 1.2, 1.2)
    np.testing.assert_allclose(volumes_mm3(coarse), volumes_mm3(fine), rtol=0.05)
    centre = [
        [np.argwhere(c.label_xyz == k).mean(axis=0) * c.spacing_mm for k in LEVELS]
        - (np.array(c.label_xyz.shape) - 1) / 2 * c.spacing_mm
        for c in (coarse, fine)
    ]
    np.testing.assert_allclose(centre[0], centre[1], atol=0.35)


@pytest.mark.parametrize("index", INDICES)
def test_air_is_dark_and_marrow_stands_out(index: int) -> None:
    made = case(index)
    image = made.image_xyz / np.exp(made.log_bias_xyz)
    middle = made.image_xyz.shape[0] // 2
    corner = made.image_xyz[:6, :6, :6]  # in front of the throat
    behind = made.image_xyz[:3, -6:, 40:70]
    marrow = np.median(image[ndimage.binary_erosion(made.label_xyz > 0, iterations=2)])
    around = ndimage.binary_dilation(made.label_xyz > 0, iterations=4) & (made.label_xyz == 0)
    assert corner.mean() < 60
    assert behind.mean() < 60
    assert np.median(image[around]) < 0.6 * marrow
    assert (made.image_xyz[middle] < 60).mean() > 0.05  # the airway and the air in front
