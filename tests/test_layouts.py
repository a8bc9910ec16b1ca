"""Which files form a cohort: every supported layout, lists of pairs, selections, patients."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from cspine_data import InputError, find_cases, open_cohort, prepare, read_volume, volumes_in, write_volume
from cspine_data.sources.file_names import patient_and_sequence
from cspine_data.sources.pair_lists import write_pairs
from cspine_data.volumes.io import content_digest
from cspine_train.prediction.files import find_targets
from cspine_train.run.evaluations import figures_of_patients, number_of_patients
from tests.conftest import write_case
from tests.test_dicom import volume_of, write_series


def tree(folder: Path, *names: str) -> Path:
    """Make empty files; listing a source does not open volumes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def listed(folder: Path, **options: object) -> dict[str, tuple[str, str | None, str, str | None]]:
    """Return volume, label map, patient and sequence of each case, paths in the folder."""
    listing = find_cases(folder, **options)
    assert listing.problems == ()
    return {
        case.id: (
            case.volume.relative_to(folder).as_posix(),
            case.label and case.label.relative_to(folder).as_posix(),
            case.patient,
            case.sequence,
        )
        for case in listing.cases
    }


LAYOUTS = {
    "flat": (
        ("P1_T1w.nii.gz", "P1_T1w_seg.nii.gz", "P2_T1w.nrrd", "P2_T1w-gt.nii", ".P3.nii"),
        {
            "P1_T1w": ("P1_T1w.nii.gz", "P1_T1w_seg.nii.gz", "P1", "T1w"),
            "P2_T1w": ("P2_T1w.nrrd", "P2_T1w-gt.nii", "P2", "T1w"),
        },
    ),
    "flat with 3D Slicer's name": (
        ("P1.nii.gz", "Segmentation.seg.nrrd"),
        {"P1": ("P1.nii.gz", "Segmentation.seg.nrrd", "P1", None)},
    ),
    "folders": (
        ("P1/T2.nii.gz", "P1/seg.nii.gz", "P2/T2.nii.gz", "P2/T2_mask.nii.gz", "P2/T1.nii.gz", "P3/image.nii"),
        {
            "P1_T2": ("P1/T2.nii.gz", "P1/seg.nii.gz", "P1", "T2"),
            "P2_T1": ("P2/T1.nii.gz", None, "P2", "T1"),
            "P2_T2": ("P2/T2.nii.gz", "P2/T2_mask.nii.gz", "P2", "T2"),
            "P3": ("P3/image.nii", None, "P3", None),
        },
    ),
    "folders alone with several patients": (
        ("raw/sub-01_T1w.nii.gz", "raw/sub-01_T2w.nii.gz", "raw/sub-02_T2w.nii.gz", "raw/sub-02_T2w-label.nii.gz"),
        {
            "sub-01_T1w": ("raw/sub-01_T1w.nii.gz", None, "sub-01", "T1w"),
            "sub-01_T2w": ("raw/sub-01_T2w.nii.gz", None, "sub-01", "T2w"),
            "sub-02_T2w": ("raw/sub-02_T2w.nii.gz", "raw/sub-02_T2w-label.nii.gz", "sub-02", "T2w"),
        },
    ),
    "folders alone with one patient": (
        ("P1/T2.nii.gz", "P1/T1.nii.gz"),
        {"P1_T1": ("P1/T1.nii.gz", None, "P1", "T1"), "P1_T2": ("P1/T2.nii.gz", None, "P1", "T2")},
    ),
    "folders of images and labels": (
        ("images/train/P1.nii.gz", "labels/train/P1.nii.gz", "images/test/P2.nii.gz", "labels/test/P2_seg.nii.gz"),
        {
            "P1": ("images/train/P1.nii.gz", "labels/train/P1.nii.gz", "P1", None),
            "P2": ("images/test/P2.nii.gz", "labels/test/P2_seg.nii.gz", "P2", None),
        },
    ),
    "folders in each patient's": (
        ("P1/images/T2.nii.gz", "P1/masks/T2.nii.gz", "P2/images/T2.nii.gz"),
        {
            "P1_T2": ("P1/images/T2.nii.gz", "P1/masks/T2.nii.gz", "P1", "T2"),
            "P2_T2": ("P2/images/T2.nii.gz", None, "P2", "T2"),
        },
    ),
    "CSpineSeg": (
        ("annotation/593974-000001.nii.gz", "annotation/593974-000002.nii.gz",
         "segmentation/593974-000001_SEG.nii.gz", "segmentation/593974-000002_SEG.nii.gz"),
        {
            f"593974-00000{number}": (
                f"annotation/593974-00000{number}.nii.gz", f"segmentation/593974-00000{number}_SEG.nii.gz", "593974",
                None,
            )
            for number in (1, 2)
        },
    ),
    "SPIDER": (
        ("images/1_t1.nrrd", "images/1_t2.nrrd", "masks/1_t1.nrrd", "masks/1_t2.nrrd", "images/2_t2_SPACE.nrrd"),
        {
            "1_t1": ("images/1_t1.nrrd", "masks/1_t1.nrrd", "1", "t1"),
            "1_t2": ("images/1_t2.nrrd", "masks/1_t2.nrrd", "1", "t2"),
            "2_t2_SPACE": ("images/2_t2_SPACE.nrrd", None, "2", "t2"),
        },
    ),
    "bids": (
        ("dataset_description.json", "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
         "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz", "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
         "sub-02/anat/sub-02_T2w.nii.gz", "sub-02/func/sub-02_bold.nii.gz",
         "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_T2w_label-vertebrae_dseg.nii.gz",
         "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_T2w_label-discs_dseg.nii.gz",
         "derivatives/manual/sub-02/anat/sub-02_seg-vert_msk.nii.gz",
         "derivatives/preprocessed/sub-02/anat/sub-02_desc-denoised_T2w.nii.gz"),
        {
            "sub-01_ses-a_T2w": (
                "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
                "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_T2w_label-vertebrae_dseg.nii.gz", "sub-01", "T2w",
            ),
            "sub-01_ses-b_T1w": ("sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz", None, "sub-01", "T1w"),
            "sub-01_ses-b_T2w": ("sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz", None, "sub-01", "T2w"),
            "sub-02_T2w": (
                "sub-02/anat/sub-02_T2w.nii.gz", "derivatives/manual/sub-02/anat/sub-02_seg-vert_msk.nii.gz",
                "sub-02", "T2w",
            ),
        },
    ),
    "bids of VerSe": (
        ("rawdata/sub-v004/sub-v004_ct.nii.gz", "derivatives/sub-v004/sub-v004_seg-vert_msk.nii.gz"),
        {
            "sub-v004_ct": (
                "rawdata/sub-v004/sub-v004_ct.nii.gz", "derivatives/sub-v004/sub-v004_seg-vert_msk.nii.gz",
                "sub-v004", "ct",
            ),
        },
    ),
    "nnunet": (
        ("imagesTr/A_0000.nii.gz", "imagesTr/A_0001.nii.gz", "labelsTr/A.nii.gz", "imagesTs/B_0000.nii.gz"),
        {
            "A": ("imagesTr/A_0000.nii.gz", "labelsTr/A.nii.gz", "A", None),
            "B": ("imagesTs/B_0000.nii.gz", None, "B", None),
        },
    ),
    "msd": (
        ("imagesTr/la_003.nii.gz", "imagesTr/._la_003.nii.gz", "labelsTr/la_003.nii.gz", "imagesTs/la_004.nii.gz"),
        {
            "la_003": ("imagesTr/la_003.nii.gz", "labelsTr/la_003.nii.gz", "la_003", None),
            "la_004": ("imagesTs/la_004.nii.gz", None, "la_004", None),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    files, expected = LAYOUTS[name]
    folder = tree(tmp_path, *files)
    assert listed(folder) == expected
    layout = name.partition(" ")[0]
    layout = "folders" if layout in ("CSpineSeg", "SPIDER") else layout
    assert f"layout {layout}: " in find_cases(folder).notes[0]
    assert listed(folder, layout=layout) == expected
    assert volumes_in(folder) == [folder / volume for volume, *_ in expected.values()]
    write_pairs(tmp_path / "list.csv", find_cases(folder).cases)
    assert find_cases(folder, tmp_path / "list.csv").cases == find_cases(folder).cases


def test_the_channels_of_nnunet_are_offered_by_name(tmp_path: Path) -> None:
    folder = tree(tmp_path, *LAYOUTS["nnunet"][0])
    assert any("--sequence" in note and "0001" in note for note in find_cases(folder).notes)
    assert listed(folder, sequence="0001") == {"A": ("imagesTr/A_0001.nii.gz", "labelsTr/A.nii.gz", "A", "0001")}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2", "1": "T1"}}))
    assert [case.volume.name for case in find_cases(folder, sequence="t1").cases] == ["A_0001.nii.gz"]
    (folder / "imagesTr" / "C_0001.nii.gz").touch()
    assert "C_0000" in find_cases(folder).problems[0].message


def test_several_label_maps_of_a_volume_are_a_problem_that_exclude_solves(tmp_path: Path) -> None:
    names = ("sub-01_T2w_label-vertebrae_dseg", "sub-01_T2w_desc-b_label-vertebrae_dseg")
    folder = tree(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz", *(f"derivatives/a/sub-01/{name}.nii.gz" for name in names))
    listing = find_cases(folder)
    assert listing.cases == ()
    assert "--exclude" in listing.problems[0].message
    (label,) = [case.label for case in find_cases(folder, exclude=["*desc-b*"]).cases]
    assert label is not None
    assert label.name == f"{names[0]}.nii.gz"


def test_cases_are_selected_by_pattern_and_sequence(tmp_path: Path) -> None:
    folder = tree(tmp_path, "sub-1/T1.nii.gz", "sub-1/T2.nii.gz", "sub-2/T2.nii.gz", "other/T2.nii.gz")
    assert sorted(listed(folder, include=["sub-*"])) == ["sub-1_T1", "sub-1_T2", "sub-2_T2"]
    assert sorted(listed(folder, include=["sub-*"], exclude=["*1*"])) == ["sub-2_T2"]
    assert sorted(listed(folder, sequence="t2")) == ["other_T2", "sub-1_T2", "sub-2_T2"]
    with pytest.raises(InputError, match=r"sequence 'STIR'.*T1, T2"):
        find_cases(folder, sequence="STIR")
    with pytest.raises(InputError, match="--include"):
        find_cases(folder, include=["none*"])
    with pytest.raises(InputError, match="'xnat'.*bids"):
        find_cases(folder, layout="xnat")


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "a", "P1/T1.nii.gz", "P1/T2.nii.gz", "P1/odd.nii.gz")
    found = find_cases(tmp_path / "a", sequence="t2")
    assert [case.id for case in found.cases] == ["P1_T2"]
    assert any("odd.nii.gz" in note for note in found.notes)
    write_series(tmp_path / "b" / "exam", volume_of(np.random.default_rng(0), (9, 8, 7)))
    write_case(tmp_path / "b", "P1", label=False)
    assert any("--layout dicom" in note for note in find_cases(tmp_path / "b").notes)
    (tmp_path / "list.csv").write_text("case,volume,label")
    with pytest.raises(InputError, match="--pairs"):
        find_cases(tmp_path / "list.csv")


def test_patients_by_a_pattern(tmp_path: Path) -> None:
    tree(tmp_path, "site1/P07_T2.nii.gz", "site1/P07_b.nii.gz", "site2/P08_T2.nii.gz")
    found = find_cases(tmp_path, patient_pattern="(P[0-9]+)_")
    assert sorted(case.patient for case in found.cases) == ["P07", "P07", "P08"]
    for bad, word in (("P[0-9]+", "group"), ("(P", "group"), ("(X)", "P07_T2"), ("()P", "P07_T2")):
        with pytest.raises(InputError, match=word):
            find_cases(tmp_path, patient_pattern=bad)


def test_a_tree_of_dicom_series_with_label_maps(tmp_path: Path) -> None:
    volume = volume_of(np.random.default_rng(0), (6, 5, 4))
    for number, series in enumerate(("1", "2")):
        tags = {"SeriesInstanceUID": f"1.2.{series}", "SeriesNumber": number, "SeriesDescription": f"t{series}_tse_sag"}
        for path in write_series(tmp_path / series, volume, lambda n, own, tags=tags: own | tags):
            (tmp_path / "P1" / "exam").mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "P1" / "exam" / f"{series}-{path.name}")
        (tmp_path / series).rmdir()
    write_series(tmp_path / "P2", volume)
    (tmp_path / "P2-label.nii.gz").touch()
    listing = find_cases(tmp_path, layout="dicom")
    assert listing.problems == ()
    assert [(case.id, case.patient, case.sequence, case.label and case.label.name) for case in listing.cases] == [
        ("P1_exam-1", "P1", "t1", None), ("P1_exam-2", "P1", "t2", None), ("P2", "P2", None, "P2-label.nii.gz"),
    ]  # fmt: skip
    assert [case.volume.name for case in listing.cases] == ["exam#1", "exam#2", "P2"]
    (tmp_path / "P2-label.nii.gz").rename(tmp_path / "P1" / "exam-1-label.nii.gz")
    found = find_cases(tmp_path)
    assert found.notes[0].startswith("layout dicom:")
    assert [case.label and case.label.name for case in found.cases] == ["exam-1-label.nii.gz", None, None]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("case,volume,label,patient\nA,a.nii,,p\n", "utf-8"),
        ("sep=;\nCase ; Volume;LABEL;Patient\n A ;a.nii; ; p\n;;;\n", "utf-8-sig"),
        ("case\tvolume\tlabel\tpatient\r\nA\ta.nii\t\tp\r\n", "utf-16"),
        ("patient,label,volume,case,\np,,a.nii,A,\n", "utf-8"),
    ],
)
def test_lists_as_spreadsheets_write_them(text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    (case,) = find_cases(tmp_path, tmp_path / "list.csv").cases
    assert (case.id, case.volume, case.label, case.patient) == ("A", tmp_path / "a.nii", None, "p")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case,volume,label,pateint\nA,a.nii,,p\n", "unknown column 'pateint'"),
        ("case,volume\nA,a.nii\n", "lacks the column label"),
        ("case,volume,label\nA,a,b.nii,c.nii\n", "line 2 has 4 fields"),
        ('case,volume,label\n"A,a.nii,\n', "line 2"),
        ("case,volume,label,case\n", "twice"),
        ("", "lacks the column case"),
    ],
)
def test_the_cause_and_line_of_a_bad_list_are_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        find_cases(tmp_path, tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("name", "patient", "sequence"),
    [
        ("sub-07_T2w", "sub-07", "T2w"), ("sub-1_ses-2_acq-sag_T1w", "sub-1", "T1w"), ("1_t2_SPACE", "1", "t2"),
        ("T2_001", "001", "T2"), ("VB2_02", "VB2_02", None), ("CS_01", "CS_01", None), ("T2", "T2", "T2"),
        ("P3_visit2", "P3", None), ("SE_01", "SE_01", None), ("T2_participant1", "participant1", "T2"),
        ("593974-000002", "593974", None),
    ],
)  # fmt: skip
def test_patients_and_sequences_in_names(name: str, patient: str, sequence: str | None) -> None:
    assert patient_and_sequence(name) == (patient, sequence)


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30))
def test_any_name_has_a_patient(name: str) -> None:
    patient, _ = patient_and_sequence(name)
    assert patient
    assert patient in name


