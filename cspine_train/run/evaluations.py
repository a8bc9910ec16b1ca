"""The evaluations that lie in a run folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cspine_train.metrics.overlap import MEASURES, Measure
from cspine_train.metrics.statistics import MeanInterval, mean_interval
from cspine_train.run.folder import EVALUATION_FOLDER
from cspine_train.run.record import RunRecord

#: Measures of a patient.
SHOWN: tuple[Measure, ...] = (*MEASURES, Measure("batch_averaged_dice", "batch-averaged Dice"))
FIGURES = tuple(measure.name for measure in SHOWN)


def mean_over_patients(rows: Sequence[Mapping[str, Any]], measure: Measure) -> MeanInterval | None:
    """Return the mean of a measure over the rows of an evaluation; None unless all have it, as older ones may not."""
    if not all(measure.name in row for row in rows):
        return None
    return mean_interval([row[measure.name] for row in rows], measure.within)


def recorded_evaluations(run: Path, record: RunRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the evaluations of what a run predicts in the end: name, and what `<name>.json` holds.

    Those of weights that a run did not keep, or of other postprocessing, are left out; so are damaged ones, with a
    warning.
    """
    # One that begins with a dot was being written when its process was killed.
    for path in sorted((run / EVALUATION_FOLDER).glob("[!.]*.json")):
        try:
            evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            # Evaluations of an older cspine do not say; it evaluated finished runs as well as others.
            same_weights = evaluation.get("kept_epoch", record.kept_epoch) == record.kept_epoch
            steps = evaluation.get("kept_components"), evaluation.get("filled_holes", False)
            current = same_weights and steps == (record.kept_components, record.filled_holes)
            for row in evaluation["patients"]:
                "".join((row["case"], row["split"])), row["dice"] + 0.0
                sum(row[figure] for figure in FIGURES if figure in row)
            evaluation.get("seconds", 0.0) + 0.0
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            warnings.warn(f"{path}: is damaged and left out; evaluate again", stacklevel=2)
        else:
            if current:
                yield path.stem, evaluation
