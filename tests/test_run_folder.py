"""What people find in a run folder: pictures, the model card, logs, and a line on the terminal while it is made."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cspine_data import Preprocessing, as_seen, open_cohort
from cspine_train import RunError, RunSettings, evaluate, load_run, train
from cspine_train.cli.commands import main as train_main
from cspine_train.metrics.overlap import Overlap, overlap, slice_overlaps
from cspine_train.prediction.overlays import BEST, WORST, extreme_slices, save_overlays
from cspine_train.prediction.stored_volumes import Segmented
from cspine_train.reports.figures import SliceView, draw_curves, draw_overlays
from cspine_train.reports.model_card import escaped, write_card
from cspine_train.run.record import RunRecord, load_record, save_record
from cspine_train.training.loggers import RunMLflow, RunTensorBoard, open_loggers
from cspine_train.training.progress import TrainingProgress
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.conftest import Stopped

SMALL = {"model": "linknet", "encoder": "tu-test_resnet", "weights": "none", "pixel_mm": 12.0, "precision": "32"}
SMALL |= {"context": 0, "crop_margin_mm": "whole"}
TRUTH, FOUND = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., bool]], None]:
    """Let something raise `Stopped` where a condition on its arguments holds."""

    def stop(place: str, when: Callable[..., bool]) -> None:
        module, name = place.rsplit(".", 1)
        home = SliceSegmenter if module == "SliceSegmenter" else sys.modules[f"cspine_train.{module}"]
        original = getattr(home, name)

        def watched(*arguments: Any) -> Any:
            if when(*arguments):
                raise Stopped
            return original(*arguments)

        monkeypatch.setattr(home, name, watched)

    return stop


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[..., :3] * 255).astype(int)


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture - np.array(colour)).max(-1) < 12


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run along two axes whose pictures could not be made at first, and its training was stopped before that."""
    folder = tmp_path_factory.mktemp("runs") / "two axes"
    settings = RunSettings(**SMALL, axes=(0, 2), schedule="onecycle", learning_rate=3e-3, epochs=3)
    with pytest.MonkeyPatch.context() as patches:
        step = SliceSegmenter.training_step

        def until_the_second_epoch(self: SliceSegmenter, batch: Any, number: int) -> Any:
            if self.trainer.current_epoch == 1:
                raise Stopped
            return step(self, batch, number)

        patches.delenv("MLFLOW_TRACKING_URI", raising=False)
        patches.setattr(SliceSegmenter, "training_step", until_the_second_epoch)
        with pytest.raises(Stopped):
            train(phantom_store, folder, settings, loggers=("tensorboard", "mlflow"))
        patches.setattr(SliceSegmenter, "training_step", step)
        train(phantom_store, folder, settings, loggers=("mlflow", "tensorboard"))
    return folder


def test_all_is_there_and_nothing_that_predicts_is_a_pickle(run: Path, tmp_path: Path) -> None:
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "run.json", "model/config.json", "model/model.safetensors", "metrics.csv", "curves.png", "overlays/best.png",
        "overlays/worst.png", "MODEL_CARD.md",
    } <= there  # fmt: skip
    assert [name for name in there if Path(name).name.startswith(".")] == [".lock"]
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints", "mlruns", "tensorboard"))
    for path in filter(Path.is_file, bare.rglob("*")):
        # A pickle of protocol 2 and on, or the archive that PyTorch puts one into.
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
    assert load_run(bare).record.label_meaning == {0: "background", 1: "vertebra"}


