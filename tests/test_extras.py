"""Without an optional dependency, one line says what to install."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from cspine_data import Preprocessing
from cspine_data.extras import _MODULES, install_hint
from cspine_train import RunSettings
from cspine_train.run.record import RunRecord, save_record

#: Calls each command in a process where some packages cannot be found.
BARE = """
import json, sys
from importlib.machinery import PathFinder
hidden, commands = sys.argv[1].split(","), json.loads(sys.argv[2])
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *where: None if name.partition(".")[0] in hidden else find(name, *where)
)
import cspine_train
from click.testing import CliRunner
from cspine_data.cli.commands import main as data
from cspine_train.cli.commands import main as train
found = []
for program, *arguments in commands:
    done = CliRunner().invoke({"cspine-data": data, "cspine-train": train}[program], arguments)
    kind = None if done.exception is None else type(done.exception).__name__
    found.append([done.exit_code, kind, done.stderr])
from cspine_data import open_cohort
for call in (lambda: cspine_train.train, lambda: open_cohort("http://127.0.0.1:9/s.zarr")):
    try:
        call()
    except Exception as error:
        found.append(str(error))
print(json.dumps(found))
"""


def without(modules: tuple[str, ...], commands: list[list[str]]) -> list[list[object]]:
    done = subprocess.run(
        [sys.executable, "-c", BARE, ",".join(modules), json.dumps(commands)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_optional_dependency_has_a_hint() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {normal(re.split(r"[\[<>=!~; ]", one)[0]) for one in requirements}

    modules: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(normal(distribution), set()).add(module)
    base = names(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in ("test", "bench", "lint"):
            for name in names(requirements) - base:
                assert modules[name] & set(_MODULES[extra]), name
    assert install_hint(ModuleNotFoundError("", name="upath.core")) == (
        "upath is not installed; pip install 'cspine[remote]'"
    )
    assert install_hint(ModuleNotFoundError("", name="cspine_data.nothing")) is None
    assert install_hint(ImportError("broken", name="torch")) is None


@pytest.fixture
def run(tmp_path: Path) -> str:
    record = RunRecord(
        store=str(tmp_path / "s.zarr"), settings=RunSettings(), weights_used="none", size_hw=(32, 32), versions={},
        preprocessing=Preprocessing(bias=None), train=("A",), validation=("B",), test=("C",), digests={},
    )  # fmt: skip
    save_record(tmp_path, record)
    return str(tmp_path)


def test_without_the_extra_for_training_each_command_says_what_to_install(store: Path, run: str) -> None:
    commands = [
        ["cspine-train", "run", "--store", str(store), "-o", f"{run}/new"],
        ["cspine-train", "evaluate", run],
        ["cspine-train", "predict", str(store), "--run", run, "-o", f"{run}/out"],
        ["cspine-train", "export", run, "-o", f"{run}/x.onnx"],
        ["cspine-train", "models"],
    ]
    *found, imported, _ = without(_MODULES["train"], commands)
    for command, (status, kind, told) in zip(commands, found, strict=True):
        assert (status, kind) == (1, "SystemExit"), command
        # predict says before how its run was trained.
        last = str(told).splitlines()[-1]
        assert re.fullmatch(r"Error: \w+ is not installed; pip install 'cspine\[train\]'", last), command
        assert "Traceback" not in str(told)
    assert re.fullmatch(r"\w+ is not installed; pip install 'cspine\[train\]'", str(imported))


def test_help_and_the_data_package_need_no_extra(store: Path) -> None:
    every = tuple(module for modules in _MODULES.values() for module in modules)
    commands = [
        ["cspine-train", "--help"],
        *(["cspine-train", name, "--help"] for name in ("run", "evaluate", "predict", "compare", "study", "table")),
        ["cspine-data", "info", str(store)],
        ["cspine-data", "verify", str(store)],
    ]
    *found, _, url = without(every, commands)
    assert [status for status, *_ in found] == [0] * len(found), found
    assert "pip install 'cspine[remote]'" in str(url)
