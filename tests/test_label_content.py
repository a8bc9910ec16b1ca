"""What is looked at in a label map before it is trusted, and what scan, prepare and predict say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from cspine_data import (
    InputError,
    Volume,
    open_cohort,
    prepare,
    preprocess_volume,
    read_volume,
    usable_image,
    write_volume,
)
from cspine_data.preprocessing.parameters import Preprocessing
from cspine_data.sources.cases import Case, LoadedCase, load_case
from cspine_data.volumes.label_checks import looks_like_labels, value_counts
from cspine_data.volumes.label_options import LabelOptions
from tests.conftest import ball, geometry, write_case

IMAGE, LABEL = ball()


def case_of(folder: Path, label: np.ndarray, name: str = "P1", ending: str = "-label.nrrd", image=IMAGE) -> Case:
    write_volume(folder / f"{name}.nrrd", image)
    write_volume(folder / f"{name}{ending}", Volume(label, image.geometry))
    return Case(name, folder / f"{name}.nrrd", folder / f"{name}{ending}")


def loaded(folder: Path, label: np.ndarray, **options: Any) -> LoadedCase:
    return load_case(case_of(folder, label), LabelOptions(**options))


def refused(folder: Path, label: np.ndarray, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        loaded(folder, label, **options)
    return str(error.value)


def with_corner(value: int, dtype: type = np.int16) -> np.ndarray:
    label = LABEL.array.astype(dtype)
    label[:4] = value
    return label


def test_a_good_label_map_needs_no_note(tmp_path: Path) -> None:
    assert loaded(tmp_path, LABEL.array).notes == ()


def test_negative_values_are_refused_unless_they_are_ignored(tmp_path: Path) -> None:
    message = refused(tmp_path, with_corner(-1))
    assert "negative value -1" in message
    assert "--ignore-label -1" in message
    assert loaded(tmp_path, with_corner(-1), ignore_label=-1).notes == ()
    both = with_corner(-1)
    both[-1] = -2
    assert "negative value -2" in refused(tmp_path, both, ignore_label=-1)
    # Also where the ignored value is a positive one.
    assert "negative value -1" in refused(tmp_path, with_corner(-1), ignore_label=3)


def test_a_segmentation_that_is_cropped_to_its_labels_has_a_background(tmp_path: Path) -> None:
    """As 3D Slicer writes it: a box of ones in a larger volume."""
    grid = IMAGE.geometry
    corner = grid.positions_mm(np.array([[4, 5, 6]]))[0]
    box = np.ones((6, 6, 6), np.uint8)
    write_volume(tmp_path / "P1.nrrd", IMAGE)
    write_volume(
        tmp_path / "P1.seg.nrrd",
        Volume(box, grid.model_copy(update={"size": box.shape, "origin_mm": tuple(corner.tolist())})),
    )
    found = load_case(Case("P1", tmp_path / "P1.nrrd", tmp_path / "P1.seg.nrrd"))
    assert found.label is not None
    assert np.argwhere(found.label.array).min(0).tolist() == [4, 5, 6]
    assert found.label.array.sum() == box.size


def test_an_image_that_was_enlarged_without_interpolation_is_no_label_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = np.clip(IMAGE.array + rng.normal(0, 0.03 * IMAGE.array.std(), IMAGE.array.shape), 0, None)
    large = (small / small.max() * 250).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    assert looks_like_labels(large)
    volume = usable_image(Volume(large, geometry(large.shape)))
    assert "flat regions" in volume.notes[0]


@pytest.mark.parametrize(
    ("values", "noted"),
    # The last is TPTBox's: vertebrae, their discs and their endplates.
    [((85, 170, 255), True), ((20, 21, 22), False), ((41, 42, 43, 92, 95), False), ((5, 6, 105, 205, 206), False)],
)
def test_values_with_wide_gaps_get_a_note(values: tuple[int, ...], noted: bool, tmp_path: Path) -> None:
    label = LABEL.array.astype(np.uint8)
    for number, part in enumerate(np.array_split(np.flatnonzero(label), len(values))):
        label.flat[part] = values[number]
    assert any("scaled to 8 bits" in note for note in loaded(tmp_path, label).notes) == noted


def test_large_unsigned_values_are_counted() -> None:
    values, counts = value_counts(np.array([2**63 + 1, 2**63 + 2, 2**63 + 2], np.uint64))
    assert (values.tolist(), counts.tolist()) == ([2**63 + 1, 2**63 + 2], [1, 2])


def test_an_image_is_no_label_map(tmp_path: Path) -> None:
    assert "as an image does" in refused(tmp_path, np.roll(IMAGE.array, 1, 0))
    eight_bits = (IMAGE.array / IMAGE.array.max() * 200).astype(np.uint8)
    assert np.unique(eight_bits).size < 256
    assert "as an image does" in refused(tmp_path, eight_bits)
    few = np.random.default_rng(0).integers(0, 20, IMAGE.array.shape).astype(np.int16)
    image = Volume(few, IMAGE.geometry)
    with pytest.raises(InputError, match="voxels as its volume"):
        load_case(case_of(tmp_path, few, image=image))


def test_a_label_map_of_many_structures_is_one(tmp_path: Path) -> None:
    blocks = np.kron(np.arange(120).reshape(4, 5, 6), np.ones((4, 4, 4), int)).astype(np.uint8)
    assert loaded(tmp_path, blocks).label is not None


def test_a_label_map_without_background_is_refused(tmp_path: Path) -> None:
    assert "labels every voxel" in refused(tmp_path, LABEL.array + 1)
    assert "that counts" in refused(tmp_path, np.where(with_corner(-1), with_corner(-1), 1), ignore_label=-1)


def test_what_is_odd_is_noted(tmp_path: Path) -> None:
    (note,) = loaded(tmp_path, (IMAGE.array > -1).astype(np.uint8) * (np.indices(IMAGE.array.shape)[0] > 1)).notes
    assert "88% of the volume" in note
    tiny = np.zeros_like(LABEL.array)
    tiny[8, 10, 12] = 1
    (note,) = loaded(tmp_path, tiny).notes
    assert "only 1 voxel," in note
    air = np.zeros_like(LABEL.array)
    air[:2, :5] = 1
    (note,) = loaded(tmp_path, air).notes
    assert "100% of what" in note
    (note,) = loaded(tmp_path, with_corner(255, np.uint8)).notes
    assert "--ignore-label 255" in note
    assert loaded(tmp_path, np.where(LABEL.array, 255, 0).astype(np.uint8)).notes == ()


def empty_segmentation(folder: Path, *, same_origin: bool) -> None:
    """Write what 3D Slicer saves where nobody has drawn anything: one voxel, at the volume's origin or nowhere."""
    grid = IMAGE.geometry.model_copy(update={"size": (1, 1, 1)}) if same_origin else geometry((1, 1, 1))
    write_volume(folder / "P1.nrrd", IMAGE)
    write_volume(folder / "P1.seg.nrrd", Volume(np.zeros((1, 1, 1), np.uint8), grid), {1: "C5"})


