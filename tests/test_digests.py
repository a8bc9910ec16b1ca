"""Source files are hashed side by side and once; again only when their size, times or inode have changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cspine_data import InputError, open_cohort, prepare
from cspine_data.parallel.workers import Workers
from cspine_data.preparation.case_writer import prepare_case
from cspine_data.preparation.plan import Job, plan_jobs
from cspine_data.preparation.source_digests import DigestCache, digest_files, digest_source
from cspine_data.preprocessing.parameters import Preprocessing
from cspine_data.sources.listing import find_cases
from cspine_data.store.publishing import create_store
from cspine_data.volumes.io import content_digest
from tests.conftest import write_case

RAW = Preprocessing(bias=None)
HOUR_NS = 3600 * 10**9


def age(*paths: Path) -> None:
    """Let files have been written an hour ago, all at one moment."""
    moment = time.time_ns() // 10**9 * 10**9 - HOUR_NS
    for path in paths:
        os.utime(path, ns=(moment, moment))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two cases of the same size in bytes, written at the same moment an hour ago."""
    folder = tmp_path / "raw"
    for number, name in enumerate("AB"):
        image = write_case(folder, name, number)
        image.write_bytes(image.read_bytes().ljust(1 << 17, b"\0"))
    age(*folder.iterdir())
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was hashed."""
    counts: Counter[str] = Counter()
    file_digest = hashlib.file_digest

    def counting(file: Any, *rest: Any) -> Any:
        counts[Path(file.name).name] += 1
        return file_digest(file, *rest)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return counts


def test_files_are_hashed_once_and_again_only_if_asked(raw: Path, tmp_path: Path, hashed: Counter[str]) -> None:
    every = {"A.nrrd", "B.nrrd", "AS-label.nrrd", "BS-label.nrrd"}
    for options, reused, times in (({}, 0, 1), ({}, 2, 0), ({"rehash": True}, 2, 1), ({"axes": "2"}, 2, 0)):
        hashed.clear()
        assert len(prepare(raw, tmp_path / "s.zarr", n4=False, **options).reused) == reused
        assert hashed == dict.fromkeys(every, times) if times else not hashed
    age(raw / "B.nrrd")
    prepare(raw, tmp_path / "s.zarr", n4=False)
    assert hashed == {"B.nrrd": 1}


def test_a_file_that_was_just_written_is_hashed_each_time(raw: Path, tmp_path: Path, hashed: Counter[str]) -> None:
    """It could be written once more without another time of change."""
    for seconds in (0, 3600):
        moment = time.time_ns() + seconds * 10**9
        os.utime(raw / "A.nrrd", ns=(moment, moment))
        for _ in range(2):
            hashed.clear()
            prepare(raw, tmp_path / "s.zarr", n4=False)
            assert hashed["A.nrrd"] >= 1


def test_files_of_one_size_and_age_that_change_their_names_are_noticed(raw: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    prepare(raw, store, n4=False)
    before = {case: open_cohort(store).record(case).image_sha256 for case in "AB"}
    for old, new in (("A", "C"), ("B", "A"), ("C", "B")):
        (raw / f"{old}.nrrd").rename(raw / f"{new}.nrrd")
    assert (raw / "A.nrrd").stat().st_size == (raw / "B.nrrd").stat().st_size
    assert (raw / "A.nrrd").stat().st_mtime_ns == (raw / "B.nrrd").stat().st_mtime_ns
    prepare(raw, store, n4=False)
    assert {case: open_cohort(store).record(case).image_sha256 for case in "AB"} == {
        "A": before["B"],
        "B": before["A"],
    }


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"entries": {"a": []}, "checksum": "x"}', b"\xff" * 9])
def test_a_damaged_cache_is_made_anew(content: bytes, raw: Path, tmp_path: Path, hashed: Counter[str]) -> None:
    store, cache = tmp_path / "s.zarr", tmp_path / ".s.zarr.digests.json"
    prepare(raw, store, n4=False)
    cache.write_bytes(content)
    assert prepare(raw, store, n4=False).reused == ("A", "B")
    hashed.clear()
    assert prepare(raw, store, n4=False).reused == ("A", "B")
    assert not hashed


def test_a_wrong_digest_in_the_cache_is_not_believed(raw: Path, tmp_path: Path) -> None:
    cache = tmp_path / ".s.zarr.digests.json"
    prepare(raw, tmp_path / "s.zarr", n4=False)
    digest = content_digest(raw / "A.nrrd").encode()
    cache.write_bytes(cache.read_bytes().replace(digest, digest[::-1]))
    assert prepare(raw, tmp_path / "s.zarr", n4=False).reused == ("A", "B")


def test_the_cache_names_nobody_and_lies_beside_the_store(raw: Path, tmp_path: Path) -> None:
    (raw / "A.nrrd").rename(raw / "Doe_Jane.nrrd")
    prepare(raw, tmp_path / "s.zarr", n4=False, anonymise=True)
    cache = tmp_path / ".s.zarr.digests.json"
    assert cache.stat().st_mode & 0o777 == 0o600
    assert b"Doe" not in cache.read_bytes()
    assert str(raw).encode() not in cache.read_bytes()
    assert not list((tmp_path / "s.zarr").rglob("*digests*"))


def test_a_place_that_cannot_be_written_costs_only_time(raw: Path, tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "missing" / "cache")
    cache.add(raw / "A.nrrd", digest_source(raw / "A.nrrd"))
    cache.save()
    assert DigestCache(tmp_path / "missing" / "cache").find(raw / "A.nrrd") is None


def test_two_processes_keep_what_each_other_found(raw: Path, tmp_path: Path) -> None:
    one, two = DigestCache(tmp_path / "cache"), DigestCache(tmp_path / "cache")
    for cache, name in ((one, "A"), (two, "B")):
        cache.add(raw / f"{name}.nrrd", digest_source(raw / f"{name}.nrrd"))
        cache.save()
    both = DigestCache(tmp_path / "cache")
    assert [both.find(raw / f"{name}.nrrd") for name in "AB"] == [digest_source(raw / f"{name}.nrrd") for name in "AB"]


def test_every_file_of_a_source_is_part_of_its_state(tmp_path: Path) -> None:
    """Of a folder all that lies in it; of a detached header its data file too."""
    folder = tmp_path / "series"
    folder.mkdir()
    for name in ("1", "2"):
        (folder / name).write_bytes(b"\0" * 128 + b"DICM" + name.encode())
    header = tmp_path / "x.nhdr"
    header.write_text(
        "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nspace: left-posterior-superior\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\ndata file: x.raw\n"
    )
    (tmp_path / "x.raw").write_bytes(b"12345678")
    age(header, tmp_path / "x.raw", *folder.iterdir())
    for path, part in ((folder, folder / "2"), (folder, folder / "3"), (header, tmp_path / "x.raw")):
        cache = DigestCache(tmp_path / "cache")
        cache.add(path, digest_source(path))
        cache.save()
        assert DigestCache(tmp_path / "cache").find(path) == digest_source(path)
        part.write_bytes(b"\0" * 128 + b"DICM!" if path == folder else b"87654321")
        age(part)
        assert DigestCache(tmp_path / "cache").find(path) is None


def planned(raw: Path, store: Path) -> Job:
    create_store(store)
    cases = find_cases(raw).cases
    jobs, problems = plan_jobs(cases, store, RAW, (0,), digest_files(cases, store, Workers()))
    assert not problems
    return jobs[0]


def test_what_changed_since_it_was_hashed_is_refused(raw: Path, tmp_path: Path) -> None:
    job = planned(raw, tmp_path / "s.zarr")
    other = (raw / "B.nrrd").read_bytes()
    (raw / "A.nrrd").write_bytes(other)
    age(raw / "A.nrrd")
    with pytest.raises(InputError, match="while it was read"):
        prepare_case(job, tmp_path / "s.zarr")


def test_what_was_only_touched_since_it_was_hashed_is_prepared(raw: Path, tmp_path: Path) -> None:
    job = planned(raw, tmp_path / "s.zarr")
    (raw / "A.nrrd").touch()
    assert prepare_case(job, tmp_path / "s.zarr").written_bytes > 0


def test_files_are_hashed_side_by_side(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for another one: one after the other, the first would wait in vain."""
    together, file_digest = threading.Barrier(2, timeout=20), hashlib.file_digest

    def waiting(*arguments: Any) -> Any:
        together.wait()
        return file_digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", waiting)
    found = digest_files(find_cases(raw).cases, tmp_path / "s.zarr", Workers(2))
    monkeypatch.undo()
    assert {path.name: held.sha256 for path, held in found.items()} == {
        path.name: content_digest(path) for path in raw.iterdir()
    }
