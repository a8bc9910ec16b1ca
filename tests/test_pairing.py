"""Which file is whose label map: by the endings that people use, and however a name's letters are encoded."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

from cspine_data import find_cases, open_cohort, prepare, remove_cases, volumes_in, write_volume
from tests.conftest import ball, write_case

NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "ending",
    ["_seg", "-seg", "_SEG", "_mask", "-Mask", "_masks", "_gt", "-GT", "_label", "_labels", "-labels", "_segmentation"],
)
def test_endings_that_people_use_are_paired(ending: str, tmp_path: Path) -> None:
    listing = find_cases(touch(tmp_path, "P1.nii.gz", f"P1{ending}.nii.gz", "P2.nii.gz"))
    found = {case.id: case.label.name if case.label else None for case in listing.cases}
    assert (found, listing.problems) == ({"P1": f"P1{ending}.nii.gz", "P2": None}, ())
    assert [path.name for path in volumes_in(tmp_path)] == ["P1.nii.gz", "P2.nii.gz"]


def test_an_ending_that_may_be_a_volumes_own_decides_nothing_alone(tmp_path: Path) -> None:
    names = ["T2_seg.nrrd", "brain_GT.nrrd", "x-mask.nrrd"]
    listing = find_cases(touch(tmp_path, *names))
    assert [(case.id, case.label) for case in listing.cases] == [("T2_seg", None), ("brain_GT", None), ("x-mask", None)]
    assert sorted(path.name for path in volumes_in(tmp_path)) == sorted(names)
    (problem,) = find_cases(touch(tmp_path / "sure", "A.nrrd", "B_labels.nrrd")).problems
    assert "map without a volume" in problem.message


def test_two_label_maps_of_one_volume_are_told(tmp_path: Path) -> None:
    listing = find_cases(touch(tmp_path, "A.nrrd", "A_seg.nrrd", "A-label.nrrd"))
    assert listing.cases == ()
    assert "label maps of 'A'" in listing.problems[0].message


@pytest.mark.parametrize(("volume", "label"), [(NFC, NFD), (NFD, NFC)])
def test_names_are_compared_however_their_letters_are_encoded(volume: str, label: str, tmp_path: Path) -> None:
    listing = find_cases(touch(tmp_path, f"{volume}.nii.gz", f"{label}-label.nii.gz"))
    (case,) = listing.cases
    assert (case.id, listing.problems) == (NFC, ())
    assert case.volume.exists()
    assert case.label
    assert case.label.exists()
    nnunet = tmp_path / "nnunet"
    for folder, name in (("imagesTr", f"{volume}_0000"), ("labelsTr", label)):
        (nnunet / folder).mkdir(parents=True)
        (nnunet / folder / f"{name}.nrrd").touch()
    (case,) = find_cases(nnunet).cases
    assert (case.id, case.label is not None) == (NFC, True)


def test_one_name_in_two_encodings_is_one_case(tmp_path: Path) -> None:
    listing = find_cases(touch(tmp_path, f"{NFC}.nrrd", f"{NFD}.nrrd"))
    assert "claim the same case" in listing.problems[0].message


def test_a_list_of_pairs_names_files_in_either_encoding(tmp_path: Path) -> None:
    folder = touch(tmp_path / NFD, f"{NFD}.nrrd", f"{NFC}-label.nrrd")
    table = tmp_path / "pairs.csv"
    table.write_text(f"case,volume,label\n{NFD},{NFC}/{NFC}.nrrd,{NFC}/{NFD}-label.nrrd\n", encoding="utf-8")
    (case,) = find_cases("nowhere", table).cases
    assert (case.id, case.volume, case.label) == (NFC, folder / f"{NFD}.nrrd", folder / f"{NFC}-label.nrrd")


def test_a_store_knows_a_case_by_its_name_in_either_encoding(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in (NFD, "A", "B"):
        write_case(raw, name)
    assert set(prepare(raw, store, n4=False).done) == {"A", "B", NFC}
    cohort = open_cohort(store)
    for name in (NFC, NFD):
        assert cohort.record(name).case == NFC
        assert cohort.slices(0, cases=[name]).cases == (NFC,)
        assert cohort.export(name, label=True).array.any()
        assert NFC in cohort.split(leave_out=name).test
    remove_cases(store, [NFD])
    assert open_cohort(store).cases == ("A", "B")


def test_weights_and_comparisons_take_a_name_in_either_encoding() -> None:
    import numpy as np

    from cspine_train.data.datamodule import _weights
    from cspine_train.run.settings import RunSettings

    for asked, stored in ((NFC, NFD), (NFD, NFC)):
        weighted = RunSettings(case_weights={asked: 3.0})
        assert _weights([stored, "A"], weighted, SimpleNamespace(cases=(stored, "A"))).tolist() == [3.0, 1.0]
        settings = RunSettings(case_weights={asked: 0.0})
        assert (settings.weight_of(stored), settings.weight_of("A")) == (0.0, 1.0)
        np.testing.assert_equal(settings.case_weights, {NFC: 0.0})


def test_a_detached_header_names_its_data_in_either_encoding(tmp_path: Path) -> None:
    import numpy as np

    from cspine_data import read_volume

    (tmp_path / f"{NFD}.raw").write_bytes(np.arange(8, dtype=np.uint8).tobytes())
    header = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: {NFC}.raw\n"
    (tmp_path / "x.nhdr").write_text(header, encoding="utf-8")
    assert read_volume(tmp_path / "x.nhdr").array.ravel("F").tolist() == list(range(8))


def test_scan_finds_copies_in_another_format_as_prepare_does(tmp_path: Path, run_data) -> None:
    image, _ = ball()
    write_volume(tmp_path / "A.nii.gz", image)
    write_volume(tmp_path / "A_copy.nii", image)
    scanned = run_data("scan", tmp_path)
    assert "holds the same volume" in scanned.stderr
    summary = prepare(tmp_path, tmp_path / "s.zarr", n4=False)
    # Workers finish in any order: the copy that is published first stays.
    (problem,) = summary.failed
    assert {problem.case, problem.copy_of} == {*summary.done, problem.case} == {"A", "A_copy"}


def test_copies_of_a_refused_file_are_refused_for_its_reason(tmp_path: Path) -> None:
    _, label = ball()
    for name in ("A", "B", "C"):
        write_volume(tmp_path / f"{name}.nrrd", label)
    summary = prepare(tmp_path, tmp_path / "s.zarr", n4=False)
    assert [problem.case for problem in summary.failed] == ["A", "B", "C"]
    assert all("looks like a label" in problem.message for problem in summary.failed)
