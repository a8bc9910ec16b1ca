"""Voxels that do not count: neither in the store's counts, nor the loss, validation, thresholds, evaluation."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cspine_data import (
    IGNORE_INDEX,
    Volume,
    open_cohort,
    prepare,
    read_volume,
    repair,
    verify,
    write_volume,
)
from cspine_train import RunError, RunSettings, evaluate, train
from cspine_train.data.augmentation import Amounts, Augmentation
from cspine_train.data.batches import SliceBatches
from cspine_train.data.transforms import shares_of
from cspine_train.extensions import LOSSES
from cspine_train.metrics.overlap import overlap
from cspine_train.prediction.stored_volumes import Segmented
from cspine_train.training.losses import SegmentationLoss
from cspine_train.training.segmentation_module import THRESHOLDS, SliceSegmenter, best_threshold
from tests.conftest import QUICK_N4, ball, contents, write_case
from tests.test_labels import BALLS

SIZE = (16, 32, 32)


def marked(value: int, seed: int = 0) -> tuple[Volume, Volume, np.ndarray]:
    """A ball, its label map with a value in one corner and one slab, and where that is."""
    image, label = ball(SIZE, seed)
    ignored = np.zeros(SIZE, bool)
    ignored[:5] = True
    ignored[:, :, 20:] = True
    return image, Volume(np.where(ignored, np.int16(value), label.array.astype(np.int16)), label.geometry), ignored


def cohort_of(folder: Path, value: int, ignore: int | None, names: str = "ABCD") -> Path:
    for number, name in enumerate(names):
        image, label, _ = marked(value, number)
        write_volume(folder / "raw" / f"{name}.nrrd", image)
        write_volume(folder / "raw" / f"{name}-label.nrrd", label)
    summary = prepare(folder / "raw", folder / "s.zarr", n4=False, ignore_label=ignore)
    assert summary.failed == ()
    return folder / "s.zarr"


# The store


@pytest.mark.parametrize("value", [-1, 9])
def test_a_store_does_not_count_them(value: int, tmp_path: Path) -> None:
    store = cohort_of(tmp_path, value, value, "AB")
    cohort = open_cohort(store)
    record = cohort.record("A")
    _, label, ignored = marked(value)
    counted = (label.array != 0) & ~ignored
    assert (record.ignore_label, record.ignored_voxels) == (value, ignored.sum())
    assert (record.labels, record.ignored_values) == ((1, 3), (value,))
    assert record.label_voxels == {v: int((label.array == v).sum()) for v in (1, 3)}
    assert record.labelled_voxels[2] == tuple(counted.sum((0, 1)))
    np.testing.assert_array_equal(cohort.label_xyz("A"), label.array)
    np.testing.assert_array_equal(cohort.export("A", label=True).array, label.array)
    expected = np.where(ignored, IGNORE_INDEX, label.array != 0)
    binary = cohort.slices(axis=0, cases=["A"])
    # The first slices hold nothing but what is ignored, which must be read too.
    np.testing.assert_array_equal(np.stack([binary[n][1][0] for n in range(16)]), expected)
    assert binary[0][1].dtype == np.uint8
    np.testing.assert_array_equal(cohort.volumes(cases=["A"])[0][1][0], expected)
    stored = cohort.slices(axis=0, cases=["A"], labels="stored")
    np.testing.assert_array_equal(np.stack([stored[n][1][0] for n in range(16)]), label.array)
    assert (stored.ignored_values(0), stored.ignores) == ((value,), True)
    assert pickle.loads(pickle.dumps(binary)).ignores  # noqa: S301
    assert len(cohort.slices(axis=0, cases=["A"], only_labelled=True)) == np.count_nonzero(counted.any((1, 2)))


def test_a_case_without_them_keeps_its_bytes(ball_cohort: Path, tmp_path: Path) -> None:
    record = open_cohort(ball_cohort / "s.zarr").record("A")
    written = next((ball_cohort / "s.zarr" / "cases" / "A").glob("*/zarr.json")).read_text()
    assert "ignore" not in written
    assert (record.ignored_values, record.ignored_voxels) == ((), 0)
    prepare(ball_cohort / "raw", tmp_path / "s.zarr", n4=False)
    assert contents(tmp_path / "s.zarr") == contents(ball_cohort / "s.zarr")
    # Asked for where no voxel has it: nothing is masked.
    prepare(ball_cohort / "raw", tmp_path / "t.zarr", n4=False, ignore_label=-1)
    other = open_cohort(tmp_path / "t.zarr")
    assert other.record("A").ignore_label == -1
    assert not other.slices().ignores


def test_the_value_stays_with_a_case(tmp_path: Path, run_data) -> None:
    store = cohort_of(tmp_path, 9, 9, "AB")
    # Forgotten once, the ignored voxels must not become a vertebra.
    again = run_data("prepare", tmp_path / "raw", "--store", store, "--no-n4")
    assert "nothing to do" in again.stdout
    assert open_cohort(store).record("A").ignore_label == 9
    changed = prepare(tmp_path / "raw", store, n4=False, ignore_label=3)
    assert changed.done == ("A", "B")
    assert open_cohort(store).record("A").labels == (1, 9)
    assert prepare(tmp_path / "raw", tmp_path / "t.zarr", n4=False, ignore_label=3).done == ("A", "B")
    zero = run_data("prepare", tmp_path / "raw", "--store", store, "--ignore-label", "0")
    assert (zero.exit_code, "is the background" in zero.output) == (1, True)
    scanned = run_data("scan", tmp_path / "raw", "--ignore-label", "9")
    assert "1 3 9 (ignored)" in scanned.stdout


def test_the_value_holds_for_the_other_variant_and_not_for_another_label_map(tmp_path: Path) -> None:
    store = cohort_of(tmp_path, 9, 9, "AB")
    prepare(tmp_path / "raw", store, preprocessing=QUICK_N4)
    assert open_cohort(store).record("A", variant="n4").ignored_values == (9,)
    path = tmp_path / "raw" / "A-label.nrrd"
    label = read_volume(path)
    write_volume(path, replace(label, array=np.where(label.array == 0, 0, 9).astype(np.uint8)))
    prepare(tmp_path / "raw", store, n4=False)
    assert open_cohort(store).record("A", variant="raw").labels == (9,)


@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_case_is_made_again_with_it(lost: bool, tmp_path: Path) -> None:
    store = cohort_of(tmp_path, -1, -1, "AB")
    before = contents(store)
    folder = next(path for path in (store / "cases" / "A").iterdir() if path.is_dir())
    (folder / ("zarr.json" if lost else "axis0/label/c/0/0/0")).write_bytes(b"damaged")
    summary = repair(store, tmp_path / "raw")
    assert (summary.mended, summary.failed) == ((("A", "raw"),), ())
    assert verify(store) == []
    assert contents(store) == before


def test_a_case_without_a_label_map_is_repaired_beside_cases_with_the_option(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "t.zarr"
    cohort_of(tmp_path, 9, 9, "AB")
    (raw / "A-label.nrrd").unlink()
    prepare(raw, store, n4=False, axes="0", ignore_label=9)
    before = contents(store)
    next((store / "cases" / "A").glob("*/zarr.json")).write_bytes(b"damaged")
    assert repair(store, raw).failed == ()
    assert contents(store) == before


# The loss


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", LOSSES.names())
@pytest.mark.parametrize("empty", [False, True])
def test_a_loss_is_that_of_the_pixels_that_count(name: str, labels: int, empty: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(2, labels + 1 if labels > 1 else 1, 8, 10, generator=generator)
    shares = torch.rand(2, labels, 8, 10, generator=generator) / labels * (not empty)
    ignored = torch.zeros(2, 1, 8, 10)
    # Part of a pixel is enough: what the rest of it holds is not known.
    ignored[:, :, 5:], ignored[:, :, 7] = 1, 0.2
    loss = SegmentationLoss(name, labels)
    whole = logits.clone().requires_grad_()
    found = loss(whole, torch.cat([shares, ignored], 1))
    found.backward()
    cut = logits[:, :, :5].clone().requires_grad_()
    expected = loss(cut, shares[:, :, :5])
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(whole.grad[:, :, :5], cut.grad)
    assert not whole.grad[:, :, 5:].any()
    garbage = shares.clone()
    garbage[:, :, 5:] = 1 / labels
    wild = torch.where(ignored > 0, 1e6, logits)
    assert torch.equal(loss(wild, torch.cat([garbage, ignored], 1)), found)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", LOSSES.names())
def test_a_batch_of_which_nothing_counts_moves_nothing(name: str, labels: int) -> None:
    logits = torch.randn(2, labels + 1 if labels > 1 else 1, 8, 10).requires_grad_()
    loss = SegmentationLoss(name, labels)(logits, torch.ones(2, labels + 1, 8, 10))
    loss.backward()
    assert torch.isfinite(loss)
    assert not logits.grad.any()


# On the way to the network


@pytest.mark.parametrize("labels", ["binary", "stored"])
@pytest.mark.parametrize("pixel_mm", [None, 2.0])
def test_batches_say_what_does_not_count(labels: Any, pixel_mm: float | None, tmp_path: Path) -> None:
    slices = open_cohort(cohort_of(tmp_path, -1, -1, "A")).slices(axis=0, labels=labels)
    values = (1, 3) if labels == "stored" else ()
    batch = SliceBatches(slices, pixel_mm, (64, 64), values, ignores=True).__getitems__(list(range(16)))
    number = max(1, len(values))
    shares = batch.shares(number, ignores=True)
    assert tuple(shares.shape) == (16, number + 1, 64, 64)
    first, inner = shares[0, :, 16:48, 16:48], shares[8, :, 16:48, 16:48]
    if pixel_mm is None:
        # A slice of which nothing counts, and the margin around it, which is background.
        assert bool((first[-1] == 1).all())
        assert shares[:, -1].sum() == 5 * 32 * 32 + 11 * 32 * 12
        assert not shares[0, :, 0].any()
        _, label, ignored = marked(-1)
        truth = torch.from_numpy(np.where(ignored, 0, label.array)[8])
        for channel, value in enumerate(values or (None,)):
            wanted = truth == value if value else truth != 0
            assert torch.equal(inner[channel], wanted.float())
    else:
        assert 0 < shares[8, -1].sum() < shares[0, -1].sum()
        assert shares.sum(1).max() <= 1 + 1e-5


def test_numbers_of_pixels_become_shares() -> None:
    numbers = torch.tensor([[[[0, 1, 2, IGNORE_INDEX]]]], dtype=torch.uint8)
    assert shares_of(numbers, 2, ignores=True)[0, :, 0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert shares_of(numbers, 1, ignores=True)[0, :, 0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_crop_holds_labels_and_not_what_is_ignored() -> None:
    masks = torch.zeros(20, 2, 64, 64)
    masks[:, 0, 50:60, 50:60] = 1
    masks[:, 1, :10, :10] = 1
    images, axes = torch.zeros(20, 1, 64, 64), torch.zeros(20, dtype=torch.int64)
    _, cropped = Augmentation(Amounts(), (32, 32), 1)(images, masks, axes, list(range(20)))
    torch.testing.assert_close(cropped[:, 0].sum((1, 2)), torch.full((20,), 100.0))
    assert not cropped[:, 1].any()


# Validation and evaluation


def test_a_patient_in_whom_nothing_is_labelled_decides_no_threshold() -> None:
    counts = torch.zeros(2, 2, len(THRESHOLDS) + 1, dtype=torch.int64)
    # Labelled voxels above all thresholds but the last; of the other patient 50 above the first five.
    counts[0, 1, -2], counts[0, 0, 3], counts[1, 0, 5] = 100, 40, 50
    alone = best_threshold(counts[:1])
    assert best_threshold(counts) == alone
    assert alone[0] == 1.0
    assert best_threshold(counts[1:]) == (0.0, 0.5)


class Fixed(torch.nn.Module):
    """Stands where a network does: its logits are the images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize("labels", [1, 2])
