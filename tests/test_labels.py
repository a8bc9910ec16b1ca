"""Label values as stored, from the store through a softmax back to a label map on the file's own grid."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cspine_data import (
    LEVEL_NAMES,
    Preprocessing,
    Split,
    Volume,
    open_cohort,
    prepare,
    preprocess_volume,
    read_volume,
    write_volume,
)
from cspine_data.volumes.geometry import Geometry, Orientation, as_rows
from cspine_train import RunError, RunSettings, evaluate, load_run, predict_volume, train
from cspine_train.cli.commands import main as train_main
from cspine_train.data.batches import SliceBatches
from cspine_train.data.transforms import masks_to_network
from cspine_train.metrics.instances import (
    LEVEL_MEASURES,
    identification,
    label_centroids,
    label_overlaps,
    panoptic_quality,
)
from cspine_train.metrics.overlap import (
    MEASURES,
    Overlap,
    agreement,
    diagonal_mm,
    label_agreements,
    mean_over_labels,
    overlap,
)
from cspine_train.prediction.files import predict_files
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.run.label_classes import (
    class_numbers,
    label_values,
    stored_values,
    unknown_labels,
    unknown_labels_note,
)
from cspine_train.run.record import RunRecord, load_record
from cspine_train.training.confusion import confusion, mean_label_dice
from tests.conftest import ball
from tests.test_training import SMALL

SIZE = (224, 256)
PHANTOM = (1, 2, 3, 4, 5, 6, 7)
RAW = Preprocessing(bias=None)
many_values = st.sets(st.integers(-(2**31), 2**31 - 1).filter(bool), min_size=1, max_size=8).map(sorted)


def stand_in(**values: tuple[int, ...]) -> Any:
    """What is asked of a cohort: which label values its cases have."""
    records = {
        case: SimpleNamespace(case=case, labels=of_case, segments={}, overlaps=(), label_centroids_mm={})
        for case, of_case in values.items()
    }
    return SimpleNamespace(path="s.zarr", record=lambda case, _: records[case])


MM = (1.0, 1.0, 1.0)
MISSED = agreement(np.zeros((1, 1, 1), np.bool_), np.ones((1, 1, 1), np.bool_), MM)

# Values and numbers


@given(many_values, st.integers(0, 99))
def test_values_come_back_as_they_went(values: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).choice(np.array([0, *values], np.int64), (3, 4, 5))
    numbers = class_numbers(labels, values)
    back = stored_values(numbers, values)
    np.testing.assert_array_equal(back, labels)
    smaller = {1: (), 2: (np.int8, np.uint8), 4: (np.int16, np.uint16)}[back.dtype.itemsize]
    assert not any(np.iinfo(d).min <= min(values) and max(values) <= np.iinfo(d).max for d in smaller)


def test_what_is_none_of_the_values_is_background() -> None:
    assert class_numbers(np.array([0, 5, 9, -5]), (5,)).tolist() == [0, 1, 0, 0]
    assert stored_values(np.array([0, 1], np.uint8), ()).tolist() == [0, 1]
    assert stored_values(np.array([0, 1], np.uint8), ()).dtype == np.uint8


def test_the_values_are_those_of_cases_that_train() -> None:
    cohort = stand_in(a=(2, 7), b=(1, 2), c=(2, 9, 13), d=(7,), e=(1, 400))
    split, asked = Split(("a", "b"), ("c",), ("d", "e")), RunSettings(labels="stored")
    assert label_values(cohort, split, asked) == (1, 2, 7)
    assert unknown_labels(cohort, split, asked, (1, 2, 7)) == {"c": (9, 13), "e": (400,)}
    weighed = RunSettings(labels="stored", case_weights={"a": 0})
    assert label_values(cohort, split, weighed) == (1, 2)
    assert label_values(cohort, split, RunSettings()) == ()
    assert unknown_labels(cohort, split, RunSettings(), ()) == {}


@pytest.mark.parametrize(
    ("values", "told"),
    [(tuple(range(1, 257)), "256 different label values"), ((1, 2**40), "the label value 1099511627776")],
)
def test_labels_that_cannot_be_told_apart_are_refused(values: tuple[int, ...], told: str) -> None:
    message = rf"^s.zarr: its training cases have {told}; at most 254 .*: renumber them, or train with --labels binary$"
    with pytest.raises(RunError, match=message):
        label_values(stand_in(a=values), Split(("a",), (), ()), RunSettings(labels="stored"))


def test_unknown_labels_are_told_in_one_line() -> None:
    told = unknown_labels_note({"C": (8, 9), "D": (9,), "E": (9,), "F": (9,), "G": (9,)})
    assert told.startswith("labels that no training")
    assert "E has 9" in told


# Shares, batches


def test_shares_of_labels_add_up_to_the_binary_share() -> None:
    masks = np.random.default_rng(0).integers(0, 4, (2, 30, 40)).astype(np.uint8)
    shares = masks_to_network(masks, (1.0, 1.5), 2.0, (32, 32), 3)
    assert tuple(shares.shape) == (2, 3, 32, 32)
    binary = masks_to_network((masks > 0).astype(np.uint8), (1.0, 1.5), 2.0, (32, 32))
    torch.testing.assert_close(shares.sum(1, keepdim=True), binary, atol=1e-5, rtol=0)
    for number in (1, 2, 3):
        alone = masks_to_network((masks == number).astype(np.uint8), (1.0, 1.5), 2.0, (32, 32))
        torch.testing.assert_close(shares[:, number - 1], alone[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pixel_mm", [None, 2.0])
def test_batches_hold_the_labels_that_slices_hold(pixel_mm: float | None, phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=(0, 2), variant="n4", labels="stored")
    items = np.random.default_rng(1).permutation(np.flatnonzero(slices.labelled_voxels))[:6].tolist()
    values = (2, 3, 5)
    batch = SliceBatches(slices, pixel_mm, SIZE, values).__getitems__(items)
    shares = batch.shares(3)
    assert batch.masks.dtype == (torch.float32 if pixel_mm else torch.uint8)
    assert batch.masks.shape[1] == (3 if pixel_mm else 1)
    assert shares.dtype == torch.float32
    for item, found in zip(items, shares, strict=True):
        label = slices[item][1]
        for value, of_value in zip(values, found, strict=True):
            mask = (label == value).astype(np.uint8)
            expected = masks_to_network(mask, slices.spacing_mm(item), pixel_mm, SIZE)[0, 0]
            torch.testing.assert_close(of_value, expected, atol=1e-6, rtol=0)


# Scores


def test_labels_are_scored_by_value_and_averaged_over_those_a_patient_has() -> None:
    truth = np.array([1, 1, 5, 5, 0, 0, 9]).reshape(1, 1, 7)
    found = np.array([1, 0, 5, 5, 5, 7, 0]).reshape(1, 1, 7)
    overlaps = label_agreements(found, truth, MM)
    assert {value: of.voxels for value, of in overlaps.items()} == {
        1: Overlap(1, 0, 1),
        5: Overlap(2, 1, 0),
        7: Overlap(0, 1, 0),
        9: Overlap(0, 0, 1),
    }
    assert mean_over_labels(overlaps, "dice") == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert mean_over_labels(overlaps, "iou") == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert mean_over_labels(label_agreements(found, truth * 0, MM), "dice") == 0
    assert mean_over_labels(label_agreements(found * 0, truth * 0, MM), "dice") == 1


@given(st.integers(2, 4), st.integers(0, 999), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_validation_counts_what_evaluation_counts(labels: int, seed: int, unknown: list[int]) -> None:
    rng = np.random.default_rng(seed)
    # Few voxels, so that patients lack labels, or have none.
    truth, found = (rng.integers(0, labels + 1, (4, 2, 3)) * rng.integers(0, 2, (4, 1, 1)) for _ in range(2))
    numbers = rng.integers(0, 3, 4)
    shares = (torch.from_numpy(truth)[:, None] == torch.arange(1, labels + 1).view(1, -1, 1, 1)).float()
    logits = torch.nn.functional.one_hot(torch.from_numpy(found), labels + 1).movedim(3, 1).float()
    inside = rng.random((4, 2, 3)) < 0.8
    within = torch.from_numpy(inside)[:, None]
    counts = sum(
        confusion(logits[part], shares[part], torch.from_numpy(numbers)[part], within[part], 3)
        for part in (slice(0, 3), slice(3, 4))
    )
    truth, found = truth * inside, found * inside
    expected = []
    for patient in range(3):
        overlaps = label_agreements(found[numbers == patient], truth[numbers == patient], MM)
        missed = {100 + n: MISSED for n in range(unknown[patient])}
        # A patient without any label has no Dice.
        if missed or truth[numbers == patient].any():
            expected.append(mean_over_labels(overlaps | missed, "dice"))
    assert mean_label_dice(counts, unknown) == pytest.approx(np.mean(expected or [0]))


# Prediction


class Reads(torch.nn.Module):
    """Stands where a network does: sees each voxel's label in its intensity."""

    def __init__(self, intensities: list[float]) -> None:
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))
        self.encoder = SimpleNamespace(output_stride=32)
        self.intensities = torch.tensor(intensities)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        numbers = (images - self.intensities.view(1, -1, 1, 1)).abs().argmin(1)
        logits = 50 * torch.nn.functional.one_hot(numbers, len(self.intensities)).movedim(3, 1).float()
        return logits if len(self.intensities) > 2 else logits[:, 1:] - 25


