from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cspine_data import InputError, NotInStoreError, Preprocessing, open_cohort, prepare, read_volume
from cspine_data.geometry import Orientation
from cspine_data.reader import SliceArray
from tests.conftest import write_case


def test_items_are_as_designed(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    assert cohort.cases == ("CS_01", "CS_02", "CS_03", "CS_04")
    for axis in range(3):
        slices = cohort.slices(axis=axis, variant="n4")
        image, mask = slices[len(slices) // 2]
        record = slices.records[slices.records[0].size_xyz[0] * 0]
        height, width = (n for a, n in enumerate(record.size_xyz) if a != axis)
        first_image, _ = slices[0]
        assert first_image.shape == (1, height, width) == (1, *slices.shape(0))
        assert image.dtype == np.float32
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        assert len(slices) == sum(record.size_xyz[axis] for record in slices.records)


def test_slices_lie_where_the_file_says(phantom_folder: Path, phantom_store: Path) -> None:
    """Axis 0 is left-right whatever order the file stores: checked against the file itself."""
    cohort = open_cohort(phantom_store)
    for case in cohort.cases:
        truth = read_volume(phantom_folder / f"{case}S-label.nrrd")
        turned = Orientation.of(truth.geometry).to_anatomical(truth.array)
        for axis in range(3):
            slices = cohort.slices(axis=axis, variant="raw", cases=[case], labels="stored")
            found = np.stack([slices[i][1][0] for i in range(len(slices))], axis=axis)
            np.testing.assert_array_equal(found, turned)


def test_volumes_and_slices_hold_the_same_numbers(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    for variant in cohort.variants:
        image, mask = cohort.volumes(variant=variant)[1]
        slices = cohort.slices(axis=1, variant=variant, cases=["CS_02"])
        np.testing.assert_array_equal(np.stack([slices[i][0][0] for i in range(len(slices))], 1), image[0])
        np.testing.assert_array_equal(np.stack([slices[i][1][0] for i in range(len(slices))], 1), mask[0])
    assert len(cohort.volumes(variant="n4")) == 4


def test_volumes_keep_their_range_where_slices_are_coarser(tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    coarse = Preprocessing(bias=None, spacing_mm=(5.0, 5.0, 5.0))
    prepare(tmp_path / "raw", tmp_path / "s.zarr", preprocessing=coarse, axes="0")
    cohort = open_cohort(tmp_path / "s.zarr")
    image, mask = cohort.volumes()[0]
    assert image.shape == mask.shape == (1, 16, 20, 24)
    source = read_volume(tmp_path / "raw" / "A.nrrd").array
    expected = cohort.record("A").normalisation.apply(source)
    np.testing.assert_allclose(image[0], expected, atol=1e-3)
    np.testing.assert_array_equal(cohort.label_xyz("A"), read_volume(tmp_path / "raw" / "AS-label.nrrd").array)


def test_choosing_slices(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    everything = cohort.slices(axis=0, variant="n4")
    labelled = cohort.slices(axis=0, variant="n4", only_labelled=True)
    counts = np.array([everything[i][1].sum() for i in range(len(everything))])
    np.testing.assert_array_equal(everything.labelled_voxels, counts)
    assert len(labelled) == np.count_nonzero(counts) < len(everything)
    assert all(labelled[i][1].any() for i in range(len(labelled)))
    both = cohort.slices(axis=(0, 2), variant="n4", cases=["CS_03"])
    assert {both.place(i).axis for i in range(len(both))} == {0, 2}
    assert both.place(5) == type(both.place(5))("CS_03", 0, 5)
    record = both.records[0]
    assert both.spacing_mm(0) == record.spacing_xyz_mm[1:]
    assert both.spacing_mm(len(both) - 1) == record.spacing_xyz_mm[:2]
    images = cohort.slices(axis=0, variant="n4", labels=None)
    assert isinstance(images[0], np.ndarray)
    assert images[0].shape == everything[0][0].shape


@pytest.mark.parametrize("context", [1, 3])
def test_neighbours_are_channels_and_end_at_the_volume(context: int, phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    alone = cohort.slices(axis=2, variant="n4", cases=["CS_01", "CS_02"])
    slices = cohort.slices(axis=2, variant="n4", cases=["CS_01", "CS_02"], context=context)
    assert len(slices) == len(alone)
    depth = cohort.record("CS_01", "n4").size_xyz[2]
    for item in (0, 1, depth // 2, depth - 1, depth):
        image, mask = slices[item]
        first, last = (0, depth - 1) if item < depth else (depth, len(alone) - 1)
        around = [min(max(item + k, first), last) for k in range(-context, context + 1)]
        np.testing.assert_array_equal(image, np.concatenate([alone[k][0] for k in around]))
        np.testing.assert_array_equal(mask, alone[item][1])


def test_no_slice_is_read_twice_for_its_neighbours(phantom_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[int] = []
    read = SliceArray.read_into
    monkeypatch.setattr(SliceArray, "read_into", lambda s, n, out: positions.append(n) or read(s, n, out))
    slices = open_cohort(phantom_store).slices(axis=2, variant="n4", labels=None, context=4)
    _ = slices[1]
    assert positions == [0, 1, 2, 3, 4, 5]


def test_splits_are_by_patient(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    parts = {
        part: {r.case for r in cohort.slices(axis=0, split=part, variant="n4").records}
        for part in ("train", "validation", "test")
    }
    assert parts == {"train": {"CS_01", "CS_02"}, "validation": {"CS_03"}, "test": {"CS_04"}}
    assert {r.case for r in cohort.slices(split="valid", variant="n4").records} == parts["validation"]
    chosen = cohort.slices(split="train", cases=["CS_02", "CS_04"], variant="n4")
    assert [r.case for r in chosen.records] == ["CS_02"]
    assert cohort.split(folds=4, fold=1, variant="n4").test == ("CS_02",)
    assert cohort.split(leave_out="CS_04", variant="n4").validation == ("CS_01",)


def test_a_case_that_lost_its_label_leaves_its_part(store: Path) -> None:
    assert open_cohort(store).split().train == ("A",)
    (store.parent / "raw" / "AS-label.nrrd").unlink()
    prepare(store.parent / "raw", store, n4=False)
    assert open_cohort(store).split().train == ()
    assert [r.case for r in open_cohort(store).slices(split="test").records] == ["B"]


def test_cases_without_a_label_are_read_as_images_only(tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    write_case(tmp_path / "raw", "B", label=False)
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False)
    cohort = open_cohort(tmp_path / "s.zarr")
    assert cohort.cases == ("A", "B")
    assert [r.case for r in cohort.slices().records] == ["A"]
    assert [r.case for r in cohort.slices(labels=None).records] == ["A", "B"]
    assert cohort.volumes(labels=None, cases=["B"])[0].shape == (1, 16, 20, 24)
    assert cohort.split().train == ("A",)
    with pytest.raises(InputError, match="case 'B': has no label map; ask for labels=None"):
        cohort.slices(cases=["A", "B"])
    with pytest.raises(NotInStoreError, match="case 'B' has no label map"):
        cohort.export("B", label=True)


def test_what_cannot_be_given_is_told(tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, axes="0")
    cohort = open_cohort(tmp_path / "s.zarr")
    with pytest.raises(NotInStoreError, match=r"has no slices along axis 2; run cspine-data prepare --axes 02"):
        cohort.slices(axis=2)
    with pytest.raises(InputError, match=r"axis 3: is not known; choose 0 \(sagittal\)"):
        cohort.slices(axis=3)
    with pytest.raises(InputError, match="context=-1: is negative"):
        cohort.slices(context=-1)
    with pytest.raises(InputError, match="split 'holdout': is not known"):
        cohort.slices(split="holdout")
    with pytest.raises(InputError, match="labels='both': is not known"):
        cohort.slices(labels="both")  # type: ignore[arg-type]


def test_no_pytorch_is_needed(phantom_store: Path) -> None:
    code = (
        "import sys, cspine_data, json;"
        f"c = cspine_data.open_cohort({str(phantom_store)!r});"
        "i, m = c.slices(variant='n4')[0]; v = c.volumes(variant='n4')[0];"
        "cspine_data.prepare, cspine_data.verify;"
        "print(json.dumps([n for n in ('torch', 'lightning') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_public_names_are_what_they_say() -> None:
    import cspine_data

    for name in cspine_data.__all__:
        assert getattr(cspine_data, name) is not None
    assert callable(cspine_data.prepare)
    assert callable(cspine_data.verify)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cspine_data.nothing
