"""Neutral case ids for anonymised stores, since file names may contain patient names.

The key is a CSV file with the columns ``id,case,patient,site``, outside the store and readable by its owner only. A
case in it keeps its id. New cases are numbered in the order of their volumes' digests, which do not depend on names
or dates. A patient's id is that of the patient's first case, and so is a site's.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cspine_data.errors import InputError, Problem
from cspine_data.files import exclusive_lock, make_folder, replace_file
from cspine_data.names import normalised
from cspine_data.preparation.source_digests import Digested, digest_file
from cspine_data.sources.cases import Case, Listing
from cspine_data.sources.file_names import is_contrast
from cspine_data.store.records import read_root
from cspine_data.store.schema import NEUTRAL_ID, RootRecord

COLUMNS = ("id", "case", "patient", "site")
_PATIENCE_S = 60
_RESTORE = "correct it by hand or restore a copy; a new key would give other ids"


@dataclass(frozen=True)
class _Entry:
    """What a key says of a case: its neutral id, its patient unless this is the case, and its site if it is known."""

    id: str
    patient: str = ""
    site: str = ""


def key_file(store: str | Path) -> Path:
    """Return the key of an anonymised store: the file beside it that maps neutral ids to case names."""
    store = Path(store).resolve()
    return store.with_name(f"{store.name}.key.csv")


def listed_neutrally(listing: Listing, store: Path, sources: Mapping[Path, Digested | Problem]) -> Listing:
    """Replace the case ids of a listing by the neutral ids of an anonymised store."""
    return with_neutral_ids(listing, existing_key(store, read_root(store)), sources)


def existing_key(store: Path, root: RootRecord) -> Path:
    """Return the key of an anonymised store; it must exist if any ids have been given out."""
    key = key_file(store)
    if (root.cases or root.enrolled or root.standards) and not key.exists():
        raise InputError(key, "is missing, and without it the cases cannot be identified", "restore it there")
    return key


def with_neutral_ids(listing: Listing, key: Path, sources: Mapping[Path, Digested | Problem] | None = None) -> Listing:
    """Replace the case ids of a listing by neutral ids; new cases are added to the key.

    The key is a CSV file, created with its folder if necessary; several processes may use it at once. New volumes
    are hashed here unless `sources` has their digests. The cases are in order of their ids. Problems keep their
    message, which names the file for the user, but their case is the neutral id or empty.
    """
    # If the key is a link, the file behind it is replaced.
    key = Path(key).resolve()
    cases = [case for case in listing.cases if _is_utf8(case)]
    others = [case for case in listing.cases if not _is_utf8(case)]
    try:
        entries = _enter(key, cases, sources)
    except OSError as error:
        problem = f"cannot be used as a key ({error.strerror or error})"
        raise InputError(key, problem, "choose another place, or fix this") from None
    patients, sites = _first_ids(entries)
    named = [
        replace(
            case,
            id=entries[case.id].id,
            patient=patients[case.patient],
            site=case.site and f"site of {sites[case.site]}",
            # A list of pairs may hold any text here.
            sequence=case.sequence if case.sequence and is_contrast(case.sequence) else None,
        )
        for case in cases
    ]
    ids = {case: entry.id for case, entry in entries.items()}
    problems = [Problem(ids.get(problem.case, ""), problem.message) for problem in listing.problems]
    in_order = tuple(sorted(named, key=lambda case: case.id))
    return Listing(in_order, (*problems, *map(_not_utf8, others)), listing.notes)


def _first_ids(entries: Mapping[str, _Entry]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the id of the first case of each patient and of each site."""
    patients: dict[str, str] = {}
    sites: dict[str, str] = {}
    for case, entry in sorted(entries.items(), key=lambda item: _number(item[1].id)):
        patients.setdefault(entry.patient or case, entry.id)
        sites.setdefault(entry.site, entry.id)
    return patients, sites


