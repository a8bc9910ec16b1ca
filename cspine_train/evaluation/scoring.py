"""Evaluation of a run on whole volumes, per patient, on the grid of their source."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cspine_data import LEVEL_NAMES, Cohort, CspineDataError, Problem, open_cohort
from cspine_data.tools import count, make_folder
from cspine_train.errors import RunError
from cspine_train.evaluation.patient_score import PatientScore, score_patient
from cspine_train.metrics.overlap import Overlap
from cspine_train.metrics.statistics import MeanInterval
from cspine_train.prediction.overlays import BEST, MEDIAN, WORST, Gallery
from cspine_train.prediction.predictor import LoadedRun, load_run
from cspine_train.prediction.stored_volumes import check_trained_on, segment
from cspine_train.reports.figures import never_fatal
from cspine_train.reports.model_card import write_card
from cspine_train.reports.run_report import write_report
from cspine_train.run.evaluations import (
    LevelMeans,
    NameReliability,
    known_measures,
    mean_over_patients,
    means_of_levels,
    reliability_of_names,
)
from cspine_train.run.folder import CARD_NAME, EVALUATION_FOLDER, REPORT_NAME, only_writer, write_rows, write_text
from cspine_train.run.record import load_record


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run, with caveats and the files that hold them.

    Attributes
    ----------
    scores : tuple of PatientScore
        Scores of each patient.
    caveats : tuple of str
        Notes that belong beside the scores.
    files : tuple of Path
        The written files.
    means : dict
        Means over patients by split and name, see `PatientScore.figures`. Splits are apart, as validation patients
        chose epoch and threshold.
    failed : tuple of Problem
        Patients whose volumes could not be read from the store; they are in no figure.
    levels : tuple of LevelMeans
        Means of each level; empty if the run's labels are not levels.
    names : tuple of NameReliability
        Reliability of the names of vertebrae in each split; empty if the run's labels are not levels.
    """

    scores: tuple[PatientScore, ...]
    caveats: tuple[str, ...]
    files: tuple[Path, ...]
    means: Mapping[str, Mapping[str, MeanInterval]]
    failed: tuple[Problem, ...] = ()
    levels: tuple[LevelMeans, ...] = ()
    names: tuple[NameReliability, ...] = ()

    def patients(self, split: str) -> int:
        """Return the number of scored patients of a split."""
        return len({score.patient for score in self.scores if score.split == split})

    def expected_dice_errors(self, split: str) -> list[float]:
        """Return the difference of the expected from the true Dice of each patient of a split who has both."""
        return [
            score.expected_dice - score.dice
            for score in self.scores
            if score.split == split and score.expected_dice is not None
        ]

    @property
    def mean_dice(self) -> float:
        """Mean Dice over patients; a `RunError` for patients of several splits, see `means`."""
        return self._of_one_split["dice"].mean

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union over patients; a `RunError` for patients of several splits."""
        return self._of_one_split["iou"].mean

    @property
    def mean_label_dice(self) -> float | None:
        """Mean over patients of `PatientScore.label_dice`; None for binary labels."""
        found = self._of_one_split.get("label_dice")
        return None if found is None else found.mean

    @property
    def mean_label_iou(self) -> float | None:
        """Mean over patients of `PatientScore.label_iou`; None for binary labels."""
        found = self._of_one_split.get("label_iou")
        return None if found is None else found.mean

    @property
    def _of_one_split(self) -> Mapping[str, MeanInterval]:
        if len(self.means) > 1:
            raise RunError(f"{' and '.join(self.means)} patients are not averaged together; use `means`")
        return next(iter(self.means.values()))


def evaluate(
    run: str | Path,
    splits: Sequence[str] = ("test",),
    store: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Predict all volumes of parts of a run's split, and compare them with their label maps.

    Writes into the run folder: `evaluation/<parts>.csv` and `.json`, the scores; `<parts>-slices.csv`, a row for each
    slice; with several labels `<parts>-labels.csv` and `<parts>-confusion.csv`; pictures of the best, median and worst
    slices; `report.html` with all of these; and the scores in `MODEL_CARD.md`.

    Parameters
    ----------
    run : str or Path
        The run folder.
    splits : sequence of str
        ``train``, ``validation`` or ``test``.
    store : str or Path, optional
        The store, if it has moved since training, or is at a URL.
    progress : callable, optional
        Called with (patients done, patients, case id).

    Returns
    -------
    Evaluation
        Scores of each patient.

    Raises
    ------
    RunError
        If the run cannot be used, another process trains or evaluates it, the parts have no labelled patient, the store
        holds other data than at training, or a plug-in's measure fails.
    CspineDataError
        If the store, or all patients in it, cannot be read. If only some cannot, the others are scored.
    """
    # Before the lock creates a file in a folder that is no run.
    load_record(Path(run))
    with only_writer(Path(run)):
        return _evaluate(run, splits, store, progress)


