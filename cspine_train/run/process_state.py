"""State of the process that training changes and restores."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

# Loggers with their former levels, the latest last.
_quietened: list[tuple[logging.Logger, int]] = []


def quieten(*names: str) -> None:
    """Set loggers to errors only, until the innermost `restored_process_state` ends."""
    for name in names:
        logger = logging.getLogger(name)
        _quietened.append((logger, logger.level))
        logger.setLevel(logging.ERROR)


@contextmanager
def restored_process_state() -> Iterator[None]:
    """Restore the state of the process at the end, also after an error.

    The state is: environment variables, warning filters, levels of loggers (set by `quieten`), the global random
    generators, handlers of SIGINT and SIGTERM, and PyTorch's threads and deterministic algorithms. After an error it
    includes Lightning's rank, which silences loggers.
    """
    environment, first, threads = dict(os.environ), len(_quietened), torch.get_num_threads()
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking an unused GPU for its generator would allocate memory there.
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, rank = torch.backends.cudnn.benchmark, getattr(rank_zero_only, "rank", None)
    try:
        with warnings.catch_warnings():
            yield
    except BaseException:
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        raise
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        while len(_quietened) > first:
            logger, level = _quietened.pop()
            logger.setLevel(level)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                # None: the handler was not set from Python, and cannot be set from Python.
                if handler is not None:
                    signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.benchmark = benchmark
