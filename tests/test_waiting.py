"""How PyTorch's threads are told to wait."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from cspine_train.cli import waiting

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
DISPLAYED = """
import os, sys
from cspine_train.cli.waiting import stay_awake
assert "torch" not in sys.modules
stay_awake()
assert "torch" not in sys.modules
os.execv(sys.executable, [sys.executable, "-c", "import torch"])
"""


@pytest.mark.skipif(not waiting.has_gnu_openmp(), reason="PyTorch has another OpenMP here")
def test_pytorch_reads_what_it_is_told() -> None:
    unset = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", DISPLAYED]
    done = subprocess.run(
        command, env=unset | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True
    )
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in NAMES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "7")
    waiting.stay_awake()
    assert {each: os.environ.get(each) for each in NAMES} == dict.fromkeys(NAMES) | {name: "7"}


def test_another_openmp_is_not_told_to_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # A package that brings none.
    monkeypatch.setattr(waiting, "find_spec", lambda _: importlib.util.find_spec("click"))
    waiting.stay_awake()
    assert {name: os.environ.get(name) for name in NAMES} == {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "1000"}