def test_validation_counts_only_what_counts(labels: int) -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 1 if labels == 1 else 3, 32, 32, generator=generator)
    masks = (torch.rand(4, labels + 1, 32, 32, generator=generator) > 0.6).float()
    numbers, shapes = torch.tensor([0, 0, 1, 1]), torch.full((4, 2), 32)

    def counts(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        settings = RunSettings(labels="stored" if labels > 1 else "binary")
        module = SliceSegmenter(Fixed(), settings, ("A", "B"), labels=labels, ignores=True)
        module.validation_step((images, masks, numbers, shapes), 0)
        return module._counts

    found = counts(images, masks)
    assert found.sum() == (masks[:, -1] == 0).sum()
    garbage, ignored = masks.clone(), masks[:, -1:] > 0
    garbage[:, :-1] = torch.where(ignored, 1 - garbage[:, :-1], garbage[:, :-1])
    assert torch.equal(counts(torch.where(ignored, 99 * images.flip(1), images), garbage), found)


def test_a_volume_is_scored_where_it_counts() -> None:
    rng = np.random.default_rng(3)
    found, truth = rng.integers(0, 2, (2, 6, 7, 8))
    ignored = rng.random((6, 7, 8)) < 0.4
    truth[ignored] = 0
    segmented = Segmented("A", found, (1.0, 1.0, 1.0), found, truth, ignored_xyz=ignored)
    expected = overlap(found[~ignored] != 0, truth[~ignored] != 0)
    assert overlap(segmented.scored(found) != 0, truth != 0) == expected
    slices = segmented.slices[0].values()
    assert sum(one.true_positive for one in slices) == expected.true_positive
    assert sum(one.false_positive for one in slices) == expected.false_positive


def results(store: Path, run: Path, settings: RunSettings) -> tuple[list[dict[str, str]], dict[str, Any]]:
    train(store, run, settings)
    evaluate(run, ("validation", "test"))
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(file)]
    (summary,) = (run / "evaluation").glob("*.json")
    patients = json.loads(summary.read_text())["patients"]
    # The note names the ignored value.
    return rows, [{name: figure for name, figure in row.items() if name != "note"} for row in patients]


