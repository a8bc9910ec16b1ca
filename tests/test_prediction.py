"""From files and folders to label maps: fused, mirrored, sure or not, once and no more."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from filelock import FileLock
from PIL import Image

from cspine_data import Geometry, Orientation, Volume, open_cohort, preprocess_volume, read_volume, write_volume
from cspine_train import RunError, RunSettings, load_run, predict, predict_volume, train
from cspine_train.prediction.files import find_targets
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.preview import draw_overview
from cspine_train.run.cohort_range import CohortLooks, differences, looks_of, looks_of_record
from cspine_train.run.record import load_record, save_record
from tests.conftest import ball, write_case
from tests.processes import Command
from tests.test_dicom import volume_of, write_series
from tests.test_expected_dice import CALIBRATION
from tests.test_labels import a_run
from tests.test_training import SMALL
from tests.test_volumes import forms_of, two_places


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory, without_pictures: None) -> Path:
    """A run that marks something, trained as briefly as can be."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(phantom_store, folder, RunSettings(**{**SMALL, "variant": "raw"}))
    # Whatever two epochs are worth, its predictions have an expected Dice.
    save_record(folder, load_record(folder).model_copy(update={"calibration": CALIBRATION}))
    return folder


# Fused, mirrored


class Gives(torch.nn.Module):
    """Stands where a network does: the same probability everywhere, or left of the middle alone."""

    def __init__(self, probability: float, left_alone: bool = False) -> None:
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(1))
        self.encoder = torch.nn.Identity()
        self.encoder.output_stride = 1
        self.logit = float(np.log(probability / (1 - probability)))
        self.left_alone = left_alone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(images[:, :1], self.logit)
        if self.left_alone:
            # Rows of coronal slices run from the patient's right to the left.
            logits[:, :, : images.shape[2] // 2] = -100
        return logits


def gives(probability: float, threshold: float = 0.5, left_alone: bool = False) -> LoadedRun:
    made = a_run(Gives(probability, left_alone), (), (1,))
    record = made.record.model_copy(update={"threshold": threshold, "size_hw": (1, 1)})
    return replace(made, record=record)


def test_runs_count_what_they_are_told_to() -> None:
    image, _ = ball()
    runs = [gives(0.9), gives(0.2)]
    for weights, probability in ((None, 0.55), ((3.0, 1.0), 0.725), ((0.0, 2.0), 0.2)):
        found = predict(runs, image, weights, with_probability=True)
        assert found.probability is not None
        np.testing.assert_allclose(found.probability.array, probability, rtol=1e-5)
        assert found.probability.geometry == image.geometry
        assert (found.label.array == (probability > 0.5)).all()
        # One marks all, the other nothing.
        assert found.agreement == 0
    thresholds = [gives(0.5, 0.3), gives(0.5, 0.8)]
    assert predict_volume(thresholds, image, (1.0, 1.0)).array.max() == 0
    assert predict_volume(thresholds, image, (4.0, 1.0)).array.min() == 1


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), (-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0)])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(RunError, match="2 runs, none negative"):
        predict([gives(0.9), gives(0.2)], ball()[0], weights)


def test_mirrored_what_is_found_on_the_left_is_found_on_the_right() -> None:
    image, _ = ball()
    asked = gives(0.9, left_alone=True)
    plain, both = (predict([asked], image, mirror=mirror, with_probability=True) for mirror in (False, True))
    assert plain.probability is not None
    assert both.probability is not None
    half = image.array.shape[0] // 2
    np.testing.assert_allclose(plain.probability.array[:half], 0, atol=1e-6)
    np.testing.assert_allclose(plain.probability.array[half:], 0.9, rtol=1e-5)
    np.testing.assert_allclose(both.probability.array, 0.45, rtol=1e-5)
    assert (plain.agreement, both.agreement) == (None, 0)


# Unlike training


def test_a_volume_like_those_in_training_is_not_warned_of(run: Path, phantom_store: Path, phantom_folder: Path) -> None:
    loaded, cohort = load_run(run), open_cohort(phantom_store)
    for case in loaded.record.train:
        stored = looks_of_record(cohort.record(case, "raw"))
        source = preprocess_volume(read_volume(phantom_folder / f"{case}.nrrd"), loaded.record.preprocessing)
        assert looks_of(source) == pytest.approx(stored)
        assert differences(loaded.record.cohort_looks, stored) == ()


def changed(volume: Volume, **of_grid: object) -> Volume:
    return Volume(volume.array, volume.geometry.model_copy(update=of_grid))


