"""Names of label values, from BIDS tables (``dseg.tsv``) beside the label maps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from cspine_data.errors import InputError, Problem, count, printable, some_of
from cspine_data.sources.cases import LONGEST_NAME, Case
from cspine_data.sources.file_names import name_of
from cspine_data.sources.pair_lists import table_rows

#: Label values with their names.
Names = tuple[tuple[int, str], ...]
_SUFFIX = "dseg"
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_DERIVATIVES = "derivatives"
_INDEX = re.compile(r"\d{1,9}")
# Some exports write the value as the name, which counts as no name.
_NO_NAME = re.compile(r"|n/a|background|label[-_ ]?\d+", re.IGNORECASE)
# About 3000 lines: the names are sent to workers with each case.
_MOST_BYTES = 1 << 17


def with_label_names(cases: Iterable[Case], home: Path) -> tuple[list[Case], list[Problem], list[str]]:
    """Return the cases with the names of their label values, a problem for each unusable table, and notes.

    Parameters
    ----------
    cases : iterable of Case
        The cases. Only label maps with the BIDS suffix ``dseg`` have tables.
    home : Path
        The folder of the source. Tables above it are not read.
    """
    tables = _Tables(home)
    kept: list[Case] = []
    used: Counter[Path] = Counter()
    refused: dict[Path, list[str]] = {}
    for case in cases:
        table = tables.table_of(case.label) if case.label else None
        names = tables.read(table) if table else ()
        if isinstance(names, InputError):
            refused.setdefault(table or home, []).append(case.id)
        else:
            kept.append(replace(case, label_names=names))
            used.update([table] if table and names else [])
    problems = [
        Problem(ids[0], f"{tables.read(table)} ({count(len(ids), 'case')} left out because of it)")
        for table, ids in refused.items()
    ]
    notes = [f"the labels of {count(used.total(), 'case')} are named by {some_of(list(used))}"] if used else []
    return kept, problems, notes


class _Tables:
    """The tables of a source. Each folder is listed only once, and each table is read only once."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._in: dict[Path, list[Path]] = {}
        self._read: dict[Path, Names | InputError] = {}

    def table_of(self, label: Path) -> Path | None:
        """Return the table of a label map: the nearest one whose entities the label map has, too."""
        *entities, suffix = name_of(label).split("_")
        if suffix.lower() != _SUFFIX:
            return None
        for folder in self._folders(label):
            if folder not in self._in:
                # Reading a pipe would never end.
                self._in[folder] = sorted(path for path in folder.glob(f"*{_SUFFIX}.tsv") if path.is_file())
            own = [path for path in self._in[folder] if set(path.stem.split("_")) <= {*entities, _SUFFIX}]
            if own:
                return max(own, key=lambda path: len(path.stem.split("_")))
        return None

    def _folders(self, label: Path) -> Iterator[Path]:
        """Iterate over the folders that may hold tables: from the label map's up to the data set's."""
        names = label.parent.parts
        top = max((n for n, name in enumerate(names) if _SUBJECT.fullmatch(name)), default=len(names))
        # ``derivatives/sub-01`` or ``derivatives/pipeline/sub-01``.
        top = next((n for n in (top - 2, top - 1) if n >= 0 and names[n : n + 1] == (_DERIVATIVES,)), top)
        for folder in label.parents:
            yield folder
            if folder == self._home or len(folder.parts) <= top:
                return

    def read(self, table: Path) -> Names | InputError:
        """Return the names of a table, or why it cannot be used."""
        if table not in self._read:
            try:
                self._read[table] = _names(table)
            except InputError as error:
                self._read[table] = error
            except OSError as error:
                self._read[table] = InputError(table, f"cannot be read ({error.strerror})", "fix this, or remove it")
        return self._read[table]


def _names(table: Path) -> Names:
    size = table.stat().st_size
    if size > _MOST_BYTES:
        raise InputError(table, f"is too large ({size} bytes)", f"shorten it to at most {_MOST_BYTES >> 10} KiB")
    found: dict[int, str] = {}
    for number, row in table_rows(table, ("index", "name"), None):
        if not _INDEX.fullmatch(row["index"]):
            raise InputError(
                table, f"has an index in line {number} that is not a label value", "give a whole number, 0 or more"
            )
        value, name = int(row["index"]), printable(" ".join(row["name"].split()))[:LONGEST_NAME]
        if not value or _NO_NAME.fullmatch(name):
            continue
        if found.setdefault(value, name) != name:
            raise InputError(table, f"gives the label value {value} two names", "keep one of them")
    return tuple(found.items())
