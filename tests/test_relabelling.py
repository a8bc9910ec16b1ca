"""Vertebrae are ordered along the spine and named; what is ambiguous is listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import slicerio
from click.testing import Result
from numpy.typing import NDArray

from cspine_data import (
    InputError,
    Orientation,
    Volume,
    find_cases,
    level_colour,
    open_cohort,
    prepare,
    read_volume,
    relabel,
    write_volume,
)
from cspine_data.volumes.instances import find_instances, label_centroids_mm, order_problems, unordered_labels
from cspine_data.volumes.levels import LEVEL_NAMES, SCHEMES, SPINE, consecutive_levels, level_value
from cspine_data.volumes.segments import Segment
from tests.conftest import geometry

SIZE = (12, 24, 90)
TILTED = ((1, 0, 0), (0, 0.96, 0.28), (0, -0.28, 0.96))


def spine(values: list[int], *, start: int = 3, step: int = 12) -> NDArray[np.uint8]:
    """Boxes along z, from feet to head, with these values."""
    label = np.zeros(SIZE, np.uint8)
    for number, value in enumerate(values):
        label[3:9, 8:16, start + number * step : start + number * step + 8] = value
    return label


def write(folder: Path, name: str, label: NDArray[np.uint8], suffix: str = ".nrrd") -> None:
    grid = geometry(SIZE, (2.0, 1.5, 2.0), TILTED)
    image = np.random.default_rng(len(name)).normal(200 + 100 * (label > 0), 20).clip(0).astype(np.int16)
    image[0, 0, 0] = int.from_bytes(name.encode(), "big") % 500
    write_volume(folder / f"{name}{suffix}", Volume(image, grid))
    write_volume(folder / f"{name}-label{suffix}", Volume(label, grid))


def test_instances_are_ordered_from_head_to_feet_whatever_the_files_orientation() -> None:
    label = Volume(spine([3, 1, 2]), geometry(SIZE, (2.0, 1.5, 2.0), TILTED))
    turned = Orientation((2, 0, 1), (True, False, True))
    other = Volume(turned.to_file(label.array), turned.geometry_in_file(label.geometry))
    for one in (label, other):
        found = find_instances(one)
        assert [instance.value for instance in found] == [2, 1, 3]
        assert order_problems(found) == []
        assert found[0].volume_ml == pytest.approx(6 * 8 * 8 * 6 / 1000)
    np.testing.assert_allclose(find_instances(other)[0].centroid_mm, find_instances(label)[0].centroid_mm, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda label: np.where(label == 3, 0, label), "missing"),
        (lambda label: np.where((label == 3) & (np.arange(SIZE[1])[:, None] > 11), 9, label), "one vertebra"),
        (lambda label: np.where((label == 2) & (np.arange(SIZE[0])[:, None, None] == 5), 0, label), "pieces"),
    ],
)
def test_gaps_duplicates_and_fragments_are_ambiguous(
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], word: str
) -> None:
    grid = geometry(SIZE, (2.0, 1.5, 2.0))
    label = spine([1, 2, 3, 4, 5, 6])
    assert order_problems(find_instances(Volume(label, grid))) == []
    problems = order_problems(find_instances(Volume(change(label), grid)))
    assert problems
    assert any(word in problem for problem in problems)


def test_values_are_unordered_only_where_one_is_clearly_above_and_below() -> None:
    grid = geometry(SIZE, (2.0, 1.5, 2.0))
    orders = ([1, 2, 3, 4], [3, 2, 1, 4], [1, 3, 4], [2, 1, 3, 4])
    first, second, third, fourth = (label_centroids_mm(spine(order), grid) for order in orders)
    assert unordered_labels([first, third]) == ()
    assert unordered_labels([first, third, second]) == (1, 2, 3)
    # One structure that may be anywhere, such as a lesion.
    assert unordered_labels([first, fourth]) == ()
    # Bodies and discs, both along the whole spine.
    assert unordered_labels([{1: (0, 0, 50), 2: (0, 0, 52)}, {1: (0, 0, 50), 2: (0, 0, 47)}]) == ()
    assert label_centroids_mm(np.zeros(SIZE, np.uint8), grid) == {}


def test_centroids_are_means_of_positions() -> None:
    array = np.random.default_rng(0).choice(np.array([-1, 0, 0, 3, 300], np.int16), (5, 6, 7))
    grid = geometry(array.shape, (2.0, 1.5, 2.0), TILTED)
    for order in ("C", "F"):
        found = label_centroids_mm(np.asarray(array, order=order), grid)
        assert list(found) == [-1, 3, 300]
        for value, centroid_mm in found.items():
            np.testing.assert_allclose(centroid_mm, grid.positions_mm(np.argwhere(array == value)).mean(0))


def test_consecutive_levels_end_where_they_are_told() -> None:
    named = [
        " ".join(LEVEL_NAMES[value] for value in consecutive_levels(*given))
        for given in (("L5", None, 3), (None, "C6", 4))
    ]
    assert named == ["L3 L4 L5", "C6 C7 T1 T2"]
    assert [LEVEL_NAMES[value] for value in consecutive_levels("L6", None, 3)] == ["L4", "L5", "L6"]
    assert [LEVEL_NAMES[value] for value in consecutive_levels("T13", None, 2)] == ["T12", "T13"]
    assert [LEVEL_NAMES[value] for value in consecutive_levels("sacrum", None, 2)] == ["L5", "sacrum"]
    for bad in (("C2", None, 3), (None, "L4", 3), ("X1", None, 1), (None, None, 2), ("L5", "C1", 2)):
        with pytest.raises(InputError):
            consecutive_levels(*bad)


def test_colours_of_levels_show_the_region_and_tell_neighbours_apart() -> None:
    colours = [level_colour(value) for value in LEVEL_NAMES]
    assert len(set(colours)) == len(colours)
    hues = {name[0]: np.argmax(level_colour(value)) for value, name in LEVEL_NAMES.items()}
    assert hues == {"C": 2, "T": 1, "L": 0, "s": 0}
    for region in ("C", "T", "L"):
        light = [sum(level_colour(value)) for value in SPINE if LEVEL_NAMES[value][0] == region]
        assert (np.abs(np.diff(light)) > 150).all()
    with pytest.raises(KeyError):
        level_colour(27)


def test_schemes_are_one_to_one_and_names_have_their_values() -> None:
    for scheme in SCHEMES.values():
        assert len(set(scheme.values())) == len(scheme)
    assert all(level_value(name) == value for value, name in LEVEL_NAMES.items())
    assert (SCHEMES["totalspineseg"][1], SCHEMES["totalspineseg"][19], SCHEMES["totalspineseg"][24]) == (11, 32, 45)


def test_only_the_chosen_values_are_instances(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    """SPIDER numbers vertebrae from below; 100 is the canal, and discs follow from 201."""
    label = spine([1, 2, 3, 4, 5])
    label[3:9, 18:20] = 100
    label[3:9, 8:16, 11:15] = 201
    for name in ("A", "B"):
        write(tmp_path / "raw", name, label)
    note = run_data("scan", tmp_path / "raw").output
    assert "feet to head" in note
    told = run_data("relabel", tmp_path / "raw", "-o", tmp_path / "out", "--lowest", "L5", "--label-values", "1-25")
    assert told.exit_code == 0
    found = read_volume(tmp_path / "out" / "A" / "A.seg.nrrd")
    np.testing.assert_array_equal(found.array, np.where(label < 100, (25 - label) * (label > 0), 0))
    assert "levels L1 to L5" in run_data("scan", "--pairs", tmp_path / "out" / "pairs.csv").output
    with pytest.raises(InputError, match="label values"):
        relabel(find_cases(tmp_path / "raw"), tmp_path / "x", lowest="L5", label_values="0")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two cases of six instances in different orders, and one with a gap."""
    folder = tmp_path / "raw"
    write(folder, "A", spine([1, 2, 3, 4, 5, 6]))
    write(folder, "B", spine([6, 2, 3, 4, 5, 1]))
    write(folder, "C", np.where(spine([1, 2, 3, 4, 5, 6]) == 4, 0, spine([1, 2, 3, 4, 5, 6])).astype(np.uint8))
    return folder


