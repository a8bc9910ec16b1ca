"""3D Slicer's named segments: their layers, their values, and what training makes of their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicerio
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cspine_data import InputError, Split, open_cohort, prepare, read_volume, repair, verify, write_volume
from cspine_data.volumes.formats.nrrd_segments import parse_segments
from cspine_data.volumes.levels import level_value
from cspine_data.volumes.segments import Segment, common_values, flattened
from cspine_train import RunError, RunSettings
from cspine_train.cli.commands import main as train_main
from cspine_train.run.label_classes import label_meaning, label_names, label_values, unnamed_note
from cspine_train.run.record import load_record
from tests.conftest import ball, contents
from tests.test_training import SMALL

#: Name, value and layer of a segment.
Named = tuple[str, int, int]


def write_segments(path: Path, layers: np.ndarray, named: Sequence[Named], grid: Any) -> None:
    """Write a segmentation as 3D Slicer does; (layers, i, j, k), a single layer as a 3-D file."""
    steps = (grid.direction_matrix * np.array(grid.spacing_mm)).T
    vectors = " ".join(f"({','.join(map(str, step))})" for step in steps)
    listed = len(layers) > 1
    size = " ".join(map(str, layers.shape if listed else layers.shape[1:]))
    lines = [
        "NRRD0004", "type: uint8", f"dimension: {3 + listed}", "space: left-posterior-superior", f"sizes: {size}",
        f"space directions: {'none ' * listed}{vectors}", f"kinds: {'list ' * listed}domain domain domain",
        "encoding: raw", f"space origin: ({','.join(map(str, grid.origin_mm))})",
    ]  # fmt: skip
    for number, (name, value, layer) in enumerate(named):
        fields = {"ID": f"Segment_{number}", "Name": name, "LabelValue": value, "Layer": layer}
        lines += [f"Segment{number}_{field}:={text}" for field, text in fields.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + layers.astype(np.uint8).tobytes(order="F"))


def balls(folder: Path, **named: Sequence[Named]) -> Path:
    """Write cases whose segmentations name a ball and the shell around it."""
    for number, (case, segments) in enumerate(named.items()):
        image, label = ball((16, 32, 32), seed=number)
        layers = np.zeros((1 + max(layer for *_, layer in segments), *label.array.shape), np.uint8)
        for (_, value, layer), mask in zip(
            segments, (label.array == 1, label.array == 3, label.array > 0), strict=False
        ):
            layers[layer][mask] = value
        write_volume(folder / f"{case}.nrrd", image)
        write_segments(folder / f"{case}.seg.nrrd", layers, segments, image.geometry)
    return folder


# Names and values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("C1", 1), ("c7", 7), ("T1", 8), ("Th12", 19), ("T13", 28), ("L1", 20), ("L6", 25), ("Sacrum", 26),
        ("vertebrae_C3", 3), ("C3 vertebra", 3), ("C03", 3),
        ("C8", None), ("C0", None), ("T14", None), ("L7", None), ("C3/C4", None), ("disc C3", None), ("", None),
    ],
)  # fmt: skip
def test_names_of_levels_have_the_values_of_verse(name: str, value: int | None) -> None:
    assert level_value(name) == value


@given(st.lists(st.sampled_from(["C3", "T13", "disc", "cord", "L1"]), unique=True), st.data())
def test_a_name_has_the_same_value_in_all_cases(names: list[str], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(1, 200), min_size=len(names), max_size=len(names) + 3, unique=True))
    common = common_values([Segment(*one) for one in zip(names, values, strict=False)], values, ("disc", "C3"))
    assert len(set(common.values())) == len(values)
    expected = {"C3": 3, "T13": 28, "L1": 20, "disc": 101}
    for name, value in zip(names, values, strict=False):
        assert common[value] == expected.get(name, common[value])
        # Beside levels, another value is none of a level.
        assert name != "cord" or names == ["cord"] or common[value] not in range(1, 29)


def test_values_without_names_of_levels_stay() -> None:
    assert common_values([Segment("disc", 3), Segment("cord", 1)], [1, 2, 3]) == {1: 1, 2: 2, 3: 3}
    assert common_values([], [1, 2, 30], (1, 2)) == {1: 1, 2: 2, 30: 30}
    # A level that an unnamed value seems to be is not meant by it.
    assert common_values([Segment("C3", 1)], [1, 2, 3]) == {1: 3, 2: 102, 3: 103}


# Layers


@pytest.mark.parametrize("seed", range(3))
def test_layers_become_one_label_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = rng.integers(0, 3, (3, 5, 6, 7)) * (rng.random((3, 5, 6, 7)) < 0.2 + 0.2 * seed)
    segments = [Segment(f"s{n}", n + 1, *divmod(n, 2)) for n in range(6)]
    segments = [Segment(one.name, one.value, one.layer, one.layer_value + 1) for one in segments]
    array, overlaps = flattened(layers, segments)
    masks = {one.value: layers[one.layer] == one.layer_value for one in segments}
    expected = np.zeros(array.shape, int)
    for value, mask in masks.items():
        expected[mask] = value
    np.testing.assert_array_equal(array, expected)
    shared = {(a, b): int((masks[a] & masks[b]).sum()) for a in masks for b in masks if a < b}
    assert {(one.first.value, one.second.value): one.voxels for one in overlaps} == {
        pair: voxels for pair, voxels in shared.items() if voxels
    }


def test_segments_in_layers_that_do_not_overlap_are_read_without_loss(tmp_path: Path) -> None:
    _, label = ball()
    layers = np.stack([label.array == 1, label.array == 3])
    write_segments(tmp_path / "x.seg.nrrd", layers, [("a", 1, 0), ("b", 1, 1)], label.geometry)
    found = read_volume(tmp_path / "x.seg.nrrd")
    np.testing.assert_array_equal(found.array, layers[0] + 2 * layers[1])
    assert [(one.name, one.value) for one in found.segments] == [("a", 1), ("b", 2)]
    assert found.overlaps == ()
    assert found.geometry.same_grid(label.geometry)
    # Values that differ between the layers stay.
    write_segments(tmp_path / "y.seg.nrrd", layers * np.array([7, 9])[:, None, None, None],
                   [("a", 7, 0), ("b", 9, 1)], label.geometry)  # fmt: skip
    assert np.unique(read_volume(tmp_path / "y.seg.nrrd").array).tolist() == [0, 7, 9]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ([("a", 1, 0), ("b", 1, 2)], "in layer 2, which it lacks"),
        ([("a", 1, 0), ("b", 1, 0)], "gives two segments the same value"),
        ([(f"s{n}", n + 1, 0) for n in range(256)], "256 segments"),
        ([], "is 4-D"),
    ],
)
def test_segments_that_cannot_be_read_are_refused(named: list[Named], told: str, tmp_path: Path) -> None:
    _, label = ball()
    write_segments(tmp_path / "x.seg.nrrd", np.stack([label.array] * 2), named, label.geometry)
    with pytest.raises(InputError, match=told):
        read_volume(tmp_path / "x.seg.nrrd")


def test_values_and_layers_that_a_header_lacks_are_those_of_3d_slicer(tmp_path: Path) -> None:
    keys = {"Segment0_Name": "a", "Segment1_ID": "Segment_2", "Segment2_Name": "c", "Segment2_LabelValue": "4"}
    found = parse_segments(tmp_path, keys, layers=3)
    assert [(one.name, one.layer, one.layer_value) for one in found] == [("a", 0, 1), ("Segment_2", 1, 1), ("c", 2, 4)]
    (alone,) = parse_segments(tmp_path, {"Segment0_Name": "a"}, layers=None)
    assert (alone.name, alone.value) == ("a", 1)


# Cases


def test_overlapping_segments_are_a_union_with_a_note(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    raw = balls(tmp_path / "raw", A=[("C3", 1, 0), ("C4", 1, 1), ("column", 1, 2)])
    _, label = ball((16, 32, 32))
    shared = int((label.array == 1).sum())
    scanned = run_data("scan", raw)
    assert f"segments 'C3' and 'column' share {shared} voxels" in scanned.stderr
    assert prepare(raw, tmp_path / "all.zarr", n4=False, axes="0").failed == ()
    cohort = open_cohort(tmp_path / "all.zarr")
    record = cohort.record("A")
    # The last one wins, and hides the others.
    assert (record.overlaps, record.labels) == (((3, 103), (4, 103)), (103,))
    # Training on levels would name them.
    assert record.segments == {3: "C3", 4: "C4", 103: "column"}
    np.testing.assert_array_equal(cohort.label_xyz("A") > 0, label.array > 0)
    # What is not wanted hides nothing.
    chosen = tmp_path / "chosen.zarr"
    assert run_data("prepare", raw, "--store", chosen, "--no-n4", "--label-values", "c3,C4").exit_code == 0
    record = open_cohort(chosen).record("A")
    assert (record.overlaps, record.segments) == ((), {3: "C3", 4: "C4"})
    assert record.label_voxels == {3: shared, 4: int((label.array == 3).sum())}


def test_names_are_stored_shown_and_exported(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    raw = balls(tmp_path / "raw", A=[("C4", 1, 0), ("C3", 2, 0)], B=[("C3", 1, 0), ("disc", 2, 0)])
    store, out = tmp_path / "s.zarr", tmp_path / "out.seg.nrrd"
    assert run_data("prepare", raw, "--store", store, "--no-n4").exit_code == 0
    shown = run_data("info", store).stdout
    assert "3 (C3) 4 (C4)" in shown
    assert "3 (C3) 102 (disc)" in shown
    assert run_data("export", store, "A", "--label", "-o", out).exit_code == 0
    segments = {int(one["labelValue"]): one["name"] for one in slicerio.read_segmentation(str(out))["segments"]}
    assert segments == {3: "C3", 4: "C4"}
    np.testing.assert_array_equal(read_volume(out).array, np.choose(ball((16, 32, 32))[1].array, [0, 4, 0, 3]))
    # The same again computes nothing, and a damaged case is made again of the same.
    assert prepare(raw, store, n4=False).done == ()
    shard = next((store / "cases/A").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert repair(store, raw).failed == ()
    assert verify(store) == []


def test_free_text_is_not_stored_under_neutral_ids(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    balls(raw, A=[("C3", 1, 0), ("Doe", 1, 1), ("disc", 1, 2)], B=[("doe", 1, 0), ("C3", 2, 0)])
    assert prepare(raw, store, n4=False, axes="0", anonymise=True).failed == ()
    found = contents(store)
    assert not [name for name, content in found.items() if b"doe" in content.lower()]
    first, second = (dict(open_cohort(store).record(case).segments) for case in ("case0001", "case0002"))
    assert first[3] == second[3] == "C3"
    # The same name has the same code.
    assert first[102] == second[101]
    shard = next((store / "cases/case0001").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert repair(store, raw).failed == ()
    assert contents(store) == found


def test_names_that_are_no_levels_get_one_value_where_they_are_chosen(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    balls(raw, A=[("inner", 1, 0), ("outer", 2, 0)], B=[("outer", 1, 0), ("inner", 2, 0)], C=[("outer", 5, 0)])
    split = Split(("A",), ("B",), ("C",))
    settings = RunSettings(labels="stored", variant="raw")
    prepare(raw, store, n4=False, axes="0")
    with pytest.raises(RunError, match="segment 'outer' is label 2 in A and 1 in B; prepare with --label-values"):
        label_values(open_cohort(store), split, settings)
    prepare(raw, store, n4=False, axes="0", label_values="outer,inner")
    cohort = open_cohort(store)
    assert label_values(cohort, split, settings) == (1, 2)
    assert label_names(cohort, split, settings) == {1: "outer", 2: "inner"}
    truth = ball((16, 32, 32))[1].array
    np.testing.assert_array_equal(cohort.export("A", label=True).array, np.choose(truth, [0, 2, 0, 1]))


def test_a_value_to_ignore_is_the_one_that_is_stored(tmp_path: Path) -> None:
    """The file's value 3 is ignored, and C3 has VerSe's value 3."""
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    balls(raw, A=[("C3", 1, 0), ("ignore", 3, 0)])
    (problem,) = prepare(raw, store, n4=False, axes="0", ignore_label=3).failed
    assert "give --ignore-label 103" in problem.message
    assert prepare(raw, store, n4=False, axes="0", ignore_label=103).failed == ()
    record = open_cohort(store).record("A")
    assert (record.labels, record.ignored_values) == ((3,), (103,))


def test_a_label_map_without_segments_keeps_its_record(store: Path) -> None:
    record = open_cohort(store).record("A").model_dump()
    assert not record.keys() & {"segments", "overlaps", "label_values"}


# Training


def cohort_of(**records: dict[str, Any]) -> Any:
    blank = {"labels": (), "segments": {}, "overlaps": (), "label_centroids_mm": {}}
    made = {case: SimpleNamespace(case=case, **{**blank, "labels": tuple(one.get("segments", {})), **one})
            for case, one in records.items()}  # fmt: skip
    return SimpleNamespace(path="s.zarr", record=lambda case, _: made[case])


STORED = RunSettings(labels="stored")
SPLIT = Split(("a",), ("b",), ())


def test_classes_have_the_names_of_segments() -> None:
    cohort = cohort_of(a={"segments": {3: "C3", 4: "C4"}}, b={"segments": {4: "c4"}})
    assert label_values(cohort, SPLIT, STORED) == (3, 4)
    assert label_meaning((3, 4), label_names(cohort, SPLIT, STORED)) == {0: "background", 3: "C3", 4: "C4"}
    assert unnamed_note(cohort, SPLIT, STORED) == ""
    mixed = cohort_of(a={"segments": {3: "C3"}}, b={"labels": (1, 2)})
    assert "1 case without names of segments (b)" in unnamed_note(mixed, SPLIT, STORED)


@pytest.mark.parametrize(
    ("segments", "told"),
    [
        ({5: "disc"}, "segment 'disc' is label 4 in a and 5 in b"),
        ({4: "cord"}, "label 4 is segment 'disc' in a and 'cord' in b"),
    ],
)
def test_names_that_contradict_values_are_refused(segments: dict[int, str], told: str) -> None:
    cohort = cohort_of(a={"segments": {4: "disc"}}, b={"segments": segments})
    with pytest.raises(RunError, match=f"^s.zarr: {told}; prepare with --label-values"):
        label_values(cohort, SPLIT, STORED)
    assert label_values(cohort, SPLIT, RunSettings()) == ()


def test_overlapping_segments_are_refused_as_levels() -> None:
    cohort = cohort_of(a={"segments": {3: "C3", 101: "column"}, "overlaps": ((3, 101),)}, b={"segments": {3: "C3"}})
    with pytest.raises(RunError, match="segments 'C3' and 'column' of a overlap"):
        label_values(cohort, SPLIT, STORED)
    assert label_values(cohort, SPLIT, RunSettings()) == ()
    left_out = RunSettings(labels="stored", case_weights={"a": 0})
    assert label_values(cohort, Split(("a", "b"), (), ()), left_out) == (3,)


def test_names_reach_the_prediction(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    """Through the command line: values in any order, classes by name, a segmentation with names."""
    named = {case: [("C3", 1 + n % 2, 0), ("C4", 2 - n % 2, 0)] for n, case in enumerate("ABCD")}
    raw, store, run, out = (tmp_path / name for name in ("raw", "s.zarr", "run", "out.seg.nrrd"))
    balls(raw, **named)
    assert run_data("prepare", raw, "--store", store, "--no-n4", "--axes", "0").exit_code == 0
    options = {**SMALL, "variant": "raw", "epochs": 1, "labels": "stored", "pixel_mm": 1.0}
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    for command in (
        ["run", "--store", store, *given, "-o", run],
        ["predict", raw / "D.nrrd", "--run", run, "-o", out],
    ):
        done = CliRunner().invoke(train_main, [str(argument) for argument in command])
        assert done.exit_code == 0, done.output
    assert load_record(run).label_meaning == {0: "background", 3: "C3", 4: "C4"}
    segments = {int(one["labelValue"]): one["name"] for one in slicerio.read_segmentation(str(out))["segments"]}
    assert segments == {3: "C3", 4: "C4"}
