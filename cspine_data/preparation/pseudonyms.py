"""Which neutral id stands for which case: file names are names of patients too, and a store should hold none.

The key is a CSV file with the columns ``id,case``, kept outside the store and readable by its owner only. A case
that it knows keeps its id for ever. New ones are numbered in the order of their volume's digest, which says nothing
of names or dates.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from cspine_data.errors import InputError, Problem
from cspine_data.files import exclusive_lock, make_folder, replace_file
from cspine_data.names import normalised
from cspine_data.preparation.plan import digest_file
from cspine_data.preparation.source_digests import Digested
from cspine_data.sources.cases import Case, Listing
from cspine_data.store.schema import NEUTRAL_ID

COLUMNS = ("id", "case")
_PATIENCE_S = 60
_BY_HAND = "mend it by hand or bring back a copy; another key would give other ids"


def with_neutral_ids(listing: Listing, key: Path, sources: Mapping[Path, Digested | Problem] | None = None) -> Listing:
    """Give every case of a listing its neutral id: the one that the key knows, or a new one, which the key gets.

    Parameters
    ----------
    listing : Listing
        What `find_cases` found.
    key : Path
        The CSV file that says which id is which case; made, with its folder, where it is not there yet. Two processes
        may use it at once.
    sources : dict, optional
        What each volume holds; without it, the new ones are hashed here.

    Returns
    -------
    Listing
        The cases under their neutral ids, in order of these. Problems keep their message, which must name the file to
        whoever runs this, but not their case: theirs is its neutral id or empty.

    Raises
    ------
    InputError
        If the key is damaged, or cannot be read or written.

    Examples
    --------
    >>> listing = with_neutral_ids(find_cases("data/raw"), Path("key.csv"))  # doctest: +SKIP
    >>> [case.id for case in listing.cases]  # doctest: +SKIP
    ['case0001', 'case0002']
    """
    # Through a link, so that the file behind it is replaced and not the link.
    key = Path(key).resolve()
    cases = [case for case in listing.cases if _fits_the_key(case)]
    unfit = [case for case in listing.cases if not _fits_the_key(case)]
    try:
        ids = _enter(key, cases, sources)
    except OSError as error:
        problem = f"cannot be used as a key ({error.strerror or error})"
        raise InputError(key, problem, "choose another place, or fix this") from None
    named = sorted((replace(case, id=ids[case.id]) for case in cases), key=lambda case: case.id)
    problems = [Problem(ids.get(problem.case, ""), problem.message) for problem in listing.problems]
    return Listing(tuple(named), (*problems, *map(_unfit, unfit)))


def _enter(key: Path, cases: Iterable[Case], sources: Mapping[Path, Digested | Problem] | None) -> dict[str, str]:
    """Enter the cases that a key does not know yet; return the id of every case that it knows then."""
    # What takes long comes before the lock: a key that is replaced at once can be read without it.
    before = read_key(key)
    in_order = _in_order((case for case in cases if case.id not in before), sources)
    if not in_order:
        return before
    make_folder(key.parent)
    with exclusive_lock(key.with_name(f".{key.name}.lock"), _PATIENCE_S):
        ids = read_key(key)
        last = max(map(_number, ids.values()), default=0)
        new = [case for case in in_order if case not in ids]
        ids |= {case: f"case{number:04d}" for number, case in enumerate(new, start=last + 1)}
        if new:
            _write(key, ids)
    return ids


def _in_order(cases: Iterable[Case], sources: Mapping[Path, Digested | Problem] | None) -> list[str]:
    """Return cases by the digest of their volume; those whose file has none come last, by name."""

    def place(case: Case) -> tuple[bool, str, str]:
        held = sources[case.volume] if sources is not None else digest_file(case.volume)
        return (True, "", case.id) if isinstance(held, Problem) else (False, held.sha256, case.id)

    return [case for *_, case in sorted(map(place, cases))]


def read_key(key: Path) -> dict[str, str]:
    """Read the neutral id of every case of a key; none where there is no key yet.

    What is wrong is told by its line, without the names that stand there.
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
        raise InputError(key, f"is no readable CSV file ({error})", _BY_HAND) from None
    if not rows or tuple(rows[0]) != COLUMNS:
        raise InputError(key, f"does not start with the columns {','.join(COLUMNS)}", _BY_HAND)
    if not text.endswith(("\n", "\r")):
        raise InputError(key, "ends within a line", "if it is whole, end that line; else bring back a copy")
    ids: dict[str, str] = {}
    given: set[str] = set()
    for number, row in enumerate(rows[1:], start=2):
        wrong = _wrong(row, ids, given)
        if wrong:
            raise InputError(key, f"{wrong} in row {number}", _BY_HAND)
        ids[normalised(row[1])] = row[0]
        given.add(row[0])
    return ids


def _wrong(row: list[str], ids: Mapping[str, str], given: set[str]) -> str | None:
    if len(row) != len(COLUMNS) or not row[1]:
        return "has not an id and a case"
    neutral, case = row
    if not NEUTRAL_ID.fullmatch(neutral):
        return "has an id unlike case0001"
    if neutral in given:
        return f"gives {neutral} a second time,"
    return "names a case a second time" if normalised(case) in ids else None


def _write(key: Path, ids: Mapping[str, str]) -> None:
    """Replace a key in one step, durably; whoever holds its lock is the only one who writes."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows((ids[case], case) for case in sorted(ids, key=lambda case: _number(ids[case])))
    temporary = key.with_name(f".{key.name}.new")
    # A process that was killed may have left one.
    temporary.unlink(missing_ok=True)
    replace_file(key, text.getvalue().encode(), temporary, mode=0o600)


def _number(neutral: str) -> int:
    return int(neutral.removeprefix("case"))


def _fits_the_key(case: Case) -> bool:
    try:
        case.id.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unfit(case: Case) -> Problem:
    name = os.fsencode(case.volume).decode(errors="replace")
    return Problem("", f"{name}: its name is not UTF-8, and the key could not hold it; rename the file")
