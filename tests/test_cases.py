from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cspine_data import InputError, Problem, Volume, find_cases, write_volume
from cspine_data.sources.cases import Case, cohort_note, load_case, scan_case
from cspine_data.tools import describe_problem
from tests.conftest import ball, geometry, write_case


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def pairs(folder: Path) -> dict[str, str | None]:
    return {case.id: case.label.name if case.label else None for case in find_cases(folder).cases}


def test_every_naming_is_paired(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "A.nrrd", "AS-label.nrrd",
        "B.nii.gz", "B-label.nii.gz",
        "C.nhdr", "C.seg.nrrd",
        "D.nii", "DS-label.nrrd",
        "KS.nrrd", "KS-label.nrrd",
        "Alone.nrrd",
        "notes.txt", ".hidden.nrrd", "truth/A-log-bias.nrrd",
    )  # fmt: skip
    assert pairs(tmp_path) == {
        "A": "AS-label.nrrd", "Alone": None, "B": "B-label.nii.gz", "C": "C.seg.nrrd", "D": "DS-label.nrrd",
        "KS": "KS-label.nrrd",
    }  # fmt: skip
    assert find_cases(tmp_path).problems == ()


def test_nnunet_layout(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "imagesTr/neck_1_0000.nii.gz", "labelsTr/neck_1.nii.gz", "imagesTr/neck_2_0000.nii.gz",
        "imagesTs/neck_3_0000.nii.gz", "dataset.json",
    )  # fmt: skip
    assert pairs(tmp_path) == {"neck_1": "neck_1.nii.gz", "neck_2": None, "neck_3": None}
    touch(tmp_path, "imagesTr/neck_1_0001.nii.gz", "labelsTr/neck_9.nii.gz", "imagesTr/odd.nii.gz")
    assert any("--sequence" in note and "0001" in note for note in find_cases(tmp_path).notes)
    messages = [problem.message for problem in find_cases(tmp_path).problems]
    assert any("neck_9.nii.gz: is a label" in message for message in messages)
    assert any("has no channel number" in message for message in messages)
    assert len(find_cases(tmp_path).cases) == 3


def test_a_list_of_pairs(tmp_path: Path) -> None:
    touch(tmp_path, "img/1.nrrd", "lab/1.nrrd")
    table = tmp_path / "pairs.csv"
    table.write_text("\ufeffcase,volume,label\none,img/1.nrrd,lab/1.nrrd\ntwo,img/2.nrrd,\n,img/3.nrrd,\n")
    listing = find_cases("nowhere", table)
    assert listing.cases == (
        Case("one", tmp_path / "img/1.nrrd", tmp_path / "lab/1.nrrd"),
        Case("two", tmp_path / "img/2.nrrd", None),
    )
    (problem,) = listing.problems
    assert "4 names no case" in problem.message
    table.write_text("patient,image\n1,2\n")
    with pytest.raises(InputError, match="column case, volume, label"):
        find_cases("nowhere", table)
    table.write_bytes(b"case,volume,label\n\xff\xfe,,\n")
    with pytest.raises(InputError, match="readable CSV file"):
        find_cases("nowhere", table)
    with pytest.raises(InputError, match="is no file"):
        find_cases("nowhere", tmp_path / "missing.csv")


