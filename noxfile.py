"""What a contributor runs: lint, tests, the demonstration, the benchmarks. `nox -l` lists the sessions.

PyTorch is gigabytes, so all sessions share one environment, made once and made again when `pyproject.toml` changes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
# nox gives each session an environment of its own, so this one is made here.
nox.options.default_venv_backend = "none"
ENVIRONMENT = Path(".nox").resolve() / "cspine"
PROGRAMS = ENVIRONMENT / ("Scripts" if sys.platform == "win32" else "bin")


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Run a program of the shared environment."""
    session.run(str(PROGRAMS / program), *arguments, external=True)


def install(session: nox.Session) -> None:
    """Make the shared environment with the project and all that its sessions need, unless that has been done."""
    stamp = ENVIRONMENT / "installed"
    wanted = hashlib.sha256(Path("pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not ENVIRONMENT.exists():
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    run(session, "python", "-m", "pip", "install", "--quiet", "-e", ".[train,test,lint]")
    stamp.write_text(wanted)


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, docstrings, types, and that dependencies point one way."""
    install(session)
    run(session, "ruff", "format", "--check", ".")
    run(session, "ruff", "check", ".")
    run(session, "mypy")
    run(session, "lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    install(session)
    run(session, "pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Do the main job on a synthetic cohort: make it, prepare it, train, evaluate."""
    install(session)
    folder = Path("demo")
    raw, store, trained = (str(folder / name) for name in ("raw", "cspine.zarr", "run"))
    run(session, "cspine-data", "phantom", raw)
    run(session, "cspine-data", "prepare", raw, "--store", store, "--n4", "--axes", "012")
    run(
        session, "cspine-train", "run", "--store", store, "-o", trained,
        "--model", "linknet", "--encoder", "mobilenet_v2", "--weights", "none", "--axis", "0",
        "--context", "1", "--epochs", "5", "--schedule", "onecycle", "--learning-rate", "1e-2",
    )  # fmt: skip
    run(session, "cspine-train", "evaluate", trained, "--split", "validation", "--split", "test")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, an hour or two; `-- COHORT` adds a folder of real volumes to all that can use one."""
    install(session)
    run(session, "python", "-m", "pip", "install", "--quiet", "-e", ".[bench]")
    cohort = session.posargs[:1]
    run(session, "python", "benchmarks/streaming.py", *cohort)
    run(session, "python", "benchmarks/feeding.py")
    run(session, "python", "benchmarks/n4_resolution.py", "--converged")
    run(session, "python", "benchmarks/bias_accuracy.py", *cohort, "--peers", "--sweep")
    if cohort:
        run(session, "python", "benchmarks/prepare_cohort.py", *cohort)
    run(session, "python", "benchmarks/training_step.py")
    run(session, "python", "benchmarks/augmentation.py")
