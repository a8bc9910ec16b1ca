"""A run from store to Dice, and what happens when it is repeated, killed, moved or tampered with."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from cspine_data import (
    Cohort,
    InputError,
    Preprocessing,
    Volume,
    open_cohort,
    prepare,
    preprocess_volume,
    read_volume,
    write_volume,
)
from cspine_data.volumes.geometry import Orientation
from cspine_train import RunError, RunSettings, evaluate, load_run, predict_volume, train
from cspine_train.cli.commands import default_run_name
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sampling import EpochSampler
from cspine_train.data.sizes import Sides
from cspine_train.metrics.overlap import overlap
from cspine_train.metrics.statistics import MeanInterval
from cspine_train.models.build import build_model, sides_of
from cspine_train.run.record import load_record
from cspine_train.training.segmentation_module import THRESHOLDS, SliceSegmenter, best_threshold
from tests.conftest import ball, write_case
from tests.test_checkpoints import same, weights

pytestmark = pytest.mark.usefixtures("without_pictures")

#: Slices as they are.
WHOLE: dict[str, object] = {"context": 0, "pixel_mm": None, "crop_margin_mm": None}
SMALL = {
    "model": "unet",
    "context": 0,
    "crop_margin_mm": "whole",
    "encoder": "tu-test_resnet",
    "weights": "none",
    "epochs": 2,
    "pixel_mm": 6.0,
    "learning_rate": 3e-3,
    "schedule": "onecycle",
    "precision": "32",
}


@pytest.fixture(scope="module")
def trained(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory, without_pictures: None) -> Path:
    """A run of a small model, two axes, neighbours as channels, a few epochs."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    train(phantom_store, run, RunSettings(**{**SMALL, "axes": (0, 2), "context": 1, "epochs": 3}))
    return run