def left_right(volume: Volume) -> int:
    """Return which index axis runs from side to side."""
    return Orientation.of(volume.geometry).axes[0]


def along(volume: Volume, mm: float) -> tuple[float, ...]:
    """Return a volume's spacing, another one from side to side."""
    return tuple(mm if axis == left_right(volume) else own for axis, own in enumerate(volume.geometry.spacing_mm))


def thin(volume: Volume) -> tuple[np.ndarray, Geometry]:
    """Return a third of the slices from side to side."""
    array = volume.array.take(range(volume.array.shape[left_right(volume)] // 3), left_right(volume))
    return array, volume.geometry.model_copy(update={"size": array.shape})


def inverted(volume: Volume) -> Volume:
    brightest = volume.array.max()
    return Volume(np.where(volume.array > 60, brightest - volume.array, volume.array), volume.geometry)


def tilted(volume: Volume) -> Volume:
    c, s = np.cos(0.5), np.sin(0.5)
    return changed(volume, directions=((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: changed(v, spacing_mm=along(v, 9.0)), "measure 9 mm left-right"),
        (lambda v: Volume(*thin(v)), "reaches over .* left-right"),
        (tilted, "tilted by 29 degrees"),
        (inverted, "intensities have another distribution"),
        (lambda v: Volume(v.array - 1000, v.geometry), "dark as in CT"),
        (lambda v: replace(v, assumed_orientation=True), "LPS is assumed"),
    ],
)  # fmt: skip
def test_in_what_a_volume_is_unlike_training_is_told(
    change: Callable[[Volume], Volume], told: str, run: Path, phantom_folder: Path
) -> None:
    volume = read_volume(phantom_folder / "CS_02.nrrd")
    assert predict([load_run(run)], volume).warnings == ()
    warnings = predict([load_run(run)], change(volume)).warnings
    assert any(re.search(told, warning) for warning in warnings), warnings


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_other_intensities_suggest_a_robust_recipe_unless_the_run_has_it(
    augment: str, run: Path, phantom_folder: Path
) -> None:
    loaded = load_run(run)
    settings = loaded.record.settings.model_copy(update={"augment": augment})
    loaded = replace(loaded, record=loaded.record.model_copy(update={"settings": settings}))
    (warning,) = predict([loaded], inverted(read_volume(phantom_folder / "CS_02.nrrd"))).warnings
    assert "another distribution" in warning
    assert ("--recipe robust" in warning) == (augment == "light")


def test_notes_on_a_volume_are_told_and_the_label_map_keeps_both_forms_of_its_header(tmp_path: Path) -> None:
    volume = read_volume(two_places(tmp_path / "x.nii.gz"))
    array = volume.array.astype(np.float32)
    array[0] = np.nan
    prediction = predict([gives(0.9)], replace(volume, array=array))
    assert any("sform (code 2)" in warning for warning in prediction.warnings)
    assert any("30 voxels outside" in warning for warning in prediction.warnings)
    write_volume(tmp_path / "mask.nii.gz", prediction.label)
    assert forms_of(tmp_path / "mask.nii.gz") == forms_of(tmp_path / "x.nii.gz")


def test_slices_that_would_not_go_into_memory_are_refused() -> None:
    image, _ = ball((40, 40, 3))
    huge = Geometry(
        size=(40, 40, 3), spacing_mm=(100, 100, 100), directions=image.geometry.directions, origin_mm=(0, 0, 0)
    )
    run = gives(0.9)
    settings = run.record.settings.model_copy(update={"pixel_mm": 0.1, "axes": (2,)})
    run = replace(run, record=run.record.model_copy(update={"settings": settings}))
    with pytest.raises(RunError, match="40000 x 40000 pixels"):
        predict([run], Volume(image.array, huge))


def test_a_record_does_not_ask_for_more_memory_than_a_volume_does() -> None:
    run = gives(0.9)
    run = replace(run, record=run.record.model_copy(update={"size_hw": (1 << 14, 1 << 14)}))
    with pytest.raises(RunError, match="16384 x 16384 pixels"):
        predict([run], ball()[0])


def test_of_a_run_that_does_not_know_its_cohort_nothing_is_told() -> None:
    assert differences(None, {"air": -1000.0}) == ()
    assert CohortLooks.of([]).ranges == {}


# Files


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: read_volume(path).array for path in folder.glob("*-label.*")}


def test_a_folder_is_predicted_once_and_goes_on_where_it_was_killed(
    run: Path, phantom_folder: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    """Killed after its first label map, and given again; label maps of the folder are no volumes to predict."""
    process = Command("cspine-train", "predict", phantom_folder, "--run", run, "-o", tmp_path / "out")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*-label.nrrd")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in labels(tmp_path / "out")}
    assert before
    # What a kill in the middle of a row leaves.
    with (tmp_path / "out" / "predictions.csv").open("a") as index:
        index.write("CS_09.nrrd,CS_09-lab")
    again = run_train("predict", phantom_folder, "--run", run, "-o", tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert again.output.count("there already:") == len(before)
    assert again.output.count("wrote") == 4 - len(before)
    assert run_train("predict", phantom_folder, "--run", run, "-o", tmp_path / "whole").exit_code == 0
    for name, array in labels(tmp_path / "whole").items():
        np.testing.assert_array_equal(array, labels(tmp_path / "out")[name])
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == then for name, then in before.items())
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["volume"] for row in rows) == [f"CS_0{number}.nrrd" for number in range(1, 5)]
    assert all(0 <= float(row["expected_dice"]) <= 1 for row in rows)
    left = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")}
    assert left == {".predictions.lock"}


def test_what_other_runs_or_other_bytes_gave_is_left_alone(
    run: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    volume = write_case(source, "A", label=False)
    asked = ("predict", source, "--run", run, "-o", out)
    assert run_train(*asked).exit_code == 0
    found = (out / "A-label.nrrd").read_bytes()
    assert "there already: " in run_train(*asked).output
    mirrored = run_train(*asked, "--mirror")
    assert mirrored.exit_code == 1
    assert "A-label.nrrd: exists already" in mirrored.output
    write_volume(volume, ball(seed=5)[0])
    other = run_train(*asked)
    assert other.exit_code == 1
    assert "predicted from another A.nrrd" in other.output
    assert (out / "A-label.nrrd").read_bytes() == found


def test_dicom_gives_the_mask_that_nrrd_gives(run: Path, tmp_path: Path, run_train: Callable[..., Result]) -> None:
    """Through the command line, into named segments; a DICOM folder has as many voxels as its slices."""
    image, _ = ball()
    # A stack of slices along the patient's left-right axis, as sagittal series are.
    turned = Geometry(
        size=image.array.shape[1:] + image.array.shape[:1],
        spacing_mm=(1.0, 1.0, 1.5),
        directions=((0, 0, 1), (1, 0, 0), (0, 1, 0)),
        origin_mm=image.geometry.origin_mm,
    )
    stacked = Volume(np.ascontiguousarray(np.moveaxis(image.array, 0, 2)), turned)
    write_series(tmp_path / "series", stacked)
    write_volume(tmp_path / "a.nrrd", image)
    # Whatever the network makes of a ball, some of it is above the middle.
    middle = float(np.median(predict([load_run(run)], image, with_probability=True).probability.array))
    sensitive = shutil.copytree(run, tmp_path / "sensitive")
    save_record(sensitive, load_run(run).record.model_copy(update={"threshold": middle}))
    done = run_train(
        "predict",
        tmp_path / "series",
        tmp_path / "a.nrrd",
        "--run",
        sensitive,
        "--format",
        "seg.nrrd",
        "-o",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    one, other = (read_volume(tmp_path / "out" / f"{name}-label.seg.nrrd") for name in ("series", "a"))
    np.testing.assert_array_equal(np.moveaxis(one.array, 2, 0), other.array)
    assert other.array.any()
    import slicerio

    (segment,) = slicerio.read_segmentation(str(tmp_path / "out" / "a-label.seg.nrrd"))["segments"]
    assert (segment["name"], segment["labelValue"]) == ("vertebra", 1)


def test_folders_name_their_volumes(tmp_path: Path) -> None:
    """Two label maps of one volume, a link to nowhere and a label map in a DICOM folder hide nothing."""
    raw, dicom, nnunet = tmp_path / "raw", tmp_path / "dicom", tmp_path / "nnunet"
    write_case(raw, "A")
    write_case(raw, "B", label=False)
    for label in ("B-label.nrrd", "BS-label.nrrd"):
        (raw / label).touch()
    (raw / "D.nrrd").symlink_to(tmp_path / "nowhere")
    write_series(dicom, volume_of(np.random.default_rng(0), (6, 5, 4)))
    (dicom / "spine-label.nrrd").touch()
    (nnunet / "imagesTr").mkdir(parents=True)
    (nnunet / "imagesTr" / "P_0000.nii.gz").touch()
    targets, problems = find_targets([raw, dicom, nnunet, tmp_path / "x.nii"])
    assert [(target.volume, target.place) for target in targets] == [
        (raw / "A.nrrd", Path()), (raw / "B.nrrd", Path()), (dicom, Path()),
        (nnunet / "imagesTr" / "P_0000.nii.gz", Path("imagesTr")), (tmp_path / "x.nii", Path()),
    ]  # fmt: skip
    assert [str(raw / "D.nrrd") in problem for problem in problems] == [True]


def test_the_folders_of_patients_are_mirrored(run: Path, tmp_path: Path, run_train: Callable[..., Result]) -> None:
    for name in ("P1", "P2"):
        write_case(tmp_path / "raw" / name, "T2", seed=int(name[1]), label=False)
    asked = ("predict", tmp_path / "raw", "--run", run, "-o", tmp_path / "out")
    assert run_train(*asked).exit_code == 0
    labels = [tmp_path / "out" / name / "T2-label.nrrd" for name in ("P1", "P2")]
    assert all(label.is_file() for label in labels)
    again = run_train(*asked)
    assert again.exit_code == 0
    assert again.stdout.count("there already") == 2


def test_one_file_is_predicted_once(run: Path, tmp_path: Path, run_train: Callable[..., Result]) -> None:
    volume = write_case(tmp_path / "raw", "A", label=False)
    asked = ("predict", volume, "--run", run, "--probability", "-o", tmp_path / "out" / "mask.nrrd")
    assert run_train(*asked).exit_code == 0
    again = run_train(*asked)
    assert again.exit_code == 0
    assert "there already: " in again.output
    # As when a command is killed between the two files.
    (tmp_path / "out" / "mask.nrrd").unlink()
    assert "wrote" in run_train(*asked).output
    (tmp_path / "out" / "predictions.csv").unlink()
    refused = run_train(*asked)
    assert refused.exit_code == 1
    assert "mask.nrrd: exists already" in refused.output


def test_whatever_goes_wrong_with_one_volume_the_others_go_on(
    run: Path, tmp_path: Path, run_train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw; a file that changes while it is read; a name that no terminal should be given."""
    read = read_volume

    def reads(path: Path) -> Volume:
        volume = read(path)
        if path.name == "A.nrrd":
            raise ZeroDivisionError("by accident")
        if path.name == "B.nrrd":
            write_volume(path, ball(seed=7)[0])
        return volume

    monkeypatch.setattr("cspine_train.prediction.files.read_volume", reads)
    for name in ("A", "B", "C\x1b[31m", "D"):
        write_case(tmp_path / "raw", name, label=False)
    done = run_train("predict", tmp_path / "raw", "--run", run, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "unexpectedly (ZeroDivisionError: by accident)" in done.output
    assert "while it was read" in done.output
    assert "wrote" in done.output
    assert "\x1b" not in done.output
    assert "no usable case id" in done.output
    assert set(labels(tmp_path / "out")) == {"D-label.nrrd"}


def test_what_contradicts_itself_is_refused_at_once(
    run: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    volume = write_case(tmp_path / "raw", "A", label=False)
    for asked, told in (
        ((volume, "--run", run, "--run", f"{run}/", "-o", "o"), "a --run is given twice"),
        ((tmp_path / "no.nrrd", "--run", run, "-o", "o"), "no.nrrd: does not exist; check the path"),
        ((volume, "--run", run, "--format", "seg.nrrd", "-o", tmp_path / "m.nrrd"),
         "m.nrrd: does not end in .seg.nrrd; leave --format out"),
    ):  # fmt: skip
        refused = run_train("predict", *asked)
        assert refused.exit_code != 0
        assert told in refused.output
    assert not (tmp_path / "m.nrrd").exists()


def test_what_is_written_of_two_volumes_never_meets(
    run: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    volume = write_case(tmp_path / "raw", "A", label=False)
    other = tmp_path / "A.nii.gz"
    write_volume(other, read_volume(volume))
    both = run_train("predict", volume, other, "--run", run, "-o", tmp_path / "out")
    assert "have the same name" in both.output
    beside = run_train("predict", tmp_path / "raw", "--run", run, "-o", tmp_path / "raw")
    assert "raw: holds the volumes," in beside.output
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".predictions.lock"):
        waiting = run_train("predict", volume, "--run", run, "-o", tmp_path / "out")
    assert waiting.exit_code == 1
    assert "another command predicts into" in waiting.output
    assert list(tmp_path.glob("*/A-label*")) == []


def test_an_index_that_a_spreadsheet_has_changed_is_nobodys(
    run: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    asked = ("predict", write_case(tmp_path / "raw", "A", label=False), "--run", run, "-o", tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert run_train(*asked).exit_code == 0
    index = tmp_path / "out" / "predictions.csv"
    expected = next(csv.DictReader(index.open()))["expected_dice"]
    index.write_text(index.read_text().replace(expected, f'"{expected.replace(".", ",")}"'))
    refused = run_train(*asked)
    assert refused.exit_code == 1
    assert "A-label.nrrd: exists already" in refused.output


def test_the_folder_that_one_stands_in_has_a_name(
    run: Path, tmp_path: Path, run_train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "series", ball()[0])
    monkeypatch.chdir(tmp_path / "series")
    done = run_train("predict", ".", "--run", run, "--probability", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"series-label.nrrd", "series-probability.nrrd"} <= written


def test_probabilities_and_pictures_lie_beside_the_label_map(
    run: Path, phantom_folder: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    done = run_train(
        "predict",
        phantom_folder / "CS_02.nrrd",
        "--run",
        run,
        "--probability",
        "--pictures",
        "-o",
        tmp_path / "m.nii.gz",
    )
    assert done.exit_code == 0, done.output
    pictures = {f"m-axis{axis}.{kind}" for axis in range(3) for kind in ("png", "gif")}
    index = {"predictions.csv", ".predictions.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"m.nii.gz", "m-probability.nrrd", *pictures, *index}
    probability, label = read_volume(tmp_path / "m-probability.nrrd"), read_volume(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(probability.array > load_run(run).record.threshold, label.array != 0)


def test_pictures_show_each_side_where_it_belongs(tmp_path: Path) -> None:
    """2 x 1 x 0.5 mm; the left, back, upper eighth is marked; stored upside down. All of it is true."""
    array = np.full((10, 20, 40), 50, np.int16)
    array[0, 0, 0] = 100
    label = np.zeros(array.shape, np.uint8)
    label[5:, 10:, :20] = 1
    flipped = Geometry(
        size=array.shape, spacing_mm=(2.0, 1.0, 0.5), directions=((1, 0, 0), (0, 1, 0), (0, 0, -1)), origin_mm=(0, 0, 0)
    )
    volume, found = Volume(array, flipped), Volume(label, flipped)
    truth = Volume(np.ones_like(label), flipped)
    files = draw_overview(tmp_path / "x", volume, found, truth)
    assert len(files) == 6
    for axis, frames in enumerate(array.shape):
        with Image.open(tmp_path / f"x-axis{axis}.gif") as animation:
            assert animation.n_frames == frames
            animation.seek(animation.n_frames - 1)
            frame = np.asarray(animation.convert("RGB")).astype(int)
        # 20 mm along each axis: a square.
        assert frame.shape[:2] == (320, 320)
        orange = (frame[..., 0] - frame[..., 2]) > 40
        height, width = orange.shape
        quarters = [
            orange[a : a + height // 2, b : b + width // 2].mean() for a in (0, height // 2) for b in (0, width // 2)
        ]
        # Sagittal: up and back; coronal: up and the patient's left; axial: back and left.
        expected = {0: 1, 1: 1, 2: 3}[axis]
        assert quarters[expected] > 0.8
        assert max(q for number, q in enumerate(quarters) if number != expected) < 0.1
        blue = (frame[..., 2] - frame[..., 0]) > 100
        assert blue[0].mean() > 0.5
        assert blue[:, 0].mean() > 0.5
        with Image.open(tmp_path / f"x-axis{axis}.png") as sheet:
            assert sheet.size[0] > 3 * 320


# Not what it was


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": {"context": 10**9}}, "equal to 64"),
        ({"settings": {"pixel_mm": 1e-9}}, "Input should be greater"),
        ({"size_hw": [10**9, 10**9]}, "size_hw.0: Input should"),
        ({"label_values": list(range(1, 100_000))}, "at most 255 items"),
    ],
)
def test_a_record_that_asks_for_absurd_sizes_is_refused(
    change: dict[str, object], told: str, run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    content = json.loads((copy / "run.json").read_text())
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (copy / "run.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"run.json: is damaged \(.*{told}"):
        load_run(copy)


@pytest.mark.parametrize("name", ["run.json", "model/model.safetensors", "model", "metrics.csv", "MODEL_CARD.md"])
def test_a_run_that_leads_out_of_its_folder_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).rename(tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="out of the run"):
        load_run(copy)
