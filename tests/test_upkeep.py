"""What months do to a store: flipped bytes, lost files, replaced and removed cases, and how each is mended."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cspine_data import (
    DamagedStoreError,
    NotInStoreError,
    Preprocessing,
    StoreError,
    collect_garbage,
    open_cohort,
    prepare,
    remove_cases,
    repair,
    verify,
)
from cspine_data.datasets import slice_reader as reader
from cspine_data.preparation.jobs import do_jobs
from cspine_data.store import schema
from cspine_data.store.publishing import Replacement, publish
from cspine_data.store.records import read_root
from tests.conftest import QUICK_N4, contents, in_one_line, write_case


def everything(store: Path) -> list[Any]:
    """Return every number that a user who comes anew can read from a store."""
    reader._open_arrays._arrays.clear()
    cohort = open_cohort(store)
    found: list[Any] = [cohort.cases, cohort.split(), cohort.notes]
    for variant in cohort.variants:
        for axis in range(3):
            slices = cohort.slices(axis=axis, variant=variant, labels="stored")
            found += [part for item in range(len(slices)) for part in slices[item]]
        volumes = cohort.volumes(variant=variant, labels="stored")
        found += [part for item in range(len(volumes)) for part in volumes[item]]
        for case in cohort.cases:
            found += [cohort.export(case, variant).array, cohort.export(case, variant, label=True).array]
            found += [cohort.export(case, variant).geometry]
    return found


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def told_by_verify(store: Path) -> list[str]:
    try:
        return [str(damage) for damage in verify(store)]
    except StoreError as error:
        return [str(error)]


def flip(file: Path, rng: random.Random) -> bytes:
    """Change one byte of a file; return what it held."""
    before = file.read_bytes()
    spot = rng.randrange(len(before))
    file.write_bytes(before[:spot] + bytes([before[spot] ^ rng.randrange(1, 256)]) + before[spot + 1 :])
    return before


def test_a_flipped_byte_anywhere_is_found_and_never_read(store: Path, long_run: bool) -> None:
    rng = random.Random(7)
    expected, flips = everything(store), 0
    for file in sorted(file for file in store.rglob("*") if file.is_file() and file.name != ".lock"):
        parts = file.relative_to(store).parts
        for _ in range(100 if long_run else 9 if file.name == "zarr.json" else 3):
            before = flip(file, rng)
            flips += 1
            (told,) = told_by_verify(store)
            if len(parts) > 4:
                assert told == f"{parts[1]} (raw): {'/'.join(parts[3:])}: is not what was written"
            elif len(parts) == 4:
                assert told.startswith(f"{parts[1]} (raw): record: ")
            else:
                assert "/".join(parts) in told or "no cspine store" in told
            try:
                found = everything(store)
            except StoreError:
                continue
            finally:
                file.write_bytes(before)
            assert same(found, expected), (file, before)
    assert flips >= 3 * 50
    print(f"{flips} flips")
    assert verify(store) == []


def one(store: Path, pattern: str) -> Path:
    (found,) = (store / "cases").glob(pattern)
    return found


def lose_a_shard(store: Path) -> None:
    one(store, "A/*/axis2/label/c/0/0/0").unlink()


def lose_a_record(store: Path) -> None:
    one(store, "A/*/zarr.json").write_text("{}")


def lose_a_case(store: Path) -> None:
    shutil.rmtree(store / "cases" / "A")


def exchange_volumes(store: Path) -> None:
    """Give one case the other's voxels, with sound checksums in every chunk."""
    shutil.copy(one(store, "B/*/volume/0/c/0/0/0"), one(store, "A/*/volume/0/c/0/0/0"))


def link_elsewhere(store: Path) -> None:
    shard = one(store, "A/*/axis0/image/c/0/0/0")
    shutil.move(shard, store.parent / "elsewhere")
    shard.symlink_to(store.parent / "elsewhere")