def test_the_run_folder_says_what_was_done(trained: Path, phantom_store: Path) -> None:
    record = load_record(trained)
    assert record.finished
    assert record.train == ("CS_01", "CS_02")
    assert (record.validation, record.test) == (("CS_03",), ("CS_04",))
    assert record.digests["CS_04"] == open_cohort(phantom_store).record("CS_04", "n4").digest
    assert record.weights_used == "none"
    assert record.preprocessing.variant == "n4"
    assert record.versions["torch"] == version("torch")
    assert record.caveats()[1].startswith("data: synthetic cervical phantom")
    rows = (trained / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,train_loss,valid_dice,threshold,learning_rate,seconds,seconds_waiting"
    assert len(rows) == 4
    assert record.kept_epoch == 2
    assert record.kept_dice == pytest.approx(float(rows[-1].split(",")[2]), abs=1e-5)
    assert record.threshold == float(rows[-1].split(",")[3])
    assert not [file for file in (trained / "model").iterdir() if file.suffix in (".pkl", ".pt", ".ckpt")]


def test_it_learns(trained: Path) -> None:
    first, *_, last = (trained / "metrics.csv").read_text().splitlines()[1:]
    assert float(last.split(",")[1]) < 0.7 * float(first.split(",")[1])
    assert load_record(trained).kept_dice > 0.4


def test_scores_are_of_whole_volumes_patient_by_patient(trained: Path, phantom_store: Path) -> None:
    evaluation = evaluate(trained, ("validation", "test"))
    assert [(score.case, score.split) for score in evaluation.scores] == [("CS_03", "validation"), ("CS_04", "test")]
    run = load_run(trained)
    image, label = open_cohort(phantom_store).volumes(variant="n4", cases=["CS_04"])[0]
    spacing = open_cohort(phantom_store).record("CS_04", "n4").spacing_xyz_mm
    predicted = run.probabilities(image[0], spacing) > run.record.threshold
    both = (predicted & (label[0] > 0)).sum()
    assert evaluation.scores[1].dice == 2 * both / (predicted.sum() + label.sum())
    # Validation patients chose epoch and threshold: their scores are never averaged with those of test patients.
    for split, score in zip(("validation", "test"), evaluation.scores, strict=True):
        assert evaluation.means[split]["dice"] == MeanInterval(score.dice, None, None)
    with pytest.raises(RunError, match="validation and test"):
        _ = evaluation.mean_dice
    written = json.loads(evaluation.files[1].read_text())
    assert "mean_dice" not in written
    assert written["means"]["test"]["dice"]["mean"] == pytest.approx(evaluation.scores[1].dice, abs=1e-6)
    assert written["patients"][1]["dice"] == pytest.approx(evaluation.scores[1].dice, abs=1e-6)
    assert written["caveats"] == list(evaluation.caveats)
    assert evaluation.files[0].read_text().startswith("case,patient,split,dice,iou")


@pytest.mark.parametrize("case", ["CS_03", "CS_04"])
def test_predicting_a_file_gives_what_evaluation_saw(
    case: str, trained: Path, phantom_folder: Path, phantom_store: Path
) -> None:
    """One path: the stored case and its source file end in the same mask, voxel for voxel, on the file's own grid."""
    source = read_volume(phantom_folder / f"{case}.nrrd")
    run = load_run(trained)
    found = run.predict(source)
    assert found.geometry == source.geometry
    assert found.array.dtype == np.uint8
    image, _ = open_cohort(phantom_store).volumes(variant="n4", cases=[case])[0]
    stored = run.probabilities(image[0], open_cohort(phantom_store).record(case, "n4").spacing_xyz_mm)
    stored = stored > run.record.threshold
    np.testing.assert_array_equal(Orientation.of(source.geometry).to_anatomical(found.array), stored)
    assert 0 < found.array.mean() < 0.5


def test_resampled_slices_are_scored_and_predicted_on_the_source_grid(phantom_folder: Path, tmp_path: Path) -> None:
    """Thick slices made thin for training, and everything else coarse: the figure is of the file's own voxels.

    Label values are large here: whatever is above 0 is labelled.
    """
    store, run, raw = tmp_path / "s.zarr", tmp_path / "run", tmp_path / "raw"
    shutil.copytree(phantom_folder, raw)
    for path in raw.glob("*-label.nrrd"):
        label = read_volume(path)
        write_volume(path, Volume(label.array * np.int16(1000), label.geometry))
    prepare(raw, store, preprocessing=Preprocessing(bias=None, spacing_mm=(3.0, 3.0, 2.0)), axes="1")
    train(store, run, RunSettings(**{**SMALL, "axes": (1,), "variant": "raw", "epochs": 1, "pixel_mm": None}))
    source, truth = (read_volume(phantom_folder / name) for name in ("CS_04.nrrd", "CS_04S-label.nrrd"))
    found = load_run(run).predict(source)
    assert found.geometry == source.geometry
    expected = overlap(found.array > 0, truth.array > 0)
    assert expected.true_positive > 0
    (score,) = evaluate(run).scores
    assert score.voxels == expected
    assert 0 < score.dice < 1
    prepare(raw, store, preprocessing=Preprocessing(bias=None, normalisation="percentile"), axes="1")
    told = "N4, zscore, 3 x"
    with pytest.raises(RunError, match=told):
        evaluate(run)


def test_patients_prepared_in_different_ways_are_refused(tmp_path: Path) -> None:
    for name in "ABCD":
        write_case(tmp_path / "raw", name)
    store = tmp_path / "s.zarr"
    prepare(tmp_path / "raw", store, n4=False, axes="0")
    write_case(tmp_path / "raw", "E")
    (tmp_path / "late").mkdir()
    for name in ("E.nrrd", "ES-label.nrrd"):
        (tmp_path / "raw" / name).rename(tmp_path / "late" / name)
    prepare(tmp_path / "late", store, preprocessing=Preprocessing(bias=None, spacing_mm=(2, 2, 2)), axes="0")
    with pytest.raises(RunError, match="prepared in different ways"):
        train(store, tmp_path / "run", RunSettings(**{**SMALL, "variant": "raw"}))


def test_the_threshold_is_the_best_on_the_validation_patients(tmp_path: Path) -> None:
    """At the store's own pixels validation sees what evaluation does."""
    store, run = tmp_path / "s.zarr", tmp_path / "run"
    for name in "ABCD":
        write_case(tmp_path / "raw", name)
    prepare(tmp_path / "raw", store, n4=False)
    train(store, run, RunSettings(**{**SMALL, "variant": "raw", "axes": (2,), "pixel_mm": None, "epochs": 1}))
    loaded, cohort = load_run(run), open_cohort(store)
    (case,) = loaded.record.validation
    image, label = cohort.volumes(cases=[case])[0]
    probabilities = loaded.probabilities(image[0], cohort.record(case).spacing_xyz_mm)
    dice = {threshold: overlap(probabilities > threshold, label[0] > 0).dice for threshold in THRESHOLDS}
    assert loaded.record.kept_dice == pytest.approx(max(dice.values()), abs=1e-6)
    assert dice[loaded.record.threshold] == max(dice.values())
    assert len(set(dice.values())) > 1


def test_of_equally_good_thresholds_the_middle_one_is_taken() -> None:
    counts = torch.zeros(1, 2, len(THRESHOLDS) + 1, dtype=torch.int64)
    counts[0, 0, 0], counts[0, 1, -1] = 90, 10
    assert best_threshold(counts) == (1.0, 0.5)
    counts[0, 1, -1], counts[0, 1, 0] = 0, 10
    assert best_threshold(counts) == (0.0, 0.5)
    assert best_threshold(counts * 0) == (0.0, 0.5)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.floats(0, 1, width=32)), min_size=1))
