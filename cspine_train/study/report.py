"""Results that a study writes into its folder: the tidy table, tables as Markdown, and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_data.tools import count
from cspine_train.reports.run_report import embedded_pictures, page, slice_plots
from cspine_train.run.folder import EVALUATION_FOLDER, METRICS_NAME, REPORT_NAME, read_rows, write_text
from cspine_train.study.plan import Plan, load_plan
from cspine_train.study.results import condition_name, conditions, scores, study_levels, study_table, write_results
from cspine_train.study.runner import FAILURES_NAME, RUNS_FOLDER
from cspine_train.study.tables import MARKDOWN, Findings, Table, findings, rendered

#: The tables as Markdown.
TABLES_NAME = "tables.md"


def study_findings(study: str | Path) -> tuple[Findings, pd.DataFrame, Plan]:
    """Return findings, tidy table and plan of a study so far; a `RunError` if the folder is no study."""
    folder = Path(study)
    plan = load_plan(folder)
    table = study_table(folder, plan)
    done = set(table.cell)
    unfinished = [cell.name for cell in plan.cells if cell.name not in done]
    return findings(table, unfinished, study_levels(folder, plan)), table, plan


def write_outcome(study: str | Path) -> tuple[Findings, tuple[Path, ...]]:
    """Write `results.csv`, `results.parquet`, `tables.md` and `report.html` into a study's folder.

    Returns the findings and the files; raises `RunError` if the folder is no study.
    """
    folder = Path(study)
    found, table, plan = study_findings(folder)
    written = write_results(folder, table)
    write_text(folder / TABLES_NAME, rendered(found, MARKDOWN))
    write_text(folder / REPORT_NAME, _page(folder, plan, found, table))
    return found, (*written, folder / TABLES_NAME, folder / REPORT_NAME)


def _page(study: Path, plan: Plan, found: Findings, table: pd.DataFrame) -> str:
    one_each = table.drop_duplicates("cell")
    cells = dict(zip(one_each.cell, _cell_titles(one_each), strict=True))
    return page(
        "study.html.jinja",
        title=f"Study of {count(len(plan.cells), 'cell')}, {len(cells)} of them done",
        answer=found.answer,
        caveats=found.caveats,
        tables=[*found.tables, *_failures(study), _costs(one_each)],
        patients=list(_patients(table)),
        curves=list(_curves(study, cells)),
        shown=list(_shown(study, table, cells)),
    )


def _cell_titles(cells: pd.DataFrame) -> Iterator[str]:
    named = conditions(cells).itertuples(index=False, name=None)
    for condition, row in zip(named, cells.itertuples(), strict=True):
        fold = "" if pd.isna(row.folds) else f", fold {row.fold} of {row.folds}"
        fold += "" if pd.isna(row.test_site) else f", test site {row.test_site}"
        yield f"{condition_name(condition)}{fold}, seed {row.seed}"


def _failures(study: Path) -> Iterator[Table]:
    failed = read_rows(study / FAILURES_NAME, {"cell": str, "reason": str})
    if failed:
        yield Table("Cells that failed", pd.DataFrame(failed))


def _costs(cells: pd.DataFrame) -> Table:
    minutes = (cells.train_seconds + cells.test_seconds.fillna(0)) / 60
    frame = pd.DataFrame(
        {
            "cell": cells.cell,
            "kept epoch": (cells.kept_epoch.fillna(0) + 1).astype(str),
            "validation Dice": cells.validation_dice.map(lambda dice: "" if pd.isna(dice) else f"{dice:.4f}"),
            "minutes": minutes.map("{:.1f}".format),
        },
        dtype="object",
    )
    note = f"Epochs and test together: {minutes.sum():.1f} minutes. Epochs are counted from 1."
    return Table("Time of each cell", frame, (note,))


def _patients(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for condition, dice in scores(table).items():
        dots = [{"x": f"{10 + 300 * one:.1f}", "caption": f"{name}: {one:.4f}"} for name, one in dice.dropna().items()]
        yield {"caption": condition_name(condition), "dots": dots}


def _curves(study: Path, cells: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for cell, title in cells.items():
        rows = read_rows(study / RUNS_FOLDER / cell / METRICS_NAME, {"valid_dice": float})
        dice = [row["valid_dice"] for row in rows]
        step = 285 / max(1, len(dice) - 1)
        path = " ".join(f"{'L' if n else 'M'}{30 + n * step:.1f} {100 - 95 * d:.1f}" for n, d in enumerate(dice))
        # A single point would be invisible.
        path += " h3" if len(dice) == 1 else ""
        yield {"caption": f"{title}: {max(dice, default=0.0):.3f}", "last": len(dice), "path": path}


def _shown(study: Path, table: pd.DataFrame, cells: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Iterate over the cells with the highest, the median and the lowest mean Dice: pictures and plots of slices."""
    dice = table.groupby("cell", sort=False).dice.agg(["mean", "size"])
    dice = dice.sort_values("mean", ascending=False, kind="stable")
    places = {"Highest": 0, "Median": len(dice) // 2, "Lowest": len(dice) - 1} if len(dice) else {}
    for kind, place in places.items():
        cell, (mean, patients) = dice.index[place], dice.iloc[place]
        folder = study / RUNS_FOLDER / cell / EVALUATION_FOLDER
        yield {
            # Examples, not a ranking: often a cell has one or two patients.
            "title": f"{kind} Dice of a cell",
            "caption": (
                f"{cells[cell]}: mean Dice {mean:.4f} of {count(int(patients), 'patient')} ({RUNS_FOLDER}/{cell})"
            ),
            "pictures": embedded_pictures(
                (folder / f"test-{which}.png", f"slices of {which} Dice") for which in ("best", "median", "worst")
            ),
            "plots": list(slice_plots(folder / "test-slices.csv")),
        }
