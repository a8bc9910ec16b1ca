"""A disk, a quota, memory, open files or a permission that does not suffice: one line says so, and nothing hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cspine_data import InputError, Preprocessing, Volume, open_cohort, prepare, verify, write_volume
from cspine_data.errors import Problem
from cspine_data.parallel.workers import Workers
from cspine_data.preparation.jobs import run_jobs
from cspine_data.preparation.plan import Job
from cspine_data.sources.cases import Case
from cspine_data.store.records import read_root
from tests.conftest import ball, contents, in_one_line, not_installed, serially, write_case
from tests.processes import Command
from tests.test_volumes import header

#: Longer than any of these runs takes; a run that hangs is ended by it and fails the test.
PATIENCE_S = 100


def run(
    *arguments: object, within: Callable[[], object] | None = None, in_workers: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `cspine-data` as a process of its own, within limits."""
    process = Command("cspine-data", *arguments, errors_apart=True, before=partial(limited, within, in_workers))
    output, errors = process.communicate(PATIENCE_S)
    return subprocess.CompletedProcess(arguments, process.returncode or 0, output, errors)


def limited(within: Callable[[], object] | None, in_workers: bool) -> None:
    if not in_workers:
        serially()
    if within:
        within()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        os.geteuid() != 0
        or mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("A FULL DISK IS NOT TESTED: only root can mount a small one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_case(tmp_path / "raw", "small")
    image, _ = ball((40, 60, 60))
    noise = rng.integers(0, 30000, image.array.shape).astype(np.int16)
    write_volume(
        tmp_path / "raw" / "large.nrrd", Volume(np.where(image.array > 100, noise, 0).astype(np.int16), image.geometry)
    )
    store = small_disk / "s.zarr"
    done = run("prepare", tmp_path / "raw", "--store", store, "--no-n4", "--workers", "1")
    assert done.returncode == 1
    assert "space left on device" in done.stderr
    assert "1 done, 0 reused, 1 failed" in done.stdout
    assert open_cohort(store).cases == ("small",)
    assert verify(store) == []
    assert not list(store.rglob(".unfinished-*"))


@pytest.mark.parametrize("room_kb", range(4, 160, 12))
def test_a_disk_that_is_full_at_any_point(room_kb: int, small_disk: Path, tmp_path: Path) -> None:
    for name in "AB":
        write_case(tmp_path / "raw", name)
    subprocess.run(["mount", "-o", f"remount,size={room_kb}k", small_disk], check=True)
    store = small_disk / "s.zarr"
    with contextlib.suppress(OSError):
        prepare(tmp_path / "raw", store, n4=False, axes="0")
    if (store / "zarr.json").exists():
        assert verify(store) == []
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert prepare(tmp_path / "raw", store, n4=False, axes="0").failed == ()
    undisturbed = tmp_path / "undisturbed.zarr"
    prepare(tmp_path / "raw", undisturbed, n4=False, axes="0")
    # A case that found no room the first time is an added one the second time: the splits know that, nothing else.
    enrolled = {"enrolled": read_root(undisturbed).enrolled}
    assert read_root(store).model_copy(update=enrolled) == read_root(undisturbed)
    (ours, theirs) = ({k: v for k, v in contents(s).items() if k != "zarr.json"} for s in (store, undisturbed))
    assert ours == theirs


SERIALLY = """
from tests.conftest import data_main, serially
serially()
data_main()
"""


@pytest.mark.parametrize("error", ["EDQUOT", "EIO"])
def test_a_quota_and_a_broken_disk(error: str, tmp_path: Path) -> None:
    """The kernel's own answer to `fsync` is exchanged, from the eighth call on; all else is real."""
    strace = shutil.which("strace")
    if strace is None:
        not_installed("strace")
    for name in "AB":
        write_case(tmp_path / "raw", name)
    store = tmp_path / "s.zarr"
    inject = [strace, "-f", "-qq", "-o", os.devnull, "-e", "trace=fsync", "-e", f"inject=fsync:error={error}:when=8+"]
    command = [sys.executable, "-c", SERIALLY, "prepare", str(tmp_path / "raw"), "--store", str(store), "--no-n4"]
    done = subprocess.run([*inject, *command], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    told = {"EDQUOT": "Disk quota exceeded; free some space", "EIO": "Input/output error; fix this"}[error]
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"failed: {store}") for line in lines)
    assert all(line.endswith(f"{told} and run it again") for line in lines)
    assert "0 done, 0 reused, 2 failed" in done.stdout
    assert "Traceback" not in done.stderr
    assert verify(store) == []
    assert prepare(tmp_path / "raw", store, n4=False).done == ("A", "B")
    assert verify(store) == []


