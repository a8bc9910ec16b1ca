"""How PyTorch's threads wait for each other between the hundreds of small tasks of a training step on a CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Turns awake, then asleep. More, and threads slow each other down several times where another process needs a core;
# asleep at once, and a step takes half as long again.
_TURNS = "1000"


def stay_awake() -> None:
    """Let GNU's OpenMP wait awake for a moment, also where there are more threads than cores.

    There are as soon as a thread reads ahead, and few turns are then waited unless the policy is ``ACTIVE``. Others
    take that for ever, so it is set where PyTorch brings GNU's. OpenMP reads all this when PyTorch is imported. Where
    the user has set either, both stay.
    """
    if os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return
    os.environ["GOMP_SPINCOUNT"] = _TURNS
    if has_gnu_openmp():
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"


def has_gnu_openmp() -> bool:
    """Return whether PyTorch, which is not imported for it, brings GNU's OpenMP."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations or () if spec else ()
    places = [place for folder in folders for place in (Path(folder, "lib"), Path(folder).with_name("torch.libs"))]
    return any(True for place in places for _ in place.glob("libgomp*"))
