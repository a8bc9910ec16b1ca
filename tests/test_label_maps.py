"""Label maps that other programs left scaled, or without a place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from cspine_data import InputError, Volume, open_cohort, prepare, read_volume, repair, verify, write_volume
from cspine_data.sources.cases import Case, load_case
from cspine_data.volumes.label_maps import on_volume_grid, whole_numbers
from tests.conftest import ball, geometry
from tests.test_volumes import nifti_header


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
    with pytest.raises(InputError, match="another place or angle.*resample"):
        on_volume_grid(Volume(label.array, moved), image, trust_voxels=True)
    larger = geometry((17, 20, 24))
    with pytest.raises(InputError, match=r"volume's grid \(17 x"):
        on_volume_grid(Volume(np.zeros((17, 20, 24), np.uint8), larger), image, trust_voxels=True)


def test_of_a_volume_without_a_place_the_volume_is_named() -> None:
    image, label = ball()
    nowhere = Volume(image.array, geometry(image.array.shape), Path("x.nii"))
    with pytest.raises(InputError, match="label map's does"):
        on_volume_grid(label, nowhere, trust_voxels=True)


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