def _evaluate(
    run: str | Path,
    splits: Sequence[str],
    store: str | Path | None,
    progress: Callable[[int, int, str], None] | None,
) -> Evaluation:
    started = time.monotonic()
    loaded = load_run(run)
    record = loaded.record
    splits = tuple(dict.fromkeys(splits))
    wanted = [(part, case) for part in splits for case in record.split.cases(part)]
    if not wanted:
        raise RunError(f"{run}: has no {' or '.join(splits)} patients; choose another --split")
    if store is None and "://" in record.store:
        # The run folder may come from anybody: its address is not trusted.
        raise RunError(f"{run}: its store is at {record.store}; name it with --store to read from there")
    if store is None and not Path(record.store).exists():
        raise RunError(f"{record.store}: does not exist any more; give the location of the store of {run} with --store")
    cohort = open_cohort(store or record.store)
    for _, case in wanted:
        check_trained_on(loaded, cohort, case)
    wanted, nothing = _labelled(loaded, cohort, wanted)
    gallery = Gallery(record.settings.axes, (BEST, MEDIAN, WORST), record.vertebrae)
    scores, failed = [], []
    for number, (part, case) in enumerate(wanted, start=1):
        try:
            volume = segment(loaded, cohort, case)
        except CspineDataError as error:
            failed.append(Problem(case, str(error)))
            if len(failed) == len(wanted):
                raise
        else:
            scores.append(score_patient(volume, part, loaded))
            gallery.add(volume, scores[-1].label_dice)
        if progress:
            progress(number, len(wanted), case)
    name = "-".join(splits)
    folder = loaded.path / EVALUATION_FOLDER
    make_folder(folder)
    pictures: list[Path] = []
    # Before the scores, which mark the evaluation as complete.
    with never_fatal(f"{folder}: pictures"):
        of = count(len({score.patient for score in scores}), f"{' and '.join(splits)} patient")
        pictures += gallery.draw(folder, f"{name}-", of, record.caveats())
    evaluation = _written(loaded, name, tuple(scores), tuple(failed), time.monotonic() - started, nothing)
    files = [*evaluation.files, *pictures]
    with never_fatal(f"{loaded.path / REPORT_NAME}"):
        files.append(write_report(loaded.path, record))
    with never_fatal(f"{loaded.path / CARD_NAME}"):
        write_card(loaded.path, record)
    return replace(evaluation, files=tuple(files))


