"""Keeping the last bits of matrix products the same whoever computes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_turn = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit matrix products to one thread.

    A product's last bits depend on the number of threads; workers have one, whoever predicts has many. The limit is the
    process's, so that Python's threads take turns: the first to leave would lift it for the others.
    """
    with _turn, threadpool_limits(1):
        yield
