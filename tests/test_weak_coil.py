"""Volumes whose signal falls into the noise away from the coil."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cspine_data import BiasParameters, Preprocessing, Volume, open_cohort, preprocess_volume, write_volume
from cspine_data.preprocessing.bias_field import correct, estimate_bias
from cspine_data.preprocessing.steps import doubts
from cspine_data.preprocessing.tissue import average_down, densest_core, noise_floor, tissue_threshold
from cspine_data.volumes.geometry import Geometry
from tests.conftest import phantom

SPACING_MM = (1.0, 1.0, 1.0)


@cache
def weak_coil(reach_mm: float, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A phantom behind whose back a coil lies, its true log field, and its true signal."""
    case = phantom(0, 0, SPACING_MM)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, SPACING_MM)
    signal = np.where(tissue, case.image_xyz, 0).astype(np.float32)
    depth_mm = np.maximum(np.argwhere(tissue)[:, 1].max() - np.arange(signal.shape[1]), 0)
    log_field = np.broadcast_to((-depth_mm / reach_mm)[None, :, None], signal.shape)
    signal = signal * np.exp(log_field)
    signal *= 255 / signal.max()
    channels = np.random.default_rng(0).normal(0, noise, (2, *signal.shape))
    return np.hypot(signal + channels[0], channels[1]).astype(np.float32), case.log_bias_xyz + log_field, signal


def volume_of(image: np.ndarray) -> Volume:
    eye = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))
    return Volume(image, Geometry(size=image.shape, spacing_mm=SPACING_MM, directions=eye, origin_mm=(0.0, 0.0, 0.0)))


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("share_of_signal", [0.0, 0.3, 0.45])
@pytest.mark.parametrize("margin", [0, 30])
def test_the_noise_is_that_of_the_air(noise: float, share_of_signal: float, margin: int) -> None:
    """Beside weak signal, and margins that were filled with one value."""
    rng = np.random.default_rng(0)
    image = np.hypot(*rng.normal(0, noise, (2, 60, 60, 60))).astype(np.float32)
    image[:, : round(60 * share_of_signal)] += rng.uniform(20, 60, (1, round(60 * share_of_signal), 60))
    image = np.pad(image, ((0, 0), (margin, margin), (0, 0)))
    averaged = average_down(image, (3, 3, 3))
    found = noise_floor(image, averaged, (3, 3, 3), 100.0)
    # Of a Rayleigh distribution.
    assert found.level == pytest.approx(1.2533 * noise, rel=0.02)
    assert found.deviation == pytest.approx(0.6551 * noise, rel=0.05)
    assert found.averaged_deviation == pytest.approx(0.6551 * noise / 27**0.5, rel=0.2)


def test_air_of_one_value_shows_no_noise() -> None:
    image = np.zeros((30, 30, 30), np.float32)
    image[10:20, 10:20, 10:20] = 100
    found = noise_floor(image, average_down(image, (3, 3, 3)), (3, 3, 3), 50.0)
    assert found.deviation == 0
    assert found.above_noise(average_down(image, (3, 3, 3)), (3.0, 3.0, 3.0)).all()


@pytest.mark.parametrize("outliers", [0.0, 0.3, 0.5])
def test_outliers_do_not_move_the_densest_core(outliers: float) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(10, 2, 10_000), rng.uniform(100, 1000, round(outliers / (1 - outliers) * 10_000))]
    )
    centre, deviation = densest_core(values)
    assert centre == pytest.approx(10, abs=0.6)
    assert 1.8 < deviation < 5.2


@pytest.mark.parametrize(("reach_mm", "noise"), [(40.0, 1.0), (25.0, 1.0), (25.0, 2.0)])
def test_noise_is_no_tissue(reach_mm: float, noise: float) -> None:
    image, true, signal = weak_coil(reach_mm, noise)
    found = estimate_bias(image, SPACING_MM, BiasParameters())
    lost = signal < 0.2 * noise
    assert lost.mean() > 0.15
    assert found.tissue_xyz[lost].mean() < 0.03
    assert found.noise_share > 0.03
    clear = found.tissue_xyz
    assert clear.mean() > 0.05
    assert (found.log_bias_xyz - true)[clear].std() < 0.4 * true[clear].std()
    corrected = found.corrected_xyz
    assert np.median(corrected[lost]) < 0.5 * np.median(corrected[clear])


def test_noise_bounds_the_gain() -> None:
    log_bias = np.log(np.array([[[1.0, 0.1, 0.05, 0.001]]], np.float32))
    image = np.ones(log_bias.shape, np.float32)
    unbounded = correct(image, log_bias)
    np.testing.assert_allclose(unbounded, [[[1, 10, 20, 1000]]], rtol=1e-5)
    # Half at a signal of half a deviation: the field is 0.05 where the noise is a tenth of the tissue.
    bounded = correct(image, log_bias, noise_ratio=0.1)
    np.testing.assert_allclose(bounded / unbounded, [[[1 / 1.0025, 0.8, 0.5, 1 / 2501]]], rtol=1e-4)


def test_a_linear_log_field_is_found_whatever_its_slope() -> None:
    """N4 alone converges to a steep one slowly."""
    case = phantom(0, 1)
    tissue = case.image_xyz > tissue_threshold(case.image_xyz, case.spacing_mm)
    along = np.linspace(-1, 1, case.image_xyz.shape[1])[None, :, None]
    plain = estimate_bias(case.image_xyz, case.spacing_mm, BiasParameters()).log_bias_xyz
    for slope in (0.5, 1.5):
        found = estimate_bias(case.image_xyz * np.exp(slope * along), case.spacing_mm, BiasParameters()).log_bias_xyz
        left = (found - plain - slope * along)[tissue].std() / (slope * along + 0 * plain)[tissue].std()
        assert left < 0.12


def test_an_implausible_estimate_is_a_note(tmp_path: Path, run_data) -> None:
    assert doubts(0.9, 0.4, 0.1) == ()
    assert "bias field" in doubts(1.7, 0.4, 0.1)[0]
    assert "tissue" in doubts(0.9, 0.01, 0.1)[0]
    image, _, _ = weak_coil(25.0, 2.0)
    corrected = preprocess_volume(volume_of(image), Preprocessing()).corrected
    assert "noise" in corrected.doubts[0]
    write_volume(tmp_path / "raw" / "A.nrrd", volume_of(image))
    prepared = run_data("prepare", tmp_path / "raw", "--store", tmp_path / "s.zarr", "--axes", "0")
    assert "note: A:" in prepared.stderr
    assert "brighter than the noise" in prepared.stderr
    shown = run_data("info", tmp_path / "s.zarr")
    assert "brighter than the noise" in shown.stderr
    record = open_cohort(tmp_path / "s.zarr").record("A")
    assert record.noise_share == pytest.approx(corrected.noise_share)
    assert record.noise_ratio > 0
    assert record.tissue == corrected.tissue


@pytest.mark.parametrize("mean", [9.5, 10.0])
def test_the_noise_of_eight_bit_images_is_that_of_the_air(mean: float) -> None:
    """Air of few grey values, whose mean may lie between two of them."""
    rng = np.random.default_rng(0)
    image = np.round(rng.normal(mean, 1.2, (60, 60, 60))).astype(np.uint8)
    image[:, :20] = 120
    averaged = average_down(image, (4, 4, 4))
    found = noise_floor(image, averaged, (4, 4, 4), 60.0)
    assert found.level == pytest.approx(mean, abs=0.1)
    assert found.deviation == pytest.approx(1.2, rel=0.1)
    found.above_noise(averaged, (2.0, 2.0, 2.0))