@pytest.mark.parametrize("same_origin", [True, False])
def test_a_segmentation_that_nobody_drew_is_empty(same_origin: bool, tmp_path: Path, run_data) -> None:
    empty_segmentation(tmp_path, same_origin=same_origin)
    done = run_data("scan", tmp_path)
    assert (done.exit_code, "note: P1: label map" in done.stderr) == (0, True)
    assert "1 case can be prepared, 1 without a label map; 0 problems" in done.stdout
    store = tmp_path / "s.zarr"
    done = run_data("prepare", tmp_path, "--store", store, "--no-n4")
    assert (done.exit_code, "note: P1: label map" in done.stderr) == (0, True)
    record = open_cohort(store).record("P1")
    assert (record.labelled, record.label_voxels) == (False, {})


def test_an_empty_label_map_makes_no_labelled_case(tmp_path: Path, run_data) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in ("P1", "P2", "P3", "P4"):
        write_case(raw, name)
    write_volume(raw / "P3S-label.nrrd", Volume(np.zeros_like(LABEL.array), LABEL.geometry))
    summary = prepare(raw, store, n4=False)
    assert list(summary.notes) == ["P3"]
    assert open_cohort(store).empty_label_maps() == ("P3",)
    split = open_cohort(store).split()
    assert (split.train, split.validation, split.test) == (("P1",), ("P2",), ("P4",))
    again = run_data("prepare", raw, "--store", store, "--no-n4")
    assert "note: P3: label map" in again.stderr
    assert "nothing to do" in again.stdout
    # Drawn later, it joins; the others keep their parts.
    write_volume(raw / "P3S-label.nrrd", LABEL)
    assert prepare(raw, store, n4=False).done == ("P3",)
    assert open_cohort(store).empty_label_maps() == ()
    later = open_cohort(store).split()
    assert set(later.train) >= set(split.train)
    assert "P3" in (*later.train, *later.validation, *later.test)


def test_only_label_maps_look_like_label_maps() -> None:
    rng = np.random.default_rng(0)
    assert looks_like_labels(LABEL.array)
    assert looks_like_labels(LABEL.array.astype(np.float32))
    line = np.zeros((20, 30, 40), np.int16)
    line[10, 15, ::2] = np.arange(20)
    assert looks_like_labels(line)
    assert not looks_like_labels(LABEL.array * np.float32(0.3))
    assert not looks_like_labels(IMAGE.array)
    eight_bits = (IMAGE.array / IMAGE.array.max() * 255).astype(np.uint8)
    assert not looks_like_labels(eight_bits)
    # A field of view that is mostly air of one value or two.
    padded = np.pad(eight_bits, 20)
    assert not looks_like_labels(padded)
    assert not looks_like_labels(rng.integers(0, 5, (10, 12, 14)))


@pytest.mark.parametrize("name", ["P1_vertebrae", "vertebrae P1", "P9_seg"])
def test_a_label_map_is_not_taken_for_a_volume(name: str, tmp_path: Path, run_data: Callable[..., Result]) -> None:
    write_volume(tmp_path / "P1.nrrd", IMAGE)
    write_volume(tmp_path / f"{name}.nrrd", LABEL)
    done = run_data("scan", tmp_path)
    assert done.exit_code == 1
    assert f"{name}.nrrd: looks like a label map of P1.nrrd: same grid, few whole numbers" in done.stderr
    assert "1 case can be prepared, 1 without a label map; 1 problem" in done.stdout
    # What predict does with every volume.
    with pytest.raises(InputError, match="looks like a label"):
        preprocess_volume(read_volume(tmp_path / f"{name}.nrrd"), Preprocessing())
    (tmp_path / "P1.nrrd").unlink()
    assert f"{name}.nrrd: looks like a label map: few whole numbers" in run_data("scan", tmp_path).stderr


def test_one_file_beside_a_label_map_is_read_to_name_its_volume(tmp_path: Path, monkeypatch) -> None:
    for number in range(5):
        write_volume(tmp_path / f"P{number}.nrrd", IMAGE)
    write_volume(tmp_path / "P3 bones.nrrd", LABEL)
    label = read_volume(tmp_path / "P3 bones.nrrd")
    read: list[str] = []
    monkeypatch.setattr("cspine_data.volumes.image_checks.read_volume", lambda path: read.append(path.name) or IMAGE)
    with pytest.raises(InputError, match="of P3.nrrd"):
        preprocess_volume(label, Preprocessing())
    assert read == ["P3.nrrd"]