def spoil_groups(store: Path) -> None:
    (store / "cases" / "zarr.json").unlink()
    (store / "cases" / "A" / "zarr.json").write_text("[]")
    (store / "zarr.json").write_bytes((store / "zarr.json").read_bytes() + b" ")


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_shard,
        lose_a_record,
        lose_a_case,
        exchange_volumes,
        link_elsewhere,
        spoil_groups,
    ],
)
def test_repair_brings_back_the_very_bytes_and_touches_nothing_else(damage: Any, store: Path) -> None:
    before = contents(store)
    other = one(store, "B/*/volume/0/c/0/0/0").stat().st_mtime_ns
    damage(store)
    assert verify(store)
    summary = repair(store, store.parent / "raw", workers=1)
    assert summary.failed == ()
    assert contents(store) == before
    assert verify(store) == []
    assert one(store, "B/*/volume/0/c/0/0/0").stat().st_mtime_ns == other
    assert repair(store, store.parent / "raw").damages == ()


def test_repair_deletes_no_file_that_somebody_put_there(store: Path, run_data) -> None:
    notes = one(store, "A/*/axis0") / "notes.txt"
    notes.write_text("mine")
    told = "axis0/notes.txt: does not belong"
    assert told in run_data("verify", store, "--repair", store.parent / "raw").stderr
    assert notes.read_text() == "mine"


def test_links_are_not_followed_out_of_a_store(store: Path, tmp_path: Path, run_data) -> None:
    other = tmp_path / "other.zarr"
    shutil.copytree(store, other)
    before = contents(other)
    for linked in ("cases", "cases/A", f"cases/A/{read_root(store).cases['A']['raw']}"):
        (store / linked).rename(tmp_path / "aside")
        (store / linked).symlink_to(other if linked == "cases" else other / linked)
        assert any("is behind a link" in told for told in told_by_verify(store))
        if linked.count("/") < 2:
            done = run_data("verify", store, "--repair", store.parent / "raw")
            assert done.exit_code == 1
            assert "is a link" in done.stderr
            write_case(store.parent / "raw", "A", seed=5)
            assert "is a link" in run_data("prepare", store.parent / "raw", "--store", store, "--no-n4").stderr
            write_case(store.parent / "raw", "A", seed=0)
        assert contents(other) == before
        (store / linked).unlink()
        (tmp_path / "aside").rename(store / linked)


