"""Which label values are segmented: `--label-values`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from cspine_data import InputError, PrepareOptions, Volume, open_cohort, prepare, read_volume, repair, write_volume
from cspine_data.sources.cases import EMPTY_LABEL_MAP, Case, load_case
from cspine_data.volumes.label_options import LabelOptions, label_values_text, parse_label_values
from cspine_train.run.patient_split import cohort_fields
from tests.conftest import ball, contents, write_case


@pytest.mark.parametrize(
    ("given", "values", "text"),
    [
        ("1,2", (1, 2), "1-2"),
        ("1-3, 101-102,7", (1, 2, 3, 101, 102, 7), "1-3,101-102,7"),
        ("C3,disc,5,5", ("C3", "disc", 5), "C3,disc,5"),
        ((4, "C3"), (4, "C3"), "4,C3"),
    ],
)
def test_values_and_names_are_parsed(given: object, values: tuple[object, ...], text: str) -> None:
    found = PrepareOptions(label_values=given).label_options.label_values
    assert found == values
    assert label_values_text(found) == text
    assert parse_label_values(text) == values


@pytest.mark.parametrize("given", ["", "1,,2", "0", "-1", "5-3", "1-999999999", ()])
def test_what_is_no_value_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="label values"):
        parse_label_values(given)


def test_values_that_are_left_out_are_background(
    ball_cohort: Path, tmp_path: Path, run_data: Callable[..., Result]
) -> None:
    raw, store = ball_cohort / "raw", tmp_path / "s.zarr"
    done = run_data("scan", raw, "--label-values", "3")
    assert [line.split()[-2] for line in done.stdout.splitlines() if "label.nrrd" in line] == ["3", "3"]
    assert run_data("prepare", raw, "--store", store, "--no-n4", "--label-values", "3").exit_code == 0
    truth = read_volume(raw / "AS-label.nrrd").array
    cohort = open_cohort(store)
    record = cohort.record("A")
    assert (record.label_values, record.label_voxels) == ((3,), {3: np.count_nonzero(truth == 3)})
    np.testing.assert_array_equal(cohort.export("A", label=True).array, np.where(truth == 3, 3, 0))
    slices = cohort.slices(axis=0, cases=["A"])
    np.testing.assert_array_equal(np.concatenate([mask for _, mask in slices]), truth == 3)
    assert "2 cases with --label-values 3" in run_data("info", store).stdout
    # The option may be forgotten, and a repair needs it not.
    before = contents(store)
    assert prepare(raw, store, n4=False).reused == ("A", "B")
    assert contents(store) == before
    shard = next((store / "cases/A").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert repair(store, raw).failed == ()
    assert contents(store) == before
    # The other variant keeps them, too; other values replace the case.
    assert prepare(raw, store, n4=False, label_values=(1,)).done == ("A", "B")
    assert open_cohort(store).record("A").labels == (1,)


def test_all_values_give_another_digest_than_chosen_ones(store: Path) -> None:
    digests = [open_cohort(store).record("A").digest]
    for values in ("1,3", "3"):
        prepare(store.parent / "raw", store, n4=False, label_values=values)
        digests.append(open_cohort(store).record("A").digest)
    assert len(set(digests)) == 3


def test_ignored_voxels_stay_beside_chosen_values(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    options = LabelOptions(label_values=(1,), ignore_label=3)
    label = load_case(Case("A", tmp_path / "A.nrrd", tmp_path / "AS-label.nrrd"), options).label
    assert np.unique(label.array).tolist() == [0, 1, 3]


def test_a_case_without_any_of_the_values_is_unlabelled(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    case = Case("A", tmp_path / "A.nrrd", tmp_path / "AS-label.nrrd")
    loaded = load_case(case, LabelOptions(label_values=(2,)))
    assert loaded.label is None
    assert loaded.notes[0] == EMPTY_LABEL_MAP
    assert "(1 3)" in loaded.notes[1]


@pytest.mark.parametrize("values", [(1, 2), (100_000,)])
def test_an_image_stays_refused_whichever_values_are_chosen(values: tuple[int, ...], tmp_path: Path) -> None:
    image, _ = ball()
    write_volume(tmp_path / "A.nrrd", image)
    noise = np.random.default_rng(0).integers(0, 200, image.array.shape).astype(np.int16)
    write_volume(tmp_path / "A-label.nrrd", Volume(noise, image.geometry))
    with pytest.raises(InputError, match="as an image does"):
        load_case(Case("A", tmp_path / "A.nrrd", tmp_path / "A-label.nrrd"), LabelOptions(label_values=values))


def test_names_need_segments(tmp_path: Path) -> None:
    write_case(tmp_path, "A")
    case = Case("A", tmp_path / "A.nrrd", tmp_path / "AS-label.nrrd")
    with pytest.raises(InputError, match="names no segments"):
        load_case(case, LabelOptions(label_values=("C3",)))


def test_a_run_repeats_what_was_segmented(tmp_path: Path) -> None:
    for name in "ABC":
        write_case(tmp_path / "raw", name)
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, label_values="1-3", note="balls")
    cohort = open_cohort(tmp_path / "s.zarr")
    assert cohort_fields(cohort, cohort.split(), "raw")["notes"] == (
        "balls",
        "only labels 1-3 of the label maps are segmented",
    )
