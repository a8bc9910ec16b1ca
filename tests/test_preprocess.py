from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from cspine_data import BiasParameters, InputError, Preprocessing, Volume, preprocess_volume
from cspine_data.extensions import NORMALISATIONS
from cspine_data.preprocessing.normalisation import (
    Levels,
    Normalisation,
    TissueStatistics,
    normalisation_of,
    standard_landmarks,
)
from cspine_data.preprocessing.parameters import NYUL_PERCENTILES
from cspine_data.volumes.geometry import Orientation
from tests.conftest import ball

N4 = Preprocessing(bias=BiasParameters(resolution_mm=3, iterations=(5, 5)))


def tissue_of(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    image = np.array([0.0, *values])
    return image, image > 0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12, unique=True), st.integers(0, 2**32 - 1))
def test_a_normalisation_is_undone_by_its_statistics(intensities: list[float], seed: int) -> None:
    start = np.unique(np.round(intensities, 2))
    start = np.array([0.0, 1.0]) if start.size < 2 else start
    end = np.cumsum(np.random.default_rng(seed).uniform(0.1, 2, start.size))
    normalisation = Normalisation(intensities=tuple(start), values=tuple(end))
    np.testing.assert_allclose(normalisation.apply(start), end, atol=2e-3)
    image = np.linspace(start[0] - 100, start[-1] + 100, 50)
    # Single precision of the normalised values, through the steepest line back.
    steepest = (np.diff(start) / np.diff(end)).max()
    tolerance = 1e-6 * (np.abs(image).max() + np.abs(normalisation.apply(image)).max() * steepest)
    np.testing.assert_allclose(normalisation.undo(normalisation.apply(image)), image, atol=tolerance)
    assert (np.diff(normalisation.apply(image)) >= 0).all()


def test_zscore_is_over_the_tissue_only() -> None:
    image = np.array([0.0, 0.0, 10.0, 14.0])
    found = normalisation_of(TissueStatistics.of(image, image > 5), "zscore", None, "x")
    np.testing.assert_allclose(found.apply(np.array([12.0, 14.0, 10.0])), [0, 1, -1])


@pytest.mark.parametrize("method", NORMALISATIONS.built_in)
def test_an_image_without_contrast_is_refused(method: str) -> None:
    image = np.array([0.0, 0.0, 10.0, 10.0])
    standard = tuple(np.linspace(0, 1, len(NYUL_PERCENTILES)))
    for tissue in (image > 5, image > 99):
        with pytest.raises(InputError, match="contrast within its tissue"):
            normalisation_of(TissueStatistics.of(image, tissue), method, standard, "x")


@pytest.mark.parametrize("method", NORMALISATIONS.built_in)
@pytest.mark.parametrize(("share", "tolerance"), [(0.002, 0.02), (0.5, 0.15)])
@pytest.mark.parametrize("brighter", [10, 1000])
def test_outliers_do_not_move_the_normalisation(method: str, share: float, tolerance: float, brighter: int) -> None:
    """Half of the mask may be noise that a field made many times as bright as tissue."""
    rng = np.random.default_rng(0)
    image = np.maximum(rng.normal(100, 20, 20_000), 1)
    outliers = brighter * rng.normal(100, 20, round(share / (1 - share) * image.size))
    standard = tuple(np.linspace(0, 1, len(NYUL_PERCENTILES)))

    def normalised(*parts: np.ndarray) -> np.ndarray:
        whole = np.concatenate(parts)
        statistics = TissueStatistics.of(whole, np.ones(whole.shape, dtype=bool))
        return normalisation_of(statistics, method, standard, "x").apply(image)

    clean, disturbed = normalised(image), normalised(image, outliers)
    assert np.abs(disturbed - clean).max() < tolerance * clean.std()


def test_nyul_brings_scans_of_other_contrasts_to_one_histogram() -> None:
    """Two monotone changes of one anatomy end on the same scale, which one line cannot do."""
    rng = np.random.default_rng(0)
    # Gamma's far tail would be outliers.
    anatomy = np.minimum(rng.gamma(3, 1, 50_000), 8)
    whole = np.ones(anatomy.shape, dtype=bool)
    scans = [1000 * anatomy**0.6, 40 * anatomy + 7, 3 * anatomy**1.5]
    standard = standard_landmarks([TissueStatistics.of(scan, whole).landmarks for scan in scans])
    assert (standard[0], standard[-1]) == (0, 1)
    matched = [normalisation_of(TissueStatistics.of(scan, whole), "nyul", standard, "x").apply(scan) for scan in scans]
    lines = [normalisation_of(TissueStatistics.of(scan, whole), "percentile", None, "x").apply(scan) for scan in scans]
    for scan in matched:
        np.testing.assert_allclose(np.percentile(scan, NYUL_PERCENTILES), standard, atol=1e-3)
    assert np.abs(matched[0] - matched[2]).mean() < 0.2 * np.abs(lines[0] - lines[2]).mean()