def test_no_patient_is_on_both_sides_of_a_split(tmp_path: Path) -> None:
    for number in range(1, 6):
        for sequence in ("T1w", "T2w"):
            write_case(tmp_path / "raw", f"sub-{number}_{sequence}")
    store = tmp_path / "s.zarr"
    assert any("5 patients with several" in note for note in prepare(tmp_path / "raw", store, n4=False).source_notes)
    cohort = open_cohort(store)
    assert cohort.patients["sub-3_T1w"] == cohort.patients["sub-3_T2w"] == "sub-3"
    for split in (cohort.split(), *(cohort.split(folds=5, fold=fold) for fold in range(5))):
        parts = [{cohort.patients[case] for case in part} for part in (split.train, split.validation, split.test)]
        assert [len(part) for part in parts] == [3, 1, 1]
        assert len(set.union(*parts)) == 5
    assert (
        cohort.split(leave_out="sub-2_T1w").test == cohort.split(leave_out="sub-2").test == ("sub-2_T1w", "sub-2_T2w")
    )
    write_case(tmp_path / "raw", "sub-1_STIR")
    before = cohort.split()
    prepare(tmp_path / "raw", store, n4=False)
    after = open_cohort(store).split()
    assert set(after.train) - set(before.train) == {"sub-1_STIR"}
    assert (after.validation, after.test) == (before.validation, before.test)
    table = open_cohort(store).table()
    assert table.loc["sub-1_STIR", ["patient", "sequence", "split"]].tolist() == ["sub-1", "STIR", "train"]


