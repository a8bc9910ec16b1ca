"""Resampling, held against functions whose values are known everywhere, and against SciPy's own path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cspine_data import InputError
from cspine_data.preprocessing.parameters import parse_spacing
from cspine_data.preprocessing.resampling import resample_image, resample_label, resampled_size

SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 1.3, 3.5])] * 3)
SIZES = st.tuples(*[st.integers(1, 12)] * 3)


def positions_mm(size: tuple[int, ...], spacing_mm: tuple[float, ...]) -> list[np.ndarray]:
    """Where voxels lie, from the volume's centre, one array an axis, ready to be broadcast."""
    places = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing_mm, strict=True)]
    return list(np.meshgrid(*places, indexing="ij", sparse=True))


@given(SIZES, SPACINGS)
def test_the_same_grid_changes_nothing(size: tuple, spacing: tuple) -> None:
    image = np.random.default_rng(0).normal(size=size).astype(np.float32)
    assert resampled_size(size, spacing, spacing) == size
    np.testing.assert_array_equal(resample_image(image, spacing, size, spacing), image)
    label = (image > 0).astype(np.int16)
    np.testing.assert_array_equal(resample_label(label, spacing, size, spacing), label)


@pytest.mark.parametrize("new", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (2.0, 2.0, 0.4), (4.0, 0.25, 3.0)])
def test_what_is_smooth_keeps_its_place_and_value(new: tuple[float, float, float]) -> None:
    """Slices of 3.5 mm, as clinical scans have them, and both finer and coarser grids: millimetres stay millimetres."""

    def anatomy(size: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
        x, y, z = positions_mm(size, spacing)
        return np.asarray(100 + 30 * np.sin(x / 9 + 0.4) + 20 * np.cos(y / 11) + 10 * np.sin(z / 8 + 1))

    size, spacing = (20, 60, 64), (3.5, 0.7, 0.6)
    new_size = resampled_size(size, spacing, new)
    assert all(abs(n * a - m * b) <= b / 2 + 1e-9 for n, a, m, b in zip(size, spacing, new_size, new, strict=True))
    found = resample_image(anatomy(size, spacing), spacing, new_size, new)
    assert found.dtype == np.float32
    error = np.abs(found - anatomy(new_size, new))
    inner = tuple(slice(int(np.ceil(6 / mm)), -int(np.ceil(6 / mm))) for mm in new)
    assert error[inner].max() < 1.5
    assert np.sqrt((error**2).mean()) < 1.5


def test_a_spline_without_smoothing_is_scipys() -> None:
    image = np.random.default_rng(1).normal(size=(7, 9, 8)).astype(np.float32)
    spacing, new = (3.0, 1.0, 2.0), (1.0, 0.5, 0.7)
    size = resampled_size(image.shape, spacing, new)
    steps = [b / a for a, b in zip(spacing, new, strict=True)]
    offset = [(n - 1) / 2 - (m - 1) / 2 * step for n, m, step in zip(image.shape, size, steps, strict=True)]
    expected = ndimage.affine_transform(image.astype(float), np.diag(steps), offset, size, order=3, mode="nearest")
    found = resample_image(image, spacing, size, new)
    np.testing.assert_allclose(found, np.clip(expected, image.min(), image.max()), atol=1e-4)


def test_shrinking_leaves_no_pattern_of_what_is_too_fine() -> None:
    """Stripes of one voxel come back grey, not as broader stripes."""
    image = np.zeros((4, 4, 60), np.float32)
    image[..., ::2] = 1
    smoothed = resample_image(image, (1, 1, 1), (4, 4, 20), (1, 1, 3))
    assert np.abs(smoothed[..., 2:-2] - 0.5).max() < 0.02
    unsmoothed = ndimage.zoom(image, (1, 1, 1 / 3), order=3)
    assert np.abs(unsmoothed[..., 2:-2] - 0.5).max() > 0.2


@given(SIZES, SPACINGS, SPACINGS, st.lists(st.integers(-3, 300), min_size=1, max_size=4), st.integers(0, 99))
def test_no_label_value_and_no_intensity_is_invented(
    size: tuple, spacing: tuple, new: tuple, values: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array(values, dtype=np.int16), size)
    new_size = resampled_size(size, spacing, new)
    found = resample_label(label, spacing, new_size, new)
    assert found.shape == new_size
    assert found.dtype == label.dtype
    assert set(np.unique(found)) <= set(values)
    image = rng.normal(size=size)
    resampled = resample_image(image, spacing, new_size, new)
    assert image.min() - 1e-6 <= resampled.min() <= resampled.max() <= image.max() + 1e-6


def test_a_label_keeps_its_volume_and_place() -> None:
    spacing, new = (3.5, 0.5, 0.5), (1.0, 1.0, 1.0)

    def two_balls(size: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
        x, y, z = positions_mm(size, spacing)
        label = np.zeros(size, np.uint8)
        label[x**2 + (y - 14) ** 2 + z**2 < 12**2] = 19
        label[x**2 + (y + 14) ** 2 + z**2 < 12**2] = 20
        return label

    size = (18, 120, 80)
    new_size = resampled_size(size, spacing, new)
    found, expected = resample_label(two_balls(size, spacing), spacing, new_size, new), two_balls(new_size, new)
    for value in (19, 20):
        both = ((found == value) & (expected == value)).sum()
        assert 2 * both / ((found == value).sum() + (expected == value).sum()) > 0.95


@pytest.mark.parametrize("mm", [1.0, 0.9999, float(np.float32(0.7)), float(np.float32(0.6))])
@pytest.mark.parametrize("start", [4, 5, 11, 12, 13])
@pytest.mark.parametrize("voxels", [4, 6, 8, 9, 10])
def test_half_the_resolution_makes_nothing_smaller_or_larger(mm: float, start: int, voxels: int) -> None:
    """At half the resolution every border runs through the middle of a voxel, or along its side."""
    label = np.zeros((32, 32, 32), np.uint8)
    label[(slice(start, start + voxels),) * 3] = 5
    found = resample_label(label, (mm,) * 3, (16, 16, 16), (round(2 * mm, 3),) * 3)
    inside = np.argwhere(found)
    extents_mm = 2 * (np.ptp(inside, axis=0) + 1)
    assert (np.abs(extents_mm - voxels) <= 1).all()


@pytest.mark.parametrize(("radius", "tolerance"), [(3, 0.15), (4, 0.1), (6, 0.05), (10, 0.02)])
def test_coarser_voxels_keep_the_size_of_small_structures(radius: float, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(20):
        x, y, z = positions_mm((32, 32, 32), (1.0, 1.0, 1.0))
        dx, dy, dz = rng.uniform(-2, 2, 3)
        label = ((x - dx) ** 2 + (y - dy) ** 2 + (z - dz) ** 2 < radius**2).astype(np.uint8)
        kept.append(8 * resample_label(label, (1, 1, 1), (16, 16, 16), (2, 2, 2)).sum() / label.sum())
    assert abs(np.mean(kept) - 1) < tolerance


@pytest.mark.parametrize(
    ("text", "expected"),
    [("native", None), ("Native", None), ("1", (1.0, 1.0, 1.0)), ("0.5,0.5, 1", (0.5, 0.5, 1.0))],
)
def test_spacings_are_read(text: str, expected: tuple[float, ...] | None) -> None:
    assert parse_spacing(text) == expected


@pytest.mark.parametrize("text", ["", "fine", "0", "-1", "1,2", "1,2,3,4", "1,nan,1", "inf", "1,,1"])
def test_spacings_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="'.*': is not known"):
        parse_spacing(text)
