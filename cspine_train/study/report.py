"""All that came out of a study, written into its folder: the tidy table, tables to read, and one page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cspine_train.reports.run_report import embedded_pictures, page, slice_plots
from cspine_train.run.folder import EVALUATION_FOLDER, METRICS_NAME, REPORT_NAME, read_rows, write_text
from cspine_train.study.plan import Plan, load_plan
from cspine_train.study.ranking import counted
from cspine_train.study.results import condition_of, scores, study_rows, write_results
from cspine_train.study.runner import FAILURES_NAME, RUNS_FOLDER
from cspine_train.study.tables import MARKDOWN, Findings, Table, findings, rendered

#: The tables, for people.
TABLES_NAME = "tables.md"


def study_findings(study: str | Path) -> tuple[Findings, list[dict[str, Any]], Plan]:
    """Return what is known of a study so far: findings, the tidy table's rows, and what was planned.

    Raises
    ------
    RunError
        If the folder is no study.
    """
    folder = Path(study)
    plan = load_plan(folder)
    rows = study_rows(folder, plan)
    done = {row["cell"] for row in rows}
    return findings(rows, [cell.name for cell in plan.cells if cell.name not in done]), rows, plan


def write_outcome(study: str | Path) -> tuple[Findings, tuple[Path, ...]]:
    """Write `results.csv`, `results.parquet`, `tables.md` and `report.html` into a study's folder.

    Returns
    -------
    found : Findings
        What they say.
    files : tuple of Path
        Which they are.

    Raises
    ------
    RunError
        If the folder is no study.
    """
    folder = Path(study)
    found, rows, plan = study_findings(folder)
    written = write_results(folder, rows)
    write_text(folder / TABLES_NAME, rendered(found, MARKDOWN))
    write_text(folder / REPORT_NAME, _page(folder, plan, found, rows))
    return found, (*written, folder / TABLES_NAME, folder / REPORT_NAME)


def _page(study: Path, plan: Plan, found: Findings, rows: Sequence[Mapping[str, Any]]) -> str:
    from markupsafe import Markup

    script = files("cspine_train.study").joinpath("study.js").read_text(encoding="utf-8")
    cells = {row["cell"]: _told(row) for row in rows}
    return page(
        "study/study.html.jinja",
        title=f"Study of {counted(len(plan.cells), 'cell')}, {len(cells)} of them done",
        answer=found.answer,
        caveats=found.caveats,
        tables=[*found.tables, *_failures(study), _costs(rows)],
        patients=list(_patients(rows)),
        curves=list(_curves(study, cells)),
        shown=list(_shown(study, rows, cells)),
        # Ours, and known to the browser by its digest: no other is run.
        script=Markup(script),  # noqa: S704
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _failures(study: Path) -> Iterator[Table]:
    failed = read_rows(study / FAILURES_NAME, {"cell": str, "reason": str})
    if failed:
        yield Table("Cells that failed", ("cell", "reason"), tuple((row["cell"], row["reason"]) for row in failed))


def _costs(rows: Sequence[Mapping[str, Any]]) -> Table:
    of_cell = {row["cell"]: row for row in rows}
    minutes = {cell: (row["train_seconds"] + (row["test_seconds"] or 0.0)) / 60 for cell, row in of_cell.items()}
    told = tuple(
        (cell, str((row["kept_epoch"] or 0) + 1), _dice(row["validation_dice"]), f"{minutes[cell]:.1f}")
        for cell, row in of_cell.items()
    )
    note = f"Epochs and test together: {sum(minutes.values()):.1f} minutes. Epochs are counted from 1."
    return Table("What each cell took", ("cell", "kept epoch", "validation Dice", "minutes"), told, (note,))


def _dice(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.4f}"


def _patients(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for condition, of_patients in scores(rows).items():
        dots = [
            {"x": f"{10 + 300 * dice:.1f}", "told": f"{patient}: {dice:.4f}"} for patient, dice in of_patients.items()
        ]
        yield {"told": condition.told(), "dots": dots}


def _told(row: Mapping[str, Any]) -> str:
    fold = f", fold {row['fold']} of {row['folds']}" if row["folds"] else ""
    return f"{condition_of(row).told()}{fold}, seed {row['seed']}"


def _curves(study: Path, cells: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for cell, told in cells.items():
        rows = read_rows(study / RUNS_FOLDER / cell / METRICS_NAME, {"valid_dice": float})
        dice = [row["valid_dice"] for row in rows]
        step = 285 / max(1, len(dice) - 1)
        path = " ".join(f"{'L' if n else 'M'}{30 + n * step:.1f} {100 - 95 * d:.1f}" for n, d in enumerate(dice))
        # Of one epoch a point would not be seen.
        path += " h3" if len(dice) == 1 else ""
        yield {"told": f"{told}: {max(dice, default=0.0):.3f}", "last": len(dice), "path": path}


def _shown(study: Path, rows: Sequence[Mapping[str, Any]], cells: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Iterate over the cells of the highest, the median and the lowest mean Dice: their pictures and slices."""
    dice: dict[str, list[float]] = {}
    for row in rows:
        dice.setdefault(row["cell"], []).append(row["dice"])
    means = {cell: sum(figures) / len(figures) for cell, figures in dice.items()}
    order = sorted(means, key=lambda cell: -means[cell])
    places = {"Highest": 0, "Median": len(order) // 2, "Lowest": len(order) - 1} if order else {}
    for kind, place in places.items():
        cell = order[place]
        folder = study / RUNS_FOLDER / cell / EVALUATION_FOLDER
        yield {
            # Often of one or two patients each: pictures to look at, not a ranking.
            "title": f"{kind} Dice of a cell",
            "told": (
                f"{cells[cell]}: mean Dice {means[cell]:.4f} of {counted(len(dice[cell]), 'patient')} "
                f"({RUNS_FOLDER}/{cell})"
            ),
            "pictures": embedded_pictures(
                (folder / f"test-{which}.png", f"slices of {which} Dice") for which in ("best", "median", "worst")
            ),
            "plots": list(slice_plots(folder / "test-slices.csv")),
        }