def test_scan_reads_headers_only_and_writes_a_list(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    raw, table = tmp_path / "raw", tmp_path / "list.csv"
    volume = write_case(raw / "P1", "T2")
    write_case(raw / "P2", "T2")
    # A damaged end, which only a full scan reads.
    volume.write_bytes(volume.read_bytes()[:-40])
    quick = run_data("scan", raw, "--quick", "--write-pairs", table)
    assert quick.exit_code == 0
    assert "cases with a readable" in quick.output
    full = run_data("scan", raw)
    assert full.exit_code == 1
    assert "P1/T2.nrrd" in full.output
    table.write_text(table.read_text().replace("P1_T2,raw/P1/T2.nrrd", "moved,raw/P1/T2.nrrd"))
    assert [case.id for case in find_cases(raw, table).cases] == ["P2_T2", "moved"]
    again = run_data("scan", "--pairs", table, "--quick", "--exclude", "moved")
    assert "case with a readable" in again.output


def test_neutral_patients_stay_the_same_as_cases_are_added(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    names = {}
    for batch in (["Doe_T1w", "Roe_T1w"], ["Doe_T2w"]):
        for name in batch:
            write_case(raw, name)
        prepare(raw, store, n4=False, anonymise=True, include=[f"{name}*" for name in batch])
        with (tmp_path / "s.zarr.key.csv").open() as file:
            names = {row["case"]: row["id"] for row in csv.DictReader(file)}
    patients = open_cohort(store).patients
    assert patients[names["Doe_T1w"]] == patients[names["Doe_T2w"]] != patients[names["Roe_T1w"]]
    assert not any(
        name in path.read_text(errors="replace") for path in store.rglob("*.json") for name in ("Doe", "Roe")
    )


def test_metaimage_files_are_read_as_itk_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, suffix in enumerate((".mha", ".mhd", ".mha")):
        volume = volume_of(rng, (6, 5, 4))
        image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
        image.SetSpacing(volume.geometry.spacing_mm)
        image.SetOrigin(volume.geometry.origin_mm)
        image.SetDirection(volume.geometry.direction_matrix.ravel())
        path = tmp_path / f"{number}{suffix}"
        sitk.WriteImage(image, str(path), useCompression=number == 2)
        read = read_volume(path)
        np.testing.assert_array_equal(read.array, volume.array)
        assert read.geometry.same_grid(volume.geometry, 1e-6)
        assert content_digest(path)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_itk_reads_the_metaimage_files_that_we_write(dtype: str, tmp_path: Path) -> None:
    turned = volume_of(np.random.default_rng(0), (6, 5, 4))
    # Another byte order, and an array that is not contiguous.
    volume = replace(turned, array=turned.array[::-1].astype(np.dtype(dtype).newbyteorder(">")))
    path = tmp_path / "x.mha"
    write_volume(path, volume)
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array.T, volume.array)
    for found, grid in (
        (image.GetSpacing(), volume.geometry.spacing_mm),
        (image.GetOrigin(), volume.geometry.origin_mm),
        (image.GetDirection(), volume.geometry.direction_matrix.ravel()),
    ):
        np.testing.assert_allclose(found, grid, rtol=1e-12)
    first = path.read_bytes()
    write_volume(path, volume)
    assert path.read_bytes() == first
    with pytest.raises(InputError, match=r"x\.mha: cannot hold voxels of float16"):
        write_volume(path, replace(turned, array=turned.array.astype(np.float16)))


@given(at=st.integers(0, 10**6), value=st.integers(0, 255), compressed=st.booleans())
def test_a_flipped_byte_of_a_metaimage_is_read_or_refused(
    at: int, value: int, compressed: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path), compressed)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    with suppress(InputError):
        assert read_volume(path).array.ndim == 3


