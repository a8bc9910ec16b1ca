"""Folders of DICOM slices, in any order and orientation, whole or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from cspine_data import Geometry, InputError, Orientation, Volume, read_volume
from cspine_data.volumes.geometry import as_rows
from cspine_data.volumes.io import content_digest

Changed = Callable[[int, dict[str, Any]], dict[str, Any]]


def volume_of(rng: np.random.Generator, size: tuple[int, int, int]) -> Volume:
    """A volume on a grid that lies in any way, right-handed or not: DICOM's are all right-handed once sorted."""
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    if np.linalg.det(rotation) < 0:
        rotation[:, 0] *= -1
    geometry = Geometry(
        size=size,
        spacing_mm=tuple(rng.uniform(0.3, 5, 3).tolist()),
        directions=as_rows(rotation),
        origin_mm=tuple(rng.uniform(-200, 200, 3).tolist()),
    )
    return Volume(rng.integers(0, 4096, size).astype(rng.choice(["<i2", "<u2"])), geometry)


def write_series(
    folder: Path, volume: Volume, change: Changed = lambda number, tags: tags, compressed: bool = False
) -> list[Path]:
    """Write a volume as DICOM, a file a slice along the last axis; names are in no order of place."""
    folder.mkdir(parents=True, exist_ok=True)
    geometry = volume.geometry
    order = np.random.default_rng(0).permutation(geometry.size[2])
    paths = []
    for number, index in enumerate(order.tolist()):
        tags = {
            "SeriesInstanceUID": "1.2.826.0.1.3680043.2.1125.1",
            "ImagePositionPatient": texts(geometry.positions_mm(np.array([[0, 0, index]]))[0]),
            "ImageOrientationPatient": texts(geometry.direction_matrix[:, :2].T.ravel()),
            "PixelSpacing": texts([geometry.spacing_mm[1], geometry.spacing_mm[0]]),
            "PatientName": "Secret^Name",
            "InstanceNumber": index,
        }
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, generate_uid()
        pixels = np.ascontiguousarray(volume.array[:, :, index].T)
        dataset.set_pixel_data(pixels, "MONOCHROME2", 16)
        for name, value in change(index, tags).items():
            setattr(dataset, name, value)
        if compressed:
            dataset.compress(RLELossless)
        paths.append(folder / f"{number:04}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def texts(numbers: Iterable[float]) -> list[str]:
    """Numbers as DICOM keeps them: sixteen letters."""
    return [f"{number:.9g}"[:16] for number in numbers]


@given(seed=st.integers(0, 2**32), compressed=st.booleans())
def test_a_series_comes_back_as_it_went(seed: int, compressed: bool, tmp_path: Path) -> None:
    """Oblique, turned and flipped grids of any spacing; files in any order."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / str(seed) / str(compressed)
    volume = volume_of(rng, (5, 4, 3))
    write_series(folder, volume, compressed=compressed)
    read = read_volume(folder)
    assert read.geometry.same_grid(volume.geometry, 1e-3)
    np.testing.assert_allclose(read.geometry.spacing_mm, volume.geometry.spacing_mm, rtol=1e-5)
    np.testing.assert_array_equal(read.array, volume.array)
    assert read.array.dtype == volume.array.dtype


@pytest.fixture
def series(tmp_path: Path) -> tuple[Path, Volume]:
    volume = volume_of(np.random.default_rng(0), (6, 5, 7))
    write_series(tmp_path / "series", volume)
    return tmp_path / "series", volume


def test_itk_reads_the_same(series: tuple[Path, Volume]) -> None:
    folder, _ = series
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    read = read_volume(folder)
    ours, itks = (np.asarray(grid) for grid in (read.geometry.spacing_mm, image.GetSpacing()))
    np.testing.assert_allclose(ours, itks, rtol=1e-5)
    np.testing.assert_allclose(read.geometry.origin_mm, image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(read.geometry.direction_matrix.ravel(), image.GetDirection(), atol=1e-5)
    np.testing.assert_array_equal(read.array.T, sitk.GetArrayFromImage(image))


def test_what_is_no_dicom_file_is_passed_over(series: tuple[Path, Volume], tmp_path: Path) -> None:
    folder, volume = series
    (folder / "README.txt").write_text("not an image")
    (folder / "within").mkdir()
    listing = pydicom.Dataset()
    listing.file_meta = pydicom.dataset.FileMetaDataset()
    listing.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    listing.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    listing.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    listing.save_as(folder / "DICOMDIR", enforce_file_format=True)
    outside = write_series(tmp_path / "other", volume)[0]
    (folder / "link.dcm").symlink_to(outside)
    np.testing.assert_array_equal(read_volume(folder).array, volume.array)


def of(index: int, **tags: Any) -> Changed:
    """Change tags of one slice."""
    return lambda number, own: own | (tags if number == index else {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda n, own: own | ({"SeriesInstanceUID": "1.2.3"} if n < 3 else {}),
         "#1 .*3 slices.*#2 .*4"),
        (of(2, SeriesInstanceUID="1.2.3"), "misses slices"),
        (of(2, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "misses slices"),
        (of(2, PixelSpacing=[9, 9]), "misses slices"),
        (of(2, ImagePositionPatient=[0, 0]), "position in the patient"),
        (of(2, ImagePositionPatient=["1e9", 0, 0]), "misses slices|shifted against each other|that no scanner gives"),
        (of(2, PhotometricInterpretation="MONOCHROME1"), "stored inverted .MONOCHROME1."),
        (of(2, NumberOfFrames=3), "3 frames without positions"),
    ],
)  # fmt: skip
def test_what_is_no_series_is_refused(change: Changed, told: str, tmp_path: Path) -> None:
    write_series(tmp_path / "series", volume_of(np.random.default_rng(0), (6, 5, 7)), change)
    with pytest.raises(InputError, match=told):
        read_volume(tmp_path / "series")


def test_slices_missing_or_there_twice_are_refused(series: tuple[Path, Volume]) -> None:
    folder, _ = series
    paths = sorted(folder.iterdir())
    # Neither the first nor the last, without which nothing is missing.
    one = max(paths[:3], key=lambda path: -abs(pydicom.dcmread(path).InstanceNumber - 3))
    copy = folder / "again.dcm"
    copy.write_bytes(one.read_bytes())
    (note,) = read_volume(folder).notes
    assert "1 duplicate file" in note
    other = pydicom.dcmread(one)
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(copy)
    with pytest.raises(InputError, match="1 slices at places"):
        read_volume(folder)
    copy.unlink()
    one.unlink()
    with pytest.raises(InputError, match=r"misses slices \(they"):
        read_volume(folder)
    for path in list(folder.iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match="single DICOM slice"):
        read_volume(folder)


def test_damaged_files_are_named(series: tuple[Path, Volume], tmp_path: Path) -> None:
    folder, _ = series
    path = sorted(folder.iterdir())[1]
    whole = path.read_bytes()
    for length in (140, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(
            InputError, match=rf"{path.name}: (is no readable DICOM image|cannot be decoded|holds \d+ bytes)"
        ):
            read_volume(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no .* DICOM"):
        read_volume(empty)


def test_a_header_that_claims_more_than_the_file_holds_takes_no_memory(series: tuple[Path, Volume]) -> None:
    """Rows and columns, two bytes each, set to 65,535: 8 GB a slice."""
    folder, _ = series
    path = sorted(folder.iterdir())[0]
    content = bytearray(path.read_bytes())
    for tag in (b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00"):
        at = content.index(tag) + len(tag)
        content[at : at + 2] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds [0-9]+ bytes, too few for the 8589672450 its header claims"):
        read_volume(folder)


@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(at: int, value: int, series: tuple[Path, Volume]) -> None:
    folder, _ = series
    path = sorted(folder.iterdir())[0]
    whole = path.read_bytes()
    content = bytearray(whole)
    content[at % len(content)] = value
    path.write_bytes(content)
    # Anything else that is raised fails the test.
    with suppress(InputError):
        assert read_volume(folder).array.ndim == 3
    path.write_bytes(whole)


def test_each_slice_is_scaled_by_its_own_header(tmp_path: Path) -> None:
    """As some scanners have it."""
    volume = volume_of(np.random.default_rng(0), (6, 5, 4))
    write_series(tmp_path / "series", volume, lambda n, tags: tags | {"RescaleSlope": n + 0.5, "RescaleIntercept": -n})
    read = read_volume(tmp_path / "series")
    expected = volume.array * (np.arange(4) + 0.5) - np.arange(4)
    # Which end of the stack comes first is the grid's to say.
    turned = (
        read.array
        if np.allclose(read.geometry.origin_mm, volume.geometry.origin_mm, atol=1e-3)
        else read.array[..., ::-1]
    )
    np.testing.assert_allclose(turned, expected, rtol=1e-6)
    assert read.array.dtype == np.float32


def test_codecs_that_are_missing_and_deflated_files_are_told(series: tuple[Path, Volume]) -> None:
    folder, _ = series
    path = sorted(folder.iterdir())[0]
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"no codestream at all"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    with pytest.raises(InputError, match="dcm: cannot be decoded"):
        read_volume(folder)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.PixelData = b"\0\0"
    dataset.save_as(path)
    with pytest.raises(InputError, match="dcm: is deflated"):
        read_volume(folder)


def leaning_by(degrees: float, gap: float) -> Changed:
    """Shift each slice against the one before, as under a gantry that is tilted."""

    def change(number: int, tags: dict[str, Any]) -> dict[str, Any]:
        columns = np.array([float(part) for part in tags["ImageOrientationPatient"][:3]])
        position = np.array([float(part) for part in tags["ImagePositionPatient"]])
        moved = position + number * gap * np.tan(np.radians(degrees)) * columns
        return tags | {"ImagePositionPatient": texts(moved)}

    return change


def rows_off_by(degrees: float) -> Changed:
    """Turn the rows of every slice against its columns."""

    def change(number: int, tags: dict[str, Any]) -> dict[str, Any]:
        columns, rows = np.array([float(part) for part in tags["ImageOrientationPatient"]]).reshape(2, 3)
        turned = np.cos(np.radians(degrees)) * rows + np.sin(np.radians(degrees)) * columns
        return tags | {"ImageOrientationPatient": texts([*columns, *turned])}

    return change


@pytest.mark.parametrize("degrees", [10, 0.1])
def test_axes_off_their_right_angles_are_refused(degrees: float, tmp_path: Path) -> None:
    volume = volume_of(np.random.default_rng(1), (6, 5, 90))
    gap = volume.geometry.spacing_mm[2]
    for name, change in (("tilted", leaning_by(degrees, gap)), ("rows", rows_off_by(degrees))):
        write_series(tmp_path / name, volume, change)
        with pytest.raises(InputError, match=r"angles \(.* degrees off\)"):
            read_volume(tmp_path / name)


def test_axes_off_by_what_headers_round_are_read(tmp_path: Path) -> None:
    volume = volume_of(np.random.default_rng(1), (6, 5, 90))
    write_series(tmp_path, volume, leaning_by(0.03, volume.geometry.spacing_mm[2]))
    assert read_volume(tmp_path).geometry.same_grid(volume.geometry, 0.5)


def test_echoes_and_series_of_a_folder_are_chosen_by_number(tmp_path: Path) -> None:
    """Two echoes in one series, another series, and a scout of three planes."""
    rng = np.random.default_rng(0)
    first, other = volume_of(rng, (6, 5, 4)), volume_of(rng, (8, 7, 3))
    volumes = [first, Volume(first.array[..., ::-1].copy(), first.geometry), other]
    folder = tmp_path / "all"
    for number, (volume, series, echo) in enumerate(zip(volumes, (3, 3, 7), (20, 80, 20), strict=True)):
        tags = {"SeriesInstanceUID": f"1.2.{series}", "SeriesNumber": series, "EchoTime": echo}
        for path in write_series(tmp_path / str(number), volume, lambda n, own, tags=tags: own | tags):
            folder.mkdir(exist_ok=True)
            path.rename(folder / f"{number}-{path.name}")
    scout = tmp_path / "scout"
    for number in range(3):
        for path in write_series(scout, volume_of(rng, (6, 6, 1)), of(0, SeriesInstanceUID="1.2.1")):
            path.rename(folder / f"scout{number}")
    with pytest.raises(InputError, match=r"slices\), #2 .*80 ms.*#3"):
        read_volume(folder)
    for number, volume in enumerate(volumes, start=1):
        read = read_volume(f"{folder}#{number}")
        assert read.geometry.same_grid(volume.geometry, 1e-3)
        np.testing.assert_array_equal(read.array, volume.array)
        assert "3 localiser slices" in read.notes[0]
    with pytest.raises(InputError, match="choose one"):
        read_volume(f"{folder}#4")


def test_reports_and_screenshots_are_left_out_and_slices_without_preamble_are_read(
    series: tuple[Path, Volume],
) -> None:
    folder, volume = series
    slices = sorted(folder.iterdir())
    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", generate_uid()
    report.SeriesInstanceUID, report.PatientName = "1.2.9", "Secret^Name"
    report.save_as(folder / "SR_0001", enforce_file_format=True)
    screenshot = pydicom.dcmread(slices[0])
    screenshot.SOPClassUID = screenshot.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    del screenshot.ImagePositionPatient
    screenshot.save_as(folder / "SC_0001")
    bare = slices[1].read_bytes()
    group_2 = 128 + 4
    length = int.from_bytes(bare[group_2 + 8 : group_2 + 12], "little")
    slices[1].write_bytes(bare[group_2 + 12 + length :])
    read = read_volume(folder)
    np.testing.assert_array_equal(read.array, volume.array)
    assert "2 DICOM files left" in read.notes[0]


def enhanced(path: Path, volumes: list[Volume], echoes: list[float]) -> None:
    """Write volumes of one grid as one multi-frame object, frames in no order."""
    write_series(path.parent / "single", volumes[0])
    dataset = pydicom.dcmread(path.parent / "single" / "0000.dcm")
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    geometry = volumes[0].geometry
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing = dataset.ImageOrientationPatient, dataset.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    frames, pixels = [], []
    order = [(which, index) for which in range(len(volumes)) for index in range(geometry.size[2])]
    for which, index in np.random.default_rng(0).permutation(order).tolist():
        frame, place, echo = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = texts(geometry.positions_mm(np.array([[0, 0, index]]))[0])
        echo.EffectiveEchoTime = echoes[which]
        frame.PlanePositionSequence, frame.MREchoSequence = [place], [echo]
        frames.append(frame)
        pixels.append(volumes[which].array[:, :, index].T)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del dataset[name]
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    dataset.set_pixel_data(np.array(pixels), "MONOCHROME2", 16)
    dataset.NumberOfFrames = len(frames)
    dataset.save_as(path)


def test_a_multi_frame_file_comes_back_as_it_went(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = volume_of(rng, (6, 5, 4))
    second = Volume(first.array[::-1].copy(), first.geometry)
    enhanced(tmp_path / "one.dcm", [first], [20])
    read = read_volume(tmp_path / "one.dcm")
    assert read.geometry.same_grid(first.geometry, 1e-3)
    np.testing.assert_array_equal(read.array, first.array)
    enhanced(tmp_path / "two.dcm", [first, second], [20, 80])
    with pytest.raises(InputError, match="80 ms.*as in two.dcm#1"):
        read_volume(tmp_path / "two.dcm")
    for number, volume in ((1, first), (2, second)):
        np.testing.assert_array_equal(read_volume(f"{tmp_path / 'two.dcm'}#{number}").array, volume.array)
    (tmp_path / "twice").mkdir()
    for name in ("a", "b"):
        (tmp_path / "twice" / name).write_bytes((tmp_path / "one.dcm").read_bytes())
    assert read_volume(tmp_path / "twice").notes == ("1 duplicate file left out",)
    digests = {content_digest(Path(f"{tmp_path / 'two.dcm'}#{number}")) for number in (1, 2)}
    assert len(digests) == 2


@pytest.mark.realdata
def test_real_multi_frame_files_are_read_as_dcm2niix_does(realdata: Path) -> None:
    folder = realdata / "dicom" / "enhanced"
    for number in (1, 2, 3, 4):
        assert_as_nifti(folder / f"siemens_xa10_6_{number}.dcm", folder / "siemens_xa10_6.nii", number - 1)
    assert_as_nifti(folder / "siemens_xa30_b0.dcm", folder / "siemens_xa30_b0.nii", 0)
    # dcm2niix scales the magnitude by a private slope.
    assert_as_nifti(Path(f"{folder / 'philips_fieldmap.dcm'}#1"), folder / "philips_fieldmap_hz.nii", 0)
    assert_as_nifti(Path(f"{folder / 'philips_fieldmap.dcm'}#2"), folder / "philips_fieldmap_e1.nii", 0)


def assert_as_nifti(source: Path, nifti: Path, time_point: int) -> None:
    image = sitk.ReadImage(str(nifti))
    if image.GetDimension() == 4:
        image = image[:, :, :, time_point]
    expected = sitk.DICOMOrient(image, "LPS")
    volume = read_volume(source)
    orientation = Orientation.of(volume.geometry)
    geometry = orientation.geometry_xyz(volume.geometry)
    array = sitk.GetArrayFromImage(expected).T
    ours = orientation.to_anatomical(volume.array)
    ours, array = ours / np.abs(ours).max(), array / np.abs(array).max()
    np.testing.assert_allclose(ours, array, atol=1e-4)
    np.testing.assert_allclose(geometry.origin_mm, expected.GetOrigin(), atol=0.01)
    np.testing.assert_allclose(geometry.spacing_mm, expected.GetSpacing(), rtol=1e-4)
    np.testing.assert_allclose(geometry.direction_matrix.ravel(), expected.GetDirection(), atol=1e-3)
