"""DICOM segmentations: read back by highdicom, and, frame by frame, against SimpleITK's reading of the series."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from click.testing import Result

from cspine_data import InputError, Volume, read_volume, segmentation_source, write_segmentation, write_volume
from tests.conftest import ball
from tests.test_dicom import enhanced, volume_of, write_series
from tests.test_exporting import run_of

SEGMENTS = {0: "background", 3: "C3", 7: "sacrum\x1b", 9: "vertebra", 207: "L6"}
PATIENT = {
    "PatientID": "P-17", "PatientName": "Müller^Zoë", "PatientBirthDate": "19700101",
    "SpecificCharacterSet": "ISO_IR 100", "StudyInstanceUID": "1.2.3.4", "SeriesNumber": 5,
    "Modality": "MR", "FrameOfReferenceUID": "1.2.3.5",
}  # fmt: skip


def label_of(volume: Volume, seed: int = 0) -> Volume:
    """A label map with two segments at random places; one slice is empty."""
    array = np.random.default_rng(seed).choice(np.array([0, 0, 3, 207], np.int16), volume.geometry.size)
    array[..., 1] = 0
    return Volume(array, volume.geometry)


def written(path: Path, source: Path | str, label: Volume) -> Any:
    write_segmentation(path, label, segmentation_source(source), SEGMENTS)
    return pydicom.dcmread(path)


def test_each_frame_lies_where_itk_has_the_slice_that_it_names(tmp_path: Path) -> None:
    volume = volume_of(np.random.default_rng(0), (6, 5, 7))
    files = write_series(tmp_path / "exam", volume, lambda _, tags: tags | PATIENT)
    label = label_of(read_volume(tmp_path / "exam"))
    dataset = written(tmp_path / "seg.dcm", tmp_path / "exam", label)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "exam")))
    places = {str(header.SOPInstanceUID): header.ImagePositionPatient for header in map(pydicom.dcmread, files)}
    shared = dataset.SharedFunctionalGroupsSequence[0]
    directions = np.reshape(image.GetDirection(), (3, 3))
    np.testing.assert_allclose(
        shared.PlaneOrientationSequence[0].ImageOrientationPatient, directions.T[:2].ravel(), atol=1e-6
    )
    measures = shared.PixelMeasuresSequence[0]
    np.testing.assert_allclose(
        [*measures.PixelSpacing[::-1], measures.SpacingBetweenSlices], image.GetSpacing(), rtol=1e-5
    )
    found = np.zeros_like(label.array)
    values = {one.SegmentNumber: int(one.SegmentDescription.split()[-1]) for one in dataset.SegmentSequence}
    for frame, pixels in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True):
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        column, row, slice_ = image.TransformPhysicalPointToIndex([float(mm) for mm in place])
        assert (column, row) == (0, 0)
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        np.testing.assert_allclose(places[reference.ReferencedSOPInstanceUID], place)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[..., slice_][pixels.T == 1] = values[number]
    np.testing.assert_array_equal(found, label.array)
    by_highdicom = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    assert set(np.unique(by_highdicom.array)) == {0, 1, 4}


def test_segments_are_coded_and_patient_and_study_are_those_of_the_source(tmp_path: Path) -> None:
    write_series(tmp_path / "exam", volume_of(np.random.default_rng(0), (6, 5, 7)), lambda _, tags: tags | PATIENT)
    dataset = written(tmp_path / "seg.dcm", tmp_path / "exam", label_of(read_volume(tmp_path / "exam")))
    for name in ("PatientID", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[name].value == PATIENT[name]
    assert str(dataset.PatientName) == "Müller^Zoë"
    assert (dataset.PatientSex, dataset.Modality, dataset.SegmentationType) == ("", "SEG", "BINARY")
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert dataset.SeriesInstanceUID != "1.2.826.0.1.3680043.2.1125.1"
    assert dataset.SeriesNumber == 1005
    told = [
        (
            one.SegmentLabel,
            one.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator,
            one.SegmentedPropertyTypeCodeSequence[0].CodeMeaning,
        )
        for one in dataset.SegmentSequence
    ]
    assert told == [
        ("C3", "SCT", "C3 vertebra"),
        ("sacrum?", "SCT", "Spine"),
        ("vertebra", "SCT", "Vertebra"),
        ("L6", "SCT", "Vertebra"),
    ]
    assert {one.SegmentAlgorithmType for one in dataset.SegmentSequence} == {"AUTOMATIC"}


def test_frames_of_a_multi_frame_file_are_referred_to(tmp_path: Path) -> None:
    """The second of two echoes, whose frames are in no order."""
    first = volume_of(np.random.default_rng(0), (6, 5, 4))
    second = Volume(first.array[::-1].copy(), first.geometry)
    enhanced(tmp_path / "two.dcm", [first, second], [20, 80])
    chosen = f"{tmp_path / 'two.dcm'}#2"
    label = label_of(read_volume(chosen))
    with pytest.raises(InputError, match=r"two\.dcm: lacks StudyInstanceUID"):
        segmentation_source(chosen)
    source = pydicom.dcmread(tmp_path / "two.dcm")
    source.StudyInstanceUID = "1.2.3.4"
    source.save_as(tmp_path / "two.dcm")
    dataset = written(tmp_path / "seg.dcm", chosen, label)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    measures, orientation = shared.PixelMeasuresSequence[0], shared.PlaneOrientationSequence[0]
    decimals = (*measures.PixelSpacing, measures.SpacingBetweenSlices, *orientation.ImageOrientationPatient)
    # The limit of a decimal string.
    assert max(len(str(number)) for number in decimals) <= 16
    found = np.zeros_like(label.array)
    values = [3, 7, 9, 207]
    for frame, pixels in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True):
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        named = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        assert named.MREchoSequence[0].EffectiveEchoTime == 80
        np.testing.assert_allclose(np.array(named.PlanePositionSequence[0].ImagePositionPatient, float), place)
        starts = [label.geometry.positions_mm(np.array([[0, 0, index]]))[0] for index in range(4)]
        index = int(np.argmin([np.linalg.norm(start - place) for start in starts]))
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[..., index][pixels.T == 1] = values[number - 1]
    np.testing.assert_array_equal(found, label.array)


def test_a_segmentation_among_slices_is_left_out(tmp_path: Path) -> None:
    volume = volume_of(np.random.default_rng(0), (6, 5, 7))
    write_series(tmp_path / "exam", volume, lambda _, tags: tags | PATIENT)
    label = label_of(read_volume(tmp_path / "exam"))
    written(tmp_path / "exam" / "seg.dcm", tmp_path / "exam", Volume(np.zeros_like(label.array), label.geometry))
    again = read_volume(tmp_path / "exam")
    np.testing.assert_array_equal(again.array, volume.array)
    assert again.notes == ("1 DICOM file left out: no images with a position in the patient",)


def test_what_cannot_have_a_segmentation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = volume_of(np.random.default_rng(0), (6, 5, 7))
    write_series(tmp_path / "exam", volume, lambda _, tags: tags | PATIENT | {"SOPClassUID": "1.2.3"})
    source = segmentation_source(tmp_path / "exam")
    label = label_of(read_volume(tmp_path / "exam"))
    with pytest.raises(InputError, match="exam: has headers that highdicom refuses"):
        write_segmentation(tmp_path / "x.dcm", label, source)
    write_series(tmp_path / "named", volume, lambda _, tags: tags | PATIENT | {"PatientSex": "DOE"})
    with pytest.raises(InputError, match="highdicom refuses") as refused:
        write_segmentation(tmp_path / "x.dcm", label, segmentation_source(tmp_path / "named"))
    assert "DOE" not in str(refused.value)
    with pytest.raises(InputError, match=r"x\.dcm: is no label map on the grid of .*exam"):
        write_segmentation(tmp_path / "x.dcm", ball()[1], source)
    with pytest.raises(InputError, match=r"x\.dcm: would have 0 segments"):
        write_segmentation(tmp_path / "x.dcm", Volume(np.zeros_like(label.array), label.geometry), source)
    assert {path.name for path in tmp_path.iterdir()} == {"exam", "named"}
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r"highdicom is not installed; pip install 'cspine\[dicom\]'"):
        segmentation_source(tmp_path / "exam")


def test_predict_writes_segmentations_of_dicom_volumes(tmp_path: Path, run_train: Callable[..., Result]) -> None:
    run = run_of(tmp_path / "run", "unet", "tu-test_resnet")
    image, _ = ball((30, 32, 12))
    write_series(tmp_path / "raw" / "exam", image, lambda _, tags: tags | PATIENT)
    options = ("--run", run.path, "--format", "dcm")
    done = run_train("predict", tmp_path / "raw", *options, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    expected = run.predict(read_volume(tmp_path / "raw" / "exam"))
    assert set(np.unique(expected.array)) > {0}
    dataset = pydicom.dcmread(tmp_path / "out" / "exam-label.dcm")
    assert [one.SegmentLabel for one in dataset.SegmentSequence] == ["vertebra"]
    assert int(dataset.pixel_array.sum()) == int(np.count_nonzero(expected.array))
    assert "there already" in run_train("predict", tmp_path / "raw", *options, "-o", tmp_path / "out").output
    done = run_train(
        "predict", tmp_path / "raw" / "exam", "--run", run.path, "--probability", "-o", tmp_path / "one.dcm"
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "one-probability.nrrd").is_file()
    inside = run_train(
        "predict", tmp_path / "raw" / "exam", "--run", run.path, "-o", tmp_path / "raw" / "exam" / "s.dcm"
    )
    assert inside.exit_code == 1
    assert "holds the volumes" in inside.output
    write_volume(tmp_path / "nifti" / "x.nii", image)
    wrong = run_train("predict", tmp_path / "nifti" / "x.nii", *options, "-o", tmp_path / "other")
    assert wrong.exit_code == 1
    assert "x.nii: is no DICOM volume" in wrong.output


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "classic/ge/anatomical/001", "classic/generic/anatomical/002_non_isotropic", "classic/siemens/anatomical/001",
        "enhanced/siemens_xa10_6_1.dcm", "enhanced/siemens_xa30_b0.dcm", "enhanced/philips_fieldmap.dcm#2",
    ],
)  # fmt: skip
def test_real_images_of_scanners_have_segmentations(name: str, realdata: Path, tmp_path: Path) -> None:
    """highdicom's reader gives the label map back, on the grid of the volume."""
    source = f"{realdata / 'dicom'}/{name}"
    label = label_of(read_volume(source))
    written(tmp_path / "seg.dcm", source, label)
    found = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    steps = label.geometry.direction_matrix * label.geometry.spacing_mm
    indices = np.argwhere(found.array)
    places = (found.affine[:3, :3] @ indices.T + found.affine[:3, 3:]).T
    back = np.linalg.solve(steps, (places - np.array(label.geometry.origin_mm)).T).T
    np.testing.assert_allclose(back, np.rint(back), atol=0.02)
    again = np.zeros_like(label.array)
    again[tuple(np.rint(back).astype(int).T)] = np.array([0, 3, 7, 9, 207])[found.array[tuple(indices.T)]]
    np.testing.assert_array_equal(again, label.array)
