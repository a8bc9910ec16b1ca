"""Keeping the largest components of a prediction and filling its holes, where validation is better for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from cspine_data import Cohort, open_cohort, read_volume
from cspine_train import LoadedRun, RunSettings, evaluate, load_run, predict_volume, train
from cspine_train.metrics.components import (
    common_box,
    filled,
    implausible_components,
    largest_components,
    tidied,
)
from cspine_train.metrics.overlap import overlap
from cspine_train.prediction.postprocessing import chosen_postprocessing
from cspine_train.prediction.stored_volumes import Segmented, segment
from cspine_train.reports.model_card import write_card
from cspine_train.run.record import load_record
from tests.test_training import SMALL

pytestmark = pytest.mark.usefixtures("without_pictures")

#: So fine that more than one component is marked.
FINE = {**SMALL, "encoder": "tu-mobilenetv3_small_100", "pixel_mm": 3.0}


def sizes(mask: NDArray[np.bool_]) -> list[int]:
    numbers, _ = ndimage.label(mask)
    return sorted(np.bincount(numbers.ravel())[1:].tolist(), reverse=True)


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.integers(1, 6))
def test_the_largest_components_stay_whole(seed: int, share: float, most: int) -> None:
    mask = np.random.default_rng(seed).random((6, 7, 8)) < share
    kept = largest_components(mask, most)
    assert not (kept & ~mask).any()
    assert sizes(kept) == sizes(mask)[:most]


def test_components_touch_through_faces_and_the_first_of_equals_stays() -> None:
    mask = np.zeros((2, 2, 3), np.bool_)
    mask[0, 0, 0] = mask[1, 1, 0] = mask[0, 0, 2] = True
    assert np.argwhere(largest_components(mask, 1)).tolist() == [[0, 0, 0]]


@given(st.integers(0, 2**32), st.floats(0.3, 0.9))
def test_a_hole_is_what_no_path_leads_out_of(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((5, 6, 7)) < share
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    reached = (outside == outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(filled(mask), ~reached)


def test_what_is_tidied_is_first_parted_and_then_filled() -> None:
    """A hollow cube and a speck within it: the speck goes, and the hole is whole."""
    mask = np.ones((7, 7, 7), np.bool_)
    mask[1:-1, 1:-1, 1:-1] = False
    mask[3, 3, 3] = True
    assert sizes(tidied(mask, None, fill=False)) == [343 - 125, 1]
    assert sizes(tidied(mask, 1, fill=False)) == [343 - 125]
    assert sizes(tidied(mask, 1, fill=True)) == [343]
    assert not tidied(np.zeros((2, 2, 2), np.bool_), 3, fill=True).any()


def test_the_box_of_masks_holds_what_each_marks() -> None:
    one, other = np.zeros((2, 5, 6, 7), np.bool_)
    assert common_box(one, other) is None
    one[1, 2, 3] = other[3, 0, 3] = True
    assert common_box(one, other) == (slice(1, 4), slice(0, 3), slice(3, 4))
    assert common_box(one, np.zeros_like(one)) == (slice(1, 2), slice(2, 3), slice(3, 4))


def whole_masks(loaded: LoadedRun, cohort: Cohort, cases: Sequence[str]) -> list[tuple[NDArray, NDArray]]:
    """Return what is found in some cases where all components are kept, and what is true."""
    whole = replace(loaded, record=loaded.record.model_copy(update={"kept_components": None}))
    return [(done.found_xyz != 0, done.truth_xyz != 0) for done in (segment(whole, cohort, case) for case in cases)]


def change(masks: list[tuple[NDArray, NDArray]], most: int) -> float:
    """Return by how much the summed Dice changes where so many components are kept."""
    return sum(
        overlap(largest_components(found, most), truth).dice - overlap(found, truth).dice for found, truth in masks
    )


def asking_for(loaded: LoadedRun, most: int, **changed: Any) -> LoadedRun:
    settings = loaded.record.settings.model_copy(update={"largest_components": most})
    return replace(loaded, record=loaded.record.model_copy(update={"settings": settings, **changed}))


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory, without_pictures: None) -> Path:
    """A run that keeps as many components as makes its validation better."""
    folder = tmp_path_factory.mktemp("runs") / "run"

    def as_many_as_are_better(loaded: LoadedRun, cohort: Cohort, *_: object) -> dict[str, Any]:
        masks = whole_masks(loaded, cohort, loaded.record.validation)
        most = next(most for most in range(1, 100) if change(masks, most) > 0)
        return chosen_postprocessing(asking_for(loaded, most), cohort)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("cspine_train.training.pipeline.chosen_postprocessing", as_many_as_are_better)
        train(phantom_store, folder, RunSettings(**FINE, largest_components=1))
    return folder


@pytest.mark.parametrize("part", ["validation", "train"])
def test_so_many_are_kept_if_validation_is_better_for_it(part: str, run: Path, phantom_store: Path) -> None:
    loaded, cohort = load_run(run), open_cohort(phantom_store)
    # Training patients are several: the mean decides.
    cases = loaded.record.split.cases(part)
    outcomes, masks = set(), whole_masks(loaded, cohort, cases)
    for most in sorted({1, loaded.record.kept_components or 1, 99}):
        better = change(masks, most) > 0
        chosen = chosen_postprocessing(asking_for(loaded, most, validation=cases), cohort)
        assert chosen == {"kept_components": most if better else None, "filled_holes": False}
        outcomes.add(better)
    assert False in outcomes
    assert part == "train" or True in outcomes


@pytest.mark.parametrize("helps", [True, False])
def test_holes_are_filled_if_validation_is_better_for_it(
    helps: bool, run: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is found is hollow; what is true is hollow too, or is not."""
    loaded, cohort = load_run(run), open_cohort(phantom_store)
    settings = loaded.record.settings.model_copy(update={"largest_components": 1, "fill_holes": True})
    asked = replace(loaded, record=loaded.record.model_copy(update={"settings": settings}))
    cube = np.ones((7, 7, 7), np.bool_)
    shell = cube & ~ndimage.binary_erosion(cube)
    patient = Segmented("A", cube, (1.0, 1.0, 1.0), shell, cube if helps else shell)
    monkeypatch.setattr("cspine_train.prediction.postprocessing.segment_all", lambda *_: iter([patient]))
    with caplog.at_level("INFO", logger="cspine_train"):
        chosen = chosen_postprocessing(asked, cohort)
    # One component is all there is, so keeping one changes nothing and is not done.
    assert chosen == {"kept_components": None, "filled_holes": helps}
    assert [message.endswith("applied") for message in caplog.messages] == [helps, False, False]


