"""Settings of OpenMP for the hundreds of small tasks of a training step on a CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Iterations that a thread spins before it sleeps. With more, threads slow each other down several times when another
# process needs a core; without, a step takes 50 % longer.
_TURNS = "1000"


def stay_awake() -> None:
    """Let threads of GNU's OpenMP spin for a moment before they sleep, even with more threads than cores.

    A thread that reads ahead is one more than the cores, and GNU's OpenMP then spins for a shorter time, unless the
    policy is ``ACTIVE``. Other implementations would spin forever, so that the policy is set only if PyTorch comes with
    GNU's. OpenMP reads the variables when PyTorch is imported. Variables set by the user are kept.
    """
    if os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return
    os.environ["GOMP_SPINCOUNT"] = _TURNS
    if has_gnu_openmp():
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"


def has_gnu_openmp() -> bool:
    """Return whether PyTorch comes with GNU's OpenMP, without importing PyTorch."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations or () if spec else ()
    places = [place for folder in folders for place in (Path(folder, "lib"), Path(folder).with_name("torch.libs"))]
    return any(True for place in places for _ in place.glob("libgomp*"))
