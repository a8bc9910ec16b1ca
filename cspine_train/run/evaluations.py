"""Evaluations in a run folder."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cspine_data import LEVEL_NAMES, SPINE
from cspine_data.tools import count
from cspine_train.metrics.calibration import CERTAIN, ReliabilityBin, expected_calibration_error, reliability_bins
from cspine_train.metrics.instances import LEVEL_MEASURES, RATE
from cspine_train.metrics.overlap import Measure, measures
from cspine_train.metrics.statistics import MeanInterval, mean_interval, of_patients
from cspine_train.run.folder import EVALUATION_FOLDER
from cspine_train.run.record import RunRecord

#: The reference study's Dice, see `batch_averaged_dice`.
BATCH_AVERAGED = Measure("batch_averaged_dice", "batch-averaged Dice", brief=False)
#: Means over the labels of a patient, see `mean_over_labels`; binary runs have none.
LABEL_MEASURES = (Measure("label_dice", "Dice of labels"), Measure("label_iou", "IoU of labels"))


def patient_measures() -> tuple[Measure, ...]:
    """Return the measures that a patient can have in an evaluation."""
    return *measures(), BATCH_AVERAGED, *LABEL_MEASURES, *LEVEL_MEASURES


def known_measures(rows: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Return the `patient_measures` that at least one row of an evaluation has."""
    return [measure for measure in patient_measures() if any(measure.name in row for row in rows)]


def mean_over_patients(rows: Sequence[Mapping[str, Any]], measure: Measure) -> MeanInterval | None:
    """Return the mean of a measure over the rows of an evaluation; None unless all rows have it."""
    if not all(measure.name in row for row in rows):
        return None
    return mean_interval(figures_of_patients(rows, measure.name), measure.within)


@dataclass(frozen=True)
class LevelMeans:
    """Means of one vertebra over the patients of one split who have it, missed or not.

    Attributes
    ----------
    level : str
        Name of the vertebra.
    split : str
        The split.
    patients : int
        Number of patients who have it.
    means : dict
        Mean of each measure; None if the evaluation lacks the measure.
    """

    level: str
    split: str
    patients: int
    means: Mapping[Measure, MeanInterval | None]

    def text(self, measure: Measure) -> str:
        """Return the mean of a measure, and its interval, as text."""
        mean = self.means[measure]
        return "" if mean is None else mean.text(measure.digits)


def means_of_levels(evaluation: Mapping[str, Any]) -> tuple[LevelMeans, ...]:
    """Return the means of each true level in an evaluation, from head to feet; none if its labels are not levels."""
    rows = level_rows(evaluation)
    measured = known_measures(rows)
    found = []
    for split, value in product(dict.fromkeys(row["split"] for row in rows), SPINE):
        own = [row for row in rows if (row["split"], row["label"]) == (split, value)]
        if own:
            means = {measure: mean_over_patients(own, measure) for measure in measured}
            found.append(LevelMeans(LEVEL_NAMES[value], split, number_of_patients(own), means))
    return tuple(found)


def level_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an evaluation's true vertebrae, missed or not, with the patient of each."""
    patients = {row["case"]: patient_of(row) for row in evaluation["patients"]}
    true = (row for row in evaluation.get("labels", ()) if RATE.name in row)
    return [row | {"patient": patients.get(row["case"])} for row in true]


@dataclass(frozen=True)
class NameReliability:
    """Reliability of the names of the predicted vertebrae of one split whose true level is known.

    Attributes
    ----------
    split : str
        The split.
    patients : int
        Number of patients.
    bins : tuple of ReliabilityBin or None
        The vertebrae by the probability of their names, see `reliability_bins`.
    correct, uncertain_correct : int
        Number of correct names, and of those with a probability below `CERTAIN`.
    wrong, uncertain_wrong : int
        Number of wrong names, and of those with a probability below `CERTAIN`.
    """

    split: str
    patients: int
    bins: tuple[ReliabilityBin | None, ...]
    correct: int
    uncertain_correct: int
    wrong: int
    uncertain_wrong: int

    @property
    def calibration_error(self) -> float:
        """The expected calibration error."""
        return expected_calibration_error(self.bins)

    @property
    def size(self) -> str:
        """Number of names and of patients, as text."""
        names = count(self.correct + self.wrong, "name")
        return f"{names} of vertebrae in {count(self.patients, f'{self.split} patient')}"

    @property
    def uncertainty(self) -> str:
        """How many wrong and correct names were uncertain, as text."""
        if not self.wrong:
            return f"no name was wrong; {self.uncertain_correct} of {self.correct} correct names were uncertain"
        wrong = f"{self.uncertain_wrong} of {self.wrong} wrong names"
        return f"{wrong} and {self.uncertain_correct} of {self.correct} correct names were uncertain"


def reliability_of_names(evaluation: Mapping[str, Any]) -> tuple[NameReliability, ...]:
    """Return the reliability of the names of vertebrae in each split of an evaluation; none without probabilities."""
    patients = {row["case"]: patient_of(row) for row in evaluation["patients"]}
    # Older evaluations have neither.
    rows = [row for row in evaluation.get("labels", ()) if row.get("probability") is not None and row.get("true_level")]
    found = []
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        correct = [LEVEL_NAMES.get(row["label"]) == row["true_level"] for row in own]
        tally = Counter(zip(correct, (row["probability"] < CERTAIN for row in own), strict=True))
        found.append(
            NameReliability(
                split,
                len({patients.get(row["case"]) for row in own}),
                reliability_bins([row["probability"] for row in own], correct),
                correct=sum(correct),
                uncertain_correct=tally[True, True],
                wrong=len(correct) - sum(correct),
                uncertain_wrong=tally[False, True],
            )
        )
    return tuple(found)


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

    Evaluations with weights, postprocessing or calibration that the run no longer uses are left out. So are damaged
    ones, with a warning.
    """
    names = [measure.name for measure in patient_measures()]
    # The name of an unfinished file begins with a dot.
    for path in sorted((run / EVALUATION_FOLDER).glob("[!.]*.json")):
        try:
            evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            # Older evaluations do not record the epoch.
            same_weights = evaluation.get("kept_epoch", record.kept_epoch) == record.kept_epoch
            steps = evaluation.get("kept_components"), evaluation.get("filled_holes", False)
            calibration = {name: getattr(record, name) for name in ("level_temperature", "threshold")}
            calibrated = all(evaluation.get(name, value) == value for name, value in calibration.items())
            current = same_weights and calibrated and steps == (record.kept_components, record.filled_holes)
            for row in (*evaluation["patients"], *evaluation.get("labels", ())):
                "".join((row["case"], row["split"])), row["dice"] + 0.0
                sum(row[name] for name in names if name in row)
            for row in evaluation.get("labels", ()):
                row["label"] + 0
                if not 0 <= (row.get("probability") or 0) <= 1:
                    raise ValueError(f"probability {row['probability']}")
            evaluation.get("seconds", 0.0) + 0.0
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            warnings.warn(f"{path}: is damaged and left out; evaluate again", stacklevel=2)
        else:
            if current:
                yield path.stem, evaluation
