"""The direct path to a slice, held equal to zarr-python's own reading."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cspine_data import DamagedStoreError, open_cohort
from cspine_data.reader import SliceArray, slice_array
from cspine_data.schema import chunk_checksum, slice_chunks
from cspine_data.writer import CaseWriter

DTYPES = ("float32", "uint8", "int16", "uint16", "int32")


def written(folder: Path, array: np.ndarray, axis: int = 0) -> Path:
    slices = np.ascontiguousarray(np.moveaxis(array, axis, 0))
    CaseWriter(folder / f"axis{axis}").write_array("image", slices, slice_chunks(slices.shape), "xyz", {})
    return folder / f"axis{axis}" / "image"


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
    axis=st.integers(0, 2),
    empty=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_direct_path_equals_zarr(data: st.DataObject, dtype: str, shape: tuple, axis: int, empty: bool) -> None:
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    if empty:
        array[array.shape[0] // 2 :] = 0
    with TemporaryDirectory() as name:
        path = written(Path(name), array, axis)
        slow = zarr.open_array(str(path), mode="r")[...]
        np.testing.assert_array_equal(slow, np.moveaxis(array, axis, 0))
        fast = SliceArray(path)
        assert fast.shape == slow.shape
        for position in range(fast.shape[0]):
            found = fast.read(position)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, slow[position])


@given(
    data=st.data(),
    dtype=st.sampled_from((*DTYPES, ">i2", "float64", "int8")),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    chunks=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
)
@settings(max_examples=40, deadline=None)
def test_zarr_reads_what_is_written(data: st.DataObject, dtype: str, shape: tuple, chunks: tuple) -> None:
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    with TemporaryDirectory() as name:
        writer = CaseWriter(Path(name) / "case")
        writer.write_group("volume", {"a": 1})
        writer.write_array("volume/0", array, chunks, "xyz", {"b": 2.5})
        writer.finish()
        found = zarr.open_group(str(writer.folder / "volume"), mode="r")
        assert found.attrs["a"] == 1
        assert found["0"].attrs["b"] == 2.5
        assert found["0"].chunks == chunks
        assert found["0"].dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(found["0"][...], array)
        for file, checksum in writer.checksums.items():
            assert hashlib.sha256((writer.folder / file).read_bytes()).hexdigest() == checksum


def test_every_flipped_byte_raises_or_changes_nothing(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 9, 11)).astype(np.float32)
    array[1] = 0
    shard = written(tmp_path, array) / "c/0/0/0"
    content = shard.read_bytes()
    raised = 0
    for spot in range(len(content)):
        shard.write_bytes(content[:spot] + bytes([content[spot] ^ 0x41]) + content[spot + 1 :])
        try:
            found = np.stack([SliceArray(tmp_path / "axis0/image").read(i) for i in range(3)])
        except DamagedStoreError as error:
            raised += 1
            assert "is not what was written" in str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(found, array)
    assert raised == len(content)


@pytest.mark.parametrize("change", ["copied", "longer", "shorter", "other items", "more than it holds", "nonsense"])
def test_a_chunk_that_lies_about_itself_is_refused_though_its_checksum_fits(change: str, tmp_path: Path) -> None:
    """Blosc's library believes a buffer's header, and would read on past the buffer's end."""
    path = written(tmp_path, np.random.default_rng(0).normal(size=(1, 40, 50)).astype(np.float32))
    shard = path / "c/0/0/0"
    content = shard.read_bytes()
    chunk = bytearray(content[: -(16 + 4 + 4)])
    if change == "copied":
        chunk[2] |= 2
        del chunk[200:]
        chunk[12:16] = len(chunk).to_bytes(4, "little")
    elif change == "nonsense":
        chunk[20:] = bytes(len(chunk) - 20)
    else:
        place, value = {
            "longer": (4, 8004), "shorter": (4, 7996), "other items": (3, 2), "more than it holds": (12, 1 << 20),
        }[change]  # fmt: skip
        chunk[place : place + (1 if place == 3 else 4)] = value.to_bytes(1 if place == 3 else 4, "little")
    index = np.array([0, len(chunk) + 4], "<u8").tobytes()
    shard.write_bytes(bytes(chunk) + chunk_checksum(bytes(chunk)) + index + chunk_checksum(index))
    with pytest.raises(DamagedStoreError, match="is not what was written|cannot be decompressed"):
        SliceArray(path).read(0)


@pytest.mark.parametrize("length", [0, 10, 200])
def test_a_truncated_shard_raises(length: int, tmp_path: Path) -> None:
    shard = written(tmp_path, np.ones((3, 9, 11), np.float32)) / "c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(
        DamagedStoreError, match=r"its index is not what was written; mend it with cspine-data verify .* --repair"
    ):
        SliceArray(tmp_path / "axis0/image")


def test_another_layout_is_not_guessed_at(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path), name="a", shape=(2, 4, 4), chunks=(1, 4, 4), dtype="f4")[...] = 1
    with pytest.raises(DamagedStoreError, match="cannot be opened"):
        SliceArray(tmp_path / "a")


def test_descriptors_stay_few_and_are_closed(tmp_path: Path) -> None:
    paths = []
    for number in range(300):
        paths.append(written(tmp_path / str(number), np.full((1, 2, 2), number, np.float32)))
    before = len(os.listdir("/proc/self/fd"))
    for number, path in enumerate(paths):
        assert slice_array(path).read(0)[0, 0] == number
    assert len(os.listdir("/proc/self/fd")) - before <= 130


def test_threads_read_what_one_thread_reads(phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=(0, 1, 2), variant="raw")
    items = np.random.default_rng(0).permutation(len(slices))[:200].tolist()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: slices[item][0], items))
    for item, image in zip(items, together, strict=True):
        np.testing.assert_array_equal(image, slices[item][0])


def _sum_of(slices, item: int) -> float:
    return float(slices[item][0].sum())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_read_the_same(method: str, phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=2, variant="raw")
    expected = [_sum_of(slices, item) for item in range(20)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(_sum_of, [(slices, item) for item in range(20)]) == expected


def test_a_dataset_survives_pickling(phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=1, variant="n4")
    again = pickle.loads(pickle.dumps(slices))  # noqa: S301
    assert len(again) == len(slices)
    np.testing.assert_array_equal(again[30][0], slices[30][0])
