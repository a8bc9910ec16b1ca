"""SIGKILL at random moments: of the coordinator, of a worker, of all of them. Nothing half-written is ever seen."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from cspine_data import collect_garbage, open_cohort, verify
from tests.conftest import contents, write_case
from tests.processes import Command, preparing

RAW = ("--no-n4",)
N4 = ("--n4-preset", "fast", "--n4-resolution", "12", "--n4-iterations", "5,5")


#: A run that starts no workers is killed several times while another one starts them.
VICTIMS = ("alone", "alone", "coordinator", "alone", "alone", "worker", "alone", "alone", "group")


def processes(session: int) -> dict[int, str]:
    """Return the living processes of a session, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            state, *_, of_session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(of_session) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found


def workers(session: int) -> list[int]:
    return [pid for pid, command in processes(session).items() if "spawn_main" in command]


def kill(process: Command, victim: str, rng: random.Random) -> bool:
    """Kill the victim; return whether it was there to be killed."""
    if process.returncode is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        if victim == "worker":
            there = workers(process.pid)
            if not there:
                return False
            os.kill(rng.choice(there), signal.SIGKILL)
        elif victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    return True


@pytest.mark.timeout(3600)
def test_runs_killed_at_random_moments_end_with_the_undisturbed_bytes(tmp_path: Path, long_run: bool) -> None:
    rng, raw = random.Random(11), tmp_path / "raw"
    for number in range(4):
        write_case(raw, f"case{number}", label=number != 2)
    undisturbed = tmp_path / "undisturbed.zarr"
    lasted = {}
    for place, in_workers in ((tmp_path / "other.zarr", True), (undisturbed, False)):
        for options in (RAW, N4):
            begun = time.monotonic()
            assert preparing(raw, place, *options, in_workers=in_workers).communicate()
            lasted[options, in_workers] = time.monotonic() - begun
    expected = contents(undisturbed)
    wanted, kills, rounds, sessions = 500 if long_run else 15, 0, 0, []
    store = tmp_path / "store0.zarr"
    while kills < wanted:
        victim = VICTIMS[rounds % len(VICTIMS)]
        options, in_workers = rng.choice((RAW, N4)), victim != "alone"
        process = preparing(raw, store, *options, in_workers=in_workers)
        sessions.append(process.pid)
        # The last part of a run is Python's own end; there is nothing left to be killed in.
        time.sleep(rng.uniform(0, 0.85 * lasted[options, in_workers]))
        killed = kill(process, victim, rng)
        kills += killed
        rounds += 1
        if victim == "worker" or not killed:
            told, _ = process.communicate(timeout=120)
            assert process.returncode == 0, told
            assert " 0 failed" in told
        else:
            process.communicate()
        if (store / "zarr.json").exists():
            assert verify(store) == []
        if contents(store) == expected:
            store = tmp_path / f"store{rounds}.zarr"
    for options in (RAW, N4):
        told, _ = preparing(raw, store, *options).communicate(timeout=120)
        assert " 0 failed" in told
    assert contents(store) == expected
    assert open_cohort(store).variants == ("n4", "raw")
    deadline = time.monotonic() + 60
    while any(processes(session) for session in sessions):
        assert time.monotonic() < deadline, "orphans outlived the run that started them"
        time.sleep(0.1)
    collect_garbage(store, grace_s=0, delete=True)
    assert contents(store) == expected
    print(f"{kills} kills in {rounds} runs")
