"""Batches as the network is fed them: from a thread, from forked and spawned workers, and in bad circumstances."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cspine_data import DamagedStoreError, open_cohort
from cspine_data.datasets.slices import SliceDataset
from cspine_train.data.batches import BatchLoader, SliceBatches
from cspine_train.data.transforms import masks_to_network, to_network

SIZE = (224, 256)


def slices_of(store: Path, context: int = 0) -> SliceDataset:
    return open_cohort(store).slices(axis=(0, 1, 2), variant="n4", context=context)


def order_of(slices: SliceDataset) -> list[int]:
    return np.random.default_rng(0).permutation(len(slices))[:30].tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("pixel_mm", [None, 2.0])
def test_batches_hold_what_the_slices_hold(workers: int, pixel_mm: float | None, phantom_store: Path) -> None:
    slices = slices_of(phantom_store, context=1)
    order = order_of(slices)
    loader = BatchLoader(SliceBatches(slices, pixel_mm, SIZE), 7, sampler=order, num_workers=workers)
    seen: list[int] = []
    for batch in loader:
        assert batch.images.dtype == (torch.float32 if pixel_mm else torch.int16)
        for image, mask, number in zip(batch.intensities(), batch.masks, batch.numbers, strict=True):
            item = order[len(seen)]
            stored, label = slices[item]
            spacing_mm = slices.spacing_mm(item)
            torch.testing.assert_close(image, to_network(stored, spacing_mm, pixel_mm, SIZE)[:, 0], rtol=0, atol=1e-6)
            expected = masks_to_network(label, spacing_mm, pixel_mm, SIZE)[0]
            torch.testing.assert_close(mask.float(), expected, rtol=0, atol=1e-6)
            assert slices.cases[number] == slices.place(item).case
            seen.append(item)
    assert seen == order
    assert len(loader) == 5
    # Persistent workers, the second time.
    assert sum(len(batch.images) for batch in loader) == len(order)


def test_spawned_workers_give_the_same(phantom_store: Path) -> None:
    slices = slices_of(phantom_store)
    batches = SliceBatches(slices, None, SIZE)
    order = order_of(slices)
    spawned = BatchLoader(batches, 8, sampler=order, num_workers=1, multiprocessing_context="spawn")
    for ours, theirs in zip(BatchLoader(batches, 8, sampler=order), spawned, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_plain_loader_batches_slices_of_one_size(phantom_store: Path) -> None:
    slices = open_cohort(phantom_store).slices(axis=(0, 1), variant="n4", size_hw=SIZE)
    for images, labels in DataLoader(slices, batch_size=16, num_workers=1):
        assert images.shape[1:] == labels.shape[1:] == (1, *SIZE)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.uint8)


def test_the_next_batch_is_read_before_it_is_asked_for(phantom_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = slices_of(phantom_store)
    read = threading.Semaphore(0)
    read_into = SliceDataset.read_into

    def counted(self: SliceDataset, *arguments: object) -> None:
        read_into(self, *arguments)
        read.release()

    monkeypatch.setattr(SliceDataset, "read_into", counted)
    batches = iter(BatchLoader(SliceBatches(slices, None, SIZE), 4, sampler=order_of(slices)))
    next(batches)
    for _ in range(2):
        assert read.acquire(timeout=60)
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_slice_is_told_in_one_line(workers: int, store: Path) -> None:
    for shard in store.rglob("axis1/label/c/0/0/0"):
        content = bytearray(shard.read_bytes())
        content[: len(content) - 400] = bytes(len(content) - 400)
        shard.write_bytes(content)
    slices = open_cohort(store).slices(axis=1)
    loader = BatchLoader(SliceBatches(slices, None, (32, 32)), 4, num_workers=workers)
    with pytest.raises(DamagedStoreError, match=r"axis1/label: slice \d+") as raised:
        list(loader)
    assert "\n" not in str(raised.value)


LEAVING = """
import sys, threading
from cspine_data import open_cohort
from cspine_train.data.batches import BatchLoader, SliceBatches

slices = open_cohort(sys.argv[1]).slices(axis=(0, 1, 2), variant="n4")
loader = BatchLoader(SliceBatches(slices, None, (224, 256)), 16, shuffle=True, num_workers=int(sys.argv[2]))
batches = iter(loader)
next(batches)

def read_on():
    while True:
        for item in range(len(slices)):
            slices[item]

for _ in range(3):
    threading.Thread(target=read_on, daemon=True).start()
next(batches)
print("leaving")
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_that_ends_while_it_reads_ends_quietly(workers: int, phantom_store: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(phantom_store), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


STARTING = """
import sys
import numpy as np
import zarr
from torch.utils.data import DataLoader
from cspine_data import open_cohort
from cspine_train.data.batches import BatchLoader, SliceBatches

cohort = open_cohort(sys.argv[1])
record = cohort.record("CS_01", "n4")
# Whatever has threads, locks or an event loop in this process has used them before it forks.
assert zarr.open_array(f"{cohort.path}/cases/CS_01/{record.digest}/axis0/image", mode="r")[...].any()
slices = cohort.slices(axis=2, variant="n4", size_hw=(224, 256))
cohort.volumes(variant="n4")[0]
batches = SliceBatches(slices, None, (224, 256))
order = np.random.default_rng(0).permutation(len(slices)).tolist()
expected = slices[order[0]][0]
started = 0
for start in range(int(sys.argv[2])):
    workers = 1 + start % 2
    if start % 4 == 3:
        loader = DataLoader(slices, 2, sampler=order, num_workers=workers)
    else:
        loader = BatchLoader(batches, 2, sampler=order, num_workers=workers)
    batch = next(iter(loader))
    images = batch[0] if type(loader) is DataLoader else batch.intensities()
    assert np.array_equal(images[0].numpy(), expected)
    started += 1
print(started)
"""


@pytest.mark.timeout(7200)
def test_no_start_of_workers_hangs(long_run: bool, phantom_store: Path) -> None:
    starts = 10_000 if long_run else 60
    command = [sys.executable, "-c", STARTING, str(phantom_store), str(starts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7000 if long_run else 280)
    assert (done.returncode, done.stdout) == (0, f"{starts}\n"), done.stderr
