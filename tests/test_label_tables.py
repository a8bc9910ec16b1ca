"""BIDS's tables of label values: which table names a label map, and that stores and `relabel` use its names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cspine_data import Volume, export_cohort, find_cases, open_cohort, prepare, read_volume, relabel, write_volume
from cspine_data.sources.cases import load_case
from cspine_data.volumes.segments import Segment
from tests.conftest import geometry
from tests.test_relabelling import SIZE, spine

DERIVED = "derivatives/labels"
TABLE = (
    "index\tname\tcolor\n0\tBackground\t#000000\n5\tL5\t#ff0000\n3\tvertebrae_L4\t#00ff00\n7\tdisc\t\n4\tlabel_4\t\n"
)
OTHER = "index\tname\n5\tT1\n"


def bids(folder: Path, tables: Mapping[str, str], subjects: int = 1, suffix: str = "dseg") -> Path:
    """Write a BIDS data set with label values 5, 3, 7 and 4, from feet to head."""
    grid = geometry(SIZE, (2.0, 1.5, 2.0))
    label = spine([5, 3, 7, 4])
    for number in range(1, subjects + 1):
        image = np.random.default_rng(number).normal(200 + 100 * (label > 0), 20).clip(0).astype(np.int16)
        write_volume(folder / f"sub-{number}/anat/sub-{number}_T2w.nii.gz", Volume(image, grid))
        name = f"{DERIVED}/sub-{number}/anat/sub-{number}_T2w_{suffix}.nii.gz"
        write_volume(folder / name, Volume(label, grid))
    (folder / "dataset_description.json").write_text("{}")
    for table, text in tables.items():
        (folder / table).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("tables", "name"),
    [
        ({f"{DERIVED}/dseg.tsv": TABLE}, "L5"),
        ({"dseg.tsv": TABLE}, "L5"),
        ({f"{DERIVED}/sub-1/anat/sub-1_T2w_dseg.tsv": TABLE, f"{DERIVED}/dseg.tsv": OTHER}, "L5"),
        ({f"{DERIVED}/sub-1_dseg.tsv": TABLE, f"{DERIVED}/dseg.tsv": OTHER}, "L5"),
        ({f"{DERIVED}/seg-other_dseg.tsv": TABLE}, None),
        ({f"{DERIVED}/sub-1/anat/dseg.json": TABLE, f"{DERIVED}/dseg.csv": TABLE}, None),
        ({"../dseg.tsv": TABLE}, None),
    ],
)
def test_the_nearest_table_of_a_label_map_names_its_values(
    tables: dict[str, str], name: str | None, tmp_path: Path
) -> None:
    listing = find_cases(bids(tmp_path / "raw", tables))
    (case,) = listing.cases
    assert dict(case.label_names).get(5) == name
    assert any("named by" in note for note in listing.notes) == (name is not None)


def test_tables_outside_the_source_are_not_read(tmp_path: Path) -> None:
    raw = bids(tmp_path / "derivatives" / "raw", {"../dseg.tsv": TABLE})
    label = raw / DERIVED / "sub-1/anat/sub-1_T2w_dseg.nii.gz"
    label.rename(raw / "sub-1/anat" / label.name)
    (case,) = find_cases(raw).cases
    assert (case.label, case.label_names) == (raw / "sub-1/anat" / label.name, ())


def test_a_files_own_names_come_before_those_of_a_table(tmp_path: Path) -> None:
    raw = bids(tmp_path, {f"{DERIVED}/dseg.tsv": TABLE})
    plain = raw / DERIVED / "sub-1/anat/sub-1_T2w_dseg.nii.gz"
    named = Volume(read_volume(plain).array, read_volume(plain).geometry, segments=(Segment("C3", 5),))
    plain.unlink()
    write_volume(plain.with_name("sub-1_T2w_dseg.seg.nrrd"), named)
    (case,) = find_cases(raw).cases
    assert dict(case.label_names)[5] == "L5"
    label = load_case(case).label
    assert label
    assert {one.name: one.value for one in label.segments}["C3"] == 3


def test_only_segmentations_of_bids_have_tables(tmp_path: Path) -> None:
    listing = find_cases(bids(tmp_path, {f"{DERIVED}/dseg.tsv": TABLE, f"{DERIVED}/msk.tsv": TABLE}, suffix="msk"))
    assert [(bool(case.label), case.label_names) for case in listing.cases] == [(True, ())]


def test_names_of_a_table_decide_values_as_those_of_segments_do(tmp_path: Path) -> None:
    raw = bids(tmp_path / "raw", {f"{DERIVED}/dseg.tsv": TABLE})
    (case,) = find_cases(raw).cases
    label = load_case(case).label
    assert label
    # Other values than levels must not equal any level's.
    assert {one.value: one.name for one in label.segments} == {24: "L5", 23: "vertebrae_L4", 107: "disc"}
    assert set(np.unique(label.array)) == {0, 23, 24, 104, 107}
    neutral = load_case(case, neutral=True).label
    assert neutral
    assert {one.value: one.name for one in neutral.segments}.items() >= {(24, "L5"), (23, "vertebrae_L4")}
    assert "disc" not in {one.name for one in neutral.segments}
    found = relabel(find_cases(raw), tmp_path / "levels", scheme="verse")
    assert found.levels == {"sub-1_T2w": ("L4", "L5")}


def test_a_store_follows_its_table(tmp_path: Path) -> None:
    raw, store = bids(tmp_path / "raw", {f"{DERIVED}/dseg.tsv": TABLE}, subjects=2), tmp_path / "s.zarr"
    prepare(raw, store, n4=False, axes="0")
    record = open_cohort(store).record("sub-1_T2w")
    assert record.segments == {24: "L5", 23: "vertebrae_L4", 107: "disc"}
    assert not prepare(raw, store, n4=False, axes="0").done
    # What is exported comes back with the same values and names.
    export_cohort(open_cohort(store), tmp_path / "bids", "bids")
    listing = find_cases(tmp_path / "bids")
    again = load_case(listing.cases[0]).label
    assert again
    assert {one.value: one.name for one in again.segments} == record.segments
    (raw / DERIVED / "dseg.tsv").write_text(TABLE.replace("L5", "L6"))
    assert len(prepare(raw, store, n4=False, axes="0").done) == 2
    assert open_cohort(store).record("sub-1_T2w").labels == (23, 25, 104, 107)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"index\tname\n" + b"1\tL1\n" * 30000, "KiB"),
        (b"index\tname\none\tL1\n", "line 2"),
        (b"index\tname\n-1\tL1\n", "line 2"),
        (b"index\tname\n1\tL1\n1\tL2\n", "two names"),
        (b"value\tname\n1\tL1\n", "index"),
        (b"index\tname\n1\t\xff\xfe\n", "UTF-8"),
        (b"", "index"),
    ],
)
def test_an_unusable_table_is_one_problem_and_other_cases_go_on(content: bytes, word: str, tmp_path: Path) -> None:
    raw = bids(tmp_path, {}, subjects=2)
    table = raw / DERIVED / "sub-2/anat/sub-2_dseg.tsv"
    table.write_bytes(content)
    listing = find_cases(raw)
    assert [case.id for case in listing.cases] == ["sub-1_T2w"]
    (problem,) = listing.problems
    assert (problem.case, problem.message.count("\n")) == ("sub-2_T2w", 0)
    assert str(table) in problem.message
    assert word in problem.message


def test_names_of_tables_are_short_and_printable(tmp_path: Path) -> None:
    raw = bids(tmp_path, {"dseg.tsv": f"index\tname\n1\tdisc\x07 a\n2\t{'x' * 999}\n3\tn/a\n4\t\n"})
    (case,) = find_cases(raw).cases
    assert [(value, len(name)) for value, name in case.label_names] == [(1, 7), (2, 200)]
    assert "\x07" not in case.label_names[0][1]


def test_only_files_are_tables(tmp_path: Path) -> None:
    raw = bids(tmp_path, {})
    (raw / DERIVED / "dseg.tsv").mkdir()
    # Opening a pipe would wait for ever.
    os.mkfifo(raw / DERIVED / "sub-1/anat/sub-1_dseg.tsv")
    listing = find_cases(raw)
    assert [case.label_names for case in listing.cases] == [()]
    assert listing.problems == ()