def test_a_run_records_and_tells_what_it_chose(run: Path) -> None:
    record = load_record(run)
    assert record.kept_components
    evaluate(run)
    which = "largest connected component" if record.kept_components == 1 else f"{record.kept_components} largest"
    told = f"patient by patient, the {which}"
    assert told in (run / "MODEL_CARD.md").read_text()


def test_where_it_cannot_be_found_out_all_are_kept_and_the_run_is_finished(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory for this volume")

    monkeypatch.setattr("cspine_train.training.pipeline.chosen_postprocessing", fail)
    settings = RunSettings(**{**SMALL, "epochs": 1, "pixel_mm": 12.0}, largest_components=7)
    with pytest.warns(UserWarning, match="memory for this volume"):
        record = train(phantom_store, tmp_path / "run", settings)
    assert record.finished
    assert record.kept_components is None


def test_wherever_a_run_predicts_so_many_are_kept(run: Path, phantom_store: Path, phantom_folder: Path) -> None:
    cohort, loaded = open_cohort(phantom_store), load_run(run)
    case = loaded.record.test[0]
    volume = read_volume(next(phantom_folder.glob(f"{case}.*")))
    keeping = {
        most: replace(loaded, record=loaded.record.model_copy(update={"kept_components": most}))
        for most in (None, 3, 1)
    }
    whole = sizes(segment(keeping[None], cohort, case).found_xyz != 0)
    assert len(whole) > 3
    for most in (3, 1):
        assert sizes(segment(keeping[most], cohort, case).found_xyz != 0) == whole[:most]
    for runs, count in (([1], 1), ([1, 1], 1), ([1, 3], len(whole)), ([1, None], len(whole))):
        assert len(sizes(predict_volume([keeping[most] for most in runs], volume).array != 0)) == count


def test_scores_of_other_components_are_not_on_the_card(run: Path) -> None:
    record = load_record(run)
    evaluate(run)
    write_card(run, record.model_copy(update={"kept_components": None}))
    assert "not evaluated yet" in (run / "MODEL_CARD.md").read_text()
    write_card(run, record)
    assert "not evaluated yet" not in (run / "MODEL_CARD.md").read_text()


def test_components_of_several_labels_are_refused(
    run_train: Callable[..., Result], phantom_store: Path, tmp_path: Path
) -> None:
    refused = run_train(
        "run", "--store", phantom_store, "--largest-components", 7, "--labels", "stored", "-o", tmp_path / "run"
    )
    assert refused.exit_code == 2
    assert "--largest-components is for binary" in refused.output
    assert not (tmp_path / "run").exists()


def test_components_are_implausible_that_are_large_or_fragments() -> None:
    mask = np.zeros((40, 40, 40), np.bool_)
    mask[:10, :10, :10] = mask[20:30, :10, :10] = mask[:10, 20:30, :10] = True
    mask[20:24, 20:25, 20:25] = True  # 100 voxels, a tenth
    mask[35:38, 35:38, 30:41] = True  # 90
    fragment = np.zeros_like(mask)
    fragment[35:38, 35:38, 30:41] = True
    np.testing.assert_array_equal(implausible_components(mask, 1000), fragment)
    small = np.zeros_like(mask)
    small[20:24, 20:25, 20:25] = True
    np.testing.assert_array_equal(implausible_components(mask, 999), mask & ~small)
    nothing = np.zeros_like(mask)
    assert not implausible_components(nothing, 1).any()