def test_a_cohort_of_instances_becomes_levels_and_trains_as_such(
    cohort: Path, tmp_path: Path, run_data: Callable[..., Result], run_train: Callable[..., Result]
) -> None:
    assert "instances, not levels" in run_data("scan", cohort).output
    told = run_data("relabel", cohort, "-o", tmp_path / "levels", "--lowest", "L5")
    assert told.exit_code == 1
    assert "T12 L1 L2 L3 L4 L5" in told.output
    assert told.output.count("problem: ") == 1
    assert "ambiguous" in told.output
    label = read_volume(tmp_path / "levels" / "B" / "B.seg.nrrd")
    heights = {one.value: one.centroid_mm[2] for one in find_instances(label)}
    assert list(heights) == [19, 20, 21, 22, 23, 24]
    assert (label.array > 0).sum() == (spine([1, 2, 3, 4, 5, 6]) > 0).sum()
    pairs = tmp_path / "levels" / "pairs.csv"
    assert [case.id for case in find_cases(".", pairs).cases] == ["A", "B"]
    assert "instances, not levels" not in run_data("scan", "--pairs", pairs).output

    for name, source, options in (("instances", cohort, {}), ("levels", tmp_path / "none", {"pairs": pairs})):
        store = tmp_path / f"{name}.zarr"
        assert prepare(source, store, n4=False, axes="0", **options).done
        unordered = unordered_labels(record.label_centroids_mm for record in open_cohort(store).records())
        assert bool(unordered) == (name == "instances")
        levels = {"A": "T12-L5", "B": "T12-L5"} if name == "levels" else dict.fromkeys("ABC", "")
        assert open_cohort(store).table()["levels"].to_dict() == levels
        info = run_data("info", store).output
        assert ("T12-L5" in info, "instances, not levels" in info) == (name == "levels", name == "instances")
    refused = run_train("run", "--store", tmp_path / "instances.zarr", "--variant", "raw", "--labels", "stored")
    assert refused.exit_code == 1
    assert "cspine-data relabel" in refused.output