def _labelled(
    loaded: LoadedRun, cohort: Cohort, wanted: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the labelled patients, by part and case, and the cases of the others; refuse if none is labelled."""
    labelled, nothing = [], []
    for part, case in wanted:
        if cohort.record(case, loaded.record.settings.variant).labels:
            labelled.append((part, case))
        else:
            nothing.append(case)
    if not labelled:
        raise RunError(
            f"{cohort.path}: the label maps of {', '.join(nothing)} label nothing, and there is no other patient; "
            "choose another --split"
        )
    return labelled, nothing


def _written(
    loaded: LoadedRun,
    name: str,
    scores: tuple[PatientScore, ...],
    failed: tuple[Problem, ...],
    seconds: float,
    nothing: Sequence[str] = (),
) -> Evaluation:
    folder = loaded.path / EVALUATION_FOLDER
    record = loaded.record
    several = bool(record.label_values)
    endings = (".csv", ".json", "-slices.csv", *(("-labels.csv", "-confusion.csv") if several else ()))
    files = tuple(folder / f"{name}{ending}" for ending in endings)
    caveats = record.caveats()
    if failed:
        caveats += (f"not scored, as the store is damaged: {', '.join(problem.case for problem in failed)}",)
    if nothing:
        caveats += (f"not scored, as their label maps label nothing: {', '.join(nothing)}",)
    parts = dict.fromkeys(score.split for score in scores)
    means = {part: _means([score for score in scores if score.split == part]) for part in parts}
    evaluation = Evaluation(scores, caveats, files, means, failed)
    note = "; ".join(evaluation.caveats)
    rows = [_row(score, note) for score in scores]
    write_rows(files[0], rows[0].keys(), rows)
    slice_rows = [row for score in scores for row in _slice_rows(score)]
    write_rows(files[2], ("case", "split", "axis", "slice", *_counts(scores[0].voxels)), slice_rows)
    summary: dict[str, Any] = {
        "patients": rows,
        "means": {part: {name: vars(one) for name, one in of_part.items()} for part, of_part in means.items()},
        "seconds": round(seconds, 1),
        "failed": {problem.case: problem.message for problem in failed},
        "caveats": evaluation.caveats,
        "settings": record.settings.model_dump(),
        # A run that is not finished may keep another epoch in the end.
        "kept_epoch": record.kept_epoch,
        "kept_components": record.kept_components,
        "filled_holes": record.filled_holes,
        "level_temperature": record.level_temperature,
        "threshold": record.threshold,
        "digests": {score.case: record.digests[score.case] for score in scores},
    }
    if several:
        label_rows = [row for score in scores for row in _label_rows(score, note, record.vertebrae)]
        # A level that only the prediction has lacks some figures.
        columns = dict.fromkeys(name for row in label_rows for name in row if name != "note")
        write_rows(files[3], (*columns, "note"), label_rows)
        confusion_rows = [row for score in scores for row in _confusion_rows(score)]
        write_rows(files[4], ("case", "split", "true_label", "found_label", "voxels"), confusion_rows)
        summary["labels"] = label_rows
    if len(means) == 1:
        names = ("dice", "iou", *(("label_dice", "label_iou") if several else ()))
        summary |= {f"mean_{name}": getattr(evaluation, f"mean_{name}") for name in names}
    write_text(files[1], json.dumps(summary, indent=1))
    return replace(evaluation, levels=means_of_levels(summary), names=reliability_of_names(summary))


def _means(scores: Sequence[PatientScore]) -> dict[str, MeanInterval]:
    """Return the means over patients of one split."""
    rows = [{"case": score.case, "patient": score.patient, **score.figures} for score in scores]
    means = {measure.name: mean_over_patients(rows, measure) for measure in known_measures(rows)}
    return {name: one for name, one in means.items() if one}


def _row(score: PatientScore, note: str) -> dict[str, Any]:
    known = {"case": score.case, "patient": score.patient, "split": score.split}
    expected = {} if score.expected_dice is None else {"expected_dice": round(score.expected_dice, 6)}
    return known | _figures(score.voxels, score.figures) | expected | {"note": note}


def _label_rows(score: PatientScore, note: str, vertebrae: Container[int]) -> Iterator[dict[str, Any]]:
    for value, of_label in (score.labels or {}).items():
        known: dict[str, Any] = {"case": score.case, "split": score.split, "label": value}
        figures = of_label.figures
        if score.levels:
            known["level"] = LEVEL_NAMES[value] if value in vertebrae else ""
            probability = score.probabilities.get(value)
            known["probability"] = None if probability is None else round(probability, 6)
            known["true_level"] = LEVEL_NAMES.get(score.true_levels.get(value, 0), "")
            figures = {**figures, **score.levels.figures_of(value)}
        yield known | _figures(of_label.voxels, figures) | {"note": note}


def _confusion_rows(score: PatientScore) -> Iterator[dict[str, Any]]:
    known = {"case": score.case, "split": score.split}
    for (true, found), voxels in score.confusion.items():
        yield known | {"true_label": true, "found_label": found, "voxels": voxels}


def _slice_rows(score: PatientScore) -> Iterator[dict[str, Any]]:
    for axis, of_axis in score.slices.items():
        for index, voxels in of_axis.items():
            yield {"case": score.case, "split": score.split, "axis": axis, "slice": index, **_counts(voxels)}


def _figures(voxels: Overlap, figures: Mapping[str, float]) -> dict[str, Any]:
    return _counts(voxels) | {name: round(figure, 6) for name, figure in figures.items()}


def _counts(voxels: Overlap) -> dict[str, Any]:
    return {
        "dice": round(voxels.dice, 6),
        "iou": round(voxels.iou, 6),
        "true_positive_voxels": voxels.true_positive,
        "false_positive_voxels": voxels.false_positive,
        "false_negative_voxels": voxels.false_negative,
    }
