"""The separable engine held equal to its slow twin, SimpleITK's filter."""

from __future__ import annotations

import numpy as np
import pytest

from cspine_data.preprocessing.bias_field import estimate_log_bias
from cspine_data.preprocessing.n4 import SplineField, fit_log_bias, itk_log_bias
from cspine_data.preprocessing.parameters import BiasParameters
from cspine_data.preprocessing.tissue import average_down, tissue_threshold, working_factors
from tests.conftest import phantom


def our_log_bias(image: np.ndarray, mask: np.ndarray, parameters: BiasParameters) -> np.ndarray:
    field = fit_log_bias(np.log(np.where(mask, image, 1)).astype(float), mask, (1, 1, 1), parameters)
    return field.at(*(np.linspace(0, 1, n) for n in image.shape))


def as_published(**changes: object) -> BiasParameters:
    """ITK's own defaults."""
    return BiasParameters(**{"spline_mm": 0, "width": 0.15, "noise": 0.01, "stride": 1, **changes})


@pytest.fixture(scope="module")
def neck() -> tuple[np.ndarray, np.ndarray]:
    """A phantom at a working resolution, and its tissue."""
    case = phantom(0, 0)
    factors = working_factors(case.spacing_mm, 8.0)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    return average_down(case.image_xyz, factors), average_down(tissue, factors) > 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"iterations": (50, 50, 50, 50), "threshold": 1e-3},
        {"iterations": (1,), "threshold": 1e-3},
        {"iterations": (20, 30), "threshold": 1e-3},
        {"iterations": (60, 60, 60)},
        {"iterations": (10, 10, 10, 10, 10), "threshold": 1e-4},
        {"iterations": (20, 20), "control_points": 6},
        {"iterations": (20, 20), "bins": 150},
        {"iterations": (20, 20), "width": 0.25, "noise": 0.1},
    ],
    ids=str,
)
def test_the_field_is_itks(neck, changes: dict[str, object]) -> None:
    image, mask = neck
    parameters = as_published(**changes)
    expected = itk_log_bias(image, mask, (8, 8, 8), parameters)
    found = our_log_bias(image, mask, parameters)
    assert (found - expected)[mask].std() < 1e-3
    assert np.abs(found - expected)[mask].max() < 1e-2


def test_long_strides_end_where_short_ones_do(neck) -> None:
    image, mask = neck
    default = BiasParameters(spline_mm=0.4)
    short, long = (our_log_bias(image, mask, default.model_copy(update={"stride": stride})) for stride in (1, 8))
    assert (short - long)[mask].std() < 0.02 * short[mask].std()


def test_a_stride_that_is_too_long_is_shortened() -> None:
    """One tissue alone is mapped to one value at once, so that going on as far again would overshoot for ever."""
    axes = np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij")
    field = 0.2 * axes[0] + 0.1 * axes[1] ** 2
    image = 100 * np.exp(field)
    mask = np.ones(image.shape, bool)
    by_one, by_many = (
        our_log_bias(image, mask, BiasParameters(stride=stride, spline_mm=0, iterations=(200, 200)))
        for stride in (1, 64)
    )
    assert (by_many - field).std() < 1.2 * (by_one - field).std() < 0.2 * field.std()


def test_weights_count_in_the_fit(neck) -> None:
    image, mask = neck
    logarithm = np.log(np.where(mask, image, 1)).astype(float)
    few = BiasParameters(iterations=(20, 20))
    full, half = (fit_log_bias(logarithm, mask * weight, (1, 1, 1), few).lattice for weight in (1.0, 0.5))
    np.testing.assert_allclose(full, half, atol=1e-9)
    behind = np.broadcast_to(np.linspace(0.1, 1, mask.shape[1])[:, None], mask.shape)
    assert np.abs(fit_log_bias(logarithm, mask * behind, (1, 1, 1), few).lattice - full).max() > 1e-3


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
    parameters = as_published(iterations=iterations)
    expected = itk_log_bias(image, mask, tuple(rng.uniform(0.3, 7, 3)), parameters)
    found = our_log_bias(image, mask, parameters)
    assert (found - expected)[mask].std() < 1e-3


def test_refining_keeps_the_field() -> None:
    field = SplineField(np.random.default_rng(0).normal(size=(4, 5, 7)))
    axes = [np.linspace(0, 1, n) for n in (9, 12, 30)]
    for elements in ((2, 4, 8), (1, 2, 4), (3, 2, 12)):
        refined = field.refined(elements)
        assert refined.lattice.shape == tuple(n + 3 for n in elements)
        np.testing.assert_allclose(refined.at(*axes), field.at(*axes), atol=1e-5)


def test_a_spline_goes_through_the_values_it_was_made_of() -> None:
    field = SplineField(np.random.default_rng(0).normal(size=(5, 4, 7)))
    coarse, fine = ([np.linspace(0, 1, n) for n in sizes] for sizes in ((9, 8, 12), (31, 17, 40)))
    through = SplineField.through(field.at(*coarse), (2, 1, 4))
    np.testing.assert_allclose(through.at(*fine), field.at(*fine), atol=1e-4)


def test_a_constant_lattice_is_a_constant_field() -> None:
    axes = [np.linspace(0, 1, n) for n in (3, 1, 8)]
    np.testing.assert_allclose(SplineField(np.full((4, 6, 5), 2.5)).at(*axes), 2.5, rtol=1e-6)


def test_the_spline_is_as_fine_as_asked_in_millimetres(neck) -> None:
    image, mask = neck
    logarithm = np.log(np.where(mask, image, 1)).astype(float)
    parameters = BiasParameters(iterations=(2, 2, 2, 2), spline_mm=40)
    field = fit_log_bias(logarithm, mask, (60.0, 120.0, 210.0), parameters)
    assert field.lattice.shape == (2 + 3, 3 + 3, 5 + 3)


@pytest.mark.parametrize("shape", [(1, 12, 14), (2, 2, 2), (5, 40, 3)])
def test_any_size_is_taken(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(50, 200, shape).astype(np.int16)
    for resolution in (1.0, 4.0):
        found = estimate_log_bias(image, image > 0, (1, 1, 1), BiasParameters(resolution_mm=resolution))
        assert found.shape == shape
        assert found.dtype == np.float32
        assert np.isfinite(found).all()


def test_both_engines_correct_a_volume_alike() -> None:
    case = phantom(2, 1)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    ours, itks = (
        estimate_log_bias(
            case.image_xyz,
            tissue,
            case.spacing_mm,
            as_published(engine=engine, iterations=(10, 10, 10)),
        )
        for engine in ("separable", "itk")
    )
    assert (ours - itks)[tissue].std() < 1e-3
