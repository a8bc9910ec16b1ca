"""Evaluations in a run folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cspine_train.metrics.overlap import Measure, measures
from cspine_train.metrics.statistics import MeanInterval, mean_interval, of_patients
from cspine_train.run.folder import EVALUATION_FOLDER
from cspine_train.run.record import RunRecord


def patient_measures() -> tuple[Measure, ...]:
    """Return the measures of a patient in an evaluation."""
    return *measures(), Measure("batch_averaged_dice", "batch-averaged Dice")


def mean_over_patients(rows: Sequence[Mapping[str, Any]], measure: Measure) -> MeanInterval | None:
    """Return the mean of a measure over the rows of an evaluation; None unless all rows have it."""
    if not all(measure.name in row for row in rows):
        return None
    return mean_interval(figures_of_patients(rows, measure.name), measure.within)


def figures_of_patients(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return a figure of each patient in the rows of an evaluation, which are by case."""
    return list(of_patients([row[name] for row in rows], [patient_of(row) for row in rows]).values())


def number_of_patients(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of patients in the rows of an evaluation, which are by case."""
    return len(set(map(patient_of, rows)))


def patient_of(row: Mapping[str, Any]) -> str:
    """Return the patient of a row of an evaluation; older evaluations have only the case."""
    return str(row.get("patient") or row["case"])


def recorded_evaluations(run: Path, record: RunRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over a run's evaluations: name, and content of `<name>.json`.

    Evaluations of weights or of postprocessing that the run does not use any more are left out; so are damaged ones,
    with a warning.
    """
    names = [measure.name for measure in patient_measures()]
    # The name of an unfinished file begins with a dot.
    for path in sorted((run / EVALUATION_FOLDER).glob("[!.]*.json")):
        try:
            evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            # Older evaluations do not record the epoch.
            same_weights = evaluation.get("kept_epoch", record.kept_epoch) == record.kept_epoch
            steps = evaluation.get("kept_components"), evaluation.get("filled_holes", False)
            current = same_weights and steps == (record.kept_components, record.filled_holes)
            for row in evaluation["patients"]:
                "".join((row["case"], row["split"])), row["dice"] + 0.0
                sum(row[name] for name in names if name in row)
            evaluation.get("seconds", 0.0) + 0.0
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            warnings.warn(f"{path}: is damaged and left out; evaluate again", stacklevel=2)
        else:
            if current:
                yield path.stem, evaluation