def test_thresholds_are_compared_by_mean_dice_over_patients(voxels: list[tuple[int, bool, float]]) -> None:
    counts = torch.zeros(3, 2, len(THRESHOLDS) + 1, dtype=torch.int64)
    for patient, truth, probability in voxels:
        counts[patient, int(truth), sum(probability > threshold for threshold in THRESHOLDS)] += 1

    def mean_dice(threshold: float) -> float:
        dice = []
        for patient in range(3):
            marked = np.array([p > threshold for n, _, p in voxels if n == patient], dtype=bool)
            truth = np.array([t for n, t, _ in voxels if n == patient], dtype=bool)
            # A patient in whom nothing is labelled has no Dice.
            dice += [overlap(marked, truth).dice] if truth.any() else []
        return float(np.mean(dice or [0]))

    dice, threshold = best_threshold(counts)
    assert dice == pytest.approx(mean_dice(threshold))
    assert dice == pytest.approx(max(map(mean_dice, THRESHOLDS)))


def test_prediction_sees_the_neighbours_that_training_saw(trained: Path, phantom_store: Path) -> None:
    cohort, run = open_cohort(phantom_store), load_run(trained)
    data = CohortSlices(cohort, run.record.split, run.record.settings)
    images = torch.cat([batch.intensities() for batch in data.val_dataloader()])
    image, _ = cohort.volumes(variant="n4", cases=["CS_03"])[0]
    spacing = cohort.record("CS_03", "n4").spacing_xyz_mm
    seen: list[torch.Tensor] = []

    def watch(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images[:, :1]

    dataclasses.replace(run, network=Watched(watch)).probabilities(image[0], spacing)
    assert torch.equal(torch.cat(seen), images)
    assert images.shape[1] == 3
    assert not torch.equal(images[:, 0], images[:, 2])


class Watched(torch.nn.Module):
    """Stands where a network does, to see what it is fed."""

    def __init__(self, watch: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))
        self.encoder = SimpleNamespace(output_stride=32)
        self.forward = watch


