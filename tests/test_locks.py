"""One process at a time writes to a run folder, and none that was killed keeps others out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from click.testing import Result

from cspine_data import Preprocessing
from cspine_data.tools import atomic_write, exclusive_lock
from cspine_train import RunError
from cspine_train.run.folder import only_writer, write_text
from cspine_train.run.record import RunRecord, load_record, save_record
from cspine_train.run.settings import RunSettings
from cspine_train.training.pipeline import _begin
from tests.processes import Command

HOLD = """
import os, sys, time
from pathlib import Path
from cspine_train.run.folder import only_writer
with only_writer(Path(sys.argv[1])):
    # As PyTorch's loaders do, which live on for a while when their process is killed.
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""
SAVE = """
import sys
from pathlib import Path
from cspine_train.run.folder import write_text
print("ready", flush=True)
sys.stdin.read()
for number in range(300):
    write_text(Path(sys.argv[1], "run.json"), str(number) * 5000)
"""
TRAIN = (
    "--encoder", "tu-test_resnet", "--weights", "none", "--model", "linknet", "--pixel-mm", "12", "--variant", "raw",
    "--precision", "32",
)  # fmt: skip


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold a folder's lock in a process that has forked another."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()


def test_no_lock_outlives_its_holder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with (
            pytest.raises(RunError, match="being trained or evaluated"),
            only_writer(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        began = time.monotonic()
        with only_writer(tmp_path, patience_s=5):
            assert time.monotonic() - began < 1


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        Thread(target=lambda: (time.sleep(0.3), process.kill())).start()
        began = time.monotonic()
        with only_writer(tmp_path, patience_s=60):
            assert 0.2 < time.monotonic() - began < 30


def test_a_thread_may_take_its_lock_again_and_another_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's cell holds the lock of the run that it trains and evaluates."""
    folder, found = tmp_path / "run", []
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)

    def other() -> None:
        try:
            exclusive_lock(folder / ".lock")
        except TimeoutError as error:
            found.append(error)

    with only_writer(folder):
        with only_writer(Path("run")), only_writer(tmp_path / "link"):
            pass
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "model" / ".writing-1").mkdir(parents=True)
    for name in (".writing-2.json", "model/.writing-1/config.json", "model/config.json", "evaluation.csv"):
        (tmp_path / name).write_text("{}")
    with only_writer(tmp_path):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".lock", "model", "model/config.json", "evaluation.csv"}


def test_what_others_write_in_a_run_folder_stays(tmp_path: Path) -> None:
    """`predict -o RUN/masks` holds another lock, and a link leads to another folder."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "masks").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / ".writing-1").touch()
    (run / "evaluation").symlink_to(elsewhere)
    with atomic_write(run / "masks" / "A.nrrd") as temporary, only_writer(run):
        assert temporary.exists()
    assert (elsewhere / ".writing-1").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((RunError, OSError)), only_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_record_is_read_while_another_process_writes(tmp_path: Path) -> None:
    record = RunRecord(
        store="s", settings=RunSettings(), weights_used="none", size_hw=(32, 32), versions={}, train=("A",),
        validation=("B",), test=("C",), digests={}, preprocessing=Preprocessing(bias=None),
    )  # fmt: skip
    save_record(tmp_path, record)
    done = Event()

    def write() -> None:
        while not done.is_set():
            write_text(tmp_path / "metrics.csv", "x")

    writer = Thread(target=write)
    writer.start()
    try:
        assert all(load_record(tmp_path) == record for _ in range(2000))
    finally:
        done.set()
        writer.join()


def test_processes_that_save_the_same_file_at_once_do_not_meet(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVE, str(tmp_path)]
    pipe = subprocess.PIPE
    savers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    for saver in savers:
        assert saver.stdout
        assert saver.stdout.readline() == "ready\n"
    for saver in savers:
        assert saver.stdin
        saver.stdin.close()
        saver.stdin = None
    assert [saver.communicate()[1] for saver in savers] == [""] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "299" * 5000


def test_a_second_command_on_a_run_ends_in_one_line(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    run = tmp_path / "run"
    asked = ("run", "--store", phantom_store, *TRAIN, "--epochs", "2000", "--schedule", "onecycle", "-o", run)
    first = Command("cspine-train", *asked)
    deadline = time.monotonic() + 120
    while not (run / "model" / "model.safetensors").exists() and time.monotonic() < deadline:
        assert first.is_alive()
        time.sleep(0.05)
    for command in (asked, ("evaluate", run)):
        second = run_train(*command)
        assert second.exit_code == 1
        assert second.stderr.startswith(f"Error: {run}: is being trained or evaluated by another process")
        assert second.stderr.count("\n") == 1
    assert first.is_alive()
    first.kill()
    first.communicate()
    with only_writer(run):
        record = load_record(run)
    with pytest.raises(RunError, match="begun it meanwhile"):
        _begin(run, record, None, ExitStack())
