from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cspine_data import (
    DamagedStoreError,
    NewerSchemaError,
    NotInStoreError,
    StoreError,
    open_cohort,
    prepare,
    read_volume,
    verify,
)
from cspine_data.store.publishing import Replacement, create_store, publish
from cspine_data.store.records import read_root
from cspine_data.store.schema import SCHEMA_VERSION, record_checksum
from tests.conftest import QUICK_N4, write_case


def folder_of(store: Path, case: str = "A", variant: str = "raw") -> Path:
    return store / "cases" / case / read_root(store).cases[case][variant]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, checksum: bool = True) -> None:
    """Change a group's record, with its checksum or against it."""
    content = json.loads((folder / "zarr.json").read_text())
    change(content["attributes"]["cspine"])
    if checksum:
        content["attributes"]["cspine_sha256"] = record_checksum(content["attributes"]["cspine"])
    (folder / "zarr.json").write_text(json.dumps(content))


def test_any_zarr_reader_finds_the_designed_layout(store: Path) -> None:
    group = zarr.open_group(str(folder_of(store)), mode="r")
    assert group["volume/0"].shape == (16, 20, 24)
    assert group["axis0/image"].shape == (16, 20, 24)
    assert group["axis1/image"].shape == (20, 16, 24)
    assert group["axis2/label"].shape == (24, 16, 20)
    assert group["axis2/image"].dtype == np.int16
    assert group["axis1/image"].shards == (20, 16, 24)
    assert group["axis1/image"].chunks == (1, 16, 24)
    ome = group["volume"].attrs["ome"]
    assert ome["version"] == "0.5"
    (scale, translation) = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1.5, 1.0, 1.0]
    assert translation["translation"] == [-10.0, 4.0, 2.5]
    assert [axis["name"] for axis in ome["multiscales"][0]["axes"]] == ["x", "y", "z"]
    assert group["volume/labels"].attrs["ome"]["labels"] == ["segmentation"]
    assert group["volume/0"].metadata.dimension_names == ("x", "y", "z")
    assert group["axis1/label"].metadata.dimension_names == ("y", "x", "z")
    normalised = open_cohort(store).record("A").normalisation.apply(group["volume/0"][...])
    for axis in range(3):
        slices = group[f"axis{axis}/image"]
        found = slices[...] * slices.attrs["scale_factor"] + slices.attrs["add_offset"]
        np.testing.assert_allclose(found, np.moveaxis(normalised, axis, 0), atol=slices.attrs["scale_factor"] * 0.51)


def test_export_gives_back_grid_values_and_dtype(store: Path, tmp_path: Path) -> None:
    for label, name in ((False, "A.nrrd"), (True, "AS-label.nrrd")):
        source, exported = read_volume(tmp_path / "raw" / name), open_cohort(store).export("A", label=label)
        np.testing.assert_array_equal(exported.array, source.array)
        assert exported.array.dtype == source.array.dtype
        assert exported.geometry == source.geometry


def test_a_store_keeps_nothing_of_its_sources_names_or_places(store: Path, tmp_path: Path) -> None:
    for file in store.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content
            assert b"AS-label" not in content


def test_a_sound_store_verifies(store: Path) -> None:
    assert verify(store) == []


def test_every_file_is_covered_and_a_flipped_byte_is_named(store: Path) -> None:
    rng = random.Random(0)
    for file in sorted(folder_of(store).rglob("*")):
        if not file.is_file():
            continue
        before = file.read_bytes()
        spot = rng.randrange(len(before))
        file.write_bytes(before[:spot] + bytes([before[spot] ^ 0x10]) + before[spot + 1 :])
        damages = verify(store)
        assert damages, file
        assert {damage.case for damage in damages} == {"A"}
        if file.parent != folder_of(store):
            assert str(damages[0]) == f"A (raw): {file.relative_to(folder_of(store))}: is not what was written"
        file.write_bytes(before)
    assert verify(store) == []


def test_missing_and_added_files_are_named(store: Path) -> None:
    shard = folder_of(store) / "axis0/image/c/0/0/0"
    content = shard.read_bytes()
    shard.unlink()
    assert [str(damage) for damage in verify(store)] == ["A (raw): axis0/image/c/0/0/0: is missing"]
    with pytest.raises(DamagedStoreError, match="cannot be opened"):
        open_cohort(store).slices(cases=["A"])[0]
    shard.write_bytes(content)
    (folder_of(store) / "extra").write_text("x")
    assert [str(damage) for damage in verify(store)] == ["A (raw): extra: does not belong there"]


@pytest.mark.parametrize("array", ["volume/0", "volume/labels/segmentation/0"])
def test_a_damaged_or_missing_volume_raises(store: Path, array: str) -> None:
    shard = folder_of(store) / array / "c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedStoreError, match="is damaged"):
        open_cohort(store).volumes(cases=["A"])[0]
    shard.unlink()
    with pytest.raises(DamagedStoreError, match="missing from the store"):
        open_cohort(store).volumes(cases=["A"])[0]


