"""How good a run is: whole volumes, patient by patient, on the grid of the file they came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from cspine_data import Cohort, open_cohort
from cspine_train.errors import RunError
from cspine_train.metrics import Overlap, overlap
from cspine_train.prediction import LoadedRun, load_run
from cspine_train.run_folder import EVALUATION_FOLDER


@dataclass(frozen=True)
class PatientScore:
    """How well one patient's volume was segmented.

    Attributes
    ----------
    case, split : str
        Whose volume, and which part of the split it is in.
    voxels : Overlap
        The counts that Dice and IoU are made of.
    """

    case: str
    split: str
    voxels: Overlap

    @property
    def dice(self) -> float:
        """Dice over the whole volume."""
        return self.voxels.dice

    @property
    def iou(self) -> float:
        """Intersection over union over the whole volume."""
        return self.voxels.iou


@dataclass(frozen=True)
class Evaluation:
    """A run's scores, what has to be said beside them, and where they were written."""

    scores: tuple[PatientScore, ...]
    caveats: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def mean_dice(self) -> float:
        """Dice averaged over patients."""
        return mean(score.dice for score in self.scores)

    @property
    def mean_iou(self) -> float:
        """Intersection over union averaged over patients."""
        return mean(score.iou for score in self.scores)


def evaluate(
    run: str | Path,
    splits: Sequence[str] = ("test",),
    store: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Predict every volume of some parts of a run's split, slice by slice, and compare it with its label map.

    Writes `evaluation/<parts>.csv` and `.json` into the run folder.

    Parameters
    ----------
    run : str or Path
        The run folder.
    splits : sequence of str
        ``train``, ``validation`` or ``test``.
    store : str or Path, optional
        The store, where it has moved since the run was trained.
    progress : callable, optional
        Called with (patients done, patients, case id).

    Returns
    -------
    Evaluation
        A score a patient.

    Raises
    ------
    RunError
        If the run cannot be used, the parts hold no patient, or the store holds other data than it was trained on.
    CspineDataError
        If the store cannot be used.
    """
    loaded = load_run(run)
    record = loaded.record
    wanted = [(part, case) for part in splits for case in record.split.cases(part)]
    if not wanted:
        raise RunError(f"{run}: has no {' or '.join(splits)} patients; choose another --split")
    if store is None and "://" not in record.store and not Path(record.store).exists():
        raise RunError(f"{record.store}: is not there any more; say with --store where the store of {run} is now")
    cohort = open_cohort(store or record.store)
    scores = []
    for number, (part, case) in enumerate(wanted, start=1):
        scores.append(PatientScore(case, part, _score(loaded, cohort, case)))
        if progress:
            progress(number, len(wanted), case)
    return _written(loaded, "-".join(splits), tuple(scores))


def _score(loaded: LoadedRun, cohort: Cohort, case: str) -> Overlap:
    variant = loaded.record.settings.variant
    stored = cohort.record(case, variant)
    if stored.digest != loaded.record.digests.get(case):
        now, then = stored.preprocessing, loaded.record.preprocessing
        if now != then:
            raise RunError(
                f"{cohort.path}: holds {case} prepared with {now.description}, and {loaded.path} was trained on "
                f"{then.description}; prepare it so again, or train anew"
            )
        raise RunError(f"{cohort.path}: holds other data of {case} than {loaded.path} was trained with; train it anew")
    probabilities = loaded.on_source_grid(cohort.prepared(case, variant))
    return overlap(probabilities > loaded.record.threshold, cohort.label_xyz(case, variant) != 0)


def _written(loaded: LoadedRun, name: str, scores: tuple[PatientScore, ...]) -> Evaluation:
    folder = loaded.path / EVALUATION_FOLDER
    folder.mkdir(exist_ok=True)
    files = (folder / f"{name}.csv", folder / f"{name}.json")
    evaluation = Evaluation(scores, loaded.record.caveats(), files)
    rows = [
        {
            "case": score.case,
            "split": score.split,
            "dice": round(score.dice, 6),
            "iou": round(score.iou, 6),
            "true_positive_voxels": score.voxels.true_positive,
            "false_positive_voxels": score.voxels.false_positive,
            "false_negative_voxels": score.voxels.false_negative,
            "note": "; ".join(evaluation.caveats),
        }
        for score in scores
    ]
    with files[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "patients": rows,
        "mean_dice": evaluation.mean_dice,
        "mean_iou": evaluation.mean_iou,
        "caveats": evaluation.caveats,
        "settings": loaded.record.settings.model_dump(),
        "digests": {score.case: loaded.record.digests[score.case] for score in scores},
    }
    files[1].write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return evaluation
