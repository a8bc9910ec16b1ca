"""What came out of a study: one tidy table, a row for each patient of each cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cspine_data.tools import atomic_write
from cspine_train.run.evaluations import FIGURES
from cspine_train.run.folder import METRICS_NAME, read_rows, write_rows
from cspine_train.run.settings import RunRecord
from cspine_train.study.plan import Cell, Plan, start_told
from cspine_train.study.runner import RUNS_FOLDER, what_came_out

#: The table, for people and programs of all kinds, and with its types.
RESULTS_NAME, PARQUET_NAME = "results.csv", "results.parquet"


class Condition(NamedTuple):
    """What is compared in a study; its folds and seeds are one condition."""

    model: str
    encoder: str
    variant: str
    axes: str
    epochs: int
    batch_size: int

    def told(self) -> str:
        """Return what it is, for people."""
        trained = f"epochs {self.epochs}, batch {self.batch_size}"
        return f"{self.model}, {self.encoder}, {self.variant}, axis {self.axes}, {trained}"


def condition_of(row: Mapping[str, Any]) -> Condition:
    """Return the condition that a row of the table belongs to."""
    encoder = f"{row['encoder']} ({row['weights']})"
    return Condition(row["model"], encoder, row["variant"], row["axes"], row["epochs"], row["batch_size"])


def study_rows(study: Path, plan: Plan) -> list[dict[str, Any]]:
    """Return the table's rows: every figure of every test patient of the cells that are done, in the plan's order."""
    found = ((cell, what_came_out(study, cell)) for cell in plan.cells)
    return [row for cell, known in found if known for row in _rows(study / RUNS_FOLDER / cell.name, cell, *known)]


def _rows(run: Path, cell: Cell, record: RunRecord, evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    settings = record.settings
    known = {
        "model": settings.model,
        "encoder": settings.encoder,
        "weights": start_told(settings),
        "variant": settings.variant,
        "axes": settings.axes_name,
        "folds": settings.folds,
        "fold": settings.fold if settings.folds else None,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "kept_epoch": record.kept_epoch,
        "validation_dice": record.kept_dice,
        # Over all its interruptions.
        "train_seconds": sum(row["seconds"] for row in read_rows(run / METRICS_NAME, {"seconds": float})),
        "test_seconds": evaluation.get("seconds"),
    }
    beside = {"cell": cell.name, "note": "; ".join(record.caveats())}
    for row in evaluation["patients"]:
        figures = {figure: float(row[figure]) for figure in FIGURES if figure in row}
        yield known | {"patient": str(row["case"])} | figures | beside


def scores(rows: Sequence[Mapping[str, Any]], figure: str = "dice") -> dict[Condition, dict[str, float]]:
    """Return a figure of each patient under each condition, averaged over the seeds that all have it under.

    The luck of a seed is not to be taken for what a condition does: where one lacks it, the others are without it.
    """
    found: dict[Condition, dict[str, dict[int, float]]] = {}
    common: dict[str, set[int]] = {}
    for row in rows:
        if figure in row:
            found.setdefault(condition_of(row), {}).setdefault(row["patient"], {})[row["seed"]] = row[figure]
    for patients in found.values():
        for patient, seeds in patients.items():
            common[patient] = common.get(patient, set(seeds)) & set(seeds)
    averaged = {
        condition: {
            patient: sum(seeds[seed] for seed in sorted(common[patient])) / len(common[patient])
            for patient, seeds in patients.items()
            if common[patient]
        }
        for condition, patients in found.items()
    }
    return {condition: patients for condition, patients in averaged.items() if patients}


def write_results(study: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Write the table as CSV and as Parquet, each in one step."""
    import pyarrow as pa
    from pyarrow import parquet

    words, numbers = pa.string(), pa.int64()
    types = {
        "model": words, "encoder": words, "weights": words, "variant": words, "axes": words, "folds": numbers,
        "fold": numbers, "seed": numbers, "epochs": numbers, "batch_size": numbers, "kept_epoch": numbers,
        "validation_dice": pa.float64(), "train_seconds": pa.float64(), "test_seconds": pa.float64(), "patient": words,
        **dict.fromkeys(FIGURES, pa.float64()), "cell": words, "note": words,
    }  # fmt: skip
    write_rows(study / RESULTS_NAME, types, rows)
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(types.items()))
    with atomic_write(study / PARQUET_NAME) as temporary:
        parquet.write_table(table, temporary)
    return study / RESULTS_NAME, study / PARQUET_NAME
