"""Fixtures: small volumes made on the spot, a small phantom store, and the real MRI where it lies."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from filelock import FileLock
from hypothesis import HealthCheck, settings

from cspine_data import BiasParameters, Geometry, Preprocessing, Volume, prepare, write_volume
from cspine_data.cli.commands import main as data_main
from cspine_data.phantom.anatomy import PhantomCase, make_case
from cspine_data.phantom.cohort import make_phantom_cohort
from cspine_data.preparation.plan import Job
from cspine_train.cli.commands import main as train_main
from cspine_train.cli.waiting import stay_awake
from tests.processes import start_fork_server

# Before PyTorch is imported, as `cspine-train` does.
stay_awake()
XDIST = "PYTEST_XDIST_WORKER" in os.environ
if XDIST:
    # xdist workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples of each property test. No deadline: machines that run the tests may be busy.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.register_profile("short", UNHURRIED, max_examples=30)
settings.register_profile("long", UNHURRIED, max_examples=300)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="The long versions of the reliability tests.")


def pytest_runtestloop(session: pytest.Session) -> None:
    if session.items:
        start_fork_server()


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("--long") else "short")


@pytest.fixture(scope="session")
def long_run(request: pytest.FixtureRequest) -> bool:
    """Whether the long versions of the reliability tests were asked for."""
    return bool(request.config.getoption("--long"))


#: What a killed run leaves, and the lock.
HIDDEN = re.compile(r"(^|/)\.(unfinished-|zarr\.json-|removed-|lock$|zarr\.json\.copy$)")
QUICK_N4 = Preprocessing(bias=BiasParameters(resolution_mm=12, iterations=(5, 5)))


def geometry(
    size: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    directions: tuple[tuple[float, float, float], ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Geometry:
    return Geometry(size=size, spacing_mm=spacing, directions=directions, origin_mm=origin)


def ball(size: tuple[int, int, int] = (16, 20, 24), seed: int = 0) -> tuple[Volume, Volume]:
    """A textured ball in noisy air, and its label map with the values 1 and 3."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) for n in size]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    image = np.where(radius < 0.8, 400 + 60 * np.sin(9 * axes[0])[:, None, None], 8) + rng.normal(0, 6, size)
    label = np.where(radius < 0.4, 1, 0).astype(np.uint8)
    label[(radius >= 0.4) & (radius < 0.6)] = 3
    grid = geometry(size, (1.5, 1.0, 1.0), origin=(-10.0, 4.0, 2.5))
    return Volume(np.clip(image, 0, None).astype(np.int16), grid), Volume(label, grid)


@cache
def phantom(seed: int, number: int, spacing_mm: tuple[float, float, float] | None = None) -> PhantomCase:
    """Make a phantom once for all tests of a process; its arrays are read-only."""
    made = make_case(seed, number, spacing_mm)
    for array in (made.image_xyz, made.label_xyz, made.log_bias_xyz):
        array.setflags(write=False)
    return made


def write_case(folder: Path, name: str, seed: int | None = None, *, label: bool = True) -> Path:
    """Write a ball as a case in the naming of the reference study; balls of other names are others."""
    image, truth = ball(seed=zlib.crc32(name.encode()) if seed is None else seed)
    write_volume(folder / f"{name}.nrrd", image)
    if label:
        write_volume(folder / f"{name}S-label.nrrd", truth)
    return folder / f"{name}.nrrd"


def contents(store: Path) -> dict[str, bytes]:
    """Return what every file of a store holds, but for those that no reader looks at."""
    files = {str(file.relative_to(store)): file for file in sorted(store.rglob("*")) if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not HIDDEN.search(name)}


def in_one_line(text: str, *words: object) -> bool:
    """Whether a text is a single line that has all these words."""
    return text.count("\n") == 1 and all(str(word) in text for word in words)


class Stopped(BaseException):
    """Stands for whatever ends a process, which nobody who expects errors may catch."""


@pytest.fixture
def run_data() -> Callable[..., Result]:
    """Call `cspine-data` in this process."""

    def call(*arguments: str | Path) -> Result:
        return CliRunner().invoke(data_main, [str(argument) for argument in arguments])

    return call


def do_serially(patches: pytest.MonkeyPatch) -> None:
    """Let `prepare` do its jobs one after the other in this process: starting Dask's workers takes seconds."""

    def run_jobs(work: Callable[..., object], jobs: Sequence[Job], store: Path, *_: object) -> Iterator[list[object]]:
        for job in jobs:
            yield [(job, work(job, str(store)))]

    for module in ("jobs", "standard"):
        patches.setattr(f"cspine_data.preparation.{module}.run_jobs", run_jobs)


