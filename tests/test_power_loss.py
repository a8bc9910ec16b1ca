"""The power fails at any instant: what was published is there, whole, and the next run ends as if nothing had been.

The same for a run folder and for predicted label maps.

Every call that changes a folder or makes something durable is recorded while a store is made and changed. From the
record, the disk is rebuilt as a failure at any step may leave it: what was not synced is lost, or half of it is,
or all of it is there in another order. That is harsher than a journalling file system is.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cspine_data import StoreError, Volume, collect_garbage, prepare, remove_cases, verify, write_volume
from cspine_data.store.publishing import Refused, publish
from cspine_data.store.records import read_root
from cspine_train import RunSettings, evaluate, load_run, predict_files, train
from cspine_train.run.record import load_record
from tests.conftest import ball, contents, do_serially, write_case

Entry = bytes | dict[str, int]
Named = dict[str, dict[str, str]]


@dataclass(repr=False)
class Step:
    """The disk after one call: all that is there, what of it was synced, and what was promised by then."""

    there: dict[int, Entry]
    durable: dict[int, Entry]
    promises: int
    #: What this call synced, and its name.
    synced: int | None = None
    name: str = ""


@dataclass
class Recorder:
    disk: Path
    steps: list[Step] = field(default_factory=list)
    #: What a function that writes promised whenever it had returned: for a store what its root named.
    promised: list[Any] = field(default_factory=lambda: [{}])
    durable: dict[int, Entry] = field(default_factory=dict)
    lives: dict[int, int] = field(default_factory=dict)
    births: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    #: Each content once, however often it was read.
    contents: dict[bytes, bytes] = field(default_factory=dict)

    def after_call(self, synced: int | None = None, name: str = "") -> None:
        found: dict[int, bytes | dict[str, int]] = {}
        for folder, _, files in os.walk(self.disk):
            with os.scandir(folder) as entries:
                found[Path(folder).stat().st_ino] = {entry.name: entry.inode() for entry in entries}
            for path in (Path(folder, name) for name in files):
                content = path.read_bytes()
                found[path.stat().st_ino] = self.contents.setdefault(content, content)
        # An inode's number is given to another file once it is free; each life of it has a number of its own here.
        self.lives = {inode: self.lives.get(inode) or next(self.births) for inode in found}
        there: dict[int, Entry] = {}
        for inode, entry in found.items():
            is_file = isinstance(entry, bytes)
            there[self.lives[inode]] = entry if is_file else {name: self.lives[child] for name, child in entry.items()}
        if synced in found:
            self.durable[self.lives[synced]] = there[self.lives[synced]]
        synced = self.lives.get(synced) if synced is not None else None
        self.steps.append(Step(there, dict(self.durable), len(self.promised) - 1, synced, name))


@contextmanager
def recorded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def watched(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def watch(*arguments: object, **options: object) -> object:
            result = call(*arguments, **options)
            if name == "fsync":
                (file,) = arguments
                recorder.after_call(os.fstat(file).st_ino, Path(f"/proc/self/fd/{file}").readlink().name)
            else:
                recorder.after_call()
            return result

        return watch

    with monkeypatch.context() as patch:
        for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        yield


def forgetting(steps: list[Step], forgets: Callable[[str, bool], bool]) -> list[Step]:
    """Return the steps as if something had not been synced, of which is given the name and whether it is a file."""
    durable: dict[int, Entry] = {}
    found = []
    for step in steps:
        if step.synced is not None and not forgets(step.name, isinstance(step.there[step.synced], bytes)):
            durable[step.synced] = step.there[step.synced]
        found.append(replace(step, durable=dict(durable)))
    return found


def after_failure(step: Step, to: Path, rng: random.Random | None) -> None:
    """Rebuild the disk: with no dice only what was synced, else each entry as synced, as it was, or half of it."""

    def rebuilt(inode: int, place: Path) -> None:
        synced = step.durable.get(inode)
        now = step.there.get(inode, synced)
        if isinstance(now, bytes):
            kept = synced if isinstance(synced, bytes) else b""
            if rng and kept != now:
                kept = rng.choice((kept, now, now[: len(now) // 2], bytes(len(now))))
            place.write_bytes(kept)
            return
        names = synced if isinstance(synced, dict) else {}
        if rng:
            names = rng.choice((names, now))
        place.mkdir()
        for name, child in names.items():
            rebuilt(child, place / name)

    rebuilt(1, to)


def what_is_wrong(store: Path, step: Step, promised: list[Named]) -> str:
    if not (store / "zarr.json").exists():
        return "" if step.promises == 0 else "the store is lost"
    try:
        named, damages = read_root(store).cases, verify(store)
    except StoreError as error:
        return str(error)
    if damages:
        return str(damages[0])
    return "" if named in promised[step.promises :] else f"it names {named} after {promised[step.promises]}"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def faults(steps: list[Step], promised: list[Named], folder: Path, often: float) -> Iterator[str]:
    """Iterate over what is wrong after a failure at each step, rebuilt without dice and so many times with them."""
    rng = random.Random(3)
    for number, step in enumerate(steps):
        for dice in (None, *[rng] * (int((number + 1) * often) - int(number * often))):
            again = folder / "after"
            after_failure(step, again, dice)
            problem = what_is_wrong(again / "s.zarr", step, promised)
            shutil.rmtree(again)
            if problem:
                yield f"step {number}: {problem}"


@pytest.fixture(scope="module")
def life_of_a_store(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """Make a store, change a case, remove one and prepare it again, collect garbage; record it all."""
    folder = tmp_path_factory.mktemp("power")
    raw, recorder = folder / "raw", Recorder(folder / "disk")
    recorder.disk.mkdir()
    store = recorder.disk / "s.zarr"
    for name in "AB":
        write_case(raw, name)

    def publish_and_promise(*arguments: Any) -> Refused:
        refused = publish(*arguments)
        recorder.promised.append(read_root(store).cases)
        return refused

    with pytest.MonkeyPatch.context() as patches, recorded(recorder, patches):
        do_serially(patches)
        patches.setattr("cspine_data.preparation.jobs.publish", publish_and_promise)
        # A run killed before its folders were durable, and its digest found by the next.
        with patches.context() as killed, suppress(KeyboardInterrupt):
            killed.setattr("cspine_data.preparation.case_writer.sync_above", interrupt)
            prepare(raw, store, n4=False, axes="0")
        prepare(raw, store, n4=False, axes="0")
        write_volume(raw / "AS-label.nrrd", Volume(np.roll(ball()[1].array, 1, 0), ball()[1].geometry))
        prepare(raw, store, n4=False, axes="0")
        remove_cases(store, ["B"])
        recorder.promised.append(read_root(store).cases)
        prepare(raw, store, n4=False, axes="0")
        collect_garbage(store, grace_s=0, delete=True)
    return recorder


def test_whatever_was_promised_is_there_after_a_power_failure(
    life_of_a_store: Recorder, tmp_path: Path, long_run: bool
) -> None:
    steps = life_of_a_store.steps
    assert len(steps) > 150
    assert list(faults(steps, life_of_a_store.promised, tmp_path, 20 if long_run else 0.3)) == []


def test_the_next_run_ends_with_the_same_bytes_after_a_power_failure(
    life_of_a_store: Recorder, tmp_path: Path, long_run: bool
) -> None:
    raw, rng = life_of_a_store.disk.parent / "raw", random.Random(5)
    undisturbed = tmp_path / "undisturbed.zarr"
    prepare(raw, undisturbed, n4=False, axes="0")
    # What was collected in the end is wanted again first.
    before = tmp_path / "before"
    shutil.copytree(raw, before)
    write_case(before, "A")
    # Garbage is collected in the last steps; half of a folder may come back there.
    steps = life_of_a_store.steps
    for number, step in enumerate(steps if long_run else rng.sample(steps[:-60], 8) + steps[-60::4]):
        again = tmp_path / "after"
        after_failure(step, again, None if number % 4 == 0 else rng)
        prepare(before, again / "s.zarr", n4=False, axes="0")
        assert verify(again / "s.zarr") == []
        prepare(raw, again / "s.zarr", n4=False, axes="0")
        remove = collect_garbage(again / "s.zarr", grace_s=0, delete=True)
        assert verify(again / "s.zarr") == [], remove
        assert contents(again / "s.zarr") == contents(undisturbed)
        shutil.rmtree(again)


@pytest.mark.parametrize(
    "forgets",
    [
        lambda name, is_file: is_file,
        lambda name, is_file: not is_file,
        lambda name, is_file: name == "cases",
        lambda name, is_file: name == "A",
        lambda name, is_file: name == "s.zarr",
        lambda name, is_file: name == "disk",
        lambda name, is_file: name == "0" and is_file,
        lambda name, is_file: name == "axis0",
    ],
    ids=["files", "folders", "cases", "case", "store", "above", "shards", "axis"],
)
def test_whatever_is_not_synced_is_missed(
    forgets: Callable[[str, bool], bool], life_of_a_store: Recorder, tmp_path: Path
) -> None:
    """The tests above can fail: without one of the steps that make things durable, something is lost."""
    steps = forgetting(life_of_a_store.steps, forgets)
    assert next(faults(steps, life_of_a_store.promised, tmp_path, often=0), None)


# Run folders


@dataclass(repr=False)
class Life:
    """What was recorded of a run folder and of a folder of predictions."""

    steps: list[Step]
    #: Names of the files that were there when `train`, `evaluate` and `predict_files` had returned.
    promised: list[set[str]]
    #: Everything that each file ever held.
    contents: dict[str, set[bytes]]


def files_in(entries: dict[int, Entry], inode: int = 1, folder: str = "") -> Iterator[tuple[str, bytes]]:
    """Iterate over the files of a recorded disk that are not hidden."""
    entry = entries[inode]
    if isinstance(entry, bytes):
        yield folder, entry
        return
    for name, child in entry.items():
        if not name.startswith("."):
            yield from files_in(entries, child, f"{folder}/{name}")


@pytest.fixture(scope="module")
def life_of_a_run(
    phantom_store: Path, phantom_folder: Path, without_pictures: None, tmp_path_factory: pytest.TempPathFactory
) -> Life:
    recorder = Recorder(tmp_path_factory.mktemp("power") / "disk")
    recorder.disk.mkdir()
    run, out = recorder.disk / "run", recorder.disk / "out"
    settings = RunSettings(
        model="linknet", encoder="tu-test_resnet", weights="none", pixel_mm=12, epochs=2, precision="32", context=0
    )
    with pytest.MonkeyPatch.context() as patches, recorded(recorder, patches):

        def promise() -> None:
            recorder.promised.append({name for name, _ in files_in(recorder.steps[-1].there)})

        train(phantom_store, run, settings)
        promise()
        evaluate(run)
        promise()
        volumes = [phantom_folder / f"CS_0{number}.nrrd" for number in (1, 2)]
        for done in predict_files([load_run(run)], volumes, out):
            assert done.error is None
            promise()
    contents: dict[str, set[bytes]] = {}
    for step in recorder.steps:
        for name, content in files_in(step.there):
            contents.setdefault(name, set()).add(content)
    return Life(recorder.steps, [set(names) for names in recorder.promised], contents)


def what_is_wrong_with_a_run(disk: Path, step: Step, life: Life) -> str:
    there = {f"/{path.relative_to(disk)}": path for path in disk.rglob("*") if path.is_file()}
    there = {name: path for name, path in there.items() if "/." not in name}
    if lost := life.promised[step.promises] - set(there):
        return f"lost {lost}"
    index = there.get("/out/predictions.csv")
    for name, path in there.items():
        if path != index and path.read_bytes() not in life.contents[name]:
            return f"{name} is not whole"
        if name.endswith("-label.nrrd") and (index is None or path.name not in index.read_text()):
            return f"{name} has no row"
    record = load_record(disk / "run") if "/run/run.json" in there else None
    if record and record.kept_epoch is not None and "/run/model/model.safetensors" not in there:
        return "the record names a model that is lost"
    if record and record.finished and not life.promised[1] - {"/run/run.json"} <= set(there):
        return "the record says finished before all is there"
    return ""


def faults_of_a_run(steps: list[Step], life: Life, folder: Path, often: int) -> Iterator[str]:
    rng = random.Random(3)
    for number, step in enumerate(steps):
        for dice in (None, *[rng] * often):
            after_failure(step, folder / "after", dice)
            problem = what_is_wrong_with_a_run(folder / "after", step, life)
            shutil.rmtree(folder / "after")
            if problem:
                yield f"step {number}: {problem}"


def test_a_run_folder_keeps_its_promises_after_a_power_failure(
    life_of_a_run: Life, tmp_path: Path, long_run: bool
) -> None:
    assert len(life_of_a_run.steps) > 60
    assert {"/run/run.json", "/run/evaluation/test.json", "/out/CS_02-label.nrrd"} <= life_of_a_run.promised[-1]
    assert list(faults_of_a_run(life_of_a_run.steps, life_of_a_run, tmp_path, 20 if long_run else 1)) == []


@pytest.mark.parametrize("files", [True, False])
def test_what_a_run_folder_does_not_sync_is_missed(files: bool, life_of_a_run: Life, tmp_path: Path) -> None:
    """The test above can fail: without syncing files, or folders, something is lost."""
    steps = forgetting(life_of_a_run.steps, lambda name, is_file: is_file == files)
    assert next(faults_of_a_run(steps, life_of_a_run, tmp_path, often=0), None)
