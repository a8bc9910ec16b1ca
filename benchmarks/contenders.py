"""One contender's measurement, in the process that it has to itself, and that process as `streaming.py` sees it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import layouts
import medical_layouts
import numpy as np
import psutil
import torch
from numcodecs import blosc
from torch.utils.data import DataLoader

from cspine_data import CaseRecord, open_cohort
from cspine_train.data.batches import Batch, BatchLoader, SliceBatches
from cspine_train.training.allocator import keep_large_blocks

BATCH = 8
CONTENDERS = {
    layout.name: layout
    for layout in (
        layouts.Ours, layouts.OursReadAhead, layouts.OursUnchecked, layouts.ZarrPython, layouts.Zarrs,
        layouts.TensorStore, medical_layouts.Blosc2Planar, medical_layouts.Blosc2Volumes,
        medical_layouts.MonaiPersistent, medical_layouts.MonaiCache, medical_layouts.TorchioQueue,
        layouts.Hdf5, layouts.Tiff, layouts.MemoryMap,
    )
}  # fmt: skip


class Batches:
    """What `DataLoader` takes: whole batches of one size, made at once."""

    def __init__(self, layout: layouts.Layout) -> None:
        self.layout = layout

    def __len__(self) -> int:
        return len(self.layout.places)

    def __getitems__(self, items: Sequence[int]) -> Any:
        images = torch.from_numpy(np.empty((len(items), 1, *self.layout.size_hw), self.layout.image_dtype))
        masks = torch.empty((len(items), 1, *self.layout.size_hw), dtype=torch.uint8)
        self.layout.read_into(items, images.numpy(), masks.numpy())
        return images, masks


def delivered_arrays(batch: Any) -> tuple[Any, Any]:
    """Return a batch's images and masks."""
    images, masks = (batch.images, batch.masks) if isinstance(batch, Batch) else batch[:2]
    return images.numpy(), masks.numpy()


def as_it_is(batch: Any) -> Any:
    return batch


def one_thread(worker: int = 0) -> None:
    """Let the libraries that decompress and compute work on one thread, in memory that is kept, as in training."""
    keep_large_blocks()
    torch.set_num_threads(1)
    blosc.set_nthreads(1)


class Bench:
    """Measures one contender along one axis, in the process that it has to itself."""

    def __init__(self, contender: str, store: Path, folder: Path, axis: int, as_float32: bool) -> None:
        one_thread()
        self.layout = CONTENDERS[contender](store, folder, axis)
        if as_float32 and not isinstance(self.layout, layouts.OursReadAhead):
            self.layout.image_dtype = np.dtype(np.float32)
        self._ours = layouts.Ours(store, folder, axis)
        self._cores = os.sched_getaffinity(0)
        self._largest_worker_mb = 0.0
        self._loader: Any = None
        size = (BATCH, 1, *self.layout.size_hw)
        self._images, self._masks = np.zeros(size, self.layout.image_dtype), np.zeros(size, np.uint8)

    def check(self, items: Sequence[int]) -> None:
        """Read what will be read, and hold it against what ours delivers."""
        for item in items:
            self._images.fill(7)
            self._masks.fill(2)
            self.layout.read_into([item], self._images[:1], self._masks[:1])
            self._hold([item], self._images[:1], self._masks[:1])

    def slices(self, items: Sequence[int], cold: bool) -> list[float]:
        """Return the seconds that a slice takes on one core, of each batch into arrays that are there already."""
        os.sched_setaffinity(0, {min(self._cores)})
        seconds = []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            if cold:
                self._forget(batch)
            started = time.perf_counter()
            self.layout.read_into(batch, self._images[: len(batch)], self._masks[: len(batch)])
            seconds.append((time.perf_counter() - started) / len(batch))
        os.sched_setaffinity(0, self._cores)
        return seconds

    def start(self, items: Sequence[int], workers: int) -> float:
        """Start workers for epochs of these slices; return the seconds until each has delivered a batch."""
        started = time.perf_counter()
        self._items, self._workers = list(items), workers
        if isinstance(self.layout, medical_layouts.TorchioQueue):
            return 0.0
        order = self._items[: BATCH * max(1, workers)]
        settings = {"persistent_workers": True, "multiprocessing_context": self.layout.start_method} if workers else {}
        if isinstance(self.layout, layouts.OursReadAhead):
            batches = SliceBatches(self.layout.slices, None, self.layout.size_hw)
            self._loader = BatchLoader(
                batches, BATCH, sampler=order, num_workers=workers, worker_init_fn=one_thread if workers else None
            )
        else:
            self._loader = DataLoader(
                Batches(self.layout), BATCH, sampler=order, collate_fn=as_it_is, num_workers=workers,
                worker_init_fn=one_thread, **settings,
            )  # fmt: skip
        for _ in self._loader:
            pass
        order[:] = self._items
        return time.perf_counter() - started

    def epoch(self) -> float:
        """Return the seconds of an epoch, its workers being there."""
        queue = self._epoch_of_torchio()
        delivered, first = 0, None
        started = time.perf_counter()
        for batch in queue or self._loader:
            first = first or batch
            delivered += len(batch[0])
            if delivered == len(self._items):
                # The workers are still there: what they held at most is asked now.
                ended = time.perf_counter()
                self._largest_worker_mb = max(self._largest_worker_mb, _peaks_mb())
        assert first is not None
        assert delivered == len(self._items)
        self._hold(first[2] if queue else self._items[:BATCH], *delivered_arrays(first))
        return ended - started

    def stop(self) -> None:
        """Let the workers go."""
        self._loader = None

    def _epoch_of_torchio(self) -> Iterator[Any] | None:
        if isinstance(self.layout, medical_layouts.TorchioQueue):
            return self.layout.loader(len(self._items), self._workers, BATCH)
        return None

    def memory(self) -> tuple[float, float]:
        """Return the most megabytes that the process held, and the largest of its workers."""
        return _peak_mb("self"), self._largest_worker_mb

    def _hold(self, items: Sequence[int], images: Any, masks: Any) -> None:
        expected = np.empty(images.shape, images.dtype), np.empty(masks.shape, np.uint8)
        self._ours.read_into(items, *expected)
        assert np.array_equal(images, expected[0]), "another image than ours"
        assert np.array_equal(masks, expected[1]), "another mask than ours"

    def _forget(self, items: Sequence[int]) -> None:
        """Let the page cache forget the files that slices are read from."""
        self.layout.let_go()
        for path in {path for item in items for path in self.layout.paths(*self.layout.places[item])}:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def labelled(store: Path) -> list[CaseRecord]:
    """Return the records of the cases that have a label map."""
    return [record for record in open_cohort(store).records() if record.labelled]