def test_an_id_that_would_leave_the_store_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("case,volume,label\n../../etc,x.nrrd,\n..,x.nrrd,\n__zarr,x.nrrd,\na/b,x.nrrd,\nfine,x.nrrd,\n")
    listing = find_cases("nowhere", table)
    assert [case.id for case in listing.cases] == ["fine"]
    assert len(listing.problems) == 4
    assert all("usable case id" in problem.message for problem in listing.problems)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("A.nrrd", "A.nii"), "claim the same case"),
        (("A.nrrd", "AS-label.nrrd", "A-label.nrrd"), "label maps of 'A'"),
        (("B.nrrd", "A-label.nrrd"), "map without a volume"),
    ],
)
def test_what_cannot_be_paired_is_told(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (problem,) = find_cases(touch(tmp_path, *names)).problems
    assert message in problem.message


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no volume; put"):
        find_cases(tmp_path)


def written(folder: Path, image: Volume, label: Volume | None, label_name: str = "x-label.nrrd") -> Case:
    write_volume(folder / "x.nrrd", image)
    if label is not None:
        # The writer knows no .seg.nrrd; the reader takes it as any NRRD.
        write_volume(folder / "label.nrrd", label)
        (folder / "label.nrrd").rename(folder / label_name)
    return Case("x", folder / "x.nrrd", folder / label_name if label else None)


def load(folder: Path, image: Volume, label: Volume | None, label_name: str = "x-label.nrrd"):
    return load_case(written(folder, image, label, label_name))


def test_a_good_case_loads(tmp_path: Path) -> None:
    path = write_case(tmp_path, "x")
    loaded = load_case(Case("x", path, tmp_path / "xS-label.nrrd"))
    assert loaded.label is not None
    assert sorted(np.unique(loaded.label.array)) == [0, 1, 3]
    assert load_case(Case("x", path)).label is None


def test_label_values_in_floats_are_kept_as_whole_numbers(tmp_path: Path) -> None:
    image, label = ball()
    loaded = load(tmp_path, image, Volume(label.array.astype(np.float64), label.geometry))
    assert loaded.label is not None
    assert loaded.label.array.dtype == np.int32
    np.testing.assert_array_equal(loaded.label.array, label.array)


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(spoiled: float, tmp_path: Path) -> None:
    image, label = ball()
    array = image.array.astype(np.float32)
    array[3, 4, 5] = spoiled
    found = scan_case(written(tmp_path, Volume(array, image.geometry), label), {})
    assert isinstance(found, Problem)
    assert "NaN or infinite" in found.message


def test_a_constant_volume(tmp_path: Path) -> None:
    image, label = ball()
    found = scan_case(written(tmp_path, Volume(np.full_like(image.array, 7), image.geometry), label), {})
    assert isinstance(found, Problem)
    assert "x.nrrd: is constant" in found.message


def test_a_probability_map_is_no_label_map(tmp_path: Path) -> None:
    image, label = ball()
    with pytest.raises(InputError, match="are no whole numbers"):
        load(tmp_path, image, Volume(label.array * 0.3, label.geometry))


def test_grids_that_differ(tmp_path: Path) -> None:
    image, label = ball()
    smaller = Volume(label.array[:-1], label.geometry.model_copy(update={"size": (15, 20, 24)}))
    with pytest.raises(InputError, match=r"volume's grid \(15 x"):
        load(tmp_path, image, smaller)
    moved = Volume(label.array, label.geometry.model_copy(update={"origin_mm": (0.0, 0.0, 0.0)}))
    with pytest.raises(InputError, match="another place or angle"):
        load(tmp_path, image, moved)


def test_a_segmentation_cropped_by_its_program_is_put_back(tmp_path: Path) -> None:
    image, label = ball()
    corner = np.array([2, 3, 4])
    cropped = Volume(
        label.array[2:14, 3:17, 4:20],
        label.geometry.model_copy(
            update={"size": (12, 14, 16), "origin_mm": tuple(label.geometry.positions_mm(corner[None])[0].tolist())}
        ),
    )
    loaded = load(tmp_path, image, cropped, "x.seg.nrrd")
    assert loaded.label is not None
    np.testing.assert_array_equal(loaded.label.array, label.array)
    outside = cropped.geometry.model_copy(update={"origin_mm": (500.0, 0.0, 0.0)})
    with pytest.raises(InputError, match="lie on its volume's"):
        load(tmp_path, image, Volume(cropped.array, outside), "x.seg.nrrd")


def test_a_note_beside_the_volumes_is_found(tmp_path: Path) -> None:
    assert cohort_note(tmp_path) is None
    (tmp_path / "COHORT.txt").write_text("lumbar stand-in\nmore\n")
    assert cohort_note(tmp_path) == "lumbar stand-in"


def test_problems_are_one_line_with_a_remedy() -> None:
    full = describe_problem("x", OSError(28, "No space left on device", "/store/x"))
    assert full.message == "/store/x: No space left on device; free some space and run it again"
    assert "use fewer --workers" in describe_problem("x", MemoryError()).message
    assert "failed unexpectedly (KeyError: 'a')" in describe_problem("x", KeyError("a")).message
    assert describe_problem("x", InputError("f", "is odd", "mend it")).message == "f: is odd; mend it"
    assert geometry((2, 2, 2)).size == (2, 2, 2)


def test_a_name_that_would_write_on_the_terminal_is_told_and_not_done(tmp_path: Path, run_data) -> None:
    for name in ("two\nlines", "red\x1b[31m", "half\udcff", "turned\u202e", ".." + "x" * 240, "\u9838\u690e" * 40):
        (tmp_path / f"{name}.nrrd").write_bytes(b"not a volume")
    (tmp_path / "\u9838\u3000\u690e.nrrd").write_bytes(b"nor this")
    done = run_data("scan", tmp_path)
    assert done.exit_code == 1
    told = done.stderr.splitlines()
    assert [line.startswith(f"problem: {tmp_path}") for line in told] == [True] * 6
    assert sum("usable case id" in line for line in told) == 5
    assert "\x1b" not in done.output


def test_volumes_of_somebody_else_are_not_written_over(tmp_path: Path, run_data) -> None:
    own = write_case(tmp_path, "CS_01")
    before = own.read_bytes()
    told = f"Error: {tmp_path}: holds volumes that are no cspine phantoms; choose an empty folder\n"
    assert run_data("phantom", tmp_path, "--cases", "1").output == told
    assert own.read_bytes() == before


def test_what_is_called_like_a_volume_and_is_none_is_told(tmp_path: Path, run_data) -> None:
    write_case(tmp_path, "A")
    (tmp_path / "dangling.nrrd").symlink_to(tmp_path / "annexed")
    (tmp_path / "folder.nii.gz").mkdir()
    done = run_data("scan", tmp_path)
    assert done.exit_code == 1
    for name in ("dangling.nrrd", "folder.nii.gz"):
        assert f"problem: {tmp_path / name}: is called like a volume and is no file; fetch the file" in done.stderr