def test_nyul_takes_images_of_few_grey_values() -> None:
    image = np.repeat([1.0, 2.0, 9.0], 100)
    whole = np.ones(image.shape, dtype=bool)
    standard = tuple(np.linspace(0, 1, len(NYUL_PERCENTILES)))
    found = normalisation_of(TissueStatistics.of(image, whole), "nyul", standard, "x").apply(np.array([1.0, 2.0, 9.0]))
    assert found[0] == 0
    assert 0 < found[1] < found[2] <= 1


@given(st.floats(0.01, 1e4), st.floats(-1e3, 1e3), st.booleans())
def test_levels_keep_an_image_to_half_a_level(width: float, middle: float, spike: bool) -> None:
    image = np.random.default_rng(0).normal(middle, width, 500).astype(np.float32)
    if spike:
        image[0] = 1e9
    levels = Levels.spanning(image)
    kept = levels.decode(levels.encode(image))
    assert kept.dtype == np.float32
    seen = np.clip(image, -32, 32)
    np.testing.assert_allclose(kept, seen, atol=0.51 * levels.scale + 1e-5)
    assert levels.scale <= 64 / 65534 * 1.001
    np.testing.assert_array_equal(levels.decode(levels.encode(kept)), kept)


def test_raw_keeps_the_sources_values_and_n4_makes_floats() -> None:
    image, _ = ball()
    raw = preprocess_volume(image, Preprocessing(bias=None))
    corrected = raw.corrected
    assert corrected.image_xyz.dtype == np.int16
    np.testing.assert_array_equal(corrected.image_xyz, image.array)
    assert corrected.log_bias_deviation == 0
    n4 = preprocess_volume(image, N4).corrected
    assert n4.image_xyz.dtype == np.float32
    assert n4.log_bias_deviation > 0
    assert (Preprocessing(bias=None).variant, N4.variant) == ("raw", "n4")


def test_ct_is_not_corrected_as_if_it_were_mri() -> None:
    image, _ = ball()
    ct = Volume(array=(image.array.astype(np.int16) - 1024), geometry=image.geometry, path=Path("ct.nrrd"))
    with pytest.raises(InputError, match="prepare it with --no-n4"):
        preprocess_volume(ct, N4)
    assert preprocess_volume(ct, Preprocessing(bias=None)).corrected.image_xyz.min() < -900


def test_what_is_air_and_what_is_tissue_is_recorded() -> None:
    image, _ = ball()
    for parameters in (Preprocessing(bias=None), N4):
        done = preprocess_volume(image, parameters)
        corrected = done.corrected
        assert 0 <= corrected.air_level < 20
        assert corrected.air_level < corrected.tissue_threshold < 300
        assert done.corrected.tissue.fraction == (corrected.image_xyz > corrected.tissue_threshold).mean()


def test_tissue_has_mean_zero_and_deviation_one() -> None:
    image, _ = ball()
    done = preprocess_volume(image, Preprocessing(bias=None))
    tissue = image.array > done.corrected.tissue_threshold
    normalised = done.normalised_xyz()[tissue]
    assert normalised.dtype == np.float32
    assert abs(normalised.mean()) < 1e-4
    assert abs(normalised.std() - 1) < 1e-4
    assert done.corrected.tissue.fraction == tissue.mean()


@pytest.mark.parametrize("preprocessing", [Preprocessing(bias=None), N4])
@pytest.mark.parametrize(
    "order", [Orientation((2, 0, 1), (True, False, True)), Orientation((1, 2, 0), (False, True, False))]
)
def test_the_order_a_file_stores_changes_nothing(preprocessing: Preprocessing, order: Orientation) -> None:
    image, _ = ball()
    stored = Volume(np.ascontiguousarray(order.to_file(image.array)), order.geometry_in_file(image.geometry))
    first, second = preprocess_volume(image, preprocessing), preprocess_volume(stored, preprocessing)
    np.testing.assert_array_equal(first.corrected.image_xyz, second.corrected.image_xyz)
    np.testing.assert_array_equal(first.levels_xyz, second.levels_xyz)
    assert first.normalisation == second.normalisation
    assert second.spacing_mm == (1.5, 1.0, 1.0)
    back = second.to_file_grid(second.corrected.image_xyz > 100)
    np.testing.assert_array_equal(back.array, order.to_file(second.corrected.image_xyz > 100))
    assert back.geometry == stored.geometry