def wait(job: Job, store: str) -> int:
    time.sleep(PATIENCE_S)
    return 0


def test_a_cluster_without_workers_is_told_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr("cspine_data.parallel.workers._PATIENCE_S", 1)
    job = Job(Case("A", write_case(tmp_path / "raw", "A")), "0" * 64, None, Preprocessing(bias=None), (0,))
    with LocalCluster(n_workers=0, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        with (
            pytest.warns(UserWarning, match=f"scheduler {address}: has no workers yet; waiting for one"),
            pytest.raises(InputError, match=f"scheduler {address}: has no workers; start some, then run it again"),
        ):
            list(run_jobs(wait, [job], tmp_path, Workers(scheduler=address)))
        cluster.scale(1)
        while not cluster.scheduler.workers:
            time.sleep(0.1)
        threading.Timer(3, cluster.scale, (0,)).start()
        (((_, problem),),) = run_jobs(wait, [job], tmp_path, Workers(scheduler=address))
        assert isinstance(problem, Problem)
        assert "worker process is left" in problem.message


def open_files(soft: int, hard: int) -> Callable[[], None]:
    return partial(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("most", [12, 40])
def test_too_few_open_files(most: int, tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    told = ("prepare", tmp_path / "raw", "--store", tmp_path / "s.zarr", "--no-n4", "--workers", "1")
    done = run(*told, within=open_files(most, most), in_workers=True)
    assert done.returncode == 1
    assert in_one_line(done.stderr, "workers 1", f"{most} open files", "ulimit -n")
    assert run(*told, within=open_files(most, 4096), in_workers=True).returncode == 0


def test_a_worker_that_dies_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_workers: None
) -> None:
    write_case(tmp_path / "raw", "fine")
    write_case(tmp_path / "raw", "deadly")
    # A module that the worker imports first and that kills it at once, as the kernel would.
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal\n"
        "import cspine_data.preparation.jobs as p\n"
        "real = p.prepare_case\n"
        "def prepare_case(job, store):\n"
        "    if job.case.id == 'deadly':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(job, store)\n"
        "p.prepare_case = prepare_case\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")]))
    summary = prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, workers=1)
    assert summary.done == ("fine",)
    (problem,) = summary.failed
    assert problem.case == "deadly"
    assert "died (out of memory?)" in problem.message


@pytest.fixture
def cohort_with_a_giant(tmp_path: Path) -> Path:
    """Two small cases, and one that needs a gigabyte."""
    for name in "AB":
        write_case(tmp_path / "raw", name)
    size = (400, 400, 400)
    voxels = np.random.default_rng(0).integers(0, 900, size, dtype=np.int16)
    (tmp_path / "raw" / "giant.nrrd").write_bytes(header(sizes="400 400 400") + voxels.tobytes())
    return tmp_path / "raw"


def told_of_the_giant(raw: Path) -> str:
    problem = "its worker process died (out of memory?); use fewer --workers, or a machine with more memory"
    return f"{raw / 'giant.nrrd'}: {problem}"


