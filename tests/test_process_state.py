"""A function that is called from Python leaves its caller's process as it found it."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from lightning.pytorch.utilities import rank_zero_only

from cspine_data import open_cohort, prepare, read_volume
from cspine_train import Machines, RunError, RunSettings, compare, evaluate, load_run, predict_volume, train
from cspine_train.prediction.onnx import export_onnx
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.conftest import write_case
from tests.test_training import SMALL

pytestmark = pytest.mark.usefixtures("without_pictures")
SETTINGS = RunSettings(**{**SMALL, "epochs": 1, "pixel_mm": 12.0})


def hashable(state: Any) -> str:
    return repr([part.tobytes() if isinstance(part, np.ndarray) else part for part in state])


def process_state() -> dict[str, Any]:
    """What of this process others can see, by name."""
    # Dask gives loggers handlers of its own.
    loggers = {name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    state: dict[str, Any] = {
        f"logger {name}": (
            one.level,
            one.disabled,
            one.propagate,
            tuple(one.handlers) * (not name.startswith("distributed.")),
        )
        for name, one in loggers.items()
    }
    state |= {f"variable {name}": value for name, value in os.environ.items()}
    state |= {f"handler of signal {number}": signal.getsignal(number) for number in signal.valid_signals()}
    state |= {f"torch.backends.cudnn.{name}": getattr(torch.backends.cudnn, name) for name in (
        "enabled", "benchmark", "deterministic", "allow_tf32",
    )}  # fmt: skip
    limits = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_NPROC)
    return state | {
        "root logger": (logging.root.level, tuple(logging.root.handlers), logging.root.manager.disable),
        "warning filters": tuple(warnings.filters),
        "showwarning": warnings.showwarning,
        "random": hashable(random.getstate()),
        "numpy.random": hashable(np.random.get_state()),
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "Lightning's rank": getattr(rank_zero_only, "rank", None),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "only warned of": torch.is_deterministic_algorithms_warn_only_enabled(),
        "uninitialised memory": torch.utils.deterministic.fill_uninitialized_memory,
        "float32 products": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "default dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "start method": multiprocessing.get_start_method(allow_none=True),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "folder": Path.cwd(),
        "path": tuple(sys.path),
        "limits": [resource.getrlimit(limit) for limit in limits],
        "signals blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "back end of figures": "matplotlib.pyplot" in sys.modules,
    }


@contextmanager
def unchanged(but: frozenset[str] = frozenset()) -> Iterator[None]:
    """Fail where what is done within changes this process; what is imported for the first time may add loggers."""
    # Whatever they are, they are no seeds of ours.
    random.seed(77)
    np.random.seed(78)
    torch.manual_seed(79)
    for number, name in enumerate(("lightning.pytorch", "lightning.fabric", "cspine_train", "torch.onnx")):
        logging.getLogger(name).setLevel(logging.INFO + number)
    before = process_state()
    yield
    after = process_state()
    changed = {name: (value, after.get(name)) for name, value in before.items() if after.get(name) != value}
    changed = {name: both for name, both in changed.items() if name not in but}
    assert changed == {}
    added = {name: value for name, value in after.items() if name not in before}
    assert [name for name in added if not name.startswith("logger ")] == []


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory, without_pictures: None) -> Path:
    """A run that is trained and evaluated: all is imported by then."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(phantom_store, folder, SETTINGS)
    evaluate(folder)
    return folder


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_that_ends_changes_nothing(deterministic: bool, run: Path, phantom_store: Path, tmp_path: Path) -> None:
    with unchanged():
        record = train(phantom_store, tmp_path / "run", SETTINGS, machines=Machines(deterministic=deterministic))
    assert record.finished


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_or_is_interrupted_changes_nothing(
    error: type[BaseException], run: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SliceSegmenter, *_: Any) -> None:
        # What a run has changed by then.
        assert os.environ["PL_GLOBAL_SEED"] == "0"
        assert torch.are_deterministic_algorithms_enabled()
        raise error

    monkeypatch.setattr(SliceSegmenter, "training_step", broken)
    with unchanged(), pytest.raises(error):
        train(phantom_store, tmp_path / "run", SETTINGS, machines=Machines(deterministic=True))


def test_a_command_that_is_interrupted_says_that_it_can_go_on(
    run: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_train: Callable[..., Result]
) -> None:
    def interrupted(self: SliceSegmenter, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SliceSegmenter, "training_step", interrupted)
    with warnings.catch_warnings():
        told = run_train(
            "run", "--store", phantom_store, "--encoder", SMALL["encoder"], "--weights", "none", "--pixel-mm", "12",
            "-o", tmp_path / "run",
        )  # fmt: skip
    assert told.exit_code == 1
    assert f"{tmp_path / 'run'}: interrupted" in told.output.splitlines()[-1]


def test_a_run_that_is_refused_changes_nothing(
    run: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before its first step, and as the second of two nodes, which tells nothing."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NODE_RANK", "1")
    other = SETTINGS.model_copy(update={"seed": 5})
    for folder, settings, machines in (
        (run, other, Machines(deterministic=True)),
        (tmp_path / "run", SETTINGS, Machines(nodes=2, deterministic=True)),
    ):
        with unchanged(), pytest.raises(RunError):
            train(phantom_store, folder, settings, machines=machines)


def test_what_the_caller_had_set_stays(
    run: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(), unchanged():
            train(phantom_store, tmp_path / "run", SETTINGS, machines=Machines(deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
        signal.signal(signal.SIGTERM, before)


def test_no_memory_setting_that_cannot_be_taken_back_is_made(
    run: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ctypes.CDLL

    def library(name: str | None, *arguments: Any, **options: Any) -> Any:
        found = opened(name, *arguments, **options)
        # Free memory may be given back; settings of the C library (`mallopt`) may not be made.
        return SimpleNamespace(malloc_trim=found.malloc_trim) if name is None else found

    monkeypatch.setattr(ctypes, "CDLL", library)
    train(phantom_store, tmp_path / "run", SETTINGS)


def test_other_modules_warnings_are_not_hidden_while_a_run_trains(
    run: Path, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's module whose name begins as Lightning's does."""
    step = SliceSegmenter.training_step

    def warning(self: SliceSegmenter, batch: Any, number: int) -> torch.Tensor:
        warnings.warn_explicit("mine", FutureWarning, "lightning_tools.py", 1, module="lightning_tools", registry={})
        return step(self, batch, number)

    monkeypatch.setattr(SliceSegmenter, "training_step", warning)
    with pytest.warns(FutureWarning, match="mine"):
        train(phantom_store, tmp_path / "run", SETTINGS)


def test_using_a_run_changes_nothing(run: Path, phantom_folder: Path, phantom_store: Path, tmp_path: Path) -> None:
    source = read_volume(phantom_folder / "CS_04.nrrd")
    other = shutil.copytree(run, tmp_path / "other")
    # That one is set up when PyTorch's compiler is first imported.
    with unchanged(but=frozenset({"logger torch.__trace"})):
        predict_volume([load_run(run)], source)
        evaluate(run, ("validation", "test"))
        compare([run, other])
        export_onnx(load_run(run), tmp_path / "run.onnx")
        assert len(open_cohort(phantom_store).slices(axis=0, variant="n4")) > 0


def test_preparing_changes_nothing(tmp_path: Path, in_workers: None) -> None:
    """Worker processes included, where more open files have to be allowed."""
    write_case(tmp_path / "raw", "A")
    prepare(tmp_path / "raw", tmp_path / "first.zarr", n4=False, workers=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        # Dask draws from it, for names and for times between its heartbeats.
        with unchanged(but=frozenset({"random"})):
            prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
