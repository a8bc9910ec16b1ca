"""What the documents show is run: the README's snippet, its commands' names, the example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cspine_data.cli.commands import main as data_main
from cspine_train.cli.commands import main as train_main

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_notebook_snippet_runs(phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cspine.zarr").symlink_to(phantom_store)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    (snippet,) = blocks("python")
    exec(snippet, names)  # noqa: S102
    assert names["image"].shape[0] == 1
    assert names["mask"].dtype == "uint8"


def test_every_command_in_the_readme_exists() -> None:
    used = set()
    for block in blocks("sh"):
        for line in block.splitlines():
            match = re.match(r"(cspine-data|cspine-train) (\w+)(.*?)(#|$)", line)
            if match:
                used.add(match.groups()[:2])
                command = (data_main if match[1] == "cspine-data" else train_main).commands[match[2]]
                command = getattr(command, "complete", command)
                known = {
                    option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
                }
                assert set(re.findall(r"(?<= )--?[a-z][\w-]*", match[3])) <= known
    assert len(used) == 8


def test_ci_runs_the_readmes_own_test_command() -> None:
    commands = [block.strip() for block in blocks("sh")[:2]]
    assert commands[0].endswith("nox -s demo")
    assert commands[1].endswith("nox -s tests")
    assert "'nox -s tests' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "look_at_slices.py"), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "prepared CS_01, CS_02, CS_03" in done.stdout
    assert re.search(r"\d+ labelled axial slices to train on", done.stdout)