def test_repair_undoes_nothing_that_another_run_does_meanwhile(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_a_shard(store)
    one(store, "B/*/axis0/image/c/0/0/0").write_bytes(b"")
    spoil_groups(store)
    other = Preprocessing(bias=None, normalisation="percentile")

    def meanwhile(jobs: Any, *rest: Any) -> Any:
        remove_cases(store, ["B"])
        prepare(store.parent / "raw", store, preprocessing=other, pairs=pairs)
        return do_jobs(jobs, *rest)

    pairs = store.parent / "raw" / "a.csv"
    pairs.write_text("case,volume,label\nA,A.nrrd,AS-label.nrrd\n")
    monkeypatch.setattr("cspine_data.preparation.repair.do_jobs", meanwhile)
    summary = repair(store, store.parent / "raw")
    assert summary.mended == ()
    assert {problem.message for problem in summary.failed} == {
        f"{store}: {case} was prepared again or removed during the repair" for case in "AB"
    }
    assert open_cohort(store).cases == ("A",)
    assert open_cohort(store).record("A").preprocessing == other
    assert verify(store) == []


def test_repair_tells_where_it_could_not_make_the_very_bytes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of a library may bring about: here, another level of compression."""
    lose_a_shard(store)
    codecs = schema.codecs

    def other_level(chunks: tuple[int, ...], itemsize: int) -> Any:
        blosc, checksum = codecs(chunks, itemsize)
        return [{**blosc, "configuration": {**blosc["configuration"], "clevel": 1}}, checksum]

    monkeypatch.setattr("cspine_data.store.schema.codecs", other_level)
    summary = repair(store, store.parent / "raw")
    assert (summary.mended, summary.differing) == ((("A", "raw"),), (("A", "raw"),))
    assert verify(store) == []


@pytest.mark.parametrize("axes", ["0", "2"])
def test_a_damaged_record_does_not_cost_the_axes_that_are_there(axes: str, store: Path) -> None:
    lose_a_record(store)
    assert prepare(store.parent / "raw", store, n4=False, axes=axes).done == ("A",)
    assert open_cohort(store).record("A").axes == (0, 1, 2)
    assert verify(store) == []


def test_metadata_that_is_no_file_stops_nothing(store: Path) -> None:
    for number, make in enumerate((Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"))):
        record = one(store, "A/*/zarr.json")
        shutil.move(record, store.parent / f"record{number}")
        make(record)
        lost = one(store, "B/*/axis2/label/c/0/0/0")
        before = lost.read_bytes()
        lost.unlink()
        assert {told.split(":")[0] for told in told_by_verify(store)} == {"A (raw)", "B (raw)"}
        with pytest.raises(StoreError):
            open_cohort(store).record("A")
        assert repair(store, store.parent / "raw").mended == (("A", "raw"), ("B", "raw"))
        assert lost.read_bytes() == before
        assert verify(store) == []


def test_what_was_mended_can_be_read_by_who_had_it_open(store: Path) -> None:
    slices = open_cohort(store).slices(axis=0)
    expected = slices[8]
    reader._open_arrays._arrays.clear()
    one(store, "A/*/axis0/image/c/0/0/0").write_bytes(b"\0" * 9000)
    with pytest.raises(DamagedStoreError, match="verify .* --repair SOURCE"):
        slices[8]
    repair(store, store.parent / "raw")
    assert same(slices[8], expected)


def test_who_opened_a_store_before_reads_what_was_there_until_it_is_collected(store: Path) -> None:
    cohort = open_cohort(store)
    before = cohort.export("A").array
    remove_cases(store, ["A"])
    assert cohort.cases == ("A", "B")
    np.testing.assert_array_equal(cohort.export("A").array, before)
    slices, prepared = cohort.slices(cases=["A"]), cohort.record("A")
    collect_garbage(store, grace_s=0, delete=True)
    reader._open_arrays._arrays.clear()
    told = "open the cohort again"
    for read in (lambda: slices[0], lambda: cohort.export("A"), lambda: cohort.volumes(cases=[prepared.case])[0]):
        with pytest.raises(StoreError, match=told):
            read()


def test_too_many_open_files_are_not_taken_for_damage(store: Path) -> None:
    slices = open_cohort(store).slices(axis=0)
    reader._open_arrays._arrays.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            slices[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(caught.value, StoreError)


def test_a_lost_record_is_made_again_as_the_other_cases_were(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in "AB":
        write_case(raw, name)
    prepare(raw, store, preprocessing=QUICK_N4, axes="02", workers=1)
    before = contents(store)
    one(store, "B/*/zarr.json").write_text("")
    assert repair(store, raw, workers=1).mended == (("B", "n4"),)
    assert contents(store) == before


def test_repair_takes_only_what_the_case_was_made_of(store: Path, run_data) -> None:
    raw = store.parent / "raw"
    lose_a_shard(store)
    write_case(raw, "A", seed=99)
    done = run_data("verify", store, "--repair", raw)
    assert done.exit_code == 1
    assert "differs from the source" in done.stderr
    assert done.stdout == f"{store}: 0 repaired, 1 still damaged\n"
    (raw / "A.nrrd").unlink()
    (raw / "AS-label.nrrd").unlink()
    told = "case 'A': is damaged"
    assert told in run_data("verify", store, "--repair", raw).stderr


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\0" * 100])
def test_a_lost_root_is_brought_back_from_its_copy(content: bytes | None, store: Path, run_data) -> None:
    before = contents(store)
    (store / "zarr.json").unlink()
    if content is not None:
        (store / "zarr.json").write_bytes(content)
    remedy = f"repair it with cspine-data verify {store} --repair SOURCE"
    for command in (
        ("info", store),
        ("verify", store),
        ("prepare", store.parent / "raw", "--store", store),
        ("gc", store),
    ):
        done = run_data(*command)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"Error: {store / 'zarr.json'}: ")
        assert remedy in done.stderr
    assert run_data("verify", store, "--repair", store.parent / "raw").exit_code == 0
    assert contents(store) == before
    (store / ".zarr.json.copy").write_bytes(b"{")
    assert told_by_verify(store) == ["store: .zarr.json.copy: is not what was written"]
    assert run_data("verify", store, "--repair", store.parent / "raw").exit_code == 0
    assert contents(store) == before


def test_a_copy_that_a_killed_run_left_behind_is_brought_up_to_date(store: Path) -> None:
    copy = store / ".zarr.json.copy"
    before = copy.read_bytes()
    for spoil in (lambda: copy.unlink(), lambda: copy.write_bytes(before[:-1]), lambda: (copy.unlink(), copy.mkdir())):
        spoil()
        assert prepare(store.parent / "raw", store, n4=False).done == ()
        assert copy.read_bytes() == before


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"null", b"[" * 100_000])
def test_a_copy_that_is_nonsense_is_told_and_mended(content: bytes, store: Path) -> None:
    copy = store / ".zarr.json.copy"
    before = copy.read_bytes()
    copy.write_bytes(content)
    assert told_by_verify(store) == ["store: .zarr.json.copy: is not what was written"]
    repair(store, store.parent / "raw")
    assert copy.read_bytes() == before


def test_a_case_removed_while_repair_verifies_is_not_brought_back(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_a_shard(store)

    def verify_and_remove(path: Path) -> Any:
        damages = verify(path)
        remove_cases(path, ["A"])
        return damages

    monkeypatch.setattr("cspine_data.preparation.repair.verify", verify_and_remove)
    (problem,) = repair(store, store.parent / "raw").failed
    assert "during the repair" in problem.message
    assert open_cohort(store).cases == ("B",)


def test_names_that_a_lost_root_leaves_are_not_taken_into_an_anonymised_store(store: Path, run_data) -> None:
    for name in ("zarr.json", ".zarr.json.copy"):
        (store / name).unlink()
    done = run_data("prepare", store.parent / "raw", "--store", store, "--no-n4", "--anonymise")
    assert in_one_line(done.output, store, "no cspine store", "--store")


def test_a_root_lost_with_its_copy_costs_no_case(store: Path) -> None:
    """What is left of the store is found by its digests; only the order of enrolment, notes and standards are lost."""
    (store / ".zarr.json.copy").unlink()
    before = contents(store)
    shards = {file: file.stat().st_mtime_ns for file in store.rglob("c/0/0/0")}
    (store / "zarr.json").write_bytes(b"\0" * 100)
    with pytest.raises(DamagedStoreError, match="what was written .*"):
        prepare(store.parent / "raw", store, n4=False)
    (store / "zarr.json").unlink()
    assert prepare(store.parent / "raw", store, n4=False).written_bytes == 0
    assert contents(store) == before
    assert {file: file.stat().st_mtime_ns for file in shards} == shards


def test_a_store_cannot_lead_out_of_its_folder(store: Path) -> None:
    from tests.test_store import rewrite

    for case, digest in (("../../etc", "0" * 32), ("A", "../../../etc"), (".hidden", "0" * 32)):
        rewrite(store, lambda record, case=case, digest=digest: record.update(cases={case: {"raw": digest}}))
        with pytest.raises(DamagedStoreError, match="valid case id"):
            open_cohort(store)


def replaced(store: Path) -> Path:
    """Prepare A and B in another way; return the folder of the digest that A had."""
    before = store / "cases" / "A" / read_root(store).cases["A"]["raw"]
    other = Preprocessing(bias=None, normalisation="percentile")
    prepare(store.parent / "raw", store, preprocessing=other, workers=1)
    return before


def age(path: Path, days: float) -> None:
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() - days * 86400,) * 2)


def test_what_was_replaced_can_be_read_until_its_grace_has_ended(store: Path) -> None:
    slices = open_cohort(store).slices()
    expected = slices[3]
    age(store / "cases", 100)
    old = replaced(store)
    assert collect_garbage(store, delete=True) == []
    assert same(slices[3], expected)
    age(old, 8)
    (found,) = collect_garbage(store)
    assert found.path == old
    assert found.size_bytes >= sum(file.stat().st_size for file in old.rglob("*") if file.is_file())
    assert old.exists()
    assert collect_garbage(store, delete=True)[0].path == old
    assert not old.exists()
    assert verify(store) == []
    assert len(collect_garbage(store, grace_s=0)) == 1


def test_gc_takes_all_that_killed_runs_leave_and_nothing_of_others(store: Path, run_data) -> None:
    before = contents(store)
    for leftover in ("cases/A/.unfinished-1/volume/0", "cases/.removed-2/x", "cases/C/.unfinished-3", "cases/D"):
        (store / leftover).mkdir(parents=True)
    for file in (".zarr.json-4", "cases/A/.zarr.json-5", "cases/D/zarr.json"):
        (store / file).write_text("{}")
    shutil.copytree(
        next((store / "cases" / "A").glob("????????????????????????????????")), store / "cases/A" / ("0" * 32)
    )
    kept = ("mine.txt", "cases/A/thesis.docx", "cases/notes")
    for file in kept:
        (store / file).write_text("mine")
    (store / "cases" / "E").symlink_to(store.parent / "raw")
    told = run_data("gc", store).output
    assert told.endswith(f"{store}: nothing has been unused for 7 days\n")
    assert "MB more may still" in told
    # What may be being written is let alone for an hour, however short the time of grace.
    assert run_data("gc", store, "--grace-days", "0").output.count("unused for") == 3
    age(store, 0.1)
    listed = run_data("gc", store, "--grace-days", "0")
    assert "7 folders and files" in listed.output
    assert "deleted with --delete" in listed.output
    assert run_data("gc", store, "--grace-days", "0").output.count("unused for") == 7
    assert "deleted" in run_data("gc", store, "--grace-days", "0", "--delete").output
    for file in kept:
        assert (store / file).read_text() == "mine"
        (store / file).unlink()
    assert (store.parent / "raw" / "A.nrrd").exists()
    (store / "cases" / "E").unlink()
    assert {file.name for file in store.rglob(".*")} == {".lock", ".zarr.json.copy"}
    assert contents(store) == before
    assert "Invalid value for '--grace-days'" in run_data("gc", store, "--grace-days", "-1").output
    assert run_data("gc", store, "--grace-days", "nan").output.startswith("Error: grace nan s")


def test_a_digest_that_a_run_is_about_to_publish_is_made_anew_where_gc_took_it(store: Path) -> None:
    digest = read_root(store).cases["A"]["raw"]
    remove_cases(store, ["A"])
    collect_garbage(store, grace_s=0, delete=True)
    assert publish(store, [Replacement("A", "raw", digest, None)]) == ({"A"}, {})
    assert open_cohort(store).cases == ("B",)
    assert prepare(store.parent / "raw", store, n4=False).done == ("A",)


def test_a_removed_case_is_gone_and_comes_back_to_its_place(store: Path, run_data) -> None:
    prepare(store.parent / "raw", store, preprocessing=QUICK_N4)
    before, enrolled = contents(store), read_root(store).enrolled
    assert in_one_line(run_data("remove", store, "A", "Z").output, store, "no case 'Z'")
    assert open_cohort(store).cases == ("A", "B")
    assert "removed A (raw)" in run_data("remove", store, "A", "--variant", "raw").output
    with pytest.raises(NotInStoreError, match="case 'A' as n4"):
        open_cohort(store).record("A", "raw")
    run_data("remove", store, "A")
    assert open_cohort(store).cases == ("B",)
    assert verify(store) == []
    run_data("gc", store, "--grace-days", "0", "--delete")
    assert not (store / "cases" / "A").exists()
    assert b"A.nrrd" not in b"".join(contents(store).values())
    for preprocessing in (Preprocessing(bias=None), QUICK_N4):
        assert prepare(store.parent / "raw", store, preprocessing=preprocessing).done == ("A",)
    assert contents(store) == before
    assert read_root(store).enrolled == enrolled
