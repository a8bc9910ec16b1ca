"""The direct path to a slice, held equal to zarr-python's own reading."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zarr
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from cspine_data import DamagedStoreError, StoreError, open_cohort, read_volume
from cspine_data.datasets.slice_reader import DirectSlices, ForeignSlices, SliceArray, _OpenArrays, open_slices
from cspine_data.store.publishing import write_record
from cspine_data.store.schema import case_path, chunk_checksum, slice_chunks
from cspine_data.store.writer import CaseWriter
from tests.conftest import write_case

DTYPES = ("float32", "uint8", "int16", "uint16", "int32")


def written(folder: Path, array: np.ndarray, axis: int = 0) -> Path:
    slices = np.ascontiguousarray(np.moveaxis(array, axis, 0))
    CaseWriter(folder / f"axis{axis}").write_array("image", slices, slice_chunks(slices.shape), "xyz", {})
    return folder / f"axis{axis}" / "image"


def read(slices: SliceArray, position: int) -> np.ndarray:
    out = np.empty(slices.shape[1:], slices.dtype)
    slices.read_into(position, out)
    return out


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
    axis=st.integers(0, 2),
    empty=st.booleans(),
)
def test_the_direct_path_equals_zarr(data: st.DataObject, dtype: str, shape: tuple, axis: int, empty: bool) -> None:
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    if empty:
        array[array.shape[0] // 2 :] = 0
    with TemporaryDirectory() as name:
        path = written(Path(name), array, axis)
        slow = zarr.open_array(str(path), mode="r")[...]
        np.testing.assert_array_equal(slow, np.moveaxis(array, axis, 0))
        fast = open_slices(path)
        assert isinstance(fast, DirectSlices)
        assert fast.shape == slow.shape
        for position in range(fast.shape[0]):
            found = read(fast, position)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, slow[position])


@given(
    data=st.data(),
    dtype=st.sampled_from((*DTYPES, ">i2", "float64", "int8")),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    chunks=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
)
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
            found = np.stack([read(open_slices(tmp_path / "axis0/image"), i) for i in range(3)])
        except DamagedStoreError as error:
            raised += 1
            assert "what was written" in str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(found, array)
    assert raised == len(content)


@pytest.mark.parametrize("change", ["copied", "longer", "shorter", "other items", "more than it holds", "nonsense"])
def test_a_chunk_that_lies_about_itself_is_refused_though_its_checksum_fits(change: str, tmp_path: Path) -> None:
    """Blosc's library believes a buffer's header, and would read on past the buffer's end."""
    path = written(tmp_path, np.random.default_rng(0).integers(0, 4, (1, 40, 50)).astype(np.float32))
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
        read(open_slices(path), 0)


@pytest.mark.parametrize("length", [0, 10, 200])
def test_a_truncated_shard_raises(length: int, tmp_path: Path) -> None:
    shard = written(tmp_path, np.ones((3, 9, 11), np.float32)) / "c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(DamagedStoreError, match="what was written"):
        open_slices(tmp_path / "axis0/image")


@st.composite
def foreign_layouts(draw: st.DrawFn) -> dict[str, object]:
    """What another program might write: chunks and shards of any size, other codecs, orders and byte orders."""
    chunks = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
    filters = draw(st.sampled_from(([], [TransposeCodec(order=(2, 0, 1))])))
    shuffle = draw(st.sampled_from(("noshuffle", "shuffle", "bitshuffle")))
    compressors = draw(st.sampled_from(([], [ZstdCodec(level=1)], [BloscCodec(cname="zstd", shuffle=shuffle)])))
    times = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    return {
        "chunks": chunks,
        "shards": times and tuple(n * m for n, m in zip(chunks, times, strict=True)),
        "filters": filters,
        "serializer": BytesCodec(endian=draw(st.sampled_from(("little", "big")))),
        "compressors": [*compressors, Crc32cCodec()],
        # zarr-python would leave out chunks of zeros, which are then not told from lost ones.
        "config": {"write_empty_chunks": True},
    }


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12)),
    layout=foreign_layouts(),
)
def test_any_other_layout_goes_through_zarr(data: st.DataObject, dtype: str, shape: tuple, layout: dict) -> None:
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    array = data.draw(hnp.arrays(dtype, shape, elements=elements))
    with TemporaryDirectory() as name:
        zarr.create_array(name, name="axis0/image", shape=shape, dtype=dtype, **layout)[...] = array
        slices = open_slices(Path(name) / "axis0/image")
        assert (slices.shape, slices.dtype) == (shape, np.dtype(dtype))
        for position in range(shape[0]):
            np.testing.assert_array_equal(read(slices, position), array[position])


