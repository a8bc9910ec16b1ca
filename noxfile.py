"""What a contributor runs: lint, tests, the demonstration, the benchmarks. `nox -l` lists the sessions.

PyTorch is gigabytes, so all sessions share one environment, made once and made again when `pyproject.toml` changes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "tests"]
ENVIRONMENT = Path(".nox") / "cspine"


def shared_environment(function):
    """Run a session in the environment that all sessions share."""
    return nox.session(venv_location=str(ENVIRONMENT), reuse_venv=True, name=function.__name__)(function)


def install(session: nox.Session) -> None:
    """Install the project and everything its sessions need, unless that has been done."""
    stamp = ENVIRONMENT / "installed"
    wanted = hashlib.sha256(Path("pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    session.install("-e", ".[train,test,lint]")
    stamp.write_text(wanted)


@shared_environment
def lint(session: nox.Session) -> None:
    """Check format, style, docstrings, types, and that dependencies point one way."""
    install(session)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("lint-imports")


@shared_environment
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    install(session)
    session.run("pytest", *session.posargs)


@shared_environment
def demo(session: nox.Session) -> None:
    """Do the main job on a synthetic cohort: make it, prepare it, train, evaluate."""
    install(session)
    folder = Path("demo")
    raw, store, run = (str(folder / name) for name in ("raw", "cspine.zarr", "run"))
    session.run("cspine-data", "phantom", raw)
    session.run("cspine-data", "prepare", raw, "--store", store, "--n4", "--axes", "012")
    session.run(
        "cspine-train", "run", "--store", store, "-o", run,
        "--model", "linknet", "--encoder", "mobilenet_v2", "--weights", "none", "--axis", "0",
        "--epochs", "5", "--schedule", "onecycle", "--learning-rate", "1e-2",
    )  # fmt: skip
    session.run("cspine-train", "evaluate", run, "--split", "validation", "--split", "test")


@shared_environment
def bench(session: nox.Session) -> None:
    """Measure; `-- FILE` adds a real volume to the N4 table."""
    install(session)
    volume = ["--volume", session.posargs[0]] if session.posargs else []
    session.run("python", "benchmarks/n4_resolution.py", *volume)
    session.run("python", "benchmarks/training_step.py")
