"""Label maps that other programs left scaled, or without a place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from cspine_data import (
    Geometry,
    InputError,
    Orientation,
    Volume,
    open_cohort,
    prepare,
    read_volume,
    repair,
    verify,
    write_volume,
)
from cspine_data.sources.cases import Case, load_case
from cspine_data.volumes.label_maps import on_volume_grid, whole_numbers
from cspine_data.volumes.label_options import LabelOptions
from tests.conftest import ball, geometry
from tests.test_volumes import nifti_header

RESAMPLING = LabelOptions(resample_labels=True)


def image_and_label() -> tuple[Volume, Volume]:
    """A ball, and a label map of it with the values 0 to 7."""
    image, label = ball()
    values = (label.array > 0) * (1 + np.arange(label.array.shape[0])[:, None, None] % 7)
    return image, Volume(values.astype(np.uint8), label.geometry)


def scaled(label: Volume, dtype: type, path: Path) -> Path:
    """Write a label map as nibabel writes floats into an integer header: the range of values on that of integers."""
    values, limits = label.array.astype(np.float64), np.iinfo(dtype)
    slope = np.float32((values.max() - values.min()) / (float(limits.max) - float(limits.min)))
    intercept = np.float32(values.min() - float(limits.min) * slope)
    stored = np.clip(np.rint((values - intercept) / slope), limits.min, limits.max).astype(np.dtype(dtype))
    write_volume(path, Volume(stored, label.geometry))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_a_scaled_label_map_is_rounded_with_a_note(dtype: type, tmp_path: Path) -> None:
    image, label = image_and_label()
    path = scaled(label, dtype, tmp_path / "x-label.nii")
    assert (read_volume(path).array % 1).any()
    write_volume(tmp_path / "x.nrrd", image)
    loaded = load_case(Case("x", tmp_path / "x.nrrd", path))
    np.testing.assert_array_equal(loaded.label.array, label.array)
    assert loaded.label.array.dtype == np.int32
    (note,) = loaded.notes
    assert "values were rounded" in note


def test_floats_that_are_nearly_whole_numbers_are_rounded_with_a_note() -> None:
    image, label = image_and_label()
    found = whole_numbers(Volume(label.array * 0.99999, label.geometry), image)
    np.testing.assert_array_equal(found.array, label.array)
    assert "rounded" in found.notes[0]
    assert whole_numbers(Volume(label.array.astype(np.float64), label.geometry), image).notes == ()


def test_a_scaled_probability_map_is_refused(tmp_path: Path) -> None:
    image, label = image_and_label()
    probabilities = Volume(np.linspace(0, 1, label.array.size).reshape(label.array.shape), label.geometry)
    path = scaled(probabilities, np.uint8, tmp_path / "x-label.nii")
    with pytest.raises(InputError, match="no whole numbers"):
        whole_numbers(read_volume(path), image)


def test_values_that_were_stored_too_coarsely_are_refused(tmp_path: Path) -> None:
    image, label = image_and_label()
    path = scaled(Volume(label.array.astype(np.float64) * 100, label.geometry), np.uint8, tmp_path / "x-label.nii")
    with pytest.raises(InputError, match="no whole numbers"):
        whole_numbers(read_volume(path), image)


def test_nan_in_a_label_map_alone_is_refused() -> None:
    image, label = image_and_label()
    array = label.array.astype(np.float32)
    array[0] = np.nan
    with pytest.raises(InputError, match=f"holds {array[0].size} voxels of NaN"):
        whole_numbers(Volume(array, label.geometry), image)


def placeless(folder: Path, suffix: str) -> Path:
    """Write a case whose label map was saved without the volume's header."""
    image, label = ball()
    write_volume(folder / "A.nii.gz", image)
    path = folder / f"A-label{suffix}"
    if suffix == ".nii":
        fields = {"dim": (3, *label.array.shape, 1, 1, 1, 1), "datatype": 2, "bitpix": 8, "pixdim": (1,) * 8}
        header = nifti_header(**fields, sform_code=2, srow=np.eye(3, 4))
        path.write_bytes(header.tobytes() + label.array.tobytes(order="F"))
    else:
        size = " ".join(map(str, label.array.shape))
        text = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {size}\nencoding: raw\n\n"
        path.write_bytes(text.encode() + label.array.tobytes(order="F"))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nrrd"])
