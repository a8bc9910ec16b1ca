"""Panoptic quality beside panoptica's, and the identification of vertebrae by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cspine_data import read_volume
from cspine_train.metrics.instances import (
    Identification,
    PanopticQuality,
    identification,
    label_centroids,
    label_overlaps,
    panoptic_quality,
    true_levels,
)

# Computed by panoptica 2.1.7 (naive threshold matching, IoU of at least 0.5). It is no dependency, as it needs older
# versions of numpy, pandas and rich than the project has.
OF_SPINE = (0.8636363636363636, 0.8328184295330796, 0.719252280051296)
OF_RANDOM = (
    (0.5, 0.5553459119496855, 0.27767295597484276),
    (0.4, 0.6071428571428572, 0.24285714285714288),
    (0.6666666666666666, 0.5599658782580097, 0.3733105855053398),
    (0.6666666666666666, 0.5496792416698583, 0.3664528277799055),
    (0.7272727272727273, 0.5912698412698413, 0.43001443001443),
    (0.8333333333333334, 0.6698979591836736, 0.558248299319728),
    (0.36363636363636365, 0.5833333333333333, 0.2121212121212121),
    (0.36363636363636365, 0.6875, 0.25),
)


def random_maps(seed: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """A true and a predicted row of boxes; some are missing, and the last is predicted in two halves."""
    rng = np.random.default_rng(seed)
    truth, found = np.zeros((2, 8, 8, 60), np.uint16)
    for number, start in enumerate(range(0, 60, 10)):
        for labels, value in ((truth, 1 + number), (found, 20 + 5 * number % 7)):
            low, high = rng.integers(0, 2, 3), rng.integers(6, 9, 3)
            if rng.random() < 0.85:
                labels[low[0] : high[0], low[1] : high[1], start + low[2] : start + high[2]] = value
    truth[:, :, 50:], found[:, :, 50:] = 6, 27
    found[:4, :, 50:] = 28
    return truth, found


def qualities(found: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float, float]:
    quality = panoptic_quality(label_overlaps(found, truth))
    return quality.recognition, quality.segmentation, quality.panoptic


@pytest.mark.parametrize("seed", range(len(OF_RANDOM)))
def test_panoptic_quality_of_random_maps_is_panopticas(seed: int) -> None:
    truth, found = random_maps(seed)
    assert qualities(found, truth) == pytest.approx(OF_RANDOM[seed], abs=1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["matched", "unmatched"])
def test_panoptic_quality_of_a_spine_is_panopticas(realdata: Path, kind: str) -> None:
    truth, found = (
        read_volume(realdata / "panoptica" / f"{kind}_instance_{which}.nii.gz").array for which in ("ref", "pred")
    )
    assert qualities(found, truth) == pytest.approx(OF_SPINE, abs=1e-6)


def test_panoptic_quality_without_instances() -> None:
    none = np.zeros((2, 2, 2), np.uint8)
    one = np.pad(np.ones((1, 1, 1), np.uint8), ((0, 1), (0, 1), (0, 1)))
    assert panoptic_quality(label_overlaps(none, none)) == PanopticQuality(1, 1)
    assert panoptic_quality(label_overlaps(one, none)) == PanopticQuality(0, 0)
    assert panoptic_quality(label_overlaps(none, one)) == PanopticQuality(0, 0)


def test_overlaps_are_counted_by_true_and_predicted_value() -> None:
    truth, found = np.array([[[0, 0, 5, 5, 7]]]), np.array([[[0, 5, 5, 0, 300]]])
    assert label_overlaps(found, truth) == {(0, 5): 1, (5, 5): 1, (5, 0): 1, (7, 300): 1}
    with pytest.raises(ValueError, match="shapes"):
        label_overlaps(found, truth[..., :4])


@given(st.integers(0, 2**32), st.sampled_from([np.uint8, np.int16, np.int32]))
def test_overlaps_of_any_values(seed: int, dtype: type) -> None:
    rng, limits = np.random.default_rng(seed), np.iinfo(dtype)
    values = np.array([0, 1, 2, limits.min, limits.max], dtype)
    found, truth = rng.choice(values, (2, 4, 3, 5))
    expected = Counter(zip(truth.ravel().tolist(), found.ravel().tolist(), strict=True))
    del expected[0, 0]
    assert label_overlaps(found, truth) == dict(expected)


def test_the_true_level_is_that_of_most_labelled_voxels() -> None:
    overlaps = {
        (20, 19): 30, (19, 19): 20, (0, 19): 50,  # half of its voxels are labelled
        (21, 20): 49, (0, 20): 51,
        (5, 21): 60, (21, 21): 40,  # most of it is in a disc
        (22, 22): 10, (22, 5): 90,
        (23, 0): 90,
    }  # fmt: skip
    assert true_levels(overlaps, range(19, 24)) == {19: 20, 22: 22}


def test_centroids_are_in_millimetres() -> None:
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1:3, 2, 3], labels[0, 0, 5] = 20, 21
    assert label_centroids(labels, (2, 3, 0.5)) == {20: (3, 6, 1.5), 21: (0, 0, 2.5)}
    assert label_centroids(labels * 0, (1, 1, 1)) == {}


SPINE = {20: (0.0, 0.0, 90.0), 21: (0.0, 0.0, 60.0), 22: (0.0, 0.0, 30.0)}


def shifted(mm: float, **others: tuple[float, float, float]) -> dict[int, tuple[float, float, float]]:
    return {level: (x, y, z + mm) for level, (x, y, z) in SPINE.items()} | {int(k[1:]): v for k, v in others.items()}


def test_vertebrae_are_identified_near_the_true_ones() -> None:
    assert identification(SPINE, SPINE, 500) == Identification({20: 0, 21: 0, 22: 0}, frozenset({20, 21, 22}))
    near = identification(shifted(14), SPINE, 500)
    assert (near.rate, near.distance_mm) == (1, 14)
    # Nearer to the vertebra below, though within 20 mm of their own; the lowest has none below.
    nearer = identification(shifted(-16), SPINE, 500)
    assert (nearer.identified, nearer.distance_mm) == ({22}, 16)
    # Names are one vertebra too high.
    moved = identification({19: SPINE[20], 20: SPINE[21], 21: SPINE[22]}, SPINE, 500)
    assert (moved.rate, moved.distances_mm) == (0, {20: 30, 21: 30, 22: 500})


def test_an_identified_vertebra_is_within_20_mm() -> None:
    alone = {22: SPINE[22]}
    assert identification({22: (0, 19.9, 30)}, alone, 500).rate == 1
    assert identification({22: (0, 20, 30)}, alone, 500).rate == 0


def test_missed_and_extra_vertebrae() -> None:
    missed = identification({20: SPINE[20], 22: SPINE[22]}, SPINE, 500)
    assert missed.rate == pytest.approx(2 / 3)
    assert missed.distance_mm == pytest.approx(500 / 3)
    # A missed vertebra may still be the nearest.
    assert identification({22: (0, 0, 46)}, SPINE, 500).rate == 0
    extra = identification(shifted(0, _23=(0, 0, 0)), SPINE, 500)
    assert (extra.rate, extra.distance_mm) == (1, 0)
    nothing = identification({}, {}, 500)
    assert (nothing.rate, nothing.distance_mm) == (1, 0)
    only_extra = identification(SPINE, {}, 500)
    assert (only_extra.rate, only_extra.distance_mm) == (0, 500)