@pytest.mark.parametrize("labels", ["binary", "stored"])
def test_training_and_scores_do_not_depend_on_what_is_ignored(labels: Any, tmp_path: Path) -> None:
    how = {**BALLS, "epochs": 2, "crop_margin_mm": 2.0, "pixel_mm": 1.3, "augment": "strong", "coarse_share": 0.5}
    settings = RunSettings(**{**how, "learning_rate": 1e-2}, labels=labels)
    # One value of the training data's own, one that is the last of a byte, one negative.
    found = [
        results(cohort_of(tmp_path / str(value), value, value), tmp_path / str(value) / "run", settings)
        for value in (-1, 255)
    ]
    assert found[0] == found[1]
    other, _ = results(cohort_of(tmp_path / "all", 1, None), tmp_path / "all" / "run", settings)
    assert other[0]["train_loss"] != found[0][0][0]["train_loss"]


def test_a_label_map_that_labels_nothing_neither_validates_nor_is_scored(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in "ABCD":
        write_case(raw, name)
    write_volume(raw / "BS-label.nrrd", Volume(np.zeros((16, 20, 24), np.uint8), ball()[1].geometry))
    assert prepare(raw, store, n4=False, axes="0").failed == ()
    cohort = open_cohort(store)
    assert (cohort.record("B").labelled, cohort.empty_label_maps()) == (False, ("B",))
    assert cohort.split().validation == ("C",)
    told = "labels nothing: left out"
    with pytest.warns(UserWarning, match=told):
        record = train(store, tmp_path / "run", RunSettings(**BALLS))
    assert "B" not in (*record.train, *record.validation, *record.test)
    # A record that names B in two of its parts, as a run has whose case was prepared again with an empty label map.
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    written["test"] = ["B", "D"]
    written["validation"] = ["B"]
    written["digests"]["B"] = cohort.record("B").digest
    (tmp_path / "run" / "run.json").write_text(json.dumps(written))
    evaluation = evaluate(tmp_path / "run")
    assert [score.case for score in evaluation.scores] == ["D"]
    assert any("label maps label nothing" in caveat for caveat in evaluation.caveats)
    with pytest.raises(RunError, match="B label nothing"):
        evaluate(tmp_path / "run", ("validation",))
    # Where only it would validate, nothing is trained.
    (store / ".lock").unlink(missing_ok=True)
    from cspine_data import remove_cases

    remove_cases(store, ["C"])
    with pytest.raises(RunError, match="B labels nothing"):
        train(store, tmp_path / "other", RunSettings(**BALLS))


def test_slices_are_batched_by_a_plain_loader(tmp_path: Path) -> None:
    slices = open_cohort(cohort_of(tmp_path, -1, -1, "A")).slices(axis=0, size_hw=(32, 32))
    _, masks = next(iter(DataLoader(slices, batch_size=16)))
    assert masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1, IGNORE_INDEX}