def test_a_foreign_layout_is_noticed_and_its_damage_too(tmp_path: Path) -> None:
    """The layouts that `test_any_other_layout_goes_through_zarr` writes are seldom the store's own by chance."""
    array = np.random.default_rng(0).integers(0, 999, (4, 6, 7)).astype(np.int16)
    zarr.create_array(
        str(tmp_path), name="a", shape=array.shape, chunks=(2, 3, 7), dtype="i2",
        compressors=[ZstdCodec(), Crc32cCodec()],
    )[...] = array  # fmt: skip
    slices = open_slices(tmp_path / "a")
    assert isinstance(slices, ForeignSlices)
    chunk = tmp_path / "a/c/1/0/0"
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    chunk.write_bytes(content)
    np.testing.assert_array_equal(read(slices, 1), array[1])
    with pytest.raises(DamagedStoreError, match="2 is not what"):
        read(slices, 2)


@pytest.mark.parametrize("shards", [None, (2, 6, 7)])
@pytest.mark.parametrize("instead", ["nothing", "a link", "a pipe"])
def test_a_foreign_chunk_that_is_not_there_is_damage(instead: str, shards: tuple | None, tmp_path: Path) -> None:
    """zarr-python would take it for zeros, follow it out of the store, or wait for ever."""
    path = tmp_path / "s/cases/A/d/axis0/image"
    zarr.create_array(
        str(path),
        shape=(4, 6, 7),
        chunks=(2, 3, 7),
        shards=shards,
        dtype="i2",
        compressors=[ZstdCodec(), Crc32cCodec()],
    )[...] = 1
    chunk = path / "c/1/0/0"
    chunk.rename(tmp_path / "elsewhere")
    if instead == "a link":
        chunk.symlink_to(tmp_path / "elsewhere")
    elif instead == "a pipe":
        os.mkfifo(chunk)
    slices = open_slices(path)
    assert read(slices, 1).all()
    told = {"nothing": "is not what was written .*c/1/0/0 is missing", "a link": "is a link", "a pipe": "is no file"}
    with pytest.raises(DamagedStoreError, match=f"slice 2 {told[instead]}"):
        read(slices, 2)


def test_a_store_that_was_recompressed_is_read(store: Path) -> None:
    """Every array of a case in another layout, its record told so: slices, volume and label map are the same."""
    before = open_cohort(store)
    record = before.record("A")
    folder = store / case_path("A", record.digest)
    expected = [before.slices(cases=["A"], axis=(0, 1, 2))[item] for item in (3, 20, 45)]
    files = dict(record.files)
    for name in sorted({file.removesuffix("/c/0/0/0") for file in files if file.endswith("/c/0/0/0")}):
        array = zarr.open_array(str(folder / name), mode="r")
        values, attributes = array[...], dict(array.attrs)
        shutil.rmtree(folder / name)
        zarr.create_array(
            str(folder), name=name, shape=values.shape, chunks=(3, 8, 8), dtype=values.dtype,
            compressors=[ZstdCodec(), Crc32cCodec()], attributes=attributes,
            config={"write_empty_chunks": True},
        )[...] = values  # fmt: skip
        files[f"{name}/zarr.json"] = hashlib.sha256((folder / name / "zarr.json").read_bytes()).hexdigest()
    write_record(folder, record.model_copy(update={"files": files}))
    after = open_cohort(store)
    for item, (image, label) in zip((3, 20, 45), expected, strict=True):
        found = after.slices(cases=["A"], axis=(0, 1, 2))[item]
        np.testing.assert_array_equal(found[0], image)
        np.testing.assert_array_equal(found[1], label)
    np.testing.assert_array_equal(after.label_xyz("A"), read_volume(store.parent / "raw/AS-label.nrrd").array)
    np.testing.assert_array_equal(after.export("A").array, read_volume(store.parent / "raw/A.nrrd").array)


