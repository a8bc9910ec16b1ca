"""Tables of an output folder: what was written is read, replaced by volume, and what was cut off is dropped."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from cspine_train.levels.naming import FoundLevel, NamedSpine
from cspine_train.prediction.output_tables import level_rows, level_table

SPINE = NamedSpine(
    (
        FoundLevel(3, "C3", 0.98, (1.0, -2.5, 40.25), 5.4321, 14.126),
        FoundLevel(4, "C4", 0.5, (1.5, -3.5, 25.0), 6.0, 15.0),
    ),
    doubt='C3 or C4 at the top, "perhaps"',
)


def test_a_row_for_each_vertebra_from_head_to_feet(tmp_path: Path) -> None:
    level_table(tmp_path).put("sub/A", level_rows("sub/A", SPINE))
    table = pd.read_csv(tmp_path / "levels.csv")
    assert list(table.columns) == [
        "case", "level", "probability", "centroid_x_mm", "centroid_y_mm", "centroid_z_mm", "volume_ml", "height_mm",
        "doubt",
    ]  # fmt: skip
    assert table.level.tolist() == ["C3", "C4"]
    assert table.probability.tolist() == [0.98, 0.5]
    assert table[["centroid_x_mm", "centroid_y_mm", "centroid_z_mm"]].to_numpy().tolist() == [
        [1.0, -2.5, 40.25],
        [1.5, -3.5, 25.0],
    ]
    assert table.volume_ml.tolist() == pytest.approx([5.432, 6.0])
    assert table.height_mm.tolist() == pytest.approx([14.13, 15.0])
    assert set(table.case) == {"sub/A"}
    assert set(table.doubt) == {SPINE.doubt}


def test_rows_of_a_volume_are_replaced_and_those_of_others_stay(tmp_path: Path) -> None:
    for case in ("A", "B"):
        level_table(tmp_path).put(case, level_rows(case, SPINE))
    level_table(tmp_path).put("A", level_rows("A", NamedSpine(SPINE.levels[1:])))
    table = pd.read_csv(tmp_path / "levels.csv", keep_default_na=False)
    assert list(zip(table.case, table.level, table.doubt, strict=True)) == [
        ("A", "C4", ""),
        ("B", "C3", SPINE.doubt),
        ("B", "C4", SPINE.doubt),
    ]


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    level_table(tmp_path).put("A", level_rows("A", SPINE))
    with (tmp_path / "levels.csv").open("a") as file:
        file.write("B,C3,0.9")
    assert len(level_table(tmp_path).rows("A")) == 2
    assert not level_table(tmp_path).rows("B")