def test_smps_own_loader_reads_the_model(run: Path) -> None:
    import segmentation_models_pytorch as smp

    ours = load_run(run).network.state_dict()
    theirs = smp.from_pretrained(str(run / "model")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_tensorboard_has_each_epoch_once(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    assert set(events.Tags()["scalars"]) == set(header[1:])
    for name in ("train_loss", "valid_dice", "learning_rate"):
        expected = [(int(row[0]), float(row[header.index(name)])) for row in rows]
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(logged, expected, rtol=1e-6)


def test_mlflow_has_one_run_and_each_epoch_once(run: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlruns' / 'mlflow.db'}")
    (logged,) = [
        found for experiment in client.search_experiments() for found in client.search_runs([experiment.experiment_id])
    ]
    assert (logged.info.run_name, logged.info.status) == ("two axes", "FINISHED")
    assert logged.info.run_id == (run / "mlruns" / "run-id.txt").read_text()
    assert logged.data.params["encoder"] == SMALL["encoder"]
    assert logged.data.tags["note2"].startswith("data: synthetic")
    dice = [(metric.step, metric.value) for metric in client.get_metric_history(logged.info.run_id, "valid_dice")]
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert dice == [(int(row[0]), float(row[2])) for row in rows]


def record_of_split(**split: object) -> RunRecord:
    """A record of a run that has not trained yet."""
    return RunRecord(
        store="s.zarr", settings=RunSettings(case_weights={"Doe": 2}, **split), weights_used="none", size_hw=(32, 32),
        preprocessing=Preprocessing(bias=None), notes=(), train=("Doe",), validation=(), test=(), digests={},
        versions={},
    )  # fmt: skip


def test_a_server_gets_no_names_of_cases(tmp_path: Path) -> None:
    logger = RunMLflow(tmp_path, record_of_split(split={"train": ["Doe"], "test": ["Roe"]}), 0)
    logged = logger.experiment.get_run(str(logger.run_id)).data.params
    assert "Doe" not in str(logged)
    assert logged["split_name"] == "given split"


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({}, ""),
        ({"folds": 4, "fold": 1}, ", fold 1 of 4"),
        ({"test_site": "X"}, ", test site X"),
        ({"split": {"train": ["Doe"], "test": ["Roe"]}}, ", given split"),
    ],
)
def test_a_model_card_says_how_patients_were_split(split: dict[str, object], told: str, tmp_path: Path) -> None:
    card = write_card(tmp_path, record_of_split(**split)).read_text()
    assert f"seed 0{told}. The other settings" in card


def test_a_logger_that_cannot_be_had_is_told_before_training(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = RunSettings(**SMALL, epochs=1), tmp_path / "run"
    with pytest.raises(RunError, match=r"did you mean mlflow\?"):
        train(phantom_store, folder, settings, loggers=["mflow"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RunError, match=r".*why\?.* choose another -o"):
        train(phantom_store, tmp_path / "why?", settings, loggers=["mlflow"])
    monkeypatch.setattr(
        "cspine_train.training.loggers.find_spec", lambda name: None if name == "mlflow" else find_spec(name)
    )
    told = "^logger mlflow: needs mlflow"
    with pytest.raises(RunError, match=told):
        train(phantom_store, folder, settings, loggers=["tensorboard", "mlflow"])
    assert not folder.exists()


def test_a_log_that_belongs_to_another_server_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlruns").mkdir()
    shutil.copy(run / "mlruns" / "run-id.txt", tmp_path / "mlruns")
    shutil.copy(run / "mlruns" / "mlflow.db", tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    (tmp_path / "mlruns" / "run-id.txt").write_text("0" * 32)
    with pytest.raises(RunError, match=r"logger mlflow: run 0{32} is unavailable .*run-id\.txt"):
        open_loggers(["mlflow"], tmp_path, load_record(run), 1)


def test_a_logger_that_fails_does_not_end_training(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (logger,) = open_loggers(["tensorboard"], tmp_path, load_record(run), 4)
    calls: list[int] = []

    def gone(_: RunTensorBoard, _name: str, _value: float, step: int) -> None:
        calls.append(step)
        raise ConnectionError(f"no route at {step}")

    monkeypatch.setattr(type(logger.experiment), "add_scalar", gone)
    logger.log_metrics({"valid_dice": 0.5}, step=3)
    assert calls == [], "an earlier run has logged that epoch"
    with pytest.warns(UserWarning, match="tensorboard failed .*training continues"):
        logger.log_metrics({"valid_dice": 0.5}, step=4)
    logger.log_metrics({"valid_dice": 0.5}, step=5)
    logger.save()
    logger.finalize("success")
    assert calls == [4]


def test_pictures_that_were_not_made_are_made_again_and_nothing_is_trained(
    phantom_store: Path, tmp_path: Path, stopped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when training had ended, by early stopping too: no epoch comes after the last one."""
    settings = RunSettings(
        **SMALL, schedule="plateau", learning_rate=1e-9, epochs=40, batch_size=64, empty_share=0, augment=False
    )
    folder = tmp_path / "run"
    monkeypatch.setattr("cspine_train.training.callbacks.draw_curves", lambda *_: ())
    # Dice that never gains.
    monkeypatch.setattr("cspine_train.training.segmentation_module.best_threshold", lambda counts, patients: (0.5, 0.5))
    with monkeypatch.context() as patches:
        patches.setattr("cspine_train.training.pipeline.save_overlays", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(phantom_store, folder, settings)
    before = load_record(folder)
    assert not before.finished
    rows = (folder / "metrics.csv").read_bytes()
    dice = [float(row.split(b",")[2]) for row in rows.splitlines()[1:]]
    assert before.kept_epoch == dice.index(max(dice))
    assert len(dice) == before.kept_epoch + 1 + 7 < 40
    assert not (folder / "overlays").exists()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    stopped("SliceSegmenter.training_step", lambda *_: True)
    after = train(phantom_store, folder, settings)
    assert after == load_record(folder) == before.model_copy(update={"finished": True})
    assert (folder / "metrics.csv").read_bytes() == rows
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert (folder / "overlays" / "worst.png").exists()
    assert (folder / "MODEL_CARD.md").exists()


def test_pictures_that_fail_take_no_trained_run_away(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_: Any) -> None:
        raise OSError("no space left")

    for place in ("callbacks.draw_curves", "pipeline.draw_curves", "pipeline.save_overlays", "pipeline.write_card"):
        monkeypatch.setattr(f"cspine_train.training.{place}", full)
    with pytest.warns(UserWarning, match="could not be made") as told:
        record = train(phantom_store, tmp_path / "run", RunSettings(**SMALL, epochs=1))
    assert record.finished
    assert load_run(tmp_path / "run").record == record
    told = [str(warning.message) for warning in told if "could not be made" in str(warning.message)]
    names = "curves.png", "curves.png", "overlays", "MODEL_CARD.md"
    assert [text.split(": could not be made (")[0] for text in told] == [str(tmp_path / "run" / n) for n in names]
    assert "(no space left)" in told[0]


def test_curves_show_which_epoch_is_kept(run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "metrics.csv"):
        shutil.copy(run / name, tmp_path)
    places = []
    for kept in (0, 2):
        save_record(tmp_path, load_record(run).model_copy(update={"kept_epoch": kept}))
        draw_curves(tmp_path)
        picture = pixels(tmp_path / "curves.png")
        # Between what is written above and below.
        height = len(picture)
        red, green, _ = np.moveaxis(picture[height * 3 // 4 : height * 4 // 5], -1, 0)
        lines = (green - red).sum(0)
        places.append(int(lines.argmax()) / lines.size)
    assert places[0] < 0.3
    assert places[1] > 0.9


def test_slices_are_turned_as_radiologists_see_them() -> None:
    """One voxel at a time: the one at the patient's left, back and head lies where it should, and its opposite."""
    volume = np.zeros((3, 4, 5))
    volume[2, 3, 4] = 1
    sagittal, coronal, axial = (as_seen(np.take(volume, -1, axis), axis) for axis in range(3))
    assert sagittal.shape == (5, 4)
    assert sagittal[0, -1] == 1, "head up, back on the right"
    assert coronal.shape == (5, 3)
    assert coronal[0, -1] == 1, "head up, the patient's left on the right"
    assert axial.shape == (4, 3)
    assert axial[-1, -1] == 1, "back down, the patient's left on the right"


@given(st.integers(0, 2), st.integers(0, 2**32))
def test_slices_are_counted_as_each_alone_would_be(axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, truth = (rng.random((4, 5, 6)) < rng.choice([0, 0.05, 0.5]) for _ in range(2))
    expected = {}
    for index in range(found.shape[axis]):
        pair = found.take(index, axis), truth.take(index, axis)
        if pair[0].any() or pair[1].any():
            expected[index] = overlap(*pair)
    assert slice_overlaps(found, truth, axis) == expected


def test_the_first_slices_are_chosen_and_none_beside_them(run: Path, phantom_store: Path) -> None:
    best, worst = (lambda voxels, kind=kind: kind.order(voxels, 0.0) for kind in (BEST, WORST))
    truth = np.zeros((30, 8, 8), bool)
    truth[5:25, 2:6, 2:6] = True
    found = truth.copy()
    found[10, 2, 2] = False
    found[11] = False
    found[2, 0, 0] = True
    segmented = Segmented("A", np.arange(30 * 64.0).reshape(30, 8, 8), (2.5, 1.0, 3.0), found, truth)
    views = list(extreme_slices(segmented, 0, worst))
    assert [view.index for view in views[:3]] == [11, 2, 5], "a missed slice before a stray voxel; 10 lies beside 11"
    assert views[0].voxels == Overlap(0, 0, 16)
    assert (views[0].count, views[0].spacing_mm) == (30, (3.0, 1.0))
    np.testing.assert_array_equal(views[0].image_hw, as_seen(segmented.image_xyz[11], 0))
    assert next(iter(extreme_slices(segmented, 0, best))).voxels.dice == 1
    empty = np.zeros_like(truth)
    assert not list(extreme_slices(dataclasses.replace(segmented, found_xyz=empty, truth_xyz=empty), 0, best))


def view(case: str = "A", found: bool = True) -> SliceView:
    """A slice of 10 rows 2 mm apart and 20 columns 1 mm apart: a square."""
    truth = np.zeros((10, 20), bool)
    truth[1:-1, 2:-2] = True
    image = np.linspace(0, 1, 200).reshape(10, 20)
    return SliceView(case, 1, 3, 9, image, truth[::-1] & found, truth, (2.0, 1.0), (0.0, 1.0), Overlap(5, 3, 2))


def test_overlays_have_the_shape_that_the_patient_has(tmp_path: Path) -> None:
    draw_overlays(tmp_path / "x.png", [view(found=False)], "square")
    picture = near(pixels(tmp_path / "x.png"), TRUTH)
    # Below the legend.
    rows, columns = np.nonzero(picture[picture.shape[0] // 5 :])
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=3)
    assert np.ptp(rows) > 100
    assert not near(pixels(tmp_path / "x.png"), FOUND)[picture.shape[0] // 5 :].any()


@pytest.mark.parametrize("case", ["$\\frac{", "a_$x^{2}$_b", "<b>&amp;", "頸椎"])
def test_a_case_may_bear_any_name(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A dollar would begin a formula."""
    draw_overlays(tmp_path / "x.png", [view(case)], case, [case])
    assert not recwarn
    assert near(pixels(tmp_path / "x.png"), FOUND).sum() > 100


def test_overlays_are_of_this_run_and_this_store(run: Path, phantom_store: Path, tmp_path: Path) -> None:
    cohort, loaded = open_cohort(phantom_store), dataclasses.replace(load_run(run), path=tmp_path)
    seen: list[tuple[int, int, str]] = []
    files = save_overlays(loaded, cohort, lambda *told: seen.append(told))
    assert [file.read_bytes() for file in files] == [(run / "overlays" / f.name).read_bytes() for f in files]
    assert seen == [(1, 1, "CS_03")]
    width, height = struct.unpack(">II", files[0].read_bytes()[16:24])
    assert width > height, "four slices along each of two axes"
    other = loaded.record.model_copy(update={"digests": dict.fromkeys(loaded.record.digests, "0" * 32)})
    with pytest.raises(RunError, match="other data of CS_03"):
        save_overlays(dataclasses.replace(loaded, record=other), cohort)


def rendered(text: str) -> str:
    return MarkdownIt("commonmark", {"linkify": False}).enable("table").render(text)


def card(run: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (run / "MODEL_CARD.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_record_says(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("mlruns", "tensorboard"))
    head, body = card(folder)
    assert head["library_name"] == "segmentation-models-pytorch"
    record = load_record(folder)
    html = rendered(body)
    assert re.findall("<h2>(.*)</h2>", html) == [
        "What it is", "Intended use", "Data", "Training", "Results", "How to use it", "Limits", "Versions and digests",
    ]  # fmt: skip
    assert "not a medical device" in body
    assert "sagittal and axial slices" in body
    assert f"mean Dice {record.kept_dice:.4f} over 1 patient, after epoch 3" in body
    assert f"above {record.threshold:g} are marked" in body
    assert "cervical phantom, not patients" in body
    assert "**not evaluated yet**" in body
    assert record.versions["torch"] in body
    assert not [case for case in record.digests if case in body]
    scores = evaluate(folder, ("validation", "test")).scores
    _, body = card(folder)
    assert "not evaluated yet" not in body
    for score in scores:
        # Scores are recorded with six decimals.
        dice = f"{round(score.dice, 6):.4f}"
        assert f"| {score.split} | 1 | {dice} | {dice} | {dice} |" in body
    # The weights went on: what was scored is not what is kept.
    write_card(folder, record.model_copy(update={"kept_epoch": 7, "finished": False}))
    _, body = card(folder)
    assert "not evaluated yet" in body
    assert "Training had not ended" in body


def test_the_cards_snippet_runs(
    run: Path, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "RUN").symlink_to(run)
    (tmp_path / "volume.nrrd").symlink_to(phantom_folder / "CS_04.nrrd")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall("```python\n(.*?)```", card(run)[1], re.DOTALL)
    exec(snippet, {})  # noqa: S102
    assert (tmp_path / "mask.nrrd").exists()


@given(st.text(st.sampled_from("<>[]()*_`#|~$&;!:/\\\"'-+.=1ax \n\t"), max_size=40))
def test_what_came_from_a_file_is_no_markup(text: str) -> None:
    from html import unescape

    shown = " ".join(text.split())
    html = rendered(f'- "{escaped(text)}"\n\n| a |\n|---|\n| x {escaped(text)} |\n')
    assert unescape(re.search("<li>(.*)</li>", html)[1]) == f'"{shown}"'
    assert unescape(re.findall("<td>(.*)</td>", html)[0]) == f"x {shown}".strip()


def test_notes_and_names_of_others_are_no_markup_in_the_card(run: Path, tmp_path: Path) -> None:
    note = "<script>alert(1)</script> [x](javascript:1) | $a$\n# heading ```"
    write_card(tmp_path, load_record(run).model_copy(update={"notes": (note,)}))
    html = rendered(card(tmp_path)[1])
    assert "<script" not in html
    assert "<a " not in html
    assert "<h1>heading" not in html
    assert "[x](javascript:1) | $a$ #" in html


@contextmanager
def terminal(patches: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """Make standard error a terminal; gives what is written to it, all of it after the end."""
    ours, theirs = os.openpty()
    written = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                written.extend(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", buffering=1) as file, patches.context() as within:
        within.setenv("COLUMNS", "100")
        within.setenv("TERM", "xterm")
        within.setattr(sys, "stderr", file)
        yield written
    reader.join()
    os.close(ours)


def test_a_terminal_shows_epoch_steps_dice_and_time_left(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich import get_console

    # Each state is shown: a terminal gets ten a second, and these steps are faster.
    monkeypatch.setattr(TrainingProgress, "refresh", lambda bar, hard=False: bar.progress.refresh())
    monkeypatch.setattr("cspine_train.training.pipeline.save_overlays", lambda *_: ())
    console = dict(vars(get_console()))
    with terminal(monkeypatch) as written:
        train(phantom_store, tmp_path / "run", RunSettings(**SMALL, epochs=2, schedule="onecycle"))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    first = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1].split(",")[2]
    assert re.search(r"epoch 1/2 [━╸╺]+ +3/\d+ .*it/s.* run: 0:\d\d:\d\d left", text)
    assert re.search(rf"epoch 2/2 [━╸╺]+ +1/\d+ .*Dice: {float(first):.3f} *run: 0:\d\d:\d\d left", text)
    assert vars(get_console()) == console, "other users of rich in the process have their console back"


def test_away_from_a_terminal_there_is_one_line_per_epoch(
    phantom_store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cspine_train.training.pipeline.save_overlays", lambda *_: ())
    caplog.set_level("INFO", "cspine_train")
    train(phantom_store, tmp_path / "run", RunSettings(**SMALL, epochs=2, schedule="onecycle"))
    assert [line.split(":")[0] for line in caplog.messages if line.startswith("epoch")] == [
        "epoch 1 of 2", "epoch 2 of 2",
    ]  # fmt: skip
    output, errors = capfd.readouterr()
    assert "━" not in output + errors


def test_every_field_of_the_record_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text()
    assert not [name for name in RunRecord.model_fields if f"`{name}`" not in text]
    assert all(option.help for option in train_main.commands["run"].params)


@pytest.mark.parametrize("damage", ["{", "[]", '{"patients": [{}]}', '{"patients": 3}'])
def test_a_damaged_evaluation_is_left_out_of_the_card(damage: str, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluation").mkdir(exist_ok=True)
    (copy / "evaluation" / "old.json").write_text(damage)
    with pytest.warns(UserWarning, match="damaged and left out"):
        write_card(copy, load_record(copy))
    assert (copy / "MODEL_CARD.md").read_text().startswith("---")