def test_images_that_are_no_levels_are_refused(store: Path) -> None:
    record = open_cohort(store).record("A")
    folder = store / case_path("A", record.digest)
    shape = (record.sliced_size_xyz[0], *record.sliced_size_xyz[1:])
    shutil.rmtree(folder / "axis0/image")
    writer = CaseWriter(store.parent / "other")
    writer.write_array("image", np.ones(shape, np.uint16), slice_chunks(shape), "xyz", {})
    (store.parent / "other/image").rename(folder / "axis0/image")
    files = record.files | {"axis0/image/zarr.json": writer.checksums["image/zarr.json"]}
    write_record(folder, record.model_copy(update={"files": files}))
    with pytest.raises(DamagedStoreError, match="hold 16-bit levels"):
        open_cohort(store).slices(cases=["A"])[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compressors": [ZstdCodec()]}, "chunks carry no checksums"),
        ({"shards": (4, 4, 4), "compressors": [ZstdCodec()]}, "chunks carry no checksums"),
        ({"shards": (4, 4, 4), "compressors": [GzipCodec(), Crc32cCodec()]}, "one that is read"),
        ({"compressors": [GzipCodec(), Crc32cCodec()]}, "one that is read"),
        ({"chunks": (4, 1 << 20, 1 << 20), "compressors": [Crc32cCodec()]}, "one that is read"),
        ({"shape": (4, 4), "chunks": (4, 4), "compressors": [Crc32cCodec()]}, "it holds no slices"),
        ({"dtype": "bool", "compressors": [Crc32cCodec()]}, "'bool'"),
    ],
)
def test_layouts_that_cannot_be_trusted_are_refused(options: dict, told: str, tmp_path: Path) -> None:
    zarr.create_array(
        str(tmp_path), name="a/a/a/a/a", **{"shape": (4, 4, 4), "chunks": (1, 4, 4), "dtype": "f4"} | options
    )
    with pytest.raises(DamagedStoreError, match=f"cannot be opened .*{told}"):
        open_slices(tmp_path / "a/a/a/a/a")


def test_descriptors_stay_few_and_are_closed(tmp_path: Path) -> None:
    paths = [written(tmp_path / str(n), np.full((1, 2, 2), n, np.float32)) for n in range(300)]
    before = len(os.listdir("/proc/self/fd"))
    arrays = _OpenArrays()
    for number, path in enumerate(paths):
        assert read(arrays.get(str(path)), 0)[0, 0] == number
    assert len(os.listdir("/proc/self/fd")) - before == 128
    assert read(arrays.get(str(paths[-1])), 0)[0, 0] == 299
    for path in paths:
        arrays.drop(path)
    assert len(os.listdir("/proc/self/fd")) == before


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


def test_a_store_is_read_over_the_network(serve: Callable[[Path], str], store: Path) -> None:
    near, far = open_cohort(store), open_cohort(serve(store))
    assert far.cases == near.cases
    assert far.split() == near.split()
    here, there = (cohort.slices(axis=(0, 2), context=1) for cohort in (near, far))
    for item in (0, 20, len(here) - 1):
        for expected, found in zip(here[item], there[item], strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(far.export("A").array, near.export("A").array)
    np.testing.assert_array_equal(far.label_xyz("B"), near.label_xyz("B"))
    # zarr-python's event loop has run by now, and has no thread in a forked process.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_sum_of, (there, 20)).get(60) == float(here[20][0].sum())


def test_a_url_is_no_folder(run_data: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path / "raw", "A")
    for command in (("prepare", "raw", "--no-n4", "--store"), ("info",), ("verify",), ("gc",)):
        done = run_data(*command, "http://127.0.0.1:9/s.zarr")
        assert done.exit_code != 0
        assert "URL, which only open_cohort" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_what_a_network_cannot_give_is_told(serve: Callable[[Path], str], store: Path) -> None:
    served = serve(store)
    with pytest.raises(StoreError, match="http://127.*/nothing: is no cspine"):
        open_cohort(served + "/nothing")
    with pytest.raises(StoreError, match="http://127.0.0.1:9/s.zarr: is no cspine"):
        open_cohort("http://127.0.0.1:9/s.zarr")
    for scheme in ("odd", "s3"):
        with pytest.raises(
            StoreError, match=rf"{scheme}://x/y: cannot be reached .*; pip install 'cspine\[remote\]', and"
        ):
            open_cohort(f"{scheme}://x/y")
    cohort = open_cohort(served)
    shard = next(store.rglob("axis0/image/c/0/0/0"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    damaged = 0 if "cases/A/" in str(shard) else 16
    with pytest.raises(DamagedStoreError, match="http://.*/axis0/image: slice 0"):
        cohort.slices()[damaged]
    for lost in store.rglob("axis2/image/c/0/0/0"):
        lost.unlink()
    with pytest.raises(DamagedStoreError, match="http://.*/axis2/image: slice 3"):
        cohort.slices(axis=2)[3]
