"""Keeping the largest connected pieces of a prediction, where validation is better for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from cspine_data import open_cohort, read_volume
from cspine_train import RunSettings, load_run, predict_volume, train
from cspine_train.evaluation import chosen_pieces, segment
from cspine_train.metrics import overlap
from cspine_train.pieces import largest_pieces
from cspine_train.settings import load_record, save_record
from tests.test_training import SMALL

pytestmark = pytest.mark.usefixtures("without_overlays")


def sizes(mask: NDArray[np.bool_]) -> list[int]:
    numbers, _ = ndimage.label(mask)
    return sorted(np.bincount(numbers.ravel())[1:].tolist(), reverse=True)


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.integers(1, 6))
def test_the_largest_pieces_stay_whole(seed: int, share: float, most: int) -> None:
    mask = np.random.default_rng(seed).random((6, 7, 8)) < share
    kept = largest_pieces(mask, most)
    assert not (kept & ~mask).any()
    assert sizes(kept) == sizes(mask)[:most]


def test_pieces_touch_through_faces_and_the_first_of_equals_stays() -> None:
    mask = np.zeros((2, 2, 3), np.bool_)
    mask[0, 0, 0] = mask[1, 1, 0] = mask[0, 0, 2] = True
    assert np.argwhere(largest_pieces(mask, 1)).tolist() == [[0, 0, 0]]


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pieces"
    train(phantom_store, run, RunSettings(**SMALL, pieces=1))
    return run


def test_so_many_are_kept_if_validation_is_better_for_it(run: Path, phantom_store: Path) -> None:
    loaded, cohort = load_run(run), open_cohort(phantom_store)
    loaded = replace(loaded, record=loaded.record.model_copy(update={"kept_pieces": None}))
    segmented = segment(loaded, cohort, loaded.record.validation[0])
    found, truth = segmented.found_xyz != 0, segmented.truth_xyz != 0
    outcomes = set()
    for most in range(1, len(sizes(found)) + 1):
        settings = loaded.record.settings.model_copy(update={"pieces": most})
        asked = replace(loaded, record=loaded.record.model_copy(update={"settings": settings}))
        better = overlap(largest_pieces(found, most), truth).dice > overlap(found, truth).dice
        assert chosen_pieces(asked, cohort) == (most if better else None)
        outcomes.add(better)
    assert outcomes == {True, False}


def test_a_run_records_what_it_chose(run: Path, phantom_store: Path) -> None:
    loaded = load_run(run)
    as_trained = replace(loaded, record=loaded.record.model_copy(update={"kept_pieces": None}))
    assert loaded.record.kept_pieces == chosen_pieces(as_trained, open_cohort(phantom_store))


def test_wherever_a_run_predicts_its_pieces_are_kept(run: Path, phantom_store: Path, phantom_folder: Path) -> None:
    cohort, record = open_cohort(phantom_store), load_record(run)
    case = record.test[0]
    volume = read_volume(next(phantom_folder.glob(f"{case}.*")))
    try:
        masks = {}
        for pieces in (None, 3, 1):
            save_record(run, record.model_copy(update={"kept_pieces": pieces}))
            loaded = load_run(run)
            masks[pieces] = segment(loaded, cohort, case).found_xyz != 0
            assert len(sizes(predict_volume([loaded], volume).array != 0)) == len(sizes(masks[pieces]))
        assert len(sizes(masks[None])) > 3
        for pieces in (3, 1):
            assert sizes(masks[pieces]) == sizes(masks[None])[:pieces]
        other = replace(loaded, record=record.model_copy(update={"kept_pieces": 3}))
        assert len(sizes(predict_volume([loaded, other], volume).array != 0)) == len(sizes(masks[None]))
        assert len(sizes(predict_volume([loaded, loaded], volume).array != 0)) == 1
        assert "the 1 largest connected pieces" not in (run / "MODEL_CARD.md").read_text()
    finally:
        save_record(run, record)


def test_pieces_of_several_labels_are_refused(
    run_train: Callable[..., Result], phantom_store: Path, tmp_path: Path
) -> None:
    refused = run_train("run", "--store", phantom_store, "--pieces", 7, "--labels", "stored", "-o", tmp_path / "run")
    assert refused.exit_code == 2
    assert "Error: --pieces are counted where labels are binary; leave it out" in refused.output
    assert not (tmp_path / "run").exists()
