"""The separable engine held equal to its slow twin, SimpleITK's filter."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from cspine_data._anatomy import make_case
from cspine_data._n4 import SplineField, fit_log_bias
from cspine_data.bias import BiasParameters, average_down, estimate_log_bias, tissue_threshold, working_factors


def itk_log_bias(
    image: np.ndarray, mask: np.ndarray, iterations: tuple[int, ...], threshold: float, spacing: tuple[float, ...]
) -> np.ndarray:
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(iterations))
    n4.SetConvergenceThreshold(threshold)
    ours = [sitk.GetImageFromArray(np.ascontiguousarray(a.transpose())) for a in (image, mask.astype(np.uint8))]
    for one in ours:
        one.SetSpacing(spacing)
    n4.Execute(*ours)
    return sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(ours[0])).transpose()


def our_log_bias(image: np.ndarray, mask: np.ndarray, iterations: tuple[int, ...], threshold: float) -> np.ndarray:
    field = fit_log_bias(np.log(np.where(mask, image, 1)).astype(float), mask, (1, 1, 1), iterations, threshold, 0)
    return field.at(*(np.linspace(0, 1, n) for n in image.shape))


@pytest.fixture(scope="module")
def neck() -> tuple[np.ndarray, np.ndarray]:
    """A phantom at a working resolution, and its tissue."""
    case = make_case(0, 0)
    factors = working_factors(case.spacing_mm, 8.0)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    return average_down(case.image_xyz, factors), average_down(tissue, factors) > 0.5


@pytest.mark.parametrize(
    ("iterations", "threshold"),
    [((50, 50, 50, 50), 1e-3), ((1,), 1e-3), ((20, 30), 1e-3), ((60, 60, 60), 1e-6), ((10, 10, 10, 10, 10), 1e-4)],
)
def test_the_field_is_itks(neck, iterations: tuple[int, ...], threshold: float) -> None:
    image, mask = neck
    expected = itk_log_bias(image, mask, iterations, threshold, (8, 8, 8))
    found = our_log_bias(image, mask, iterations, threshold)
    assert (found - expected)[mask].std() < 1e-3
    assert np.abs(found - expected)[mask].max() < 1e-2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("iterations", [(8,), (5, 5), (4, 4, 4)])
def test_the_field_is_itks_on_generated_volumes(seed: int, iterations: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    size = rng.integers(8, 18, 3)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    tissues = np.select([radius < 0.5, radius < 0.9], [200.0, 110.0], 60.0)
    slope = rng.uniform(-0.4, 0.4, 3)
    image = tissues * np.exp(sum(s * a for s, a in zip(slope, axes, strict=True))) + rng.normal(0, 4, size)
    image = np.maximum(image, 1).astype(np.float32)
    mask = radius < 1.3
    expected = itk_log_bias(image, mask, iterations, 1e-6, tuple(rng.uniform(0.3, 7, 3)))
    found = our_log_bias(image, mask, iterations, 1e-6)
    assert (found - expected)[mask].std() < 1e-3


def test_refining_keeps_the_field() -> None:
    field = SplineField(np.random.default_rng(0).normal(size=(4, 5, 7)))
    axes = [np.linspace(0, 1, n) for n in (9, 12, 30)]
    for which in ((True, True, True), (False, True, False)):
        refined = field.refined(which)
        assert refined.lattice.shape == tuple(
            2 * n - 3 if double else n for n, double in zip(field.lattice.shape, which, strict=True)
        )
        np.testing.assert_allclose(refined.at(*axes), field.at(*axes), atol=1e-5)


def test_a_constant_lattice_is_a_constant_field() -> None:
    axes = [np.linspace(0, 1, n) for n in (3, 1, 8)]
    np.testing.assert_allclose(SplineField(np.full((4, 6, 5), 2.5)).at(*axes), 2.5, rtol=1e-6)


def test_short_axes_are_not_refined_beyond_the_spline_spacing(neck) -> None:
    image, mask = neck
    logarithm = np.log(np.where(mask, image, 1)).astype(float)
    field = fit_log_bias(logarithm, mask, (60.0, 120.0, 240.0), (2, 2, 2, 2), 1e-6, 40.0)
    assert field.lattice.shape == (2 + 3, 4 + 3, 8 + 3)


@pytest.mark.parametrize("shape", [(1, 12, 14), (2, 2, 2), (5, 40, 3)])
def test_any_size_is_taken(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(50, 200, shape).astype(np.int16)
    for resolution in (1.0, 4.0):
        found = estimate_log_bias(image, image > 0, (1, 1, 1), BiasParameters(resolution_mm=resolution))
        assert found.shape == shape
        assert found.dtype == np.float32
        assert np.isfinite(found).all()


def test_both_engines_correct_a_volume_alike() -> None:
    case = make_case(2, 1)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    ours, itks = (
        estimate_log_bias(
            case.image_xyz, tissue, case.spacing_mm, BiasParameters(engine=engine, iterations=(10, 10, 10), spline_mm=0)
        )
        for engine in ("separable", "itk")
    )
    # ITK's field is interpolated linearly from the working grid to the full one.
    assert (ours - itks)[tissue].std() < 0.02 * itks[tissue].std() + 0.003
