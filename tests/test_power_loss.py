"""The power fails at any instant: what was published is there, whole, and the next run ends as if nothing had been.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cspine_data import StoreError, Volume, collect_garbage, prepare, remove_cases, verify, write_volume
from cspine_data.publishing import Refused, publish
from cspine_data.store import read_root
from tests.conftest import ball, contents, write_case

Entry = bytes | dict[str, int]
Named = dict[str, dict[str, str]]


@dataclass
class Step:
    """The disk after one call: all that is there, what of it was synced, and what was promised by then."""

    there: dict[int, Entry]
    durable: dict[int, Entry]
    promises: int


@dataclass
class Recorder:
    disk: Path
    #: What is not to be synced although the code asks for it, to see that it is missed.
    forgets: Callable[[Path], bool] = lambda path: False
    steps: list[Step] = field(default_factory=list)
    #: What the root named whenever a function that publishes had returned.
    promised: list[Named] = field(default_factory=lambda: [{}])
    durable: dict[int, Entry] = field(default_factory=dict)
    lives: dict[int, int] = field(default_factory=dict)
    births: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def after_call(self, synced: int | None = None) -> None:
        found: dict[int, bytes | dict[str, int]] = {}
        for folder, _, files in os.walk(self.disk):
            with os.scandir(folder) as entries:
                found[Path(folder).stat().st_ino] = {entry.name: entry.inode() for entry in entries}
            found |= {path.stat().st_ino: path.read_bytes() for path in (Path(folder, name) for name in files)}
        # An inode's number is given to another file once it is free; each life of it has a number of its own here.
        self.lives = {inode: self.lives.get(inode) or next(self.births) for inode in found}
        there: dict[int, Entry] = {}
        for inode, entry in found.items():
            is_file = isinstance(entry, bytes)
            there[self.lives[inode]] = entry if is_file else {name: self.lives[child] for name, child in entry.items()}
        if synced in found:
            self.durable[self.lives[synced]] = there[self.lives[synced]]
        self.steps.append(Step(there, dict(self.durable), len(self.promised) - 1))

    def promise(self, store: Path) -> None:
        self.promised.append(read_root(store).cases)


@contextmanager
def recorded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def watched(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def watch(*arguments: object, **options: object) -> object:
            result = call(*arguments, **options)
            synced = arguments[0] if name == "fsync" else None
            if synced is not None and recorder.forgets(Path(f"/proc/self/fd/{synced}").readlink()):
                synced = None
            recorder.after_call(None if synced is None else os.fstat(synced).st_ino)
            return result

        return watch

    with monkeypatch.context() as patch:
        for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        yield


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


def faults(recorder: Recorder, folder: Path, often: int) -> Iterator[str]:
    rng = random.Random(3)
    for number, step in enumerate(recorder.steps):
        for dice in (None, *[rng] * often):
            again = folder / "after"
            after_failure(step, again, dice)
            problem = what_is_wrong(again / "s.zarr", step, recorder.promised)
            shutil.rmtree(again)
            if problem:
                yield f"step {number}: {problem}"


@pytest.fixture
def life_of_a_store(tmp_path: Path, serially: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    """Make a store, change a case, remove one and prepare it again, collect garbage; record it all."""

    def live(forgets: Callable[[Path], bool] = lambda path: False) -> Recorder:
        raw, recorder = tmp_path / "raw", Recorder(tmp_path / "disk", forgets)
        recorder.disk.mkdir()
        store = recorder.disk / "s.zarr"
        for name in "AB":
            write_case(raw, name)

        def publish_and_promise(*arguments: Any) -> Refused:
            refused = publish(*arguments)
            recorder.promise(store)
            return refused

        with recorded(recorder, monkeypatch), monkeypatch.context() as patch:
            patch.setattr("cspine_data.pipeline.publish", publish_and_promise)
            # A run killed before its folders were durable, and its digest found by the next.
            with monkeypatch.context() as killed, suppress(KeyboardInterrupt):
                killed.setattr("cspine_data.making.sync_above", interrupt)
                prepare(raw, store, n4=False, axes="0")
            prepare(raw, store, n4=False, axes="0")
            write_volume(raw / "AS-label.nrrd", Volume(np.roll(ball()[1].array, 1, 0), ball()[1].geometry))
            prepare(raw, store, n4=False, axes="0")
            remove_cases(store, ["B"])
            recorder.promise(store)
            prepare(raw, store, n4=False, axes="0")
            collect_garbage(store, grace_s=0, delete=True)
        return recorder

    return live


def test_whatever_was_promised_is_there_after_a_power_failure(
    life_of_a_store: Callable[..., Recorder], tmp_path: Path, long_run: bool
) -> None:
    recorder = life_of_a_store()
    assert len(recorder.steps) > 150
    often = 20 if long_run else 1
    assert list(faults(recorder, tmp_path, often)) == []
    print(f"{len(recorder.steps)} steps, {len(recorder.steps) * (1 + often)} failures")


def test_the_next_run_ends_with_the_same_bytes_after_a_power_failure(
    life_of_a_store: Callable[..., Recorder], tmp_path: Path, long_run: bool
) -> None:
    recorder, rng = life_of_a_store(), random.Random(5)
    undisturbed = tmp_path / "undisturbed.zarr"
    prepare(tmp_path / "raw", undisturbed, n4=False, axes="0")
    # What was collected in the end is wanted again first.
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "raw", before)
    write_case(before, "A")
    # Garbage is collected in the last steps; half of a folder may come back there.
    steps = recorder.steps if long_run else rng.sample(recorder.steps[:-60], 15) + recorder.steps[-60::2]
    for number, step in enumerate(steps):
        again = tmp_path / "after"
        after_failure(step, again, None if number % 4 == 0 else rng)
        prepare(before, again / "s.zarr", n4=False, axes="0")
        assert verify(again / "s.zarr") == []
        prepare(tmp_path / "raw", again / "s.zarr", n4=False, axes="0")
        remove = collect_garbage(again / "s.zarr", grace_s=0, delete=True)
        assert verify(again / "s.zarr") == [], remove
        assert contents(again / "s.zarr") == contents(undisturbed)
        shutil.rmtree(again)


@pytest.mark.parametrize(
    "forgets",
    [
        Path.is_file,
        Path.is_dir,
        lambda path: path.name == "cases",
        lambda path: path.name == "A",
        lambda path: path.name == "s.zarr",
        lambda path: path.name == "disk",
        lambda path: path.name == "0" and path.is_file(),
        lambda path: path.name == "axis0",
    ],
)
def test_whatever_is_not_synced_is_missed(
    forgets: Callable[[Path], bool], life_of_a_store: Callable[..., Recorder], tmp_path: Path
) -> None:
    """The tests above can fail: without one of the steps that make things durable, something is lost."""
    assert next(faults(life_of_a_store(forgets), tmp_path, often=0), None)
