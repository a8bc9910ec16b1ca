"""How PyTorch's threads wait for each other between the hundreds of small tasks of a training step on a CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# A thousand turns awake, then asleep. Longer, and threads slow each other down several times where another process
# needs a core; asleep at once, and a step takes half as long again. ACTIVE is for waiting as long where there are more
# threads than cores, as beside the thread that reads ahead.
_WAITING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "1000"}


def stay_awake() -> bool:
    """Let GNU's OpenMP, where PyTorch brings it, wait awake for a moment; return whether it was told.

    It is told through the environment, which it reads when PyTorch is imported. What the user has set there stays.
    Other OpenMPs would take ``ACTIVE`` for ever and are not concerned.
    """
    if os.environ.keys() & _WAITING.keys() or not _has_gnu_openmp():
        return False
    os.environ.update(_WAITING)
    return True


def _has_gnu_openmp() -> bool:
    spec = find_spec("torch")
    folders = spec.submodule_search_locations or () if spec else ()
    return any(True for folder in folders for _ in Path(folder).glob("lib/libgomp*"))