def test_runs_are_fused_as_probabilities(
    trained: Path, phantom_folder: Path, phantom_store: Path, tmp_path: Path
) -> None:
    train(phantom_store, tmp_path / "other", RunSettings(**{**SMALL, "variant": "raw", "seed": 8}))
    runs, source = [load_run(trained), load_run(tmp_path / "other")], read_volume(phantom_folder / "CS_04.nrrd")
    prepared = [preprocess_volume(source, run.record.preprocessing) for run in runs]
    shares = [run.probabilities(p.normalised_xyz(), p.spacing_mm) for run, p in zip(runs, prepared, strict=True)]
    middle = (runs[0].record.threshold + runs[1].record.threshold) / 2
    expected = prepared[0].to_file_grid((shares[0] + shares[1]) / 2 > middle).array
    np.testing.assert_array_equal(predict_volume(runs, source).array, expected)
    assert (expected != runs[0].predict(source).array).any()
    with pytest.raises(RunError, match="no run given"):
        predict_volume([], source)


def test_the_same_command_again_does_nothing(
    trained: Path, phantom_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cspine_train")
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*.*") if "evaluation" not in str(file)}
    record = train(phantom_store, trained, load_record(trained).settings)
    assert record == load_record(trained)
    assert f"nothing to do: {trained} is finished" in caplog.text
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())


def test_a_folder_of_another_run_is_not_overwritten(trained: Path, phantom_store: Path, tmp_path: Path) -> None:
    settings = load_record(trained).settings
    with pytest.raises(
        RunError,
        match="epochs 3, not 9; seed 0, not 5",
    ):
        train(phantom_store, trained, settings.model_copy(update={"seed": 5, "epochs": 9}))
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(RunError, match="is no run folder"):
        train(phantom_store, tmp_path, settings)


def test_other_data_under_the_same_names_are_noticed(trained: Path, phantom_store: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "run.json").read_text()
    digest = load_record(run).digests["CS_04"]
    (run / "run.json").write_text(text.replace(digest, "0" * 32))
    with pytest.raises(RunError, match="store holds now"):
        train(phantom_store, run, load_record(run).settings)
    with pytest.raises(RunError, match="other data of CS_04"):
        evaluate(run)


def test_equal_seeds_make_equal_models_and_others_do_not(phantom_store: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(phantom_store, tmp_path / name, RunSettings(**{**SMALL, "seed": seed, "epochs": 1}))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_loader_processes_change_nothing(phantom_store: Path, tmp_path: Path) -> None:
    settings = RunSettings(**{**SMALL, "epochs": 1})
    train(phantom_store, tmp_path / "0", settings, workers=0)
    train(phantom_store, tmp_path / "2", settings, workers=2)
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pytorch_loader_takes_the_datasets_as_they_are(method: str, phantom_store: Path) -> None:
    from torch.utils.data import DataLoader

    slices = open_cohort(phantom_store).slices(axis=0, variant="n4", cases=["CS_01"])
    assert slices[3][0].shape[0] == 1
    loader = DataLoader(slices, batch_size=4, num_workers=1, multiprocessing_context=method)
    images = torch.cat([batch for batch, _ in loader])
    np.testing.assert_array_equal(images.numpy(), np.stack([slices[i][0] for i in range(len(slices))]))


def test_an_epoch_is_the_labelled_slices_and_a_share_of_empty_ones() -> None:
    counts = np.array([0, 5, 0, 0, 3, 2, 0, 1, 0, 0])
    sampler = EpochSampler(counts, 0.5, seed=4)
    epochs = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1]
        assert len(epochs[-1]) == len(sampler) == 6
        assert {1, 4, 5, 7} <= set(epochs[-1])
        assert len(set(epochs[-1])) == 6
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1
    assert len(EpochSampler(counts, 99, seed=0)) == 10
    assert len(EpochSampler(counts, 0, seed=0)) == 4


