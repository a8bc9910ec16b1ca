from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cspine_data import InputError, NotInStoreError, Preprocessing, open_cohort, prepare, read_volume
from cspine_data.datasets.slice_reader import DirectSlices
from cspine_data.volumes.geometry import Orientation
from tests.conftest import write_case


def test_items_are_as_designed(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    assert cohort.cases == ("CS_01", "CS_02", "CS_03", "CS_04")
    for axis in range(3):
        slices = cohort.slices(axis=axis, variant="n4")
        image, mask = slices[len(slices) // 2]
        height, width = (n for a, n in enumerate(cohort.record("CS_01", "n4").size_xyz) if a != axis)
        first_image, _ = slices[0]
        assert first_image.shape == (1, height, width) == (1, *slices.shape(0))
        assert image.dtype == np.float32
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        assert len(slices) == sum(record.size_xyz[axis] for record in cohort.records("n4"))


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
    assert [both.cases[number] for number in both.case_numbers] == [both.place(i).case for i in range(len(both))]
    record = cohort.record("CS_03", "n4")
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
    read = DirectSlices.read_into
    monkeypatch.setattr(DirectSlices, "read_into", lambda s, n, out: positions.append(n) or read(s, n, out))
    slices = open_cohort(phantom_store).slices(axis=2, variant="n4", labels=None, context=4)
    _ = slices[1]
    assert positions == [0, 1, 2, 3, 4, 5]


def test_a_batch_holds_what_its_items_hold(phantom_store: Path) -> None:
    """Slices of three axes and two cases, some twice, in arrays larger than each; the margin is air."""
    slices = open_cohort(phantom_store).slices(axis=(0, 1, 2), variant="n4", cases=["CS_01", "CS_02"], context=1)
    items = [*np.random.default_rng(0).integers(0, len(slices), 12).tolist(), 0, 0, len(slices) - 1, -1]
    images = np.full((len(items), 3, 200, 220), np.nan, np.float32)
    labels = np.full((len(items), 1, 200, 220), 7, np.uint8)
    slices.read_into(items, images, labels)
    for number, item in enumerate(items):
        image, label = slices[item]
        height, width = image.shape[1:]
        top, left = (200 - height) // 2, (220 - width) // 2
        window = (number, slice(None), slice(top, top + height), slice(left, left + width))
        np.testing.assert_array_equal(images[window], image)
        np.testing.assert_array_equal(labels[window], label)
        assert labels[number].sum() == label.sum()
        for channel in range(3):
            assert images[number, channel].min() == images[number, channel, 0, 0] == image[channel].min()
            assert (images[number, channel] == image[channel].min()).sum() >= 200 * 220 - height * width


def test_stored_numbers_and_their_scales_are_intensities(phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=(0, 2), variant="n4", context=1, labels=None)
    items = np.random.default_rng(0).integers(0, len(slices), 9).tolist()
    intensities = np.empty((9, 3, 200, 220), np.float32)
    stored = np.empty((9, 3, 200, 220), np.int16)
    slices.read_into(items, intensities)
    slices.read_into(items, stored)
    np.testing.assert_array_equal(stored * slices.scales(items)[:, None, None, None], intensities)


def test_items_of_one_size_are_what_a_batch_holds(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    slices = cohort.slices(axis=(0, 2), variant="n4", labels="stored", size_hw=(200, 220))
    batch = np.empty((len(slices), 1, 200, 220), np.float32), np.empty((len(slices), 1, 200, 220), np.uint8)
    slices.read_into(range(len(slices)), *batch)
    for item in range(0, len(slices), 7):
        image, label = slices[item]
        np.testing.assert_array_equal(batch[0][item], image)
        np.testing.assert_array_equal(batch[1][item], label)
    assert batch[1].max() > 1
    with pytest.raises(InputError, match="CS_0[1-4].*64 x 500"):
        cohort.slices(variant="n4", size_hw=(64, 500))
    with pytest.raises(InputError, match="32 x 500 does"):
        slices.read_into([0], np.empty((1, 1, 32, 500), np.float32))
    images = cohort.slices(variant="n4", labels=None)
    shape = images.shape(0)
    with pytest.raises(InputError, match="labels=None: reads no label"):
        images.read_into([0], np.empty((1, 1, *shape), np.float32), np.empty((1, 1, *shape), np.uint8))


def test_a_slice_is_read_once_in_a_batch_and_no_empty_label(
    phantom_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = open_cohort(phantom_store).slices(axis=2, variant="n4", cases=["CS_01"], context=2)
    found: list[tuple[int, np.dtype]] = []
    read = DirectSlices.read_into
    monkeypatch.setattr(DirectSlices, "read_into", lambda s, n, out: found.append((n, s.dtype)) or read(s, n, out))
    items = [2, 1, 1, 2, int(slices.labelled_voxels.argmax())]
    shape = slices.shape(0)
    slices.read_into(items, np.empty((5, 5, *shape), np.float32), np.empty((5, 1, *shape), np.uint8))
    assert not slices.labelled_voxels[:3].any()
    expected = sorted({*range(5), *range(items[-1] - 2, items[-1] + 3)})
    assert [n for n, dtype in found if dtype == np.int16] == expected
    assert [n for n, dtype in found if dtype == np.uint8] == items[-1:]


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (((2, 1, 200, 220), "f4"), None, r"float32 or int16, \(3"),
        (((3, 3, 200, 220), "f4"), None, "images: have to be"),
        (((1, 200, 220), "f4"), None, "images: have to be"),
        (((3, 1, 200, 220), "f8"), None, "images: have to be"),
        (
            ((3, 1, 200, 220), "i2"),
            ((3, 1, 200, 224), "u1"),
            r"uint8, \(3, 1, 200",
        ),
        (((3, 1, 200, 220), "i2"), ((2, 1, 200, 220), "u1"), "have to be uint8"),
        (((3, 1, 200, 220), "i2"), ((3, 1, 200, 220), "f4"), "have to be uint8"),
    ],
)
def test_arrays_of_another_shape_or_dtype_are_refused(
    images: tuple, labels: tuple | None, told: str, phantom_store: Path
) -> None:
    slices = open_cohort(phantom_store).slices(variant="n4")
    with pytest.raises(InputError, match=told):
        slices.read_into([0, 1, 2], np.empty(*images), np.empty(*labels) if labels else None)


def test_cases_are_named_in_a_list_and_known(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    with pytest.raises(InputError, match="cases='CS_01': is a text"):
        cohort.slices(variant="n4", cases="CS_01")
    with pytest.raises(NotInStoreError, match="holds no case 'CS_9'"):
        cohort.slices(variant="n4", split="train", cases=["CS_01", "CS_9"])


def test_items_are_counted_like_a_list(phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=(0, 1), variant="n4", only_labelled=True)
    np.testing.assert_array_equal(slices[-1][0], slices[len(slices) - 1][0])
    assert sum(1 for _ in slices) == len(slices)
    for item in (len(slices), -len(slices) - 1):
        with pytest.raises(IndexError, match=f"item {item} of {len(slices)}"):
            slices[item]


def test_splits_are_by_patient(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    parts = {
        part: set(cohort.slices(axis=0, split=part, variant="n4").cases) for part in ("train", "validation", "test")
    }
    assert parts == {"train": {"CS_01", "CS_02"}, "validation": {"CS_03"}, "test": {"CS_04"}}
    assert set(cohort.slices(split="valid", variant="n4").cases) == parts["validation"]
    chosen = cohort.slices(split="train", cases=["CS_02", "CS_04"], variant="n4")
    assert chosen.cases == ("CS_02",)
    assert cohort.split(folds=4, fold=1, variant="n4").test == ("CS_02",)
    assert cohort.split(leave_out="CS_04", variant="n4").validation == ("CS_01",)


def test_a_case_that_lost_its_label_leaves_its_part(store: Path) -> None:
    assert open_cohort(store).split().train == ("A",)
    (store.parent / "raw" / "AS-label.nrrd").unlink()
    prepare(store.parent / "raw", store, n4=False)
    assert open_cohort(store).split().train == ()
    assert open_cohort(store).slices(split="test").cases == ("B",)


def test_cases_without_a_label_are_read_as_images_only(tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    write_case(tmp_path / "raw", "B", label=False)
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False)
    cohort = open_cohort(tmp_path / "s.zarr")
    assert cohort.cases == ("A", "B")
    assert cohort.slices().cases == ("A",)
    assert cohort.slices(labels=None).cases == ("A", "B")
    assert cohort.volumes(labels=None, cases=["B"])[0].shape == (1, 16, 20, 24)
    assert cohort.split().train == ("A",)
    with pytest.raises(InputError, match="'B': has no label"):
        cohort.slices(cases=["A", "B"])
    with pytest.raises(NotInStoreError, match="'B' has no label"):
        cohort.export("B", label=True)


def test_what_cannot_be_given_is_told(tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, axes="0")
    cohort = open_cohort(tmp_path / "s.zarr")
    with pytest.raises(NotInStoreError, match="slices along axis 2"):
        cohort.slices(axis=2)
    with pytest.raises(InputError, match="3: is not known"):
        cohort.slices(axis=3)
    with pytest.raises(InputError, match="context=-1: is negative"):
        cohort.slices(context=-1)
    with pytest.raises(InputError, match="'holdout': is not known"):
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
    import cspine_data.tools

    for name in cspine_data.__all__:
        assert getattr(cspine_data, name) is not None
    assert callable(cspine_data.prepare)
    assert callable(cspine_data.verify)
    for name in cspine_data.tools.__all__:
        assert getattr(cspine_data.tools, name) is not None
        assert name not in cspine_data.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cspine_data.nothing