@pytest.mark.parametrize("name", ["../other.raw", "/etc/passwd", "LIST", "slice%03d.raw", "missing.raw"])
def test_a_metaimage_header_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "other.raw").write_bytes(bytes(8))
    header = f"NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = {name}\n"
    (home / "x.mhd").write_text(header)
    with pytest.raises(InputError, match="data file"):
        read_volume(home / "x.mhd")


def test_several_dicom_volumes_of_a_folder_are_prepared(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2):
        tags = {"SeriesInstanceUID": f"1.2.{number}", "SeriesNumber": number}
        for path in write_series(tmp_path / "s", volume_of(rng, (9, 8, 7)), lambda n, own, tags=tags: own | tags):
            (tmp_path / "raw" / "P1").mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "raw" / "P1" / f"{number}-{path.name}")
    summary = prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, axes="2")
    assert (summary.done, summary.failed) == (("P1-1", "P1-2"), ())
    assert open_cohort(tmp_path / "s.zarr").patients == {"P1-1": "P1", "P1-2": "P1"}
    heading, first, *_ = run_data("info", tmp_path / "s.zarr").output.splitlines()
    assert heading.split()[-1] == "patient"
    assert first.split()[-1] == "P1"
    targets, problems = find_targets([tmp_path / "raw" / "P1"])
    assert problems == ()
    assert [(one.volume.name, one.place) for one in targets] == [("P1#1", Path()), ("P1#2", Path())]
    assert prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, axes="2").reused == ("P1-1", "P1-2")


