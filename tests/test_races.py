"""Several processes at one store at once: all finish, nothing is lost, readers see whole cases only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cspine_data import StoreError, open_cohort, prepare, read_volume, remove_cases, verify
from cspine_data.store import publishing
from cspine_data.store.records import read_root
from tests.conftest import contents, write_case
from tests.processes import Command, preparing

N4 = ("--n4-resolution", "12", "--n4-iterations", "5,5")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in "ABCD":
        write_case(tmp_path / "raw", name)
    return tmp_path / "raw"


@contextmanager
def watched(store: Path, raw: Path) -> Iterator[list[int]]:
    """Read all that a store holds, over and over, while others write to it; yield how many cases each look found."""
    looks: list[int] = []
    wrong: list[object] = []
    ended = threading.Event()
    sources = {case: read_volume(raw / f"{case}.nrrd").array for case in "ABCD"}

    def look() -> None:
        while not ended.is_set():
            try:
                root = read_root(store)
            except StoreError:  # not there yet
                continue
            try:
                wrong.extend(verify(store))
                cohort = open_cohort(store)
                for case, variants in root.cases.items():
                    if "raw" in variants:
                        np.testing.assert_array_equal(cohort.export(case, "raw").array, sources[case])
                    cohort.record(case, next(iter(variants)))
            except Exception as error:  # noqa: BLE001 - whatever it is, the test must not miss it
                wrong.append(error)
            looks.append(len(root.cases))
            ended.wait(0.01)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        yield looks
    finally:
        ended.set()
        reader.join()
    assert wrong == []
    assert looks == sorted(looks)


def finished(runs: list[Command]) -> None:
    for run in runs:
        told, _ = run.communicate(timeout=200)
        assert run.returncode == 0, told
        assert ", 0 failed" in told


def test_the_same_command_many_times_at_once(raw: Path, tmp_path: Path) -> None:
    store, undisturbed = tmp_path / "s.zarr", tmp_path / "undisturbed.zarr"
    prepare(raw, undisturbed, n4=False)
    with watched(store, raw) as looks:
        finished([preparing(raw, store, "--no-n4", "--workers", "1", in_workers=number == 0) for number in range(4)])
    assert looks
    assert contents(store) == contents(undisturbed)


def test_other_variants_and_axes_at_once(raw: Path, tmp_path: Path, run_data) -> None:
    """Each run knows of its own axes only; the store ends with all of them."""
    store, undisturbed = tmp_path / "s.zarr", tmp_path / "undisturbed.zarr"
    told = (("--no-n4", "--axes", "0"), ("--no-n4", "--axes", "12"), (*N4, "--axes", "2"), (*N4, "--axes", "01"))
    with watched(store, raw):
        finished([preparing(raw, store, *options) for options in told])
    for options in (("--no-n4",), N4):
        assert run_data("prepare", raw, "--store", undisturbed, *options).exit_code == 0
    assert read_root(store) == read_root(undisturbed)
    assert contents(undisturbed).items() <= contents(store).items()


def test_other_parameters_at_once(raw: Path, tmp_path: Path) -> None:
    """One of two ways to prepare the same variant is current in the end, for each case; both runs end well."""
    store = tmp_path / "s.zarr"
    told = (("--spacing", "2"), ("--normalisation", "percentile"))
    with watched(store, raw):
        finished([preparing(raw, store, "--no-n4", *options) for options in told])
    ways = {record.preprocessing.description for record in open_cohort(store).records()}
    assert ways <= {"no N4, zscore, 2 x 2 x 2 mm", "no N4, percentile, native voxels"}
    assert open_cohort(store).cases == tuple("ABCD")
    for name in "ABCD":
        assert len([file for file in (store / "cases" / name).iterdir() if file.is_dir()]) == 2


def test_a_store_that_another_run_makes_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "s.zarr"
    store.mkdir()
    look = publishing._could_become_a_store

    def look_late(path: Path, **options: bool) -> bool:
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(publishing, "_could_become_a_store", look)
            publishing.create_store(path)
        return look(path, **options)

    monkeypatch.setattr(publishing, "_could_become_a_store", look_late)
    publishing.create_store(store)
    assert read_root(store).cases == {}


HOLD = """
import sys, time
from pathlib import Path
from cspine_data.store.publishing import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_no_lock_outlives_its_holder(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(store)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(publishing, "_PATIENCE_S", 0.2)
    told = "run has been writing"
    with pytest.raises(StoreError, match=told):
        remove_cases(store, ["A"])
    assert len(open_cohort(store).slices()) == 32
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    begun = time.monotonic()
    with publishing.locked(store):
        assert time.monotonic() - begun < 1
