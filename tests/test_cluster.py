"""Worker processes answer nobody but the process that started them; a scheduler of one's own may ask for TLS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import get_client
from distributed.security import Security

from cspine_data import InputError, open_cohort
from cspine_data.tools import Workers, side_by_side
from tests.conftest import write_case

# Connects to every port in three ways: Dask's protocol in the clear, with TLS and a certificate of its own, and HTTP.
UNINVITED = """
import asyncio, json, os, sys
from distributed.core import connect
from distributed import get_client
from distributed.security import Security

async def by_dask(address, **security):
    try:
        comm = await connect(address, timeout=3, **security)
        await comm.write({"op": "identity", "reply": True})
        return str(await asyncio.wait_for(comm.read(), 3))
    except Exception:
        return ""

async def by_http(port):
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /sitemap.json HTTP/1.0\\r\\n\\r\\n")
        return (await asyncio.wait_for(reader.read(), 3)).decode(errors="replace")
    except Exception:
        return ""

async def main():
    mine = Security.temporary().get_connection_args("client")
    ports = list(map(int, sys.argv[1:]))
    tries = {}
    for port in ports:
        tries[asyncio.ensure_future(by_dask(f"tcp://127.0.0.1:{port}"))] = port
        tries[asyncio.ensure_future(by_dask(f"tls://127.0.0.1:{port}", **mine))] = port
        tries[asyncio.ensure_future(by_http(port))] = port
    # Dask waits for ever where something else than Dask listens.
    ended, _ = await asyncio.wait(tries, timeout=8)
    answers = [[tries[one], one.result()] for one in ended if one.result()]
    print(json.dumps({"user": os.getuid(), "answers": answers}), flush=True)
    os._exit(0)

asyncio.run(main())
"""


def listening() -> dict[int, str]:
    """Return the TCP ports that this process and those it started listen on, each with its address."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in processes for socket in process.net_connections("inet")]
    return {one.laddr.port: one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}


def when_there(path: Path | None) -> bool:
    """Wait, in a worker, until a file is there."""
    while path is not None and not path.exists():
        time.sleep(0.02)
    return True


def uninvited() -> list[str]:
    """Return the command of a client that was not invited: as another user, where this one may become another."""
    command = [sys.executable, "-c", UNINVITED]
    if os.geteuid() == 0 and (setpriv := shutil.which("setpriv")):
        return [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    return command


def test_local_workers_answer_no_uninvited_client(tmp_path: Path) -> None:
    before, release = set(listening()), tmp_path / "release"
    results = side_by_side(when_there, [None, release], lambda _, why: why, Workers(2))
    assert [outcome for _, outcome in next(batch for batch in results if batch)] == [True]
    ports = {port: address for port, address in listening().items() if port not in before}
    command = [*uninvited(), *map(str, ports)]
    client = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd="/")
    release.touch()
    assert [outcome for batch in results for _, outcome in batch] == [True]
    told = json.loads(client.stdout)
    assert told["user"] != 0 or os.geteuid() != 0
    assert told["answers"] == []
    assert set(ports.values()) == {"127.0.0.1"}
    # The scheduler, two workers and what watches them; no web server.
    assert len(ports) == 5


@pytest.fixture(scope="module")
def tls_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A scheduler and a worker that a user started with TLS: its address, and the settings that let a client in."""
    folder = tmp_path_factory.mktemp("tls")
    made, files = Security.temporary(), {}
    for name, text in (("ca", made.tls_ca_file), ("key", made.tls_client_key)):
        files[name] = folder / f"{name}.pem"
        files[name].write_text(text)
    settings = {"CA_FILE": "ca"} | {
        f"{role}__{what}": file
        for role in ("CLIENT", "SCHEDULER", "WORKER")
        for what, file in (("KEY", "key"), ("CERT", "ca"))
    }
    environment = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(files[file]) for name, file in settings.items()}
    place = folder / "scheduler.json"
    common = ["--scheduler-file", str(place), "--protocol", "tls", "--host", "127.0.0.1", "--no-dashboard"]
    # Dask's HTTP server has a port of its own, which another test may have.
    scheduler = ["scheduler", *common, "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    worker = ["worker", *common, "--nthreads", "1", "--local-directory", str(folder)]
    with ExitStack() as processes:
        for command in (scheduler, worker):
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command], env=os.environ | environment, stderr=subprocess.DEVNULL
            )
            processes.enter_context(process)
            processes.callback(process.terminate)
            while not place.exists():
                assert process.poll() is None
                time.sleep(0.1)
        yield json.loads(place.read_text())["address"], environment


def configured(environment: dict[str, str]) -> Any:
    """Configure Dask in this process as variables of its environment would."""
    return dask.config.set(
        {name.removeprefix("DASK_").lower().replace("__", "."): value for name, value in environment.items()}
    )


def ask_the_scheduler(_: object) -> int:
    """Do in a worker what a cell of a study does there: ask the scheduler for its workers."""
    return len(get_client().scheduler_info()["workers"])


def test_a_scheduler_with_tls_prepares(tls_cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = tls_cluster
    assert address.startswith("tls://127.0.0.1:")
    write_case(tmp_path / "raw", "A")
    command = [sys.executable, "-m", "cspine_data", "prepare", tmp_path / "raw", "--store", tmp_path / "s.zarr"]
    command += ["--no-n4", "--scheduler", address]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    assert open_cohort(tmp_path / "s.zarr").cases == ("A",)
    with configured(environment):
        batches = side_by_side(ask_the_scheduler, [None], lambda _, why: why, Workers(scheduler=address))
        assert [outcome for batch in batches for _, outcome in batch] == [1]


def test_a_scheduler_with_tls_refuses_who_has_no_certificate_of_its_own(
    tls_cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = tls_cluster
    unencrypted = address.replace("tls", "tcp")
    others = Security.temporary()
    for name, text in (("ca", others.tls_ca_file), ("key", others.tls_client_key)):
        (tmp_path / name).write_text(text)
    wrong = {name: str(tmp_path / ("key" if name.endswith("KEY") else "ca")) for name in environment}
    missing = dict.fromkeys(environment, str(tmp_path / "none.pem"))
    for scheduler, given, told in (
        (address, {}, "no certificate is configured"),
        (address, wrong, "certificate does not match"),
        (address, missing, "No such file"),
        (unencrypted, environment, "cannot be reached"),
        (unencrypted, {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}, "requires encryption"),
        ("no-port", {}, "missing port number"),
    ):
        work = side_by_side(ask_the_scheduler, [None], lambda _, why: why, Workers(scheduler=scheduler))
        with configured(given), pytest.raises(InputError, match=told) as caught:
            list(work)
        assert str(caught.value).startswith(f"scheduler {scheduler}: ")
        assert "DASK_DISTRIBUTED__COMM__TLS" in str(caught.value)
