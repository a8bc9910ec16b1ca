"""What `against_peers.py` asks of each peer. It needs no other library: peers have environments of their own."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

#: Shares of the training time at which a schedule is evaluated.
TICKS = 1000


@dataclass
class Task:
    """Train on a fold for some time, and write a mask of each test case.

    Attributes
    ----------
    data : Path
        The cohort in nnU-Net's layout, with label values 0 and 1.
    fold : int
        The fold of ``splits_final.json``.
    minutes : float or None
        Training time; None for the peer's own schedule.
    spacing_mm : float
        Voxel size of the peers that resample volumes.
    work : Path
        The peer's folder, shared by all folds.
    masks : Path
        An empty folder for ``CASE.nii.gz``, each on the grid of its volume.
    options : list of str
        Further options of the peer.
    costs : dict
        Seconds by name, and ``disk_mb``.
    """

    data: Path
    fold: int
    minutes: float | None
    spacing_mm: float
    work: Path
    masks: Path
    options: list[str]
    costs: dict[str, float] = field(default_factory=lambda: {"prepare_s": 0.0})

    def cases(self, part: str) -> list[str]:
        """Return the cases of ``train`` or ``test``."""
        folds = json.loads((self.data / "splits_final.json").read_text())
        return list(folds[self.fold]["val" if part == "test" else part])

    def image(self, case: str) -> Path:
        return self.data / "imagesTr" / f"{case}_0000.nii.gz"

    def label(self, case: str) -> Path:
        return self.data / "labelsTr" / f"{case}.nii.gz"

    def mask(self, case: str) -> Path:
        return self.masks / f"{case}.nii.gz"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to the costs."""
        started = time.perf_counter()
        yield
        self.costs[name] = self.costs.get(name, 0) + time.perf_counter() - started

    def reads(self, *folders: Path) -> None:
        """Record the size of what training reads."""
        files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
        self.costs["disk_mb"] = sum(path.stat().st_size for path in files) / 1e6


class Clock:
    """The share of the training time that is over; it starts at once."""

    def __init__(self, minutes: float) -> None:
        self._started, self._seconds = time.perf_counter(), 60 * minutes

    def share(self) -> float:
        """Return the share, from 0 to 1."""
        return min(1.0, (time.perf_counter() - self._started) / self._seconds)


@contextmanager
def given_task() -> Iterator[Task]:
    """Read the task from the command line, and write its costs when the block ends."""
    parser = argparse.ArgumentParser()
    for name in ("data", "work", "masks"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--fold", type=int, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--spacing-mm", type=float, required=True)
    parser.add_argument("options", nargs="*")
    task = Task(**vars(parser.parse_args()))
    yield task
    (task.masks / "costs.json").write_text(json.dumps(task.costs))