def test_the_fixed_size_holds_every_slice_of_the_run(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    settings = RunSettings(axes=(0, 1, 2), weights="none", **WHOLE)
    data = CohortSlices(cohort, cohort.split(variant="n4"), settings)
    largest = np.array([record.size_xyz for record in cohort.records("n4")]).max(0)
    assert data.sizes.slice_hw[0] >= max(largest[0], largest[1])
    assert data.sizes.slice_hw[1] >= max(largest[1], largest[2])
    assert data.sizes.slice_hw[0] % 32 == data.sizes.slice_hw[1] % 32 == 0
    images, _, masks, *_ = next(iter(data.train_dataloader()))
    assert images.shape == masks.shape == (8, 1, *data.sizes.slice_hw)


def test_a_crop_is_as_large_as_the_largest_labelled_region_and_its_margin(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    split = cohort.split(variant="n4")
    settings = RunSettings(axes=(0,), weights="none", pixel_mm=1.0, crop_margin_mm=10.0, context=1)
    data = CohortSlices(cohort, split, settings)
    extents = []
    for case in split.train:
        record = cohort.record(case, "n4")
        _, label = cohort.volumes(variant="n4", cases=[case])[0]
        extents.append([np.ptp(at) + 1 for at in np.nonzero(label[0])[1:]] * np.array(record.spacing_xyz_mm[1:]))
    needed = np.ceil(np.max(extents, axis=0) + 20)
    assert data.sizes.crop_hw is not None
    for size, least, full in zip(data.sizes.crop_hw, needed, data.sizes.slice_hw, strict=True):
        assert size % 32 == 0
        assert size == full or least <= size < least + 32
    assert data.sizes.crop_hw[0] < data.sizes.slice_hw[0]
    module = SliceSegmenter(torch.nn.Identity(), settings, split.validation, data.sizes)
    module.trainer = SimpleNamespace(training=True, global_step=3, global_rank=0, world_size=1)
    images, masks, *_ = module.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert tuple(images.shape) == (8, 3, *data.sizes.crop_hw)
    assert tuple(masks.shape) == (8, 1, *data.sizes.crop_hw)
    module.trainer.training = False
    images, *_ = module.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert tuple(images.shape[-2:]) == data.sizes.slice_hw
    assert CohortSlices(cohort, split, settings.model_copy(update={"crop_margin_mm": None})).sizes.crop_hw is None


@pytest.mark.parametrize(
    ("model", "stride", "least"),
    [
        ("unet", 32, 32),
        ("fpn", 32, 32),
        ("linknet", 32, 32),
        ("pspnet", 8, 8),
        ("deeplabv3plus", 16, 16),
        ("pan", 16, 128),
    ],
)
def test_the_fixed_size_is_the_smallest_that_the_network_takes(
    model: str, stride: int, least: int, phantom_store: Path
) -> None:
    cohort = open_cohort(phantom_store)
    settings = RunSettings(model=model, weights="none", context=0, pixel_mm=3.0, crop_margin_mm=None)
    network, _ = build_model(model, SMALL["encoder"])
    assert sides_of(network) == Sides(stride, least)
    data = CohortSlices(cohort, cohort.split(variant="n4"), settings, sides=sides_of(network))
    largest = np.max([np.round(np.multiply(r.size_xyz, r.spacing_xyz_mm) / 3) for r in cohort.records("n4")], 0)[1:]
    assert data.sizes.slice_hw == tuple(np.maximum(np.ceil(largest / stride) * stride, least))
    with torch.inference_mode():
        assert tuple(network.eval()(torch.zeros(1, 1, *data.sizes.slice_hw)).shape[-2:]) == data.sizes.slice_hw
        if model != "unet":
            with pytest.raises(RuntimeError, match="Wrong input shape"):
                network(torch.zeros(1, 1, data.sizes.slice_hw[0] + stride // 2, data.sizes.slice_hw[1]))
        if least > stride:
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 1, least - stride, least))


def labelled_bounds(cohort: Cohort, case: str) -> list[tuple[int, int]]:
    _, label = cohort.volumes(variant="n4", cases=[case])[0]
    return [(int(at.min()), int(at.max())) for at in np.nonzero(label[0])]


def test_a_size_that_was_asked_for_is_refused_just_where_it_cuts_labelled_voxels(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    split = cohort.split(variant="n4")
    needed = []
    for case in (*split.train, *split.validation):
        size = cohort.record(case, "n4").size_xyz
        for axis, (first, last) in list(enumerate(labelled_bounds(cohort, case)))[1:]:
            wanted = next(w for w in range(1, size[axis] + 1) if (size[axis] - w) // 2 <= first and
                          (size[axis] - w) // 2 + w > last)  # fmt: skip
            needed.append((axis, wanted, case))
    height, width = (-(-max(wanted for a, wanted, _ in needed if a == axis) // 8) * 8 for axis in (1, 2))
    whole = CohortSlices(cohort, split, RunSettings(**WHOLE), sides=Sides(8, 8))
    assert height < whole.sizes.slice_hw[0] or width < whole.sizes.slice_hw[1]
    data = CohortSlices(cohort, split, RunSettings(**WHOLE, size_hw=(height, width), empty_share=0), sides=Sides(8, 8))
    assert data.sizes.slice_hw == (height, width)
    loader = data.train_dataloader()
    seen = np.concatenate([masks.sum((1, 2, 3)).numpy() for _, _, masks, *_ in loader])
    loader.batch_sampler.sampler.set_epoch(0)
    order = list(loader.batch_sampler.sampler)[: len(seen)]
    labelled = cohort.slices(0, variant="n4", cases=split.train).labelled_voxels
    np.testing.assert_array_equal(seen, labelled[order])
    images, *_ = next(iter(data.val_dataloader()))
    assert tuple(images.shape[-2:]) == whole.sizes.slice_hw
    for size in ((height - 8, width), (height, width - 8)):
        told = (
            rf"size {size[0]},{size[1]}: would cut \d+\.\d mm \(\d pixels\) off the labelled region of CS_0[123] along "
            rf"axis {1 if size[0] < height else 2}; the smallest --size that cuts nothing off is {height},{width}$"
        )
        with pytest.raises(RunError, match=told):
            CohortSlices(cohort, split, RunSettings(**WHOLE, size_hw=size), sides=Sides(8, 8))


def test_a_run_on_cropped_slices_predicts_whole_ones(phantom_store: Path, phantom_folder: Path, tmp_path: Path) -> None:
    cohort = open_cohort(phantom_store)
    settings = RunSettings(**{**SMALL, "model": "pspnet", "epochs": 1, "size_hw": (32, 72), "pixel_mm": 3.0})
    whole = CohortSlices(
        cohort, cohort.split(variant="n4"), settings.model_copy(update={"size_hw": None}), sides=Sides(8, 8)
    )
    assert whole.sizes.slice_hw[0] > 32
    assert whole.sizes.slice_hw[1] < 72
    assert train(phantom_store, tmp_path / "run", settings).size_hw == (32, 72)
    run, seen = load_run(tmp_path / "run"), []
    run.network.register_forward_pre_hook(lambda _, images: seen.append(tuple(images[0].shape[-2:])))
    source = read_volume(phantom_folder / "CS_04.nrrd")
    assert run.predict(source).geometry == source.geometry
    assert set(seen) == {(whole.sizes.slice_hw[0], 72)}
    assert evaluate(tmp_path / "run").scores


def test_a_size_that_no_network_takes_is_refused(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    common = ("run", "--store", phantom_store, "--weights", "none", "-o", tmp_path / "run", "--size")
    for size, told in (
        ("100,70", "size 100,70: {}; the nearest --size is 96,64 and 128,96"),
        ("20", "size 20,20: {}; the nearest --size is 32,32"),
    ):
        refused = run_train(*common, size)
        assert refused.exit_code == 1
        told = told.format("linknet with encoder tu-resnet10t takes multiples of 32")
        assert refused.output == f"Error: {told}\n"
    refused = run_train(*common, "160,60", "--model", "pan")
    assert "pan with encoder tu-resnet10t takes multiples of 16 from 128 on; the nearest" in refused.output
    assert "--size is 160,128\n" in refused.output
    for size in ("0", "32,0", "32,32,32", "-32", "32.5", "a", ""):
        refused = run_train(*common, size)
        assert refused.exit_code == 2
        assert "--size" in refused.output
    assert not (tmp_path / "run").exists()


def test_pixels_larger_than_what_is_labelled_are_refused(phantom_store: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fewer than 4 pixels"):
        train(phantom_store, tmp_path / "run", RunSettings(**{**SMALL, "pixel_mm": 500.0}))
    assert not (tmp_path / "run").exists()


def test_too_few_cases_are_told(store: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="prepare at least three"):
        train(store, tmp_path / "run", RunSettings(**{**SMALL, "variant": "raw"}))
    with pytest.raises(InputError, match="made of 2 labelled"):
        train(store, tmp_path / "run", RunSettings(**{**SMALL, "variant": "raw", "folds": 5}))


def test_nothing_labelled_is_told_before_training(tmp_path: Path) -> None:
    for number in range(3):
        image, label = ball(seed=number)
        write_volume(tmp_path / "raw" / f"{number}.nrrd", image)
        write_volume(tmp_path / "raw" / f"{number}-label.nrrd", Volume(label.array * 0, label.geometry))
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False)
    with pytest.raises(RunError, match="0, 1, 2 labels"):
        train(tmp_path / "s.zarr", tmp_path / "run", RunSettings(**{**SMALL, "variant": "raw"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("{}", "is damaged"), ('{"record_version": 1, "evil": 2}', "is damaged")],
)
def test_a_damaged_record_is_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=f"{message}.*; train"):
        load_run(tmp_path)


def test_what_is_no_run_is_told(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text((trained / "run.json").read_text())
    with pytest.raises(RunError, match="trained model yet"):
        load_run(tmp_path)
    without = load_record(trained).model_copy(update={"train": ()})
    (tmp_path / "run.json").write_text(without.model_dump_json())
    shutil.copytree(trained / "model", tmp_path / "model")
    with pytest.raises(RunError, match="has no train patients"):
        evaluate(tmp_path, ["train"])
    newer = {**json.loads((trained / "run.json").read_text()), "record_version": 9, "a field of tomorrow": 1}
    (tmp_path / "run.json").write_text(json.dumps(newer))
    with pytest.raises(RunError, match="written by a newer"):
        load_run(tmp_path)


def test_the_command_line_evaluates_and_predicts(
    trained: Path, phantom_folder: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    scored = run_train("evaluate", trained)
    assert scored.exit_code == 0
    columns = re.split("  +", scored.output.splitlines()[0])
    assert columns[:5] == ["case", "split", "Dice", "IoU", "Hausdorff 95 %, mm"]
    assert re.search(r"CS_04 +test +0\.\d{4}", scored.output)
    assert "started from random weights" in scored.output
    assert "note: data: synthetic" in scored.output
    alone = run_train("predict", phantom_folder / "CS_02.nrrd", "--run", trained, "-o", tmp_path / "one.nii.gz")
    assert alone.exit_code == 0
    assert read_volume(tmp_path / "one.nii.gz").geometry.same_grid(read_volume(phantom_folder / "CS_02.nrrd").geometry)
    (tmp_path / "bad.nrrd").write_text("no volume")
    several = run_train(
        "predict", phantom_folder / "CS_02.nrrd", tmp_path / "bad.nrrd", phantom_folder / "CS_03.nrrd",
        "--run", trained, "--run", shutil.copytree(trained, tmp_path / "twin"), "-o", tmp_path / "out",
    )  # fmt: skip
    assert several.exit_code == 1
    assert "readable NRRD file" in several.output
    predicted = ["CS_02-label.nrrd", "CS_03-label.nrrd", "predictions.csv"]
    assert sorted(file.name for file in (tmp_path / "out").glob("[!.]*")) == predicted
    again = run_train("predict", phantom_folder / "CS_02.nrrd", "--run", trained, "-o", tmp_path / "out")
    assert again.exit_code == 1
    assert "CS_02-label.nrrd: exists already" in again.output
    twice = run_train(
        "predict", phantom_folder / "CS_02.nrrd", phantom_folder / "CS_02.nrrd", "--run", trained, "-o", tmp_path
    )
    assert "have the same name" in twice.output


def test_a_volume_without_contrast_cannot_be_predicted(trained: Path, tmp_path: Path, run_train) -> None:
    source = read_volume(write_constant(tmp_path / "flat.nrrd"))
    with pytest.raises(InputError, match="is constant"):
        load_run(trained).predict(source)
    done = run_train("predict", tmp_path / "flat.nrrd", "--run", trained, "-o", tmp_path / "x.nrrd")
    assert done.exit_code == 1
    assert not (tmp_path / "x.nrrd").exists()


def write_constant(path: Path) -> Path:
    image, _ = ball()
    write_volume(path, Volume(np.full_like(image.array, 5), image.geometry))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--store", "nowhere"), "nowhere: is no cspine"),
        (("evaluate", "nowhere"), "nowhere: is no run"),
        (("predict", ".", "--run", "nowhere", "-o", "y.nrrd"), "nowhere: is no run"),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[str, ...], message: str, run_train: Callable[..., Result]) -> None:
    done = run_train(*arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pixel-mm", "-1"), "--pixel-mm: Input should be greater than or equal to 0.05"),
        (("--learning-rate", "nan"), "--learning-rate: Input should"),
        (("--crop-margin-mm", "inf"), "--crop-margin-mm: Input should"),
        (("--fold", "1"), "a fold needs --folds"),
        (("--folds", "5", "--fold", "5"), "counted from 0"),
    ],
)
def test_a_setting_out_of_range_is_told(
    arguments: tuple[str, ...], message: str, run_train: Callable[..., Result]
) -> None:
    done = run_train("run", *arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_what_cannot_hold_a_prediction_is_refused(
    trained: Path, phantom_folder: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    volumes = [phantom_folder / "CS_02.nrrd", phantom_folder / "CS_03.nrrd"]
    one = run_train("predict", volumes[0], "--run", trained, "-o", tmp_path / "mask.png")
    assert "name for a label" in one.output
    several = run_train("predict", *volumes, "--run", trained, "-o", tmp_path / "mask.nii.gz")
    assert "mask.nii.gz: is a file" in several.output
    assert one.exit_code == several.exit_code == 1
    assert not list(tmp_path.iterdir())
    dotted = run_train("predict", *volumes, "--run", trained, "-o", tmp_path / "masks_v1.2")
    assert dotted.exit_code == 0
    assert len(list((tmp_path / "masks_v1.2").glob("*-label.nrrd"))) == 2


def test_a_store_that_moved_is_asked_for(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    record = load_record(run)
    (run / "run.json").write_text(record.model_copy(update={"store": str(tmp_path / "gone.zarr")}).model_dump_json())
    with pytest.raises(RunError, match="exist any more"):
        evaluate(run)
    assert evaluate(run, store=record.store).scores


def test_runs_of_other_settings_lie_in_folders_of_their_own() -> None:
    settings = {"model": "fpn", "encoder": "inceptionv4"}
    plain = default_run_name(RunSettings(**settings))
    assert plain == "fpn-inceptionv4-axis0-n4-seed0"
    others = {default_run_name(RunSettings(**settings, **more)) for more in ({"context": 2}, {"pixel_mm": 3.0})}
    assert len(others) == 2
    assert all(name.startswith(f"{plain}-") for name in others)


def test_models_are_listed(run_train: Callable[..., Result]) -> None:
    output = run_train("models").output
    assert "unet fpn linknet pspnet" in output
    assert "inceptionv4" in output


def test_a_run_trains_and_is_evaluated_over_the_network(
    serve: Callable[[Path], str], phantom_store: Path, tmp_path: Path
) -> None:
    settings = RunSettings(**{**SMALL, "epochs": 1, "pixel_mm": 12.0})
    far, near = tmp_path / "far", tmp_path / "near"
    url = serve(phantom_store)
    assert train(url, far, settings).store == url
    train(phantom_store, near, settings)
    assert same(weights(far), weights(near))
    assert [score.dice for score in evaluate(far, store=url).scores] == [score.dice for score in evaluate(near).scores]