def serially() -> None:
    """Do the same in a process of its own, for as long as that lives."""
    do_serially(pytest.MonkeyPatch())


@pytest.fixture
def in_workers() -> None:
    """Let `prepare` start worker processes, as users do; without it, a test prepares in its own process."""


@pytest.fixture(autouse=True)
def _serially(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "in_workers" not in request.fixturenames:
        do_serially(monkeypatch)


@pytest.fixture(scope="session")
def ball_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `raw`, two balls, and `s.zarr`, made of them without N4 along all axes."""
    folder = tmp_path_factory.mktemp("balls")
    for number, name in enumerate("AB"):
        write_case(folder / "raw", name, number)
    with pytest.MonkeyPatch.context() as patches:
        do_serially(patches)
        assert prepare(folder / "raw", folder / "s.zarr", n4=False).done == ("A", "B")
    return folder


@pytest.fixture
def store(ball_cohort: Path, tmp_path: Path) -> Path:
    """A copy, to spoil, of the balls' store; their files are in `raw` beside it."""
    shutil.copytree(ball_cohort, tmp_path, dirs_exist_ok=True)
    return tmp_path / "s.zarr"


@pytest.fixture(autouse=True)
def _no_command_talks_on() -> Iterator[None]:
    """Take back where a command sends what is reported: the next test in this process may listen for silence."""
    log = logging.getLogger("cspine_train")
    before = log.handlers, log.level
    yield
    log.handlers = before[0]
    # Which also forgets what was asked of the level that it had.
    log.setLevel(before[1])


@pytest.fixture
def run_train() -> Callable[..., Result]:
    """Call `cspine-train` in this process."""
    return lambda *arguments: CliRunner().invoke(train_main, [str(argument) for argument in arguments])


def leave_out_pictures(patches: pytest.MonkeyPatch) -> None:
    """Let `train` and `evaluate` draw no pictures, which takes longer than training a tiny network."""
    places = ("training.callbacks.draw_curves", "training.pipeline.draw_curves", "training.pipeline.save_overlays")
    for place in (*places, "evaluation.scoring.Gallery.draw"):
        patches.setattr(f"cspine_train.{place}", lambda *_: ())


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        leave_out_pictures(patches)
        yield


def once_per_run(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first xdist worker to ask for it makes, for all of them."""
    base = factory.getbasetemp()
    folder = (base.parent if XDIST else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}-unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms with large voxels: few slices, so that training on them takes a second."""

    def coarse(seed: int, number: int) -> PhantomCase:
        return make_case(seed, number, tuple(1.8 * mm for mm in make_case(seed, number).spacing_mm))

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr("cspine_data.phantom.cohort.make_case", coarse)
            make_phantom_cohort(folder, cases=4, seed=3)

    return once_per_run(tmp_path_factory, "phantom", make)


@pytest.fixture(scope="session")
def phantom_store(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms in both variants, all axes."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patches:
            do_serially(patches)
            for preprocessing in (QUICK_N4, Preprocessing(bias=None)):
                assert len(prepare(phantom_folder, folder / "cspine.zarr", preprocessing=preprocessing).done) == 4

    return once_per_run(tmp_path_factory, "store", make) / "cspine.zarr"


def not_installed(what: str) -> None:
    """Skip a test for want of a program, loudly; `.ci/run` tries to install it."""
    pytest.skip(f"NOT TESTED: {what} is not installed")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real MRI; named and missing is a failure, not named and missing a loud skip."""
    named = os.environ.get("CSPINE_REALDATA")
    folder = Path(named or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "spine14").is_dir():
        if named:
            pytest.fail(f"CSPINE_REALDATA names {folder}, which holds no spine14")
        pytest.skip(f"REAL MRI IS MISSING: {folder} holds no spine14; set CSPINE_REALDATA")
    return folder


SERVER = """
import asyncio, sys
from aiohttp import web

async def main():
    app = web.Application()
    app.router.add_static("/", sys.argv[1])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Give a store out as a web server on this machine does; returns its URL."""
    with ExitStack() as servers:

        def start(store: Path) -> str:
            command = [sys.executable, "-c", SERVER, str(store.parent)]
            server = servers.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            servers.callback(server.kill)
            assert server.stdout
            return f"http://127.0.0.1:{int(server.stdout.readline())}/{store.name}"

        yield start
