"""Hash the source files of a cohort in parallel; unchanged files are taken from a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cspine_data.errors import Problem, describe_problem
from cspine_data.parallel.workers import Workers, side_by_side, usable_cores
from cspine_data.preparation.plan import digest_file, files_of
from cspine_data.preparation.source_digests import DigestCache, Digested
from cspine_data.sources.cases import Case


def digest_files(
    cases: Iterable[Case], store: Path, workers: int | None, scheduler: str | None, *, rehash: bool = False
) -> dict[Path, Digested | Problem]:
    """Return the digest of each file of the cases, or its problem; unchanged files are not read.

    The cache is a hidden file beside the store.
    """
    cache = DigestCache(store.with_name(f".{store.name}.digests.json"))
    paths = list(dict.fromkeys(path for case in cases for path in files_of(case)))
    found: dict[Path, Digested | Problem] = {}
    if not rehash:
        found |= {path: known for path in paths if (known := cache.find(path))}
    try:
        for path, digested in _hash([path for path in paths if path not in found], workers, scheduler):
            found[path] = digested
            if isinstance(digested, Digested):
                cache.add(path, digested)
    finally:
        cache.save()
    return found


def _hash(
    paths: Sequence[Path], workers: int | None, scheduler: str | None
) -> Iterator[tuple[Path, Digested | Problem]]:
    """Hash files in parallel, on the workers of a scheduler or in threads."""
    if scheduler is not None:

        def lost(path: Path, reason: str | Exception) -> Problem:
            return describe_problem("", reason) if isinstance(reason, Exception) else Problem("", f"{path}: {reason}")

        for finished in side_by_side(digest_file, paths, lost, Workers(scheduler=scheduler)):
            yield from finished
        return
    # Reading and hashing release the interpreter lock: threads are as fast as processes and start at once.
    pool = ThreadPoolExecutor(workers or usable_cores())
    try:
        yield from zip(paths, pool.map(digest_file, paths), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