@pytest.mark.parametrize("name", ["x" * 201, "a\x1bb"])
@pytest.mark.parametrize("column", ["patient", "site", "sequence"])
def test_a_name_that_a_store_cannot_keep_is_refused_before_anything_is_prepared(
    column: str, name: str, tmp_path: Path
) -> None:
    write_case(tmp_path, "A")
    (tmp_path / "list.csv").write_text(f"case,volume,label,{column}\nA,A.nrrd,,{name}\n")
    summary = prepare(store=tmp_path / "s.zarr", pairs=tmp_path / "list.csv", n4=False)
    assert summary.done == ()
    (problem,) = summary.failed
    assert problem.case == "A"
    assert "patient, site or sequence" in problem.message
    assert len(problem.message) < 300 + len(str(tmp_path))


def test_a_missing_folder_is_named_for_prediction_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: is no folder"):
        volumes_in(tmp_path / "missing")


def test_the_patients_of_an_evaluation_count_once() -> None:
    rows = [{"case": "a", "patient": "P"}, {"case": "b", "patient": "P"}, {"case": "c"}]
    rows = [{**row, "dice": dice} for row, dice in zip(rows, (0.2, 0.4, 0.9), strict=True)]
    assert number_of_patients(rows) == 2
    assert figures_of_patients(rows, "dice") == pytest.approx([0.3, 0.9])
