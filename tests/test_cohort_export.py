"""A whole store in the layouts of other tools: what they require, and what comes back from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import Result

from cspine_data import Cohort, InputError, NotInStoreError, Volume, open_cohort, prepare, read_volume, write_volume
from cspine_data.cli.commands import main
from cspine_data.datasets.export import export_cohort
from cspine_data.datasets.export_layouts import EXPORT_LAYOUTS, label_table
from cspine_data.files import exclusive_lock
from cspine_data.store.identities import Identity
from tests.conftest import ball, do_serially

#: By case: patient, site, sequence, and whether it has a label map. Values are 1 and 3, and 9 where ignored.
CASES = {
    "VB2_01": ("VB2_01", "A", "T2w", True),
    "VB2_02": ("VB2_02", "B", "T2w", True),
    "Zoë T1": ("Zoë", "", "T1w", True),
    "Zoë T2": ("Zoë", "", "T2w", True),
    "x_2021": ("x_2021", "", "STIR", True),
    "sub-7_ses-1_T1w": ("sub-7", "", "T1w", True),
    "sub-8_T2w": ("sub-8", "", "T2w", True),
    "without": ("without", "", "", False),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("patients")
    lines = ["case,volume,label,patient,site,sequence"]
    for number, (case, (patient, site, sequence, labelled)) in enumerate(CASES.items()):
        image, label = ball(seed=number)
        write_volume(folder / f"{number}.nrrd", image)
        values = label.array.astype(np.int16)
        if case == "VB2_02":
            values[:2] = 9
        write_volume(folder / f"{number}-label.nrrd", Volume(values, label.geometry))
        lines.append(f"{case},{number}.nrrd,{f'{number}-label.nrrd' * labelled},{patient},{site},{sequence}")
    (folder / "list.csv").write_text("\n".join(lines))
    (folder / "COHORT.txt").write_text("synthetic balls\n")
    with pytest.MonkeyPatch.context() as patches:
        do_serially(patches)
        summary = prepare(folder, folder / "s.zarr", pairs=folder / "list.csv", n4=False, axes="2", ignore_label=9)
    assert summary.failed == ()
    return open_cohort(folder / "s.zarr")


@pytest.fixture(scope="module", params=EXPORT_LAYOUTS)
def exported(request: pytest.FixtureRequest, cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store in one of the layouts."""
    folder = tmp_path_factory.mktemp("exports") / request.param
    assert len(export_cohort(cohort, folder, request.param).cases) == len(CASES)
    assert [path.name for path in folder.parent.iterdir()] == [request.param]
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_exported_comes_back_by_itself_and_by_its_list(exported: Path, cohort: Cohort, tmp_path: Path) -> None:
    renumbered = {0: 0, 1: 1, 3: 2, 9: 3} if exported.name == "nnunet" else {}
    for pairs in (None, exported / "cases.csv"):
        store = tmp_path / f"{pairs is None}.zarr"
        ignored = 3 if renumbered else 9
        summary = prepare(exported, store, pairs=pairs, n4=False, axes="2", ignore_label=ignored)
        assert summary.failed == ()
        again = open_cohort(store)
        if exported.name != "bids" or pairs:
            assert again.cases == cohort.cases
        if pairs:
            assert [again.identity(case) for case in again.cases] == [cohort.identity(case) for case in cohort.cases]
        by_voxels = {record.voxels_sha256: record.case for record in again.records()}
        for record in cohort.records():
            case = by_voxels[record.voxels_sha256]
            assert again.record(case).geometry.same_grid(record.geometry, 1e-3)
            assert again.record(case).labelled == record.labelled
            if record.labelled:
                expected = cohort.export(record.case, label=True).array
                for value, number in renumbered.items():
                    expected = np.where(cohort.export(record.case, label=True).array == value, number, expected)
                np.testing.assert_array_equal(again.export(case, label=True).array, expected)
        assert again.notes == ("synthetic balls",)


def test_folds_are_the_cohorts_by_patient(exported: Path, cohort: Cohort) -> None:
    folds = json.loads((exported / "splits_final.json").read_text())
    names = {"Zoë T1": "sub-Zoe_T1w", "Zoë T2": "sub-Zoe_T2w", "x_2021": "sub-x2021_MRI"} | {
        f"VB2_0{number}": f"sub-VB20{number}_T2w" for number in (1, 2)
    }
    names = names if exported.name == "bids" else {}
    assert len(folds) == 5
    for number, fold in enumerate(folds):
        split = cohort.split(folds=5, fold=number)
        assert fold["val"] == sorted(names.get(case, case) for case in split.test)
        assert fold["train"] == sorted(names.get(case, case) for case in (*split.train, *split.validation))
    validated = [case for fold in folds for case in fold["val"]]
    assert len(validated) == len(set(validated)) == 7