def test_a_worker_over_dasks_limit(
    cohort_with_a_giant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_workers: None
) -> None:
    from dask.system import CPU_COUNT
    from distributed import system

    # Of which each worker, with its one thread, gets its share.
    monkeypatch.setattr(system, "MEMORY_LIMIT", CPU_COUNT * 350_000_000)
    summary = prepare(cohort_with_a_giant, tmp_path / "s.zarr", n4=False, workers=1)
    assert summary.done == ("A", "B")
    assert [problem.message for problem in summary.failed] == [told_of_the_giant(cohort_with_a_giant)]
    assert verify(tmp_path / "s.zarr") == []


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group whose processes may have half a gigabyte together."""
    group = Path("/sys/fs/cgroup/memory/cspine-test")
    limit = group / "memory.limit_in_bytes"
    if not group.parent.is_dir():
        group = Path("/sys/fs/cgroup/cspine-test")
        limit = group / "memory.max"
    try:
        group.mkdir(exist_ok=True)
        limit.write_text("600000000")
    except OSError:
        pytest.skip("A KERNEL WITHOUT MEMORY IS NOT TESTED: no control group can be made here")
    yield group
    group.rmdir()


def enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def test_a_worker_that_the_kernel_kills(cohort_with_a_giant: Path, tmp_path: Path, memory_group: Path) -> None:
    store = tmp_path / "s.zarr"
    asked = ("prepare", cohort_with_a_giant, "--store", store, "--no-n4", "--workers", "1")
    done = run(*asked, within=partial(enter, memory_group), in_workers=True)
    assert done.returncode == 1
    # Python's own tracker of semaphores may warn of those that a killed process held.
    told = [line for line in done.stderr.splitlines() if "resource_tracker" not in line and "warnings.warn" not in line]
    assert told == [f"failed: {told_of_the_giant(cohort_with_a_giant)}"]
    assert "2 done, 0 reused, 1 failed" in done.stdout
    assert verify(store) == []


def test_a_read_only_store_is_read_and_not_written(small_disk: Path, tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", small_disk / "s.zarr"
    write_case(raw, "A")
    told = ("prepare", raw, "--store", store, "--no-n4", "--axes", "0")
    assert run(*told).returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "nothing to do" in run(*told).stdout
    for command in (
        ("info", store),
        ("verify", store),
        ("gc", store),
        ("export", store, "A", "-o", tmp_path / "A.nrrd"),
    ):
        assert run(*command).returncode == 0
    write_case(raw, "B")
    done = run(*told)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr
    done = run("remove", store, "A")
    assert done.returncode == 1
    assert in_one_line(done.stderr, store / ".lock", "Read-only file system")
    done = run("prepare", raw, "--store", small_disk / "new.zarr", "--no-n4")
    assert done.returncode == 1
    assert "new.zarr: Read-only file system" in done.stderr
    assert verify(store) == []
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


def as_anybody(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `cspine-data` without what lets root pass every permission."""
    command = [sys.executable, "-c", SERIALLY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=give_up_capabilities)


def give_up_capabilities() -> None:
    if os.geteuid() == 0:
        library = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # to override permissions; to read and search in spite of them
            library.prctl(24, capability, 0, 0, 0)


def test_permissions(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in "AB":
        write_case(raw, name)
    raw.chmod(0o555)  # a source that cannot be written to is enough
    assert as_anybody("prepare", raw, "--store", store, "--no-n4").returncode == 0
    (raw / "A.nrrd").chmod(0)
    done = as_anybody("prepare", raw, "--store", store, "--no-n4", "--axes", "0")
    assert done.returncode == 1
    assert in_one_line(done.stderr, f"failed: {raw / 'A.nrrd'}", "Permission denied")
    assert "0 done, 1 reused, 1 failed" in done.stdout
    (raw / "A.nrrd").chmod(0o644)
    (store / "cases").chmod(0o555)
    raw.chmod(0o755)
    write_case(raw, "C")
    done = as_anybody("prepare", raw, "--store", store, "--no-n4")
    assert done.returncode == 1
    assert f"{store / 'cases' / 'C'}: Permission denied" in done.stderr
    (store / "cases").chmod(0o755)
    store.chmod(0)
    done = as_anybody("info", store)
    store.chmod(0o755)
    assert done.returncode == 1
    assert in_one_line(done.stderr, f"Error: {store / 'zarr.json'}", "Permission denied")
    assert verify(store) == []


def test_paths_with_spaces_and_any_letters(tmp_path: Path) -> None:
    raw, store = tmp_path / "Größe ñ 頸椎" / "raw data", tmp_path / "my störe 頸椎.zarr"
    names = ("Ärger mit Leerzeichen", "頸椎-1", "a'b\"c;d&e$(f)", "100% [x]{y}")
    for name in names:
        write_case(raw, name)
    done = run("prepare", raw, "--store", store, "--no-n4", "--axes", "0")
    assert done.returncode == 0, done.stderr
    assert open_cohort(store).cases == tuple(sorted(names))
    assert verify(store) == []
    for name in names:
        assert run("export", store, name, "-o", tmp_path / f"{name}.nii.gz").returncode == 0
    assert "nothing to do" in run("prepare", raw, "--store", store, "--no-n4", "--axes", "0").stdout
