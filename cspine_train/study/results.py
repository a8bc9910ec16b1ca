"""Results of a study: one tidy table, a row for each patient of each cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cspine_data import LEVEL_NAMES, SPINE
from cspine_data.tools import atomic_write
from cspine_train.run.evaluations import known_measures, level_rows, patient_measures, patient_of
from cspine_train.run.folder import METRICS_NAME, read_rows, write_text
from cspine_train.run.record import RunRecord
from cspine_train.study.plan import Cell, Plan, weights_name
from cspine_train.study.runner import RUNS_FOLDER, cell_result

#: The tidy table as text, and with its types.
RESULTS_NAME, PARQUET_NAME = "results.csv", "results.parquet"
#: Columns of a condition, which a study compares; runs of its folds and seeds belong to it.
CONDITION = ["model", "encoder", "variant", "axes", "training", "batch_size"]
_ORDER = {LEVEL_NAMES[value]: place for place, value in enumerate(SPINE)}
_WORDS, _INTEGERS = "string", "Int64"
_RUN_COLUMNS = {
    "model": _WORDS, "encoder": _WORDS, "weights": _WORDS, "variant": _WORDS, "axes": _WORDS, "folds": _INTEGERS,
    "fold": _INTEGERS, "test_site": _WORDS, "seed": _INTEGERS, "training": _WORDS, "batch_size": _INTEGERS,
    "kept_epoch": _INTEGERS, "validation_dice": "float64", "train_seconds": "float64", "test_seconds": "float64",
    "patient": _WORDS,
}  # fmt: skip


def study_table(study: Path, plan: Plan) -> pd.DataFrame:
    """Return the tidy table: every measure of every test patient of the finished cells, in the plan's order."""
    return tidy([run | _figures(row) for run, evaluation in _done(study, plan) for row in evaluation["patients"]])


def study_levels(study: Path, plan: Plan) -> pd.DataFrame:
    """Return the tidy table of levels, from head to feet: a row for each true vertebra of each test patient.

    It is empty if the labels of the finished cells are not levels.
    """
    rows = [
        run | _figures(row) | {"level": LEVEL_NAMES[row["label"]]}
        for run, evaluation in _done(study, plan)
        for row in level_rows(evaluation)
    ]
    rows.sort(key=lambda row: _ORDER[row["level"]])
    return tidy(rows).assign(level=pd.Series([row["level"] for row in rows], dtype=_WORDS))


def tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return rows as a table with all columns and their types; missing values stay empty."""
    measured = {measure.name: "float64" for measure in patient_measures()}
    columns = {**_RUN_COLUMNS, **measured, "cell": _WORDS, "note": _WORDS}
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def _done(study: Path, plan: Plan) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Iterate over the finished cells: the columns of the run, and the evaluation of its test patients."""
    for cell in plan.cells:
        if found := cell_result(study, cell):
            record, evaluation = found
            yield _run_columns(study / RUNS_FOLDER / cell.name, cell, record, evaluation), evaluation


def _run_columns(run: Path, cell: Cell, record: RunRecord, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    settings = record.settings
    fold, folds = settings.fold_of or (None, None)
    return {
        "model": settings.model,
        "encoder": settings.encoder,
        "weights": weights_name(settings),
        "variant": settings.variant,
        "axes": settings.axes_name,
        "folds": folds,
        "fold": fold,
        "test_site": settings.test_site,
        "seed": settings.seed,
        "training": settings.length,
        "batch_size": settings.batch_size,
        "kept_epoch": record.kept_epoch,
        "validation_dice": record.kept_dice,
        # Includes the time before an interruption.
        "train_seconds": sum(row["seconds"] for row in read_rows(run / METRICS_NAME, {"seconds": float})),
        "test_seconds": evaluation.get("seconds"),
        "cell": cell.name,
        "note": "; ".join(record.caveats()),
    }


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the patient and the figures of a row; older evaluations lack some measures."""
    figures = {measure.name: float(row[measure.name]) for measure in known_measures([row])}
    return {**figures, "patient": patient_of(row)}


def conditions(table: pd.DataFrame) -> pd.DataFrame:
    """Return the condition of each row of the tidy table; encoders are named with their initial weights."""
    return table[CONDITION].assign(encoder=table.encoder + " (" + table.weights + ")")


def condition_name(condition: tuple[Any, ...]) -> str:
    """Return the name of a condition."""
    model, encoder, variant, axes, training, batch_size = condition
    return f"{model}, {encoder}, {variant}, axis {axes}, {training}, batch {batch_size}"


def scores(table: pd.DataFrame, figure: str = "dice") -> pd.DataFrame:
    """Return a measure by patient (rows) and condition (columns), averaged over the seeds that all conditions have.

    A seed that one condition lacks is left out of all, so that its randomness is not taken for an effect. Missing
    values are NaN.
    """
    known = table.drop(columns=CONDITION).join(conditions(table)).dropna(subset=figure)
    order = known[CONDITION].drop_duplicates()
    by_seed = known.groupby(["patient", "seed", *CONDITION], sort=False)[figure].mean().unstack(CONDITION)
    by_seed = by_seed.reindex(columns=pd.MultiIndex.from_frame(order))
    there = by_seed.notna()
    has_patient = there.groupby(level="patient").transform("any")
    common = by_seed[(there | ~has_patient).all(axis=1)]
    averaged = common.groupby(level="patient", sort=False).mean()
    return averaged.reindex(known.patient.unique()).dropna(how="all").dropna(axis=1, how="all")


def write_results(study: Path, table: pd.DataFrame) -> tuple[Path, Path]:
    """Write the tidy table as CSV and as Parquet, each atomically."""
    write_text(study / RESULTS_NAME, table.to_csv(index=False))
    with atomic_write(study / PARQUET_NAME) as temporary:
        table.to_parquet(temporary, index=False)
    return study / RESULTS_NAME, study / PARQUET_NAME