def test_a_list_names_the_end_of_each_case_and_an_output_folder_is_new(cohort: Path, tmp_path: Path) -> None:
    rows = ["case,volume,label,lowest,highest", "A,raw/A.nrrd,raw/A-label.nrrd,,C2", "B,raw/B.nrrd,raw/B-label.nrrd,,"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    listing = find_cases(tmp_path, tmp_path / "list.csv")
    found = relabel(listing, tmp_path / "out")
    assert found.levels == {"A": ("C2", "C3", "C4", "C5", "C6", "C7")}
    assert [problem.case for problem in found.problems] == ["B"]
    assert relabel(listing, tmp_path / "other", lowest="T6").levels["B"][-1] == "T6"
    with pytest.raises(InputError, match="not empty"):
        relabel(listing, tmp_path / "out")


def test_a_level_that_does_not_fit_is_reported_with_the_file_and_leaves_the_folder_empty(
    cohort: Path, tmp_path: Path
) -> None:
    listing = find_cases(cohort)
    found = relabel(listing, tmp_path / "out", highest="L3")
    assert not found.levels
    message = {problem.case: problem.message for problem in found.problems}["A"]
    assert message.startswith(str(cohort / "A-label.nrrd"))
    assert "6 vertebrae" in message
    assert not any((tmp_path / "out").iterdir())
    assert list(relabel(listing, tmp_path / "out", lowest="L3").levels) == ["A", "B"]


def test_values_of_other_tools_are_converted_there_and_back(tmp_path: Path) -> None:
    write(tmp_path / "raw", "A", np.where(spine([45, 44, 43, 42, 41, 99]) == 99, 91, spine([45, 44, 43, 42, 41, 99])))
    found = relabel(find_cases(tmp_path / "raw"), tmp_path / "verse", scheme="totalspineseg")
    assert found.levels == {"A": ("L1", "L2", "L3", "L4", "L5")}
    back = relabel(find_cases(".", found.pairs), tmp_path / "back", scheme="verse", to_scheme="totalspineseg")
    array = read_volume(tmp_path / "back" / "A" / "A-label.nrrd").array
    np.testing.assert_array_equal(array, spine([45, 44, 43, 42, 41]))
    assert back.problems == ()
    with pytest.raises(InputError):
        relabel(find_cases(".", found.pairs), tmp_path / "x", scheme="none")
    with pytest.raises(InputError):
        relabel(find_cases(".", found.pairs), tmp_path / "x", scheme="verse", lowest="L5")
    assert not (tmp_path / "x").exists()


def test_segmentations_have_the_names_of_the_levels(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    write(folder, "A", spine([1, 2, 3]))
    (folder / "A-label.nrrd").unlink()
    write_volume(folder / "A.seg.nrrd", Volume(spine([1, 2, 3]), geometry(SIZE, (2.0, 1.5, 2.0), TILTED)))
    found = relabel(find_cases(folder), tmp_path / "out", highest="C3")
    assert found.levels == {"A": ("C3", "C4", "C5")}
    case = find_cases(".", found.pairs).cases[0]
    assert case.label
    assert case.label.name == "A.seg.nrrd"
    assert {one.name: one.value for one in read_volume(case.label).segments} == {"C3": 3, "C4": 4, "C5": 5}
    for segment in slicerio.read_segmentation(str(case.label))["segments"]:
        np.testing.assert_allclose(segment["color"], np.divide(level_colour(segment["labelValue"]), 255), atol=1e-3)
    # Names are kept whatever the end of the spine is said to be.
    again = relabel(find_cases(".", found.pairs), tmp_path / "again", lowest="L5")
    assert again.levels == found.levels


def test_a_scheme_does_not_rename_segments_that_name_levels(tmp_path: Path) -> None:
    """T4 has VerSe's value 11, which is C1 in TotalSpineSeg's scheme."""
    folder = tmp_path / "raw"
    write(folder, "A", spine([26, 25, 24, 99]))
    (folder / "A-label.nrrd").unlink()
    named = (Segment("T6", 26), Segment("T5", 25), Segment("T4", 24), Segment("cord", 99))
    grid = geometry(SIZE, (2.0, 1.5, 2.0), TILTED)
    write_volume(folder / "A.seg.nrrd", Volume(spine([26, 25, 24, 99]), grid, segments=named))
    found = relabel(find_cases(folder), tmp_path / "out", scheme="totalspineseg")
    assert found.levels == {"A": ("T4", "T5", "T6")}