def test_nnunet_gets_what_its_documentation_asks_for(cohort: Cohort, tmp_path: Path) -> None:
    """As `verify_dataset_integrity` of nnU-Net checks it."""
    summary = export_cohort(cohort, tmp_path / "out", "nnunet")
    assert summary.renumbered == {1: 1, 3: 2, 9: 3}
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "MRI"}
    assert description["labels"] == {"background": 0, "label_1": 1, "label_3": 2, "ignore": 3}
    assert description["renumbered"] == {"1": 1, "3": 2, "9": 3}
    ending = description["file_ending"]
    images = sorted(path.name for path in (tmp_path / "out" / "imagesTr").iterdir())
    labels = sorted(path.name for path in (tmp_path / "out" / "labelsTr").iterdir())
    assert images == [f"{name.removesuffix(ending)}_0000{ending}" for name in labels]
    assert len(images) == description["numTraining"] == 7
    assert [path.name for path in (tmp_path / "out" / "imagesTs").iterdir()] == [f"without_0000{ending}"]
    values = set()
    for image, label in zip(images, labels, strict=True):
        first, second = (
            sitk.ReadImage(str(tmp_path / "out" / folder / name))
            for folder, name in (("imagesTr", image), ("labelsTr", label))
        )
        for read in (sitk.Image.GetSize, sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
            np.testing.assert_allclose(read(first), read(second))
        values |= set(np.unique(sitk.GetArrayFromImage(second)).tolist())
    assert values == {0, 1, 2, 3}


def test_msd_lists_its_files(cohort: Cohort, tmp_path: Path) -> None:
    export_cohort(cohort, tmp_path / "out", "msd")
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (description["tensorImageSize"], description["modality"]) == ("3D", {"0": "MRI"})
    assert description["labels"] == {"0": "background", "1": "label_1", "3": "label_3", "9": "ignore"}
    assert (description["numTraining"], description["numTest"]) == (len(description["training"]), 1) == (7, 1)
    for case in description["training"]:
        assert (tmp_path / "out" / case["image"]).is_file()
        assert (tmp_path / "out" / case["label"]).is_file()
    assert description["test"] == ["./imagesTs/without.nii.gz"]


def test_msd_has_a_folder_for_test_volumes_without_any(ball_cohort: Path, tmp_path: Path) -> None:
    """nnU-Net's converter of Decathlon data sets demands it."""
    summary = export_cohort(open_cohort(ball_cohort / "s.zarr"), tmp_path / "out", "msd")
    assert (len(summary.cases), summary.folds) == (2, 0)
    assert list((tmp_path / "out" / "imagesTs").iterdir()) == []
    assert not (tmp_path / "out" / "splits_final.json").exists()


def test_bids_names_consist_of_letters_and_digits(cohort: Cohort, tmp_path: Path) -> None:
    summary = export_cohort(cohort, tmp_path / "out", "bids")
    files = bytes_of(tmp_path / "out")
    images = [
        name for name in files if re.fullmatch(r"(sub-[A-Za-z0-9]+)/(ses-1/)?anat/\1(_ses-1)?_\w+\.nii\.gz", name)
    ]
    assert sorted(images) == sorted(str(case.volume) for case in summary.cases)
    assert "sub-7/ses-1/anat/sub-7_ses-1_T1w.nii.gz" in images
    assert "derivatives/labels/sub-7/ses-1/anat/sub-7_ses-1_T1w_dseg.nii.gz" in files
    assert "sub-without/anat/sub-without_MRI.nii.gz" in images
    assert files["derivatives/labels/dseg.tsv"] == b"index\tname\n0\tbackground\n1\tlabel_1\n3\tlabel_3\n9\tignore\n"
    kinds = [
        json.loads(files[name])["DatasetType"]
        for name in ("dataset_description.json", "derivatives/labels/dataset_description.json")
    ]
    assert kinds == ["raw", "derivative"]
    participants = files["participants.tsv"].decode().splitlines()
    assert participants[0] == "participant_id\tsite"
    assert {"sub-VB201\tA", "sub-VB202\tB", "sub-Zoe\tn/a"} <= set(participants[1:])


def test_patients_whose_bids_names_would_be_equal_stay_apart() -> None:
    names = EXPORT_LAYOUTS["bids"].names
    given = {"a-1": "a-1", "a1": "a1", "A_1 again": "A_1", "sub-A1_T2w": "sub-A1", "only_mask": "-", "b_T1w": "a1"}
    identities = {
        case: Identity(patient=patient, sequence="T2w" if case != "b_T1w" else None) for case, patient in given.items()
    }
    found = names(identities)
    assert found["sub-A1_T2w"] == "sub-A1_T2w"
    assert len({name.casefold() for name in found.values()}) == len(given)
    subjects = {case: name.partition("_")[0].casefold() for case, name in found.items()}
    assert subjects["a1"] == subjects["b_T1w"]
    assert len(set(subjects.values())) == len(given) - 1
    twice = {f"P {number}": Identity(patient="P", sequence="T2w") for number in (1, 2)}
    assert names(twice) == {"P 1": "sub-P_T2w", "P 2": "sub-P_run-2_T2w"}


def test_label_values_stay_unless_a_tool_needs_consecutive_ones() -> None:
    table = label_table((2, 1, 1), (), consecutive=True)
    assert not table.changes
    assert table.names == {0: "background", 1: "label_1", 2: "label_2"}
    named = label_table((20, 21, 22, 3), (), [(20, "L1"), (21, "L2"), (22, "disc"), (3, "Disc")], consecutive=False)
    assert {20: "L1", 21: "L2", 22: "label_22", 3: "label_3"}.items() <= named.names.items()
    # nnU-Net lists values by name.
    taken = label_table((1, 2), (), [(1, "Label_2")], consecutive=True)
    assert taken.names == {0: "background", 1: "label_1", 2: "label_2"}
    levels = label_table((207, 20), (300, 255), consecutive=True)
    np.testing.assert_array_equal(levels.apply(np.array([0, 20, 207, 255, 300])), [0, 1, 2, 3, 3])
    for consecutive, expected in ((True, [5, 0, 1, 2, 3, 4]), (False, [-1, 0, 1, 3, 200, 207])):
        table = label_table((1, 3, 200, 207), (-1,), consecutive=consecutive)
        np.testing.assert_array_equal(table.apply(np.array([-1, 0, 1, 3, 200, 207])), expected)
    with pytest.raises(InputError, match="label value 9: is a label in some cases and ignored in others"):
        label_table((1, 9), (9,), consecutive=False)


def test_the_command_names_a_damaged_case_and_exports_the_others(
    store: Path, tmp_path: Path, run_data: Callable[..., Result]
) -> None:
    (option,) = (one for one in main.commands["export"].params if one.name == "layout")
    assert list(option.type.choices) == list(EXPORT_LAYOUTS)
    (shard,) = (store / "cases" / "A").glob("*/volume/0/c/0/0/0")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    output = tmp_path / "out"
    done = run_data("export", store, "--layout", "nnunet", "-o", output)
    assert done.exit_code == 1
    assert re.search(r"failed: .*cases/A/", done.output)
    assert "1 as 1, 3 as 2" in done.output
    assert "1 case, 1 with a label map; too few patients" in done.output
    assert [path.name for path in (output / "imagesTr").iterdir()] == ["B_0000.nii.gz"]
    assert [path.name for path in (output / "labelsTr").iterdir()] == ["B.nii.gz"]
    assert json.loads((output / "dataset.json").read_text())["numTraining"] == 1
    before = bytes_of(output)
    again = run_data("export", store, "--layout", "msd", "-o", output)
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert bytes_of(output) == before
    for arguments in ((), ("A", "--layout", "msd"), ("--label", "--layout", "msd")):
        wrong = run_data("export", store, *arguments, "-o", tmp_path / "other")
        assert wrong.exit_code == 1
        assert len(wrong.output.splitlines()) == 1
    assert not (tmp_path / "other").exists()


def test_nothing_appears_before_it_is_complete(cohort: Cohort, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        assert not (tmp_path / "out").exists()
        raise Interrupted

    with pytest.raises(Interrupted):
        export_cohort(cohort, tmp_path / "out", "bids", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    export_cohort(cohort, tmp_path / "out", "bids")
    assert (tmp_path / "out" / "dataset_description.json").is_file()


def test_a_store_without_label_maps_is_exported_as_bids_only(tmp_path: Path) -> None:
    image, _ = ball()
    write_volume(tmp_path / "raw" / "A.nrrd", image)
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, axes="2")
    cohort = open_cohort(tmp_path / "s.zarr")
    with pytest.raises(NotInStoreError, match="no case with a label map"):
        export_cohort(cohort, tmp_path / "out", "nnunet")
    summary = export_cohort(cohort, tmp_path / "out", "bids")
    np.testing.assert_array_equal(read_volume(tmp_path / "out" / summary.cases[0].volume).array, image.array)
    assert not (tmp_path / "out" / "derivatives").exists()
    with pytest.raises(InputError, match="layout 'dicom': is not known"):
        export_cohort(cohort, tmp_path / "new", "dicom")


def test_what_a_killed_export_left_is_removed_and_a_running_one_is_waited_for(cohort: Cohort, tmp_path: Path) -> None:
    left = tmp_path / ".unfinished-out"
    (left / "imagesTr").mkdir(parents=True)
    (left / "imagesTr" / "half.nii.gz").touch()
    lock = exclusive_lock(left / ".lock")
    with lock, ThreadPoolExecutor(1) as other, pytest.raises(InputError, match="another export"):
        other.submit(export_cohort, cohort, tmp_path / "out", "nnunet").result()
    export_cohort(cohort, tmp_path / "out", "nnunet")
    assert not left.exists()
    assert not (tmp_path / "out" / ".lock").exists()
    assert not list((tmp_path / "out").rglob("half*"))
    (tmp_path / ".unfinished-other").symlink_to(tmp_path)
    with pytest.raises(InputError, match="link"):
        export_cohort(cohort, tmp_path / "other", "nnunet")
