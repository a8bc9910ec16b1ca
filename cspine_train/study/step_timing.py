"""How long training steps take here, in a process of its own: what networks took of memory is given back with it."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from cspine_train.errors import RunError
from cspine_train.models.build import build_model
from cspine_train.run.precision import precision_of
from cspine_train.training.allocator import keep_large_blocks

# Of the time that threads could compute, what they may wait for a core. With other work there it is half of it.
_WAITING_SHARE = 0.2
# The first makes what the others find made, and whatever else the machine does makes one longer, never shorter.
_FEWEST_STEPS, _MOST_STEPS, _ENOUGH_S = 2, 4, 2.0


class Step(NamedTuple):
    """A training step: of which network, with which arithmetic, on how many slices of what size."""

    model: str
    encoder: str
    channels: int
    classes: int
    precision: str
    batch_size: int
    size_hw: tuple[int, int]

    @property
    def pixels(self) -> int:
        """How many pixels its slices have together."""
        return self.batch_size * math.prod(self.size_hw)


class StepTimer:
    """Times steps, as long as it is open.

    Parameters
    ----------
    threads : int
        Of the process that takes them.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._computing_s = self._waiting_s = 0.0

    def __enter__(self) -> StepTimer:
        """Start the process."""
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._end()

    @property
    def disturbed(self) -> bool:
        """Whether something else took the cores meanwhile: steps take up to ten times their time then."""
        return self._waiting_s > _WAITING_SHARE * (self._waiting_s + self._computing_s)

    def seconds(self, step: Step) -> float | None:
        """Return how long a step takes; None where it cannot be taken, or its process dies of it."""
        try:
            self._questions.send(step)
            taken: _Taken | None = self._questions.recv()
        except (EOFError, OSError):
            self._end()
            self._start()
            return None
        if taken is None:
            return None
        self._computing_s += taken.computing_s
        self._waiting_s += taken.waiting_s
        return taken.step_s

    def _start(self) -> None:
        # A process that was forked has PyTorch's locks, but not the threads that hold them.
        context = multiprocessing.get_context("spawn")
        self._questions, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, self._threads), daemon=True)
        self._process.start()
        # Now it alone holds that end, which closes with it.
        theirs.close()
        try:
            self._questions.recv()
        except (EOFError, OSError):
            self._end()
            raise RunError(
                "no process can be started to time steps in; free some memory, and begin a script of your own with "
                'if __name__ == "__main__"'
            ) from None

    def _end(self) -> None:
        self._questions.close()
        self._process.kill()
        self._process.join()


def _answer(questions: Connection, threads: int) -> None:
    """Time what is asked for until nobody can ask any more."""
    # At Ctrl-C the first process ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    keep_large_blocks()
    with suppress(EOFError, OSError):
        questions.send("ready")
        while True:
            questions.send(_taken(questions.recv()))


class _Taken(NamedTuple):
    step_s: float
    computing_s: float
    waiting_s: float


def _taken(step: Step) -> _Taken | None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = "bf16" in precision_of(step.precision)
    taken: list[float] = []
    try:
        built, _ = build_model(step.model, step.encoder, "none", step.channels, step.classes)
        network = built.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.zeros((step.batch_size, step.channels, *step.size_hw), device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        before = _scheduled_s()
        while len(taken) < _FEWEST_STEPS or (len(taken) < _MOST_STEPS and sum(taken) < _ENOUGH_S):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
                loss = network(images).float().mean()
            loss.backward()
            loss.item()
            taken.append(time.perf_counter() - started)
    # Whatever a layer provokes with a shape that it was not made for, and missing memory.
    except (RuntimeError, ValueError, AssertionError, MemoryError):
        return None
    computing_s, waiting_s = (after - then for after, then in zip(_scheduled_s(), before, strict=True))
    return _Taken(min(taken), computing_s, waiting_s)


def _scheduled_s() -> tuple[float, float]:
    """Return how long this process's threads have computed, and waited for a core; nothing where no system says it."""
    computed = waited = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        # It may end while it is looked at.
        with suppress(OSError, ValueError):
            computing, waiting, _ = map(int, task.read_text().split())
            computed, waited = computed + computing, waited + waiting
    return computed / 1e9, waited / 1e9
