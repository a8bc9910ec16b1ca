"""Real MRI of many makes: prepared, or refused with a line that names what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from cspine_data import (
    BiasParameters,
    Orientation,
    Preprocessing,
    find_cases,
    open_cohort,
    prepare,
    read_volume,
    verify,
)
from cspine_data.preprocessing.bias_field import estimate_log_bias
from cspine_data.preprocessing.tissue import tissue_threshold

pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def messy_store(tmp_path_factory: pytest.TempPathFactory, realdata: Path) -> Path:
    store = tmp_path_factory.mktemp("messy") / "s.zarr"
    for n4 in (True, False):
        summary = prepare(realdata / "messy", store, n4=n4)
        assert summary.failed == ()
        assert summary.done == ("brain", "breast", "cord_t1_ras", "cord_t2_psr", "lumbar_pir")
    return store


def source_of(realdata: Path, case: str, label: bool = False) -> Path:
    (path,) = (c.label if label else c.volume for c in find_cases(realdata / "messy").cases if c.id == case)
    assert path is not None
    return path


@pytest.mark.parametrize("case", ["brain", "breast", "cord_t1_ras", "cord_t2_psr", "lumbar_pir"])
@pytest.mark.parametrize("label", [False, True])
def test_export_gives_back_exactly_what_came_in(case: str, label: bool, messy_store: Path, realdata: Path) -> None:
    source = read_volume(source_of(realdata, case, label))
    exported = open_cohort(messy_store).export(case, "raw", label=label)
    np.testing.assert_array_equal(exported.array, source.array)
    assert exported.array.dtype == source.array.dtype
    assert exported.geometry.same_grid(source.geometry, 1e-4)


@pytest.mark.parametrize("case", ["cord_t1_ras", "cord_t2_psr", "lumbar_pir"])
def test_axis_0_is_sagittal_by_an_independent_reader(case: str, messy_store: Path, realdata: Path) -> None:
    image = sitk.DICOMOrient(sitk.ReadImage(str(source_of(realdata, case))), "LPS")
    turned = sitk.GetArrayFromImage(image).transpose()
    cohort = open_cohort(messy_store)
    record = cohort.record(case, "raw")
    slices = cohort.slices(axis=0, variant="raw", cases=[case])
    assert len(slices) == turned.shape[0]
    for position in (0, len(slices) // 2):
        expected = record.normalisation.apply(turned[position])
        np.testing.assert_allclose(slices[position][0][0], expected, atol=record.levels.scale * 0.51)
    np.testing.assert_allclose(record.spacing_xyz_mm, image.GetSpacing(), rtol=1e-6)


def test_label_values_are_kept(messy_store: Path, realdata: Path) -> None:
    record = open_cohort(messy_store).record("lumbar_pir", "n4")
    values, counts = np.unique(read_volume(source_of(realdata, "lumbar_pir", True)).array, return_counts=True)
    assert record.label_voxels == {int(v): int(n) for v, n in zip(values, counts, strict=True) if v}
    assert max(record.label_voxels) == 207
    assert len(record.label_voxels) == 8
    stored = open_cohort(messy_store).slices(axis=0, variant="n4", cases=["lumbar_pir"], labels="stored")
    assert set(np.unique(np.stack([stored[i][1] for i in range(len(stored))]))) == {0, *record.label_voxels}


def test_free_header_fields_stay_outside(messy_store: Path) -> None:
    for file in messy_store.rglob("*"):
        if file.is_file():
            assert b"161353.260" not in file.read_bytes()
    assert verify(messy_store) == []


def test_necks_without_labels_are_prepared_for_prediction(realdata: Path, tmp_path: Path) -> None:
    summary = prepare(realdata / "cervical", tmp_path / "s.zarr")
    assert summary.done == ("neck_gre_axial", "neck_t2_axial")
    cohort = open_cohort(tmp_path / "s.zarr")
    assert len(cohort.slices(axis=2)) == 0
    images = cohort.slices(axis=2, labels=None)
    assert len(images) == 22 + 19
    record = cohort.record("neck_t2_axial")
    assert record.spacing_xyz_mm == pytest.approx((0.6875, 0.6875, 7.5))
    assert record.size_xyz == (320, 256, 19)
    assert 0.2 < record.tissue_fraction < 0.6


def test_thick_slices_of_real_necks_are_resampled_and_export_stays_the_scan(realdata: Path, tmp_path: Path) -> None:
    thin = Preprocessing(bias=None, spacing_mm=(1.0, 1.0, 1.0))
    assert len(prepare(realdata / "cervical", tmp_path / "s.zarr", preprocessing=thin, axes="2").done) == 2
    cohort = open_cohort(tmp_path / "s.zarr")
    record = cohort.record("neck_t2_axial")
    assert record.size_xyz == (320, 256, 19)
    # 19 slices of 7.5 mm, 320 and 256 voxels of 0.6875 mm.
    assert record.sliced_size_xyz == (220, 176, 142)
    prepared = cohort.prepared("neck_t2_axial")
    back = prepared.to_source_grid(prepared.normalised_xyz())
    expected = record.normalisation.apply(prepared.corrected.image_xyz)
    assert np.corrcoef(back.ravel(), expected.ravel())[0, 1] > 0.97
    source = read_volume(realdata / "cervical" / "neck_t2_axial.nii.gz")
    np.testing.assert_array_equal(cohort.export("neck_t2_axial").array, source.array)


def test_odd_encodings_are_read_or_refused_by_name(realdata: Path, tmp_path: Path) -> None:
    ball = sitk.GetArrayFromImage(sitk.ReadImage(str(realdata / "encodings/BallBinary30x30x30.nrrd"))).transpose()
    plain = (
        "BallBinary30x30x30.nhdr", "BallBinary30x30x30.nrrd", "BallBinary30x30x30_bz2.nrrd",
        "BallBinary30x30x30_gz.nrrd", "BallBinary30x30x30_gz_lineskip.nrrd",
        "BallBinary30x30x30_gz_byteskip_minus_one.nrrd", "BallBinary30x30x30_byteskip_minus_one.nhdr",
        "BallBinary30x30x30_byteskip_minus_one_nifti.nhdr", "BallBinary30x30x30.nii.gz",
    )  # fmt: skip
    for name in plain:
        np.testing.assert_array_equal(read_volume(realdata / "encodings" / name).array, ball, err_msg=name)
    # Each file alone, with what it points to: together several claim one case.
    outcomes = {}
    for path in sorted((realdata / "encodings").iterdir()):
        if path.suffix == ".raw":
            continue
        folder = tmp_path / path.name
        folder.mkdir()
        shutil.copy(path, folder)
        if path.suffix == ".nhdr":
            for payload in ("BallBinary30x30x30.raw", "BallBinary30x30x30.nii.gz"):
                if payload.encode() in path.read_bytes():
                    shutil.copy(realdata / "encodings" / payload, folder)
                    if payload.endswith(".gz"):
                        (folder / payload).rename(folder / "payload.gz")
                        header = (folder / path.name).read_bytes().replace(payload.encode(), b"payload.gz")
                        (folder / path.name).chmod(0o644)
                        (folder / path.name).write_bytes(header)
        listing = find_cases(folder)
        assert len(listing.cases) == 1
        from cspine_data.errors import Problem
        from cspine_data.sources.cases import scan_case

        found = scan_case(listing.cases[0], {})
        # The ball is a mask: it is read, and then no volume to prepare.
        told = found.message if isinstance(found, Problem) else "read"
        outcomes[path.name] = "read" if "looks like a label map" in told else told
    for name in plain:
        assert outcomes.pop(name) == "read"
    # Without a skip its voxels would begin within the NIfTI header of its data file.
    assert "54000 bytes its header" in outcomes.pop("BallBinary30x30x30_nifti.nhdr")
    assert "byte skip of -5" in outcomes.pop("BallBinary30x30x30_byteskip_minus_five.nhdr")
    assert "is 1-D" in outcomes.pop("test1d_ascii.nrrd")
    assert "is 2-D" in outcomes.pop("test2d_ascii.nrrd")
    assert "is 1-D" in outcomes.pop("test_customFields.nrrd")
    assert "is 4-D" in outcomes.pop("test_simple4d_raw.nrrd")
    assert not outcomes


def test_two_real_spines_are_prepared_as_they_lie(realdata: Path, tmp_path: Path) -> None:
    for name in ("VB2_02", "VB2_18"):
        for file in (realdata / "spine14").glob(f"{name}*"):
            shutil.copy(file, tmp_path)
    store = tmp_path / "s.zarr"
    assert prepare(tmp_path, store, axes="0").done == ("VB2_02", "VB2_18")
    cohort = open_cohort(store)
    label = read_volume(tmp_path / "VB2_02S-label.nrrd")
    assert Orientation.of(label.geometry).flips == (False, False, False)
    slices = cohort.slices(axis=0, cases=["VB2_02"])
    np.testing.assert_array_equal(slices.labelled_voxels, np.count_nonzero(label.array, axis=(1, 2)))
    record = cohort.record("VB2_02")
    # Somebody's rescaling left air at 20 and more: tissue lies above it, and is about half of the volume.
    assert record.tissue_threshold > 22
    assert 0.4 < record.tissue_fraction < 0.7
    assert record.log_bias_deviation > 0.05


@pytest.mark.parametrize(
    "name", ["cervical/neck_t2_axial.nii.gz", "cervical/neck_gre_axial.nii.gz", "spine14/VB2_02.nrrd"]
)
def test_the_field_of_real_volumes_is_itks(name: str, realdata: Path) -> None:
    """The same method with the same settings, on the same working grid and mask."""
    volume = read_volume(realdata / name)
    spacing_mm = volume.geometry.spacing_mm
    tissue = volume.array > tissue_threshold(volume.array, spacing_mm)
    settings = {
        "iterations": (20, 20, 20),
        "threshold": 1e-3,
        "spline_mm": 0,
        "width": 0.15,
        "noise": 0.01,
        "stride": 1,
    }
    ours, itks = (
        estimate_log_bias(volume.array, tissue, spacing_mm, BiasParameters(engine=engine, resolution_mm=10, **settings))
        for engine in ("separable", "itk")
    )
    assert itks[tissue].std() > 0.02
    assert (ours - itks)[tissue].std() < 1e-3
