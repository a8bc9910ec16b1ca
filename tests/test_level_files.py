"""Prediction of levels to files: label map, table and picture of one volume or several, once and no more."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from cspine_data import CspineDataError, Geometry, Volume, preprocess_volume, read_volume, write_volume
from cspine_train import Options, RunError, predict_files
from cspine_train.cli.commands import main
from cspine_train.prediction import files
from cspine_train.prediction.files import made_by
from cspine_train.prediction.predictor import LoadedRun
from tests.test_labels import RAW, Reads, a_run

VALUES = (18, 19, 20, 21)
NAMES = ["T11", "T12", "L1", "L2"]
GRID = Geometry(
    size=(16, 28, 72), spacing_mm=(2.0, 1.5, 1.5), directions=((-1, 0, 0), (0, 1, 0), (0, 0, 1)), origin_mm=(5, 7, -9)
)


def bodies() -> np.ndarray:
    """Level map of four vertebrae, T11 the highest."""
    levels = np.zeros(GRID.size, np.uint8)
    for number, value in enumerate(VALUES):
        levels[4:12, 8:20, 56 - 15 * number : 66 - 15 * number] = value
    return levels


def image_of(levels: np.ndarray) -> Volume:
    noise = np.random.default_rng(0).integers(-5, 6, levels.shape)
    numbers = np.searchsorted((0, *VALUES), levels)
    return Volume((100 + 40 * numbers + noise).astype(np.int16), GRID)


def runs_of(folder: Path, values: tuple[int, ...], levels: tuple[int, ...] = ()) -> list[LoadedRun]:
    """A run that sees each voxel's label in its intensity; without values, vertebra or not."""
    normalisation = preprocess_volume(image_of(bodies()), RAW).normalisation
    intensities = normalisation.apply(100 + 40 * np.arange(5, dtype=np.float32)).tolist()
    network = Reads(intensities if values else [intensities[0], intensities[1]])
    (folder / "run" / "model").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "model" / "model.safetensors").write_bytes(b"weights")
    made = a_run(network, values)
    meaning = {0: "background"} | ({value: f"label {value}" for value in values} or {1: "vertebra"})
    return [
        replace(
            made,
            path=folder / "run",
            record=made.record.model_copy(update={"levels": levels, "label_meaning": meaning}),
        )
    ]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    write_volume(tmp_path / "raw" / "A.nrrd", image_of(bodies()))
    return tmp_path / "raw" / "A.nrrd"


def test_runs_on_levels_write_the_table_and_the_picture(volume: Path, tmp_path: Path) -> None:
    (done,) = predict_files(runs_of(tmp_path, VALUES, VALUES), [volume], tmp_path / "out", Options(levels=True))
    assert done.error is None
    np.testing.assert_array_equal(read_volume(tmp_path / "out" / "A-label.nrrd").array, bodies())
    table = pd.read_csv(tmp_path / "out" / "levels.csv")
    assert table.level.tolist() == NAMES
    assert set(table.case) == {"A"}
    assert (table.probability > 0.9).all()
    assert table.volume_ml.tolist() == pytest.approx([8 * 12 * 10 * 4.5 / 1e3] * 4, abs=1e-3)
    # The first axis of the file runs to the right: LPS has the other sign.
    assert table.centroid_x_mm.tolist() == [5 - 2 * 7.5] * 4
    assert table.centroid_y_mm.tolist() == [7 + 1.5 * 13.5] * 4
    assert table.centroid_z_mm.tolist() == [-9 + 1.5 * (60.5 - 15 * number) for number in range(4)]
    assert Image.open(tmp_path / "out" / "A-levels.png").format == "PNG"


