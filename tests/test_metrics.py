"""Every measure beside MONAI's, SimpleITK's and one's own fingers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import ttest_1samp

from cspine_data import read_volume
from cspine_train.metrics.overlap import (
    MEASURES,
    Agreement,
    Overlap,
    agreement,
    batch_averaged_dice,
    label_agreements,
    overlap,
)
from cspine_train.metrics.statistics import FEWEST_PATIENTS, mean_interval
from cspine_train.metrics.surfaces import surface_distances

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
# Sums of their squares are exact in float32, in which SimpleITK keeps distances.
spacings = st.tuples(*[st.sampled_from([0.25, 0.75, 1.0, 4.5])] * 3)


def blobs(seed: int, shape: tuple[int, int, int] = (9, 14, 12)) -> Mask:
    """Smooth random shapes, which touch the border now and then."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0.8, 2))
    mask: Mask = field > np.quantile(field, rng.uniform(0.6, 0.95))
    return mask


def of_monai(found: Mask, truth: Mask, spacing_mm: Spacing) -> dict[str, float]:
    pair = [torch.from_numpy(mask)[None, None] for mask in (found, truth)]
    mm = {"include_background": True, "spacing": spacing_mm}
    figures = {
        "iou": compute_iou(*pair),
        "hausdorff95_mm": compute_hausdorff_distance(*pair, percentile=95, **mm),
        "average_surface_distance_mm": compute_average_surface_distance(*pair, symmetric=True, **mm),
        "surface_dice_1mm": compute_surface_dice(*pair, class_thresholds=[1.0], **mm),
        "surface_dice_2mm": compute_surface_dice(*pair, class_thresholds=[2.0], **mm),
    }
    return {name: float(figure) for name, figure in figures.items()}


def of_simpleitk(found: Mask, truth: Mask, spacing_mm: Spacing) -> dict[str, float]:
    """SimpleITK counts overlaps; distances are read from its distance maps at its contours."""
    images = []
    for mask in (found, truth):
        # With a border: its contours leave out the border of an image.
        image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
        image.SetSpacing(spacing_mm[::-1])
        images.append(image)
    overlaps = sitk.LabelOverlapMeasuresImageFilter()
    overlaps.Execute(*images)
    contours = [sitk.LabelContour(image) for image in images]
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*contours)
    squares = [
        np.abs(
            sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(c, squaredDistance=True, useImageSpacing=True)),
            dtype=np.float64,
        )
        for c in contours
    ]
    on = [sitk.GetArrayFromImage(contour) > 0 for contour in contours]
    # Its maps are float32, and not quite 0 where they should be.
    one, other = (np.sqrt(np.where(square < 1e-9, 0, square)) for square in (squares[1][on[0]], squares[0][on[1]]))
    both = np.concatenate([one, other])
    return {
        "dice": overlaps.GetDiceCoefficient(),
        "iou": overlaps.GetJaccardCoefficient(),
        "precision": 1 - overlaps.GetFalseDiscoveryRate(),
        "recall": 1 - overlaps.GetFalseNegativeError(),
        "hausdorff95_mm": max(np.percentile(one, 95), np.percentile(other, 95)),
        "hausdorff_mm": hausdorff.GetHausdorffDistance(),
        "average_surface_distance_mm": both.mean(),
        "surface_dice_1mm": np.mean(both <= 1 + 1e-4),
        "surface_dice_2mm": np.mean(both <= 2 + 1e-4),
    }


def held_equal(found: Mask, truth: Mask, spacing_mm: Spacing) -> None:
    own = agreement(found, truth, spacing_mm)
    surfaces = surface_distances(found, truth, spacing_mm)
    assert surfaces is not None
    for name, figure in of_monai(found, truth, spacing_mm).items():
        assert getattr(own, name) == pytest.approx(figure, rel=1e-6, abs=1e-6), f"MONAI: {name}"
    farthest = max(surfaces.from_found_mm.max(), surfaces.from_truth_mm.max())
    for name, figure in of_simpleitk(found, truth, spacing_mm).items():
        ours = farthest if name == "hausdorff_mm" else getattr(own, name)
        assert ours == pytest.approx(figure, rel=1e-6, abs=1e-6), f"SimpleITK: {name}"


@given(st.integers(0, 2**32), st.integers(0, 2**32), spacings)
def test_measures_are_those_of_monai_and_simpleitk(one: int, other: int, spacing_mm: Spacing) -> None:
    held_equal(blobs(one), blobs(other), spacing_mm)


@pytest.mark.realdata
def test_measures_of_real_masks_are_those_of_monai_and_simpleitk(realdata: Path) -> None:
    """A lumbar spine as labelled beside itself moved, and beside another patient's."""
    labels = [read_volume(realdata / "spine14" / f"VB2_{number}S-label.nrrd") for number in ("02", "04")]
    spacing_mm = labels[0].geometry.spacing_mm
    truth, other = (label.array[:64, 128:256, 128:256] != 0 for label in labels)
    held_equal(np.roll(truth, (1, 2, -3), (0, 1, 2)), truth, spacing_mm)
    held_equal(other, truth, spacing_mm)


def cube(start: int, size: int = 4) -> Mask:
    mask = np.zeros((20, 20, 20), np.bool_)
    mask[start : start + size, 5 : 5 + size, 5 : 5 + size] = True
    return mask