def test_a_label_map_without_a_place_takes_its_volumes_where_that_is_asked(
    suffix: str, tmp_path: Path, run_data: Callable[..., Result]
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    raw.mkdir()
    path = placeless(raw, suffix)
    for refused in (run_data("scan", raw), run_data("prepare", raw, "--store", store, "--no-n4")):
        assert refused.exit_code == 1
        assert f"{path}: its header does not say where it lies" in refused.stderr
        assert "copy the volume's header" in refused.stderr
        assert "--trust-voxels" in refused.stderr
        assert "resample" not in refused.stderr
    for trusted in (
        run_data("scan", raw, "--trust-voxels"),
        run_data("prepare", raw, "--store", store, "--no-n4", "--trust-voxels"),
    ):
        assert trusted.exit_code == 0
        assert "say where it lies" in trusted.stderr
    image, label = ball()
    cohort = open_cohort(store)
    np.testing.assert_array_equal(cohort.export("A", label=True).array, label.array)
    assert cohort.record("A").geometry.same_grid(image.geometry)
    # What it was made of was trusted then, so it is made of the same again.
    shard = next((store / "cases/A").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert repair(store, raw).failed == ()
    assert verify(store) == []


def test_a_label_map_that_lies_elsewhere_is_not_trusted() -> None:
    image, label = ball()
    moved = label.geometry.model_copy(update={"origin_mm": (3.0, 2.0, 1.0)})
    with pytest.raises(InputError, match="another place or angle.*resample it"):
        on_volume_grid(Volume(label.array, moved), image, LabelOptions(trust_voxels=True))
    larger = geometry((17, 20, 24))
    with pytest.raises(InputError, match=r"does not lie on its volume's grid \(17 x"):
        on_volume_grid(Volume(np.zeros((17, 20, 24), np.uint8), larger), image, LabelOptions(trust_voxels=True))


def inside(grid: Geometry, start: tuple[int, int, int], size: tuple[int, int, int]) -> Geometry:
    """The grid of a window, which may extend beyond a grid."""
    origin = grid.positions_mm(np.array([start]))[0]
    return grid.model_copy(update={"size": size, "origin_mm": tuple(origin.tolist())})


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=3)))
def test_voxels_in_another_order_are_reordered_without_loss(
    axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    image, label = ball()
    values = np.random.default_rng(0).integers(0, 4, label.array.shape).astype(np.uint8)
    order = Orientation(axes, flips)
    turned = Volume(order.to_file(values), order.geometry_in_file(label.geometry))
    found = on_volume_grid(turned, image)
    np.testing.assert_array_equal(found.array, values)
    assert found.geometry == image.geometry
    assert [("another order" in note) for note in found.notes] == [True] * (axes != (0, 1, 2) or any(flips))


def test_margins_without_labels_are_cropped_with_a_note() -> None:
    image, label = ball()
    size = (20, 22, 30)
    larger = np.zeros(size, np.uint8)
    larger[2:18, 1:21, 3:27] = label.array
    grid = inside(image.geometry, (-2, -1, -3), size)
    found = on_volume_grid(Volume(larger, grid), image)
    np.testing.assert_array_equal(found.array, label.array)
    assert "beyond its volume" in found.notes[0]
    larger[0, 0, :5] = 7
    with pytest.raises(InputError, match="labels 5 voxels outside its volume"):
        on_volume_grid(Volume(larger, grid), image)
    resampled = on_volume_grid(Volume(larger, grid), image, RESAMPLING)
    np.testing.assert_array_equal(resampled.array, label.array)
    assert "-100.0% (7)" in resampled.notes[0]


def test_a_label_map_on_another_grid_is_resampled_where_that_is_asked() -> None:
    image, label = ball()
    fine = geometry((40, 30, 40), (0.8, 0.9, 0.7), origin=(-10.5, 3.1, 2.2))
    places = np.indices(fine.size).reshape(3, -1).T
    steps = np.array(image.geometry.spacing_mm)
    nearest = np.rint((fine.positions_mm(places) - image.geometry.origin_mm) / steps).astype(int)
    within = ((nearest >= 0) & (nearest < label.array.shape)).all(1)
    values = np.zeros(len(places), np.uint8)
    values[within] = label.array[tuple(nearest[within].T)]
    other = Volume(values.reshape(fine.size), fine)
    with pytest.raises(InputError, match="does not lie on its volume's grid .* give --resample-labels"):
        on_volume_grid(other, image)
    found = on_volume_grid(other, image, RESAMPLING)
    places = np.indices(label.array.shape).reshape(3, -1).T
    nearest = np.rint((image.geometry.positions_mm(places) - fine.origin_mm) / np.array(fine.spacing_mm)).astype(int)
    within = ((nearest >= 0) & (nearest < fine.size)).all(1)
    expected = np.zeros(len(places), np.uint8)
    expected[within] = other.array[tuple(nearest[within].T)]
    np.testing.assert_array_equal(found.array.ravel(), expected)
    assert found.array.dtype == np.uint8
    assert found.geometry == image.geometry
    ml = [np.count_nonzero(one.array == 3) * np.prod(one.geometry.spacing_mm) for one in (other, found)]
    assert f"{ml[1] / ml[0] - 1:+.1%} (3)" in found.notes[0]


def test_a_label_map_of_another_place_is_not_resampled_to_nothing() -> None:
    image, label = ball()
    far = label.geometry.model_copy(update={"origin_mm": (500.2, 0.0, 0.0)})
    with pytest.raises(InputError, match="labels nothing there"):
        on_volume_grid(Volume(label.array, far), image, RESAMPLING)


@pytest.mark.parametrize("size", [(16, 20, 24), (17, 20, 24)])
def test_a_label_map_without_a_place_is_never_resampled(size: tuple[int, int, int]) -> None:
    image, _ = ball()
    with pytest.raises(InputError) as refused:
        on_volume_grid(Volume(np.ones(size, np.uint8), geometry(size)), image, RESAMPLING)
    assert "resampl" not in str(refused.value)
    assert ("--trust-voxels" in str(refused.value)) == (size == image.array.shape)


def test_resampling_through_the_command_line(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    image, label = ball()
    write_volume(raw / "A.nrrd", image)
    moved = label.geometry.model_copy(update={"origin_mm": (-9.4, 4.2, 2.1)})
    write_volume(raw / "A-label.nrrd", Volume(label.array, moved))
    for command in (("scan", raw), ("prepare", raw, "--store", store, "--no-n4")):
        refused = run_data(*command)
        assert refused.exit_code == 1
        assert "--resample-labels" in refused.stderr
        assert "--trust-voxels" not in refused.stderr
        done = run_data(*command, "--resample-labels")
        assert done.exit_code == 0
        assert "note: A: label map: it was resampled to its volume's grid" in done.stderr
    # All corners are within half a voxel, so that nothing has moved.
    np.testing.assert_array_equal(open_cohort(store).export("A", label=True).array, label.array)
    shard = next((store / "cases/A").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert repair(store, raw).failed == ()


def test_of_a_volume_without_a_place_the_volume_is_named() -> None:
    image, label = ball()
    nowhere = Volume(image.array, geometry(image.array.shape), Path("x.nii"))
    with pytest.raises(InputError, match=r"x\.nii: its header does not say where it lies, and its label map's does"):
        on_volume_grid(label, nowhere, LabelOptions(trust_voxels=True))


def test_notes_on_a_label_map_change_nothing_of_the_image(tmp_path: Path) -> None:
    image, label = image_and_label()
    records = {}
    for name in ("plain", "scaled"):
        raw = tmp_path / name
        write_volume(raw / "A.nii", image)
        if name == "plain":
            write_volume(raw / "A-label.nii", label)
        else:
            scaled(label, np.uint8, raw / "A-label.nii")
        prepare(raw, tmp_path / f"{name}.zarr", n4=False)
        records[name] = open_cohort(tmp_path / f"{name}.zarr").record("A")
    plain, rounded = records.values()
    assert not plain.notes
    assert rounded.notes
    assert plain.volume_digest == rounded.volume_digest
    assert plain.voxels_sha256 == rounded.voxels_sha256
    assert plain.label_voxels == rounded.label_voxels