def _enter(key: Path, cases: Iterable[Case], sources: Mapping[Path, Digested | Problem] | None) -> dict[str, _Entry]:
    """Add new cases to a key, and changed patients and sites; return its entries by case."""
    # Hashing takes long and needs no lock, since the key is replaced in one step.
    before = _read_entries(key)
    cases = list(cases)
    in_order = _in_order((case for case in cases if case.id not in before), sources)
    if not in_order and _with_identities(before, cases) == before:
        return before
    make_folder(key.parent)
    with exclusive_lock(key.with_name(f".{key.name}.lock"), _PATIENCE_S):
        old = _read_entries(key)
        last = max((_number(entry.id) for entry in old.values()), default=0)
        new = [case for case in in_order if case not in old]
        numbered = {case: _Entry(f"case{number:04d}") for number, case in enumerate(new, start=last + 1)}
        entries = _with_identities(old | numbered, cases)
        if entries != old:
            _write(key, entries)
    return entries


def _with_identities(entries: Mapping[str, _Entry], cases: Iterable[Case]) -> dict[str, _Entry]:
    """Return entries with the patients and sites of cases."""
    known = {case.id: case for case in cases}
    return {
        name: replace(entry, patient=case.patient if case.patient != name else "", site=case.site or "")
        if (case := known.get(name))
        else entry
        for name, entry in entries.items()
    }


def _in_order(cases: Iterable[Case], sources: Mapping[Path, Digested | Problem] | None) -> list[str]:
    """Return case names in order of their volumes' digests; those without a digest come last, by name."""

    def order(case: Case) -> tuple[bool, str, str]:
        digested = sources[case.volume] if sources is not None else digest_file(case.volume)
        return (True, "", case.id) if isinstance(digested, Problem) else (False, digested.sha256, case.id)

    return [case for *_, case in sorted(map(order, cases))]


def read_key(key: Path) -> dict[str, str]:
    """Read the neutral id of every case in a key; empty if there is no key yet."""
    return {case: entry.id for case, entry in _read_entries(key).items()}


def _read_entries(key: Path) -> dict[str, _Entry]:
    """Read a key; empty if there is none yet.

    Messages give the line number and not its content, which may be a name.
    """
    try:
        # A spreadsheet program may have put a byte order mark first.
        text = key.read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise InputError(key, "is not UTF-8", "save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise InputError(key, f"is no readable CSV file ({error})", _RESTORE) from None
    if not rows or tuple(rows[0]) not in (COLUMNS, COLUMNS[:2]):
        raise InputError(key, f"does not start with the columns {','.join(COLUMNS[:2])}", _RESTORE)
    if not text.endswith(("\n", "\r")):
        raise InputError(key, "ends within a line", "if it is complete, end the line; else restore a copy")
    entries: dict[str, _Entry] = {}
    given: set[str] = set()
    for number, row in enumerate(rows[1:], start=2):
        problem = _row_problem(row, len(rows[0]), entries, given)
        if problem:
            raise InputError(key, f"{problem} in row {number}", _RESTORE)
        neutral, case, *identity = row
        entries[normalised(case)] = _Entry(neutral, *map(normalised, identity))
        given.add(neutral)
    return entries


def _row_problem(row: list[str], length: int, entries: Mapping[str, _Entry], given: set[str]) -> str | None:
    if len(row) != length or not row[1]:
        return "has not an id and a case"
    neutral, case, *_ = row
    if not NEUTRAL_ID.fullmatch(neutral):
        return "has an id unlike case0001"
    if neutral in given:
        return f"gives {neutral} a second time,"
    return "names a case a second time" if normalised(case) in entries else None


def _write(key: Path, entries: Mapping[str, _Entry]) -> None:
    """Replace a key in one step, durably; the caller holds its lock."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    in_order = sorted(entries.items(), key=lambda item: _number(item[1].id))
    rows = [COLUMNS, *((entry.id, case, entry.patient, entry.site) for case, entry in in_order)]
    # Two columns are enough where all cases are of different patients.
    columns = 4 if any(entry.patient or entry.site for entry in entries.values()) else 2
    table.writerows(row[:columns] for row in rows)
    temporary = key.with_name(f".{key.name}.new")
    # A killed process may have left one.
    temporary.unlink(missing_ok=True)
    replace_file(key, text.getvalue().encode(), temporary, mode=0o600)


def _number(neutral: str) -> int:
    return int(neutral.removeprefix("case"))


def _is_utf8(case: Case) -> bool:
    try:
        case.id.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_utf8(case: Case) -> Problem:
    name = os.fsencode(case.volume).decode(errors="replace")
    return Problem("", f"{name}: its name is not UTF-8, as the key requires; rename the file")