def test_distances_are_in_millimetres_along_each_axis() -> None:
    """Two cubes, one moved by three voxels of 2.5 mm."""
    own = agreement(cube(8), cube(5), (2.5, 1.0, 0.5))
    assert own.hausdorff95_mm == 7.5
    assert own.volume_difference_ml == 0
    assert own.dice == pytest.approx(2 * 16 / 128)
    moved = agreement(np.moveaxis(cube(8), 0, 2), np.moveaxis(cube(5), 0, 2), (2.5, 1.0, 0.5))
    assert moved.hausdorff95_mm == 1.5


def test_volume_is_what_was_found_less_what_is_true() -> None:
    own = agreement(cube(5, 4), cube(5, 2), (2.0, 5.0, 10.0))
    assert own.volume_difference_ml == pytest.approx((64 - 8) * 0.1)
    assert own.precision == pytest.approx(8 / 64)
    assert own.recall == 1
    assert agreement(cube(5, 2), cube(5, 4), (2.0, 5.0, 10.0)).volume_difference_ml == pytest.approx(-5.6)


def test_ten_voxels_of_a_tenth_are_within_a_millimetre_wherever_they_lie() -> None:
    """Differences of multiples of 0.1 come out above and below 1."""
    for start in range(1, 60):
        line = np.zeros((90, 1, 1), np.bool_)
        other = line.copy()
        line[start], other[start + 10] = True, True
        own = agreement(line, other, (0.1, 1.0, 1.0))
        assert (own.surface_dice_1mm, own.hausdorff95_mm) == (1, pytest.approx(1))


def test_where_nothing_is_found_or_true() -> None:
    nothing, something = np.zeros((3, 4, 12), np.bool_), np.zeros((3, 4, 12), np.bool_)
    something[1, 2, 3] = True
    diagonal = 13 * 0.5
    figures = {name: [getattr(a, name) for a in empties(nothing, something)] for name in (m.name for m in MEASURES)}
    assert figures == {
        "dice": [1, 0, 0],
        "iou": [1, 0, 0],
        "precision": [1, 0, 0],
        "recall": [1, 0, 0],
        "volume_difference_ml": [0, -0.000125, 0.000125],
        "hausdorff95_mm": [0, diagonal, diagonal],
        "average_surface_distance_mm": [0, diagonal, diagonal],
        "surface_dice_1mm": [1, 0, 0],
        "surface_dice_2mm": [1, 0, 0],
    }


def empties(nothing: Mask, something: Mask) -> Iterator[Agreement]:
    """Nothing to find; not found; found where there is nothing."""
    for pair in ((nothing, nothing), (nothing, something), (something, nothing)):
        yield agreement(*pair, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("compare", [overlap, lambda a, b: label_agreements(a, b, (1.0, 1.0, 1.0))])
def test_masks_of_other_shapes_cannot_be_compared(compare: Any) -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 4\)"):
        compare(np.ones((2, 3, 4), np.bool_), np.ones((2, 3, 5), np.bool_))


# Averages


def test_the_batch_averaged_dice_is_of_all_pixels_of_each_batch() -> None:
    slices = [Overlap(10, 0, 0), Overlap(0, 10, 30), Overlap(5, 0, 5)]
    assert batch_averaged_dice(slices, 2) == pytest.approx((20 / 60 + 10 / 15) / 2)
    assert batch_averaged_dice(slices, 1) == pytest.approx((1 + 0 + 10 / 15) / 3)
    assert batch_averaged_dice(slices, 99) == pytest.approx(30 / 75)
    assert batch_averaged_dice([], 8) == 1


def test_an_interval_holds_the_mean_of_all_patients_as_often_as_it_says() -> None:
    """Of 30 patients each, drawn 300 times: 95 of 100 intervals hold the true mean, give or take what chance gives."""
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(0.9, 0.05, 30).tolist()) for _ in range(300)]
    held = sum(i.low < 0.9 < i.high for i in intervals if i.low is not None and i.high is not None)
    assert 270 <= held <= 297


@pytest.mark.parametrize("patients", [6, 7, 10, 14])
def test_an_interval_holds_the_mean_of_skewed_scores_of_few_patients(patients: int) -> None:
    """Dice is skewed to the left; the percentile bootstrap of six patients holds the mean 86 times of 100."""
    rng = np.random.default_rng(2)
    intervals = [mean_interval(rng.beta(40, 6, patients).tolist()) for _ in range(1000)]
    held = sum(i.low < 40 / 46 < i.high for i in intervals if i.low is not None and i.high is not None)
    assert 920 <= held <= 970


@given(st.lists(st.floats(0, 1), min_size=FEWEST_PATIENTS, max_size=30))
def test_an_interval_is_students(figures: list[float]) -> None:
    found = mean_interval(figures)
    assert found.low is not None
    assert found.high is not None
    spread = float(np.std(figures, ddof=1))
    if spread > 1e-6:
        ends = ttest_1samp(figures, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    within = mean_interval(figures, (0.0, 1.0))
    assert (within.low, within.high) == pytest.approx((max(0.0, found.low), min(1.0, found.high)))


def test_of_too_few_patients_there_is_no_interval() -> None:
    assert FEWEST_PATIENTS == 6
    for patients in range(1, FEWEST_PATIENTS):
        few = mean_interval([0.9, 0.8, 0.95, 0.7, 0.85][:patients])
        assert (few.low, few.high) == (None, None)
        assert few.text() == f"{few.mean:.4f}"
    enough = mean_interval([0.9, 0.8, 0.95, 0.7, 0.85, 0.86])
    assert enough.text(2) == f"{enough.mean:.2f} [{enough.low:.2f}, {enough.high:.2f}]"
    same = mean_interval([0.3] * FEWEST_PATIENTS)
    assert (same.low, same.high) == (0.3, 0.3)
