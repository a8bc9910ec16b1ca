"""Neutral ids: stable, given once, and the key is whole at any instant, whoever dies."""

from __future__ import annotations

import csv
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspine_data import Case, InputError, Listing, Problem, find_cases
from cspine_data.preparation.pseudonyms import with_neutral_ids
from cspine_data.volumes.io import content_digest
from tests.conftest import write_case


def listing_of(folder: Path, names: list[str], *problems: Problem) -> Listing:
    """Cases whose files hold nothing but their own name: enough for a digest."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.nii").write_bytes(b"voxels of " + os.fsencode(name))
    return Listing(tuple(Case(name, folder / f"{name}.nii") for name in sorted(names)), problems)


def ids_of(listing: Listing) -> dict[str, str]:
    return {case.volume.stem: case.id for case in listing.cases}


def entries(key: Path) -> dict[str, str]:
    with key.open(newline="", encoding="utf-8") as file:
        return {row["case"]: row["id"] for row in csv.DictReader(file)}


def test_new_cases_are_numbered_by_what_their_volumes_hold(tmp_path: Path) -> None:
    for name in ("Doe", "Miller", "Zoe"):
        write_case(tmp_path / "raw", name)
    listing, key = find_cases(tmp_path / "raw"), tmp_path / "keys" / "key.csv"
    found = with_neutral_ids(listing, key)
    assert [case.id for case in found.cases] == ["case0001", "case0002", "case0003"]
    by_content = sorted(listing.cases, key=lambda case: content_digest(case.volume))
    assert [case.volume for case in found.cases] == [case.volume for case in by_content]
    assert [case.label for case in found.cases] == [case.label for case in by_content]
    assert entries(key) == {case.id: neutral.id for case, neutral in zip(by_content, found.cases, strict=True)}
    assert key.read_bytes().startswith(b"id,case\ncase0001,")


def test_a_known_case_keeps_its_id_though_its_file_changes_or_goes(tmp_path: Path) -> None:
    key = tmp_path / "key.csv"
    before = ids_of(with_neutral_ids(listing_of(tmp_path, ["a", "b"]), key))
    assert with_neutral_ids(listing_of(tmp_path, []), key).cases == ()
    (tmp_path / "b.nii").write_bytes(b"other voxels")
    after = ids_of(with_neutral_ids(Listing((Case("b", tmp_path / "b.nii"),)), key))
    assert after == {"b": before["b"]}
    assert set(entries(key)) == {"a", "b"}


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    key = tmp_path / "key.csv"
    listing = listing_of(tmp_path, ["a", "b"])
    first = with_neutral_ids(listing, key)
    inode = key.stat().st_ino
    assert with_neutral_ids(listing, key) == first
    assert key.stat().st_ino == inode


def test_a_file_that_cannot_be_digested_gets_an_id_after_the_others(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, ["m", "n"])
    (tmp_path / "b.nrrd").write_text("no header")
    broken = (Case("b", tmp_path / "b.nrrd"), Case("a", tmp_path / "gone.nii"))
    found = ids_of(with_neutral_ids(Listing((*broken, *listing.cases)), tmp_path / "key.csv"))
    assert (found["gone"], found["b"]) == ("case0003", "case0004")


def test_problems_keep_their_message_and_lose_their_name(tmp_path: Path) -> None:
    problems = (Problem("a", "a.nii: is broken; mend it"), Problem("Doe", "Doe.nii: claimed twice; keep one"))
    found = with_neutral_ids(listing_of(tmp_path, ["a"], *problems), tmp_path / "key.csv")
    assert [problem.case for problem in found.problems] == ["case0001", ""]
    assert [problem.message for problem in found.problems] == [problem.message for problem in problems]


def test_a_name_that_is_not_utf8_is_a_problem_of_that_case_alone(tmp_path: Path) -> None:
    name = os.fsdecode(b"M\xfcller")
    listing = listing_of(tmp_path, ["a", name])
    found = with_neutral_ids(listing, tmp_path / "key.csv")
    assert ids_of(found) == {"a": "case0001"}
    (problem,) = found.problems
    assert problem.case == ""
    assert "M\ufffdller.nii: its name is not UTF-8" in problem.message


def test_only_its_owner_reads_the_key_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with_neutral_ids(listing_of(tmp_path, ["a"]), tmp_path / "key.csv")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key.csv").stat().st_mode) == 0o600
    assert {file.name for file in tmp_path.iterdir()} - {"a.nii"} <= {"key.csv", ".key.csv.lock"}


def test_a_key_behind_a_link_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "safe").mkdir()
    (tmp_path / "key.csv").symlink_to(tmp_path / "safe" / "key.csv")
    with_neutral_ids(listing_of(tmp_path, ["a"]), tmp_path / "key.csv")
    assert (tmp_path / "key.csv").is_symlink()
    assert entries(tmp_path / "safe" / "key.csv") == {"a": "case0001"}


def test_ids_grow_wider_past_9999(tmp_path: Path) -> None:
    key = tmp_path / "key.csv"
    key.write_text("id,case\ncase9999,z\ncase0002,y\n")
    found = with_neutral_ids(listing_of(tmp_path, ["a", "b", "z"]), key)
    assert sorted(case.id for case in found.cases) == ["case10000", "case10001", "case9999"]
    assert key.read_text().splitlines()[1:3] == ["case0002,y", "case9999,z"]
    assert with_neutral_ids(listing_of(tmp_path, ["a", "b", "z"]), key) == found


def test_a_key_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    key = tmp_path / "key.csv"
    key.write_bytes('\ufeffid,case\r\ncase0007,"Doe, Jane"\r\n'.encode())
    found = ids_of(with_neutral_ids(listing_of(tmp_path, ["Doe, Jane", "Ødegård \u2028 x"]), key))
    assert found == {"Doe, Jane": "case0007", "Ødegård \u2028 x": "case0008"}
    assert entries(key) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "columns id,case"),
        (b"case,id\nDoe,case0001\n", "columns id,case"),
        (b"id,case,date\n", "columns id,case"),
        (b"id,case\ncase0001,Doe\ncase0001,Roe\n", "second time, in row 3"),
        (b"id,case\ncase0001,Doe\ncase0002,Doe\n", "second time in row 3"),
        (b"id,case\ncase1,Doe\n", "unlike case0001 in row 2"),
        (b"id,case\ncase00001,Doe\n", "unlike case0001 in row 2"),
        (b"id,case\nDoe\n", "in row 2"),
        (b"id,case\ncase0001,\n", "in row 2"),
        (b"id,case\ncase0001,D", "ends within a line"),
        (b'id,case\ncase0001,"Doe\n', "unexpected end of data"),
        (b"id,case\ncase0001,D\xf6e\n", "is not UTF-8"),
    ],
)
def test_a_damaged_key_is_refused_and_left_alone(content: bytes, message: str, tmp_path: Path) -> None:
    key = tmp_path / "key.csv"
    key.write_bytes(content)
    with pytest.raises(InputError) as caught:
        with_neutral_ids(listing_of(tmp_path, ["a"]), key)
    told = str(caught.value)
    assert told.startswith(f"{key}: ")
    assert message in told
    assert "\n" not in told
    assert "Doe" not in told
    assert key.read_bytes() == content


def test_a_key_that_cannot_be_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, ["a"])
    for place in (tmp_path, tmp_path / "a.nii" / "key.csv"):
        with pytest.raises(InputError, match="used as a key"):
            with_neutral_ids(listing, place)


@given(st.lists(st.sets(st.text("abcØ, \"'\u00e9", min_size=1, max_size=4), max_size=5), min_size=1, max_size=5))
def test_whatever_is_added_or_taken_away_no_id_changes_or_is_given_twice(batches: list[set[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        key, given_ids = Path(folder, "key.csv"), {}
        for batch in batches:
            listing = listing_of(Path(folder, "raw"), list(batch))
            found = with_neutral_ids(listing, key)
            new = {case.volume.stem: case.id for case in found.cases}
            assert set(new) == batch
            assert all(given_ids.get(name, neutral) == neutral for name, neutral in new.items())
            given_ids |= new
            assert [case.id for case in found.cases] == sorted(new.values())
        assert sorted(given_ids.values()) == [f"case{number + 1:04d}" for number in range(len(given_ids))]
        assert (entries(key) if given_ids else {}) == given_ids


#: Enters one case after the other, each in a run of its own.
ENTER = """
import sys
from pathlib import Path
from cspine_data import Case, Listing
from cspine_data.preparation.pseudonyms import with_neutral_ids
folder, key, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
for name in names:
    print(name, with_neutral_ids(Listing((Case(name, folder / f"{name}.nii"),)), key).cases[0].id, flush=True)
