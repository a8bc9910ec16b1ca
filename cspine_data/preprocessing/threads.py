"""Reproducible matrix products, independent of the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_lock = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit matrix products to one thread.

    The last bits of a product depend on the number of threads, which differs between workers and prediction. The limit
    applies to the process, so Python threads take turns: otherwise the first to finish would remove it for the others.
    """
    with _lock, threadpool_limits(1):
        yield