def test_thick_slices_are_resampled_and_found_again() -> None:
    image, label = ball((8, 40, 48))
    done = preprocess_volume(image, Preprocessing(bias=None, spacing_mm=(0.5, 1.0, 2.0)))
    assert done.corrected.image_xyz.shape == (8, 40, 48)
    assert done.levels_xyz.shape == (24, 40, 24)
    assert done.spacing_mm == (0.5, 1.0, 2.0)
    native = preprocess_volume(image, Preprocessing(bias=None))
    assert done.normalisation == native.normalisation
    sliced = done.label_on_network_grid(label.array)
    assert sliced.shape == done.levels_xyz.shape
    assert set(np.unique(sliced)) == {0, 1, 3}
    back = done.to_source_grid((sliced > 0).astype(np.float32)) > 0.5
    truth = label.array > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.9


def test_a_spacing_that_no_machine_holds_is_refused() -> None:
    image, _ = ball()
    with pytest.raises(InputError, match="1 x 1 voxels"):
        preprocess_volume(image, Preprocessing(bias=None, spacing_mm=(1e9, 1e9, 1e9)))
    with pytest.raises(InputError, match="20000 x 24000 voxels"):
        preprocess_volume(image, Preprocessing(bias=None, spacing_mm=(0.001, 0.001, 0.001)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing_mm": (-1, 1, 1)}, "positive sizes in mm"),
        ({"spacing_mm": (1, 1, float("nan"))}, "positive sizes in mm"),
        ({"normalisation": "nyul", "standard": (0, 1)}, "give 11 ascending values"),
        ({"normalisation": "nyul", "standard": tuple(range(11, 0, -1))}, "give 11 ascending values"),
        ({"normalisation": "nyul", "standard": (1,) * 11}, "below its last"),
        ({"standard": tuple(range(11))}, "with nyul only"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**changes)


_LEVELS = """
import hashlib, sys
import numpy as np
from cspine_data import Geometry, Preprocessing, Volume, preprocess_volume
rng = np.random.default_rng(0)
size = (24, 160, 160)
body = np.zeros(size); body[2:-2, 20:-20, 20:-20] = 300
image = (body * rng.uniform(0.7, 1.3, size) + rng.uniform(0, 20, size)).astype(np.int16)
grid = Geometry(size=size, spacing_mm=(3, 1, 1), directions=((1, 0, 0), (0, 1, 0), (0, 0, 1)), origin_mm=(0, 0, 0))
done = preprocess_volume(Volume(image, grid), Preprocessing(spacing_mm=(1.0, 1.1, 1.3)))
print(hashlib.sha256(done.levels_xyz.tobytes()).hexdigest())
"""


def test_threads_beside_each_other_change_no_bit_and_leave_the_limit_as_it_was() -> None:
    image, _ = ball((20, 60, 60))
    way = Preprocessing(spacing_mm=(1.0, 0.7, 0.6))

    def levels(_: int) -> bytes:
        return preprocess_volume(image, way).levels_xyz.tobytes()

    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before, alone = threads(), levels(0)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(levels, range(12))) == {alone}
    assert threads() == before


def test_the_number_of_threads_changes_no_bit() -> None:
    """A worker has one thread, whoever predicts has all cores; both must see the same image."""
    found = {
        subprocess.run(
            [sys.executable, "-c", _LEVELS], env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "2", "4")
    }  # fmt: skip
    assert len(found) == 1


def test_where_tissue_lies_is_told_whatever_it_is_normalised_by() -> None:
    """Matched to a standard, a reversed contrast would lie where every other does."""
    image, _ = ball()
    reversed_too = Volume(np.where(image.array > 60, image.array.max() + 60 - image.array, image.array), image.geometry)
    told = {}
    for name, standard in (("zscore", None), ("percentile", None), ("nyul", tuple(range(11)))):
        how = Preprocessing(bias=None, normalisation=name, standard=standard)
        told[name] = [preprocess_volume(one, how).tissue_percentiles for one in (image, reversed_too)]
    assert told["zscore"] == told["percentile"] == told["nyul"]
    assert told["nyul"][0] != told["nyul"][1]