"""


def entering(folder: Path, key: Path, names: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ENTER, str(folder), str(key), *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_two_processes_at_once_give_no_id_twice(tmp_path: Path) -> None:
    names = [[f"{letter}{number}" for number in range(40)] + ["both"] for letter in "ab"]
    listing_of(tmp_path / "raw", [*names[0], *names[1]])
    key = tmp_path / "key.csv"
    runs = [entering(tmp_path / "raw", key, part) for part in names]
    told = [line.split() for run in runs for line in run.communicate()[0].splitlines()]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(told) == 82
    given_ids = {(name, neutral) for name, neutral in told}
    assert len(given_ids) == len({neutral for _, neutral in given_ids}) == 81
    assert dict(given_ids) == entries(key)


def test_a_killed_process_leaves_a_whole_key_that_the_next_goes_on_with(tmp_path: Path) -> None:
    names = [f"n{number:03d}" for number in range(400)]
    listing_of(tmp_path / "raw", names)
    key = tmp_path / "key.csv"
    told: dict[str, str] = {}
    for wanted in (1, 7, 30):
        run = entering(tmp_path / "raw", key, names)
        assert run.stdout is not None
        lines = [run.stdout.readline() for _ in range(wanted + len(told))]
        time.sleep(0.001 * wanted)
        os.killpg(run.pid, signal.SIGKILL)
        lines += run.stdout.readlines()
        run.wait()
        told |= dict(line.split() for line in lines if line.endswith("\n"))
        # What was told is kept, and nothing else but, perhaps, the one that was not told any more.
        held = entries(key)
        assert told.items() <= held.items()
        assert len(held) <= len(told) + 1
    assert len(told) < len(names)
    found = ids_of(with_neutral_ids(listing_of(tmp_path / "raw", names), key))
    assert held.items() <= found.items()
    assert sorted(found.values()) == [f"case{number + 1:04d}" for number in range(400)]
    assert {file.name for file in tmp_path.iterdir()} <= {"raw", "key.csv", ".key.csv.lock"}


def test_a_process_that_dies_with_the_lock_does_not_hold_up_the_next(tmp_path: Path) -> None:
    listing = listing_of(tmp_path / "raw", ["a"])
    key = tmp_path / "key.csv"
    holder = (
        "import os, signal, sys; from pathlib import Path\n"
        "import cspine_data.preparation.pseudonyms as p, cspine_data.files as w\n"
        "w.sync_folder = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from cspine_data import Case, Listing\n"
        "p.with_neutral_ids(Listing((Case('x', Path('x.nii')),)), Path(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", holder, str(key)], check=False).returncode == -signal.SIGKILL
    (tmp_path / ".key.csv.new").write_text("id,case\ncase0001,half")
    started = time.monotonic()
    assert ids_of(with_neutral_ids(listing, key)) == {"a": "case0002"}
    assert time.monotonic() - started < 5
    assert entries(key) == {"x": "case0001", "a": "case0002"}
    assert not (tmp_path / ".key.csv.new").exists()