def spoil(record: dict[str, Any]) -> None:
    record["normalisation"]["values"] = "wide"


def shift(record: dict[str, Any]) -> None:
    record["normalisation"]["intensities"][0] += 1e-9


@pytest.mark.parametrize(("change", "checksum"), [(spoil, True), (shift, False)])
def test_a_damaged_record_is_not_read(change, checksum: bool, store: Path) -> None:
    rewrite(folder_of(store), change, checksum=checksum)
    with pytest.raises(DamagedStoreError, match="missing or damaged"):
        open_cohort(store).slices()
    assert [str(damage) for damage in verify(store)] == ["A (raw): record: missing or damaged"]
    assert prepare(store.parent / "raw", store, n4=False).done == ("A",)
    assert verify(store) == []


def test_notes_on_a_case_are_shown_and_a_case_without_any_keeps_its_bytes(store: Path, run_data) -> None:
    assert b"notes" not in (folder_of(store) / "zarr.json").read_bytes()
    assert open_cohort(store).record("A").notes == ()
    rewrite(folder_of(store), lambda record: record.update(notes=["12 voxels are NaN", "label map: rounded"]))
    again = prepare(store.parent / "raw", store, n4=False)
    assert again.done == ()
    assert again.notes == {"A": ("12 voxels are NaN", "label map: rounded")}
    reused = run_data("prepare", store.parent / "raw", "--store", store, "--no-n4")
    assert "note: A: 12 voxels are NaN; label map: rounded\n" in reused.stderr
    assert "note: A (raw): 12 voxels are NaN; label map: rounded\n" in run_data("info", store).stderr


def test_a_newer_schema_is_refused_by_name(store: Path) -> None:
    def raise_version(record: dict[str, Any]) -> None:
        record["schema_version"] = SCHEMA_VERSION + 1

    rewrite(store, raise_version)
    for use in (open_cohort, verify, create_store):
        told = f"has schema version {SCHEMA_VERSION + 1}, this cspine knows {SCHEMA_VERSION}; install a newer cspine"
        with pytest.raises(NewerSchemaError, match=told):
            use(store)


@pytest.mark.parametrize("content", ["", "{", '{"attributes": 3}', '{"attributes": {"cspine": {"cases": 3}}}'])
def test_a_damaged_root_is_told(store: Path, content: str) -> None:
    (store / "zarr.json").write_text(content)
    with pytest.raises(DamagedStoreError, match="repair it with cspine-data"):
        open_cohort(store)


def test_what_is_no_store_is_not_opened_and_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no cspine store"):
        open_cohort(tmp_path / "nowhere")
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(StoreError, match="is no cspine store"):
        create_store(tmp_path)
    with pytest.raises(StoreError, match="is no cspine store"):
        create_store(tmp_path / "thesis.docx")
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w")
    with pytest.raises(StoreError, match="is no cspine store"):
        open_cohort(tmp_path / "other.zarr")


def test_what_a_killed_run_left_is_invisible_and_does_not_block(store: Path, tmp_path: Path) -> None:
    half = store / "cases" / "C" / ".unfinished-1"
    half.mkdir(parents=True)
    (half / "zarr.json").write_text("{")
    whole_but_unnamed = store / "cases" / "A" / ("0" * 32)
    shutil.copytree(folder_of(store), whole_but_unnamed)
    assert open_cohort(store).cases == ("A", "B")
    assert verify(store) == []
    write_case(tmp_path / "raw", "C", 2)
    assert prepare(tmp_path / "raw", store, n4=False).done == ("C",)


def test_a_written_digest_that_was_never_published_is_used(store: Path, tmp_path: Path) -> None:
    digest = read_root(store).cases["A"]["raw"]
    rewrite(store, lambda record: record["cases"].pop("A"))
    shard = store / "cases/A" / digest / "axis0/image/c/0/0/0"
    before = shard.stat().st_mtime_ns
    assert prepare(tmp_path / "raw", store, n4=False).done == ("A",)
    assert shard.stat().st_mtime_ns == before
    assert open_cohort(store).cases == ("A", "B")


def test_variants_live_side_by_side(store: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "raw", store, preprocessing=QUICK_N4)
    cohort = open_cohort(store)
    assert cohort.variants == ("n4", "raw")
    with pytest.raises(NotInStoreError, match="say which variant"):
        cohort.slices()
    with pytest.raises(NotInStoreError, match="holds no variant 'n5'"):
        cohort.slices(variant="n5")
    assert cohort.record("A", "n4").digest != cohort.record("A", "raw").digest


def test_what_the_store_does_not_hold_is_told(store: Path) -> None:
    with pytest.raises(NotInStoreError, match="holds no case 'Z'"):
        open_cohort(store).record("Z")
    publish(store, [Replacement("A", "n4", read_root(store).cases["A"]["raw"], None)])
    with pytest.raises(NotInStoreError, match="raw, not as n4"):
        open_cohort(store).record("B", "n4")