def write(contender: str, store: Path, folder: Path) -> float:
    """Return the seconds that it takes to bring all arrays, in memory, to a contender's files for all three axes."""
    one_thread()
    seconds = 0.0
    layout = CONTENDERS[contender]
    records = labelled(store)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Importing a library is not writing.
        layout.write(Path(scratch), records[0], *layouts.volumes_of(store, records[0]))
    for record in records:
        volumes = layouts.volumes_of(store, record)
        started = time.perf_counter()
        layout.write(folder, record, *volumes)
        seconds += time.perf_counter() - started
    return seconds


def bytes_of(contender: str, store: Path, folder: Path) -> int:
    """Return what a contender's files take on the disk, for all three axes."""
    folders = [folder]
    if CONTENDERS[contender].of_store:
        kinds = [(axis, kind) for axis in range(3) for kind in layouts.KINDS]
        records = labelled(store)
        folders = [layouts.array_folder(store, record, *kind) for record in records for kind in kinds]
    files = (file for one in folders for file in one.rglob("*") if file.is_file())
    return sum(file.stat().st_blocks * 512 for file in files)


def _peak_mb(process: int | str) -> float:
    """Return a process's largest resident size: `ru_maxrss`, but without its parent's, which that begins with."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def _peaks_mb() -> float:
    return max((_peak_mb(child.pid) for child in psutil.Process().children()), default=0.0)


def serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make something in a process of its own, and call its methods as asked; a function is just called."""
    # A process that was spawned would spawn its own.
    multiprocessing.set_start_method("fork", force=True)
    try:
        made = make(*arguments)
        connection.send((made if isinstance(made, float) else None, None))
        while asked := connection.recv():
            connection.send((getattr(made, asked[0])(*asked[1:]), None))
    except EOFError:
        return
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))


class Contender:
    """A contender's process, as the one that asks sees it; one that fails is asked no more, and says why."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        self.failure: str | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()

    def answer(self, patience_seconds: float = 600) -> Any:
        """Return what was answered; None where nothing came."""
        try:
            if not self._connection.poll(patience_seconds):
                raise TimeoutError(f"no answer in {patience_seconds} s")
            result, self.failure = self._connection.recv()
        except (EOFError, OSError) as error:
            result, self.failure = None, str(error) or "its process died"
        if self.failure:
            print(f"{self.name}: {self.failure}", file=sys.stderr)
            self.end()
        return result

    def ask(self, *asked: Any) -> Any:
        """Ask for a method's result."""
        if self.failure:
            return None
        self._connection.send(asked)
        return self.answer()

    def end(self) -> None:
        """End the process: it stops when nothing more can be asked; one that does not is killed with its workers."""
        self._connection.close()
        self._process.join(5 if self.failure is None else 0)
        if self._process.is_alive():
            own = psutil.Process(self._process.pid)
            for process in (*own.children(recursive=True), own):
                process.kill()
            self._process.join()
