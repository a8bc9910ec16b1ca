"""Tables in an output folder of predictions, to which commands add rows volume by volume."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cspine_data.tools import atomic_write
from cspine_train.levels.naming import NamedSpine

#: Table of the named vertebrae, one row per vertebra.
LEVELS_NAME = "levels.csv"
_LEVEL_COLUMNS = (
    "case", "level", "probability", "centroid_x_mm", "centroid_y_mm", "centroid_z_mm", "volume_ml", "height_mm",
    "doubt",
)  # fmt: skip
# Bytes in file names that are not UTF-8 are kept.
_TEXT: Mapping[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


class OutputTable:
    """A CSV table in which each volume has one or more rows.

    Parameters
    ----------
    path : Path
        The CSV file; it is read if it exists.
    columns : sequence of str
        Its columns.
    key : str
        The column that identifies the volume of a row.
    is_whole : callable
        Whether a row is usable. Rows that were cut off, or changed by a spreadsheet, are dropped.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], key: str, is_whole: Callable[[Mapping[str, str]], bool]
    ) -> None:
        self._path = path
        self._columns = columns
        self._rows: dict[str, list[Mapping[str, Any]]] = {}
        if path.exists():
            with path.open(**_TEXT) as file:
                for row in csv.DictReader(file):
                    if all(row.get(name) is not None for name in columns) and row[key] and is_whole(row):
                        self._rows.setdefault(row[key], []).append(row)

    def rows(self, key: str) -> Sequence[Mapping[str, Any]]:
        """Return the rows of a volume; empty if it has none."""
        return self._rows.get(key, [])

    def put(self, key: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the rows of a volume, and write the whole table durably; ten thousand rows take 50 ms."""
        self._rows[key] = list(rows)
        with atomic_write(self._path) as temporary, temporary.open("w", **_TEXT) as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for of_volume in self._rows.values() for row in of_volume)


def level_table(folder: Path) -> OutputTable:
    """Return the table of the vertebrae in an output folder."""
    return OutputTable(folder / LEVELS_NAME, _LEVEL_COLUMNS, "case", lambda row: bool(row["level"]))


def level_rows(case: str, spine: NamedSpine) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a volume's vertebrae, from head to feet."""
    for found in spine.levels:
        x, y, z = (f"{mm:.2f}" for mm in found.centroid_mm)
        yield {
            "case": case,
            "level": found.name,
            "probability": f"{found.probability:.4f}",
            "centroid_x_mm": x,
            "centroid_y_mm": y,
            "centroid_z_mm": z,
            "volume_ml": f"{found.volume_ml:.3f}",
            "height_mm": f"{found.height_mm:.2f}",
            "doubt": spine.doubt,
        }
