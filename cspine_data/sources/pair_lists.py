"""Lists of cases as CSV files: reading those that people write, and writing one of the cases that were found."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cspine_data.errors import InputError, Problem
from cspine_data.files import atomic_write
from cspine_data.names import normalised, on_disk
from cspine_data.sources.cases import Case
from cspine_data.sources.layout import Found

_REQUIRED = ("case", "volume", "label")
COLUMNS = (*_REQUIRED, "patient", "site", "sequence")
# For `relabel` alone.
_LEVELS = ("lowest", "highest")
_SEPARATORS = ",;\t"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_pairs(path: Path) -> Found:
    """Read a list of cases.

    Parameters
    ----------
    path : Path
        A CSV file with the columns ``case,volume,label`` and, if wanted, ``patient,site,sequence``. Paths are relative
        to it; a label may be empty. Separators may be commas, semicolons or tabs; capitals and spaces do not matter.

    Raises
    ------
    InputError
        If it is missing or not a CSV file, lacks a column or has an unknown one.
    """
    if not path.is_file():
        raise InputError(path, "is no file", f"give a CSV file with the columns {','.join(_REQUIRED)}")
    found = Found()
    for number, row in table_rows(path, _REQUIRED, (*COLUMNS, *_LEVELS)):
        case_id, volume = row["case"], row["volume"]
        if not case_id or not volume:
            problem = (
                f"{path}: line {number} names no {'volume' if case_id else 'case'}; fill it in, or delete the line"
            )
            found.problems.append(Problem(case_id or f"line {number}", problem))
            continue
        found.cases.append(
            Case(
                normalised(case_id),
                on_disk(path.parent / volume),
                on_disk(path.parent / row["label"]) if row["label"] else None,
                normalised(row.get("patient", "")),
                row.get("site") or None,
                row.get("sequence") or None,
                row.get("lowest") or None,
                row.get("highest") or None,
            )
        )
    return found


def write_pairs(path: Path, cases: Iterable[Case]) -> None:
    """Write a list of cases that `read_pairs` reads, with paths relative to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in cases:
        volume, label = (os.path.relpath(one, path.parent) if one else "" for one in (case.volume, case.label))
        writer.writerow([case.id, volume, label, case.patient, case.site or "", case.sequence or ""])
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})", "choose another place") from None


def table_rows(
    path: Path, required: Sequence[str], known: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Iterate over the lines of a CSV file with their numbers; an `InputError` names what is wrong with it.

    Columns that are not `known` are refused. None allows all columns.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in _UTF16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, f"is no readable CSV file ({error})", "save it as CSV in UTF-8") from None
    lines = text.splitlines(keepends=True)
    # Excel's own hint.
    skipped = 1 if lines and lines[0].lower().startswith("sep=") else 0
    heading = lines[skipped] if len(lines) > skipped else ""
    separator = max(_SEPARATORS, key=heading.count)
    rows = csv.reader(lines[skipped:], delimiter=separator, strict=True)
    try:
        names = [name.strip().lower() for name in next(rows, [])]
        _check_columns(path, names, required, known)
        for row in rows:
            number = rows.line_num + skipped
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) > len(names) and any(cells[len(names) :]):
                problem = f"line {number} has {len(cells)} fields where the first line has {len(names)}"
                raise InputError(path, problem, "put names with a separator in quotation marks")
            cells += [""] * (len(names) - len(cells))
            yield number, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise InputError(path, f"line {rows.line_num + skipped} is not CSV ({error})", "correct the line") from None


def _check_columns(path: Path, names: list[str], required: Sequence[str], known: Sequence[str] | None) -> None:
    while names and not names[-1]:
        names.pop()
    missing = [name for name in required if name not in names]
    if missing:
        raise InputError(path, f"lacks the column {', '.join(missing)}", f"start it with {','.join(required)}")
    unknown = [] if known is None else [name for name in names if name not in known]
    if known and unknown:
        problem = f"has the unknown column {', '.join(map(repr, unknown))}"
        raise InputError(path, problem, f"known are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise InputError(path, "has a column twice", "keep one of them")