def a_run(
    network: torch.nn.Module, values: tuple[int, ...], axes: tuple[int, ...] = (0,), name: str = "r"
) -> LoadedRun:
    settings = RunSettings(axes=axes, labels="stored" if values else "binary", context=0, pixel_mm=None)
    record = RunRecord(
        store="s.zarr", settings=settings, weights_used="none", size_hw=(32, 32), preprocessing=RAW, train=(),
        validation=(), test=(), label_values=values, digests={}, versions={},
    )  # fmt: skip
    return LoadedRun(Path(name), record, network)


@given(
    many_values,
    st.permutations(range(3)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.lists(st.sampled_from([(0,), (1,), (2,), (0, 1, 2)]), min_size=1, max_size=2),
    st.integers(0, 99),
)
def test_a_network_that_is_right_gives_the_label_map_back(
    values: list[int],
    order: list[int],
    flips: tuple[bool, ...],
    runs: list[tuple[int, ...]],
    seed: int,
) -> None:
    """On a grid of any order, tilted, through any axes, one run or two: every voxel keeps its value."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    tilt = Rotation.from_euler("xyz", rng.uniform(-15, 15, 3), degrees=True).as_matrix()
    grid = Geometry(size=(9, 11, 13), spacing_mm=(2.0, 1.0, 0.7), directions=as_rows(tilt), origin_mm=(3.0, -4.0, 5.0))
    stored = Orientation(tuple(order), flips)
    numbers = rng.integers(0, len(values) + 1, grid.size).astype(np.uint8)
    label = stored.to_file(np.array([0, *values])[numbers])
    image = 100 + 40 * numbers.astype(np.int16) + rng.integers(-9, 10, grid.size, dtype=np.int16)
    source = Volume(np.ascontiguousarray(stored.to_file(image)), stored.geometry_in_file(grid))
    normalisation = preprocess_volume(source, RAW).normalisation
    intensities = normalisation.apply(100 + 40 * np.arange(len(values) + 1, dtype=np.float32)).tolist()
    network = Reads(intensities)
    found = predict_volume([a_run(network, tuple(values), axes) for axes in runs], source)
    np.testing.assert_array_equal(found.array, label)
    assert found.geometry == source.geometry


def test_probabilities_of_labels_add_up_to_those_of_vertebra() -> None:
    image = np.random.default_rng(0).normal(size=(5, 20, 24)).astype(np.float32)
    run = a_run(Reads([-0.5, 0.0, 0.5]), (3, 8), (0, 1))
    found = run.label_probabilities(image, (2.0, 1.0, 1.0))
    assert found.shape == (2, 5, 20, 24)
    np.testing.assert_allclose(run.probabilities(image, (2.0, 1.0, 1.0)), found.sum(0), atol=1e-6)
    np.testing.assert_allclose(found.sum(0), image > -0.25, atol=1e-6)


def test_runs_of_other_labels_are_not_fused(tmp_path: Path) -> None:
    network = Reads([0.0, 1.0, 2.0])
    runs = [a_run(network, (1, 2)), a_run(network, (1, 3), name="q")]
    told = r"\(1, 3\) than r \(1, 2\)"
    with pytest.raises(RunError, match=told):
        predict_volume(runs, ball()[0])
    with pytest.raises(RunError, match=told):
        next(predict_files(runs, [tmp_path / "a.nrrd"], tmp_path / "b.nrrd"))
    with pytest.raises(RunError, match=r"r \(vertebra or not\)"):
        predict_volume([a_run(network, ()), runs[1]], ball()[0])


# Runs


def test_a_run_tells_labels_apart(phantom_store: Path, phantom_folder: Path, tmp_path: Path) -> None:
    """Through the command line: train, evaluate and predict."""
    import segmentation_models_pytorch as smp

    run, options = tmp_path / "run", {**SMALL, "encoder": "tu-mobilenetv3_small_100", "epochs": 6, "axis": "0"}
    options |= {"labels": "stored", "loss": "dice_focal"}
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = called("run", "--store", phantom_store, *given, "-o", run)
    assert "4, 5, 6, 7" in done.output
    record = load_record(run)
    assert record.label_values == PHANTOM
    assert json.loads((run / "model" / "config.json").read_text())["classes"] == 8
    loaded, image = load_run(run), torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        again = smp.from_pretrained(str(run / "model")).eval()(image)
        torch.testing.assert_close(again, loaded.network(image), atol=5e-2, rtol=1e-2)
    scored = called("evaluate", run)
    first, *others = scored.output.splitlines()
    assert first.endswith("Dice of labels  IoU of labels")
    assert sum("identification rate" in line for line in others) == 2
    twin = shutil.copytree(run, tmp_path / "twin")
    called("predict", phantom_folder / "CS_04.nrrd", "--run", run, "--run", twin, "-o", tmp_path / "p.nrrd")
    found, truth = read_volume(tmp_path / "p.nrrd"), read_volume(phantom_folder / "CS_04S-label.nrrd")
    assert found.array.dtype == np.uint8
    overlaps = label_agreements(found.array, truth.array, found.geometry.spacing_mm)
    assert len(np.unique(found.array)) > 1
    with (run / "evaluation" / "test-labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = ["case", "split", "dice", "iou"]
    columns += [f"{kind}_voxels" for kind in ("true_positive", "false_positive", "false_negative")]
    columns += [measure.name for measure in MEASURES[2:]]
    of_vertebra = ["label", "level", "probability", "true_level"]
    of_name = ["identification_rate", "localisation_distance_mm"]
    assert list(rows[0]) == [*columns[:2], *of_vertebra, *columns[2:], *of_name, "note"]
    assert {int(row["label"]): float(row["dice"]) for row in rows} == {
        value: pytest.approx(voxels.dice, abs=1e-6) for value, voxels in overlaps.items()
    }
    with (run / "evaluation" / "test.csv").open() as file:
        (row,) = csv.DictReader(file)
    columns[1:2] = ["patient", "split"]
    of_levels = [measure.name for measure in LEVEL_MEASURES]
    expected = [*columns, "batch_averaged_dice", "label_dice", "label_iou", *of_levels, "expected_dice", "note"]
    assert list(row) == expected
    assert float(row["dice"]) == pytest.approx(overlap(found.array > 0, truth.array > 0).dice, abs=1e-6)
    assert float(row["label_dice"]) == pytest.approx(mean_over_labels(overlaps, "dice"), abs=1e-6)
    summary = json.loads((run / "evaluation" / "test.json").read_text())
    assert summary["mean_label_dice"] == pytest.approx(float(row["label_dice"]), abs=1e-6)
    assert [one["label"] for one in summary["labels"]] == [int(one["label"]) for one in rows]
    assert [one["level"] for one in summary["labels"]] == [LEVEL_NAMES[one["label"]] for one in summary["labels"]]
    named = identification(
        *(label_centroids(one.array, one.geometry.spacing_mm) for one in (found, truth)),
        diagonal_mm(truth.array.shape, truth.geometry.spacing_mm),
    )
    assert float(row["identification_rate"]) == pytest.approx(named.rate, abs=1e-6)
    assert float(row["localisation_distance_mm"]) == pytest.approx(named.distance_mm, abs=1e-6)
    quality = panoptic_quality(label_overlaps(found.array, truth.array))
    assert float(row["panoptic_quality"]) == pytest.approx(quality.panoptic, abs=1e-6)


def called(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(train_main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


BALLS = {**SMALL, "variant": "raw", "epochs": 1, "pixel_mm": None, "axes": (0,)}


#: A network that learns to tell balls from shells.
QUICKLY = {"encoder": "tu-mobilenetv3_small_100", "epochs": 8, "learning_rate": 1e-2}


def balls(folder: Path, **values: dict[int, int]) -> Path:
    """Make a store of balls whose label values, 1 and 3, become others in some cases."""
    for number, (name, renamed) in enumerate(values.items()):
        image, label = ball((16, 32, 32), seed=number)
        array = label.array.astype(np.int16)
        for old, new in renamed.items():
            array[label.array == old] = new
        write_volume(folder / "raw" / f"{name}.nrrd", image)
        write_volume(folder / "raw" / f"{name}S-label.nrrd", Volume(array, label.geometry))
    assert prepare(folder / "raw", folder / "s.zarr", n4=False, axes="0").done == tuple(values)
    return folder / "s.zarr"


def test_labels_are_learnt(tmp_path: Path) -> None:
    """A ball within a shell: the same intensities, told apart by where they are."""
    store = balls(tmp_path, A={}, B={}, C={}, D={})
    train(store, tmp_path / "run", RunSettings(**{**BALLS, **QUICKLY}, labels="stored"))
    (score,) = evaluate(tmp_path / "run").scores
    assert score.dice > 0.7
    assert min(score.labels[1].dice, score.labels[3].dice) > 0.5
    assert (tmp_path / "run" / "overlays" / "best.png").exists()
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "0 is background, 1 is label 1 of the training data, 3 is label 3 of the training data" in card
    assert (
        f"mean Dice, by label | lowest | highest |\n|---|---|---|---|---|\n| test | 1 | {score.label_dice:.4f} |"
        in card
    )


def test_a_label_that_no_training_case_has_counts_as_missed(tmp_path: Path) -> None:
    store = balls(tmp_path, A={}, B={1: 300}, C={1: 9}, D={})
    settings = RunSettings(**BALLS, labels="stored", loss="tversky")
    told = r"missed \(C has 9\)"
    with pytest.warns(UserWarning, match=told):
        record = train(store, tmp_path / "run", settings)
    assert (record.train, record.validation, record.label_values) == (("A", "B"), ("C",), (1, 3, 300))
    score, _ = evaluate(tmp_path / "run", ("validation", "test")).scores
    assert score.labels[9].dice == 0
    assert score.labels[9].voxels.false_negative > 0
    # Its voxels are at the network's own pixels, so that validation has counted what evaluation does.
    assert record.kept_dice == pytest.approx(score.label_dice, abs=1e-6)
    assert score.label_dice == pytest.approx(score.labels[3].dice / 2)


def test_one_value_alone_is_trained_as_binary_labels_are(tmp_path: Path) -> None:
    store = balls(tmp_path, A={1: 0, 3: 7}, B={1: 7, 3: 7}, C={1: 0, 3: 7}, D={1: 0, 3: 7})
    runs = {labels: tmp_path / labels for labels in ("binary", "stored")}
    records = [train(store, run, RunSettings(**BALLS, labels=labels)) for labels, run in runs.items()]
    assert [record.label_values for record in records] == [(), (7,)]
    assert records[0].threshold == records[1].threshold
    models = [load_file(run / "model" / "model.safetensors") for run in runs.values()]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    image = read_volume(tmp_path / "raw" / "D.nrrd")
    binary, stored = (load_run(run).predict(image).array for run in runs.values())
    np.testing.assert_array_equal(stored, 7 * binary)
    binary, stored = (evaluate(run) for run in runs.values())
    assert stored.mean_label_dice == stored.mean_dice == binary.mean_dice
    assert binary.mean_label_dice is None
    assert not [file for file in binary.files if "labels" in file.name or "confusion" in file.name]


def test_runs_made_before_there_were_labels_are_read(tmp_path: Path) -> None:
    record = a_run(Reads([0.0, 1.0]), ()).record
    written = json.loads(record.model_dump_json())
    del written["label_values"], written["settings"]["labels"], written["settings"]["loss"]
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert load_record(tmp_path) == record
