"""Processes for tests, forked from one that has imported everything: importing PyTorch takes seconds."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([])


def start_fork_server() -> None:
    """Start the server of `FORKS` as a fork of this process, before a test starts threads here or trains."""

    patches = pytest.MonkeyPatch()

    def fork(_program: str, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
        patches.undo()
        return os.fork() or _serve(arguments[-1], descriptors)

    patches.setattr("multiprocessing.util.spawnv_passfds", fork)
    forkserver.ensure_running()


def _serve(main: str, descriptors: Sequence[int]) -> NoReturn:
    """Be the server; the pipes of pytest and xdist are no business of this process and of those that it forks."""
    try:
        atexit._clear()
        faulthandler.disable()
        logging.getLogger().handlers.clear()
        forkserver._forkserver._lock = threading.Lock()
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *descriptors}:
            try:
                os.close(descriptor)
            except OSError:  # that of the listing
                continue
        exec(main, {})  # noqa: S102
    finally:
        os._exit(0)


def forked(function: Callable[..., object], *arguments: object, output: str | Path = os.devnull) -> BaseProcess:
    """Call a function in a process that leads a session of its own; what it prints goes to a file."""
    return _forked(function, arguments, str(output), str(output))


def _forked(function: Callable[..., object], arguments: Sequence[object], output: str, errors: str) -> BaseProcess:
    process = FORKS.Process(target=_call, args=(function, arguments, output, errors))
    process.start()
    return process


def _call(function: Callable[..., object], arguments: Sequence[object], output: str, errors: str) -> None:
    os.setsid()
    # Whoever runs the tests in a shell's background has Ctrl-C ignored, and so would this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, output), (2, errors)):
        with Path(name).open("a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    # Of which processes that this one spawns would import what pytest is.
    sys.modules["__main__"] = ModuleType("__main__")
    function(*arguments)


class Command:
    """`cspine-data` or `cspine-train` in a forked process; has what `subprocess.Popen` has."""

    def __init__(
        self, program: str, *arguments: object, errors_apart: bool = False, before: Callable[[], object] | None = None,
        environment: Mapping[str, str] | None = None, name: str | None = None,
    ) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._errors = (Path(self._folder.name, name) for name in ("output", "errors"))
        if not errors_apart:
            self._errors = self._output
        for file in (self._output, self._errors):
            # It may be killed before it opens them.
            file.touch()
        given = [str(argument) for argument in arguments]
        self._process = _forked(
            command, (program, given, before, dict(environment or {}), name), str(self._output), str(self._errors)
        )
        self.pid = self._process.pid or 0

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """Wait for the end; return what was printed, and the errors if they are kept apart."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        output = self._output.read_text()
        return output, "" if self._errors == self._output else self._errors.read_text()


def preparing(raw: Path, store: Path, *options: str, in_workers: bool = False, errors_apart: bool = False) -> Command:
    """Start `cspine-data prepare`, with worker processes or without."""
    from tests.conftest import serially

    asked = ("cspine-data", "prepare", raw, "--store", store, *options)
    return Command(*asked, before=None if in_workers else serially, errors_apart=errors_apart)


def command(
    program: str,
    arguments: Sequence[str],
    before: Callable[[], object] | None = None,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
) -> None:
    """Be `cspine-data` or `cspine-train`; the latter without pictures, which take longer than a tiny network."""
    os.environ |= environment or {}
    if before:
        before()
    sys.argv = [name or str(Path(sys.executable).with_name(program)), *arguments]
    if program == "cspine-data":
        from cspine_data.cli.commands import main as data_main

        data_main(arguments)
        return
    import torch

    from cspine_train.cli.commands import main as train_main
    from tests.conftest import leave_out_pictures

    # As many in each process, or sums differ in their last bits.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patches:
        leave_out_pictures(patches)
        train_main(arguments)


def busy(seconds: float) -> tuple[float, float, str]:
    """Take some time in a worker of Dask; it is here, as where it is imports little."""
    from distributed import get_worker

    begun = time.time()
    time.sleep(seconds)
    return begun, time.time(), str(get_worker().name)
