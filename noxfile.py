"""What a contributor runs: lint, tests, the demonstration, the benchmarks. `nox -l` lists the sessions.

PyTorch is gigabytes, so all sessions share one environment. Each adds the extras that it needs, and does so again when
`pyproject.toml` changes.
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


def install(session: nox.Session, *extras: str) -> None:
    """Make the shared environment, and install the project there with those of its extras that are not there yet."""
    wanted = hashlib.sha256(Path("pyproject.toml").read_bytes()).hexdigest()
    stamps = {extra: ENVIRONMENT / f"installed-{extra}" for extra in extras}
    missing = [extra for extra, stamp in stamps.items() if not stamp.exists() or stamp.read_text() != wanted]
    if not missing:
        return
    if not ENVIRONMENT.exists():
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    run(session, "python", "-m", "pip", "install", "--quiet", "-e", f".[{','.join(missing)}]")
    for extra in missing:
        stamps[extra].write_text(wanted)


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, docstrings, types, and that dependencies point one way."""
    install(session, "train", "test", "lint")
    run(session, "ruff", "format", "--check", ".")
    run(session, "ruff", "check", ".")
    run(session, "mypy")
    run(session, "lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    install(session, "train", "test")
    run(session, "pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Do the main job on a synthetic cohort: make it, prepare it, train on its levels, evaluate."""
    install(session, "train")
    folder = Path("demo")
    raw, store, trained = (str(folder / name) for name in ("raw", "cspine.zarr", "run"))
    run(session, "cspine-data", "phantom", raw)
    run(session, "cspine-data", "prepare", raw, "--store", store, "--n4", "--axes", "012")
    run(
        session, "cspine-train", "run", "--store", store, "-o", trained,
        "--labels", "stored", "--epochs", "5", "--weights", "none", "--pixel-mm", "own", "--crop-margin-mm", "whole",
    )  # fmt: skip
    run(session, "cspine-train", "evaluate", trained, "--split", "validation", "--split", "test")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, an hour or two; `-- COHORT` adds a folder of real volumes to all that can use one."""
    install(session, "train", "bench")
    cohort = session.posargs[:1]
    run(session, "python", "benchmarks/streaming.py", *cohort)
    run(session, "python", "benchmarks/feeding.py")
    run(session, "python", "benchmarks/n4_resolution.py", "--converged")
    run(session, "python", "benchmarks/bias_accuracy.py", *cohort, "--peers", "--sweep")
    if cohort:
        run(session, "python", "benchmarks/prepare_cohort.py", *cohort)
    run(session, "python", "benchmarks/training_step.py")
    run(session, "python", "benchmarks/augmentation.py")
