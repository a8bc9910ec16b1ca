"""Hash the source files of a cohort side by side, but for those that have not changed since the last time."""

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
    """Return what each file of the cases holds; those that have not changed since the last time are not read.

    The digests are remembered in a hidden file beside the store.
    """
    cache = DigestCache(store.with_name(f".{store.name}.digests.json"))
    paths = list(dict.fromkeys(path for case in cases for path in files_of(case)))
    found: dict[Path, Digested | Problem] = {}
    if not rehash:
        found |= {path: known for path in paths if (known := cache.find(path))}
    try:
        for path, held in _digested([path for path in paths if path not in found], workers, scheduler):
            found[path] = held
            if isinstance(held, Digested):
                cache.add(path, held)
    finally:
        cache.save()
    return found


def _digested(
    paths: Sequence[Path], workers: int | None, scheduler: str | None
) -> Iterator[tuple[Path, Digested | Problem]]:
    """Hash files side by side: by the workers of a scheduler, or here."""
    if scheduler is not None:

        def lost(path: Path, reason: str | Exception) -> Problem:
            return describe_problem("", reason) if isinstance(reason, Exception) else Problem("", f"{path}: {reason}")

        for ended in side_by_side(digest_file, paths, lost, Workers(scheduler=scheduler)):
            yield from ended
        return
    # Reading and hashing need no interpreter lock: threads are as fast as processes, and start at once.
    pool = ThreadPoolExecutor(workers or usable_cores())
    try:
        yield from zip(paths, pool.map(digest_file, paths), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
