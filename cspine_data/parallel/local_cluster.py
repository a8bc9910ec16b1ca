"""A Dask cluster of local processes that only this user's process can connect to."""

from __future__ import annotations

from typing import Any

from distributed import Nanny, Scheduler, SpecCluster, Worker
from distributed.security import Security
from distributed.system import MEMORY_LIMIT


class _NoWebServer:
    # Dask's web server accepts any client and cannot be disabled by an option.
    def start_http_server(self, *_: Any, **__: Any) -> None:
        pass


class QuietScheduler(_NoWebServer, Scheduler):
    """A scheduler without a web server."""


class QuietWorker(_NoWebServer, Worker):
    """A worker without a web server."""


def local_cluster(workers: int) -> Any:
    """Start worker processes with one thread each; each may use an equal share of the machine's memory.

    They listen on loopback and require TLS with a certificate made for this cluster. Its key is passed to the
    processes through pipes, so that other users cannot read it.
    """
    security = Security.temporary()
    options = {"host": "127.0.0.1", "protocol": "tls://", "security": security}
    worker = options | {
        "nthreads": 1, "memory_limit": MEMORY_LIMIT // workers, "worker_class": QuietWorker, "silence_logs": 50,
    }  # fmt: skip
    return SpecCluster(
        scheduler={"cls": QuietScheduler, "options": options},
        workers={number: {"cls": Nanny, "options": worker} for number in range(workers)},
        security=security,
        silence_logs=50,
    )