def test_binary_runs_name_vertebrae_from_one_end(volume: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "A.seg.nrrd"
    out.parent.mkdir()
    (done,) = predict_files(runs_of(tmp_path, ()), [volume], out, Options(levels=True, lowest="L2"))
    assert done.error is None
    label = read_volume(out)
    np.testing.assert_array_equal(np.unique(label.array), (0, *VALUES))
    np.testing.assert_array_equal(label.array, bodies())
    assert {one.value: one.name for one in label.segments} == dict(zip(VALUES, NAMES, strict=True))
    assert pd.read_csv(out.parent / "levels.csv").level.tolist() == NAMES
    assert (out.parent / "A-levels.png").exists()


def test_a_level_that_does_not_fit_is_reported_with_the_volume(volume: Path, tmp_path: Path) -> None:
    (done,) = predict_files(runs_of(tmp_path, ()), [volume], tmp_path / "out", Options(levels=True, lowest="C2"))
    assert str(done.error).startswith(f"{volume}: 4 vertebrae")


def test_levels_c1_to_c4_are_not_called_vertebra(volume: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "A.seg.nrrd"
    out.parent.mkdir()
    (done,) = predict_files(runs_of(tmp_path, ()), [volume], out, Options(levels=True, highest="C1"))
    assert done.error is None
    assert {one.value: one.name for one in read_volume(out).segments} == {1: "C1", 2: "C2", 3: "C3", 4: "C4"}


def test_the_same_call_resumes_and_keeps_the_rows_of_all_volumes(volume: Path, tmp_path: Path) -> None:
    write_volume(volume.parent / "patient" / "A.nrrd", image_of(bodies()))
    runs, out, options = runs_of(tmp_path, VALUES, VALUES), tmp_path / "out", Options(levels=True)
    (first,) = predict_files(runs, [files.Target(volume)], out, options)
    both = [files.Target(volume), files.Target(volume.parent / "patient" / "A.nrrd", Path("patient"))]
    again = list(predict_files(runs, both, out, options))
    assert not first.already
    assert [done.already for done in again] == [True, False]
    table = pd.read_csv(out / "levels.csv")
    assert table.groupby("case")["level"].apply(list).to_dict() == {"A": NAMES, "patient/A": NAMES}
    assert (out / "patient" / "A-levels.png").exists()
    # Without its label map, a volume is predicted again; its rows are replaced.
    (out / "A-label.nrrd").unlink()
    assert [done.already for done in predict_files(runs, both, out, options)] == [False, True]
    assert len(pd.read_csv(out / "levels.csv")) == 8


def test_doubt_is_a_warning_and_is_in_the_table(volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = files.predict

    def doubting(*arguments: object) -> files.Prediction:
        found = predict(*arguments)
        return replace(found, spine=replace(found.spine, doubt="T11 or T10 at the top"), warnings=("dark",))

    monkeypatch.setattr(files, "predict", doubting)
    runs = runs_of(tmp_path, VALUES, VALUES)
    (done,) = predict_files(runs, [volume], tmp_path / "out", Options(levels=True))
    assert done.warnings == ("dark", "T11 or T10 at the top")
    assert set(pd.read_csv(tmp_path / "out" / "levels.csv").doubt) == {"T11 or T10 at the top"}
    (again,) = predict_files(runs, [volume], tmp_path / "out", Options(levels=True))
    assert again.warnings == done.warnings


def test_a_volume_without_vertebrae_has_no_rows_and_a_picture(tmp_path: Path) -> None:
    empty = image_of(np.zeros(GRID.size, np.uint8))
    write_volume(tmp_path / "raw" / "A.nrrd", Volume(empty.array, GRID))
    (done,) = predict_files(
        [LoadedRun(run.path, run.record, Reads([0.0, 1e9])) for run in runs_of(tmp_path, ())],
        [tmp_path / "raw" / "A.nrrd"], tmp_path / "out", Options(levels=True, lowest="L5"),
    )  # fmt: skip
    assert done.error is None
    assert any("no vertebra" in warning for warning in done.warnings)
    assert pd.read_csv(tmp_path / "out" / "levels.csv").empty
    assert (tmp_path / "out" / "A-levels.png").exists()


def test_nothing_about_levels_is_written_unless_asked(volume: Path, tmp_path: Path) -> None:
    (done,) = predict_files(runs_of(tmp_path, VALUES, VALUES), [volume], tmp_path / "out")
    assert done.error is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "A-label.nrrd", "predictions.csv", ".predictions.lock",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "levels", "options", "words"),
    [
        ((), (), Options(levels=True), ("binary", "--lowest")),
        ((5, 7), (), Options(levels=True), ("not levels", "--levels")),
        (VALUES, VALUES, Options(lowest="L5"), ("--levels",)),
        ((), (), Options(levels=True, lowest="L5", highest="C2"), ("exclude",)),
        ((), (), Options(levels=True, lowest="L9"), ("L9", "T12")),
    ],
)
def test_levels_that_cannot_be_named_are_refused(
    values: tuple[int, ...], levels: tuple[int, ...], options: Options, words: tuple[str, ...], volume: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one line, by the function and by the command, before a file is written."""
    (run,) = runs_of(tmp_path, values, levels)
    with pytest.raises((RunError, CspineDataError)) as refused:
        next(predict_files([run], [volume], tmp_path / "out", options))
    assert all(word in str(refused.value) for word in words)
    monkeypatch.setattr("cspine_train.run.record.load_record", lambda _: run.record)
    monkeypatch.setattr("cspine_train.prediction.predictor.load_run", lambda _: run)
    arguments = ["--levels"] * options.levels
    for name in ("lowest", "highest"):
        arguments += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    done = CliRunner().invoke(
        main, ["predict", str(volume), "--run", str(run.path), "-o", str(tmp_path / "out"), *arguments]
    )
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)
    assert not (tmp_path / "out").exists()


def test_folders_predicted_before_there_were_levels_go_on(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, ())
    options = {"weights": None, "mirror": False, "format": None, "probability": False, "pictures": False}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    digest.update(hashlib.sha256(b"weights").digest())
    record = run.record
    parts = [record.settings.model_dump(mode="json"), record.preprocessing.model_dump(mode="json")]
    kept = [record.size_hw, record.label_values, record.threshold, record.kept_components, record.filled_holes]
    digest.update(json.dumps([*parts, kept], sort_keys=True).encode())
    assert made_by([run], Options()) == digest.hexdigest()
    asked = [
        Options(),
        *(Options(levels=True, lowest=level) for level in (None, "L5", "L4")),
        Options(levels=True, highest="L5"),
    ]
    assert len({made_by([run], options) for options in asked}) == 5
