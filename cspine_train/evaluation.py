"""How good a run is: whole volumes, patient by patient, on the grid of the file they came from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from numpy.typing import NDArray

from cspine_data import Cohort, open_cohort
from cspine_train.components import largest_components
from cspine_train.errors import RunError
from cspine_train.metrics import Overlap, label_overlaps, mean_over_labels, overlap
from cspine_train.model_card import write_card
from cspine_train.prediction import LoadedRun, label_map, load_run
from cspine_train.run_folder import EVALUATION_FOLDER, write_rows, write_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatientScore:
    """How well one patient's volume was segmented.

    Attributes
    ----------
    case, split : str
        Whose volume, and which part of the split it is in.
    voxels : Overlap
        The counts that Dice and IoU are made of: vertebra or not, whatever the labels.
    labels : dict or None
        The same for each label value that the patient has or was given; None for a run on binary labels.
    """

    case: str
    split: str
    voxels: Overlap
    labels: Mapping[int, Overlap] | None = None

    @property
    def dice(self) -> float:
        """Dice over the whole volume."""
        return self.voxels.dice

    @property
    def iou(self) -> float:
        """Intersection over union over the whole volume."""
        return self.voxels.iou

    @property
    def label_dice(self) -> float | None:
        """Mean Dice over the labels that the patient has, see `mean_over_labels`; None for binary labels."""
        return None if self.labels is None else mean_over_labels(self.labels, "dice")

    @property
    def label_iou(self) -> float | None:
        """Mean intersection over union over the labels that the patient has; None for binary labels."""
        return None if self.labels is None else mean_over_labels(self.labels, "iou")


@dataclass(frozen=True, eq=False)
class Segmented:
    """A labelled volume, what was found in it and what is true, all (x, y, z) on the grid of its source.

    Attributes
    ----------
    case : str
        Whose volume.
    image_xyz : ndarray
        Intensities, corrected as for the run.
    spacing_mm : tuple of float
        Voxel spacing along x, y and z.
    found_xyz, truth_xyz : ndarray
        Label values that were found, and those that are true; 0 is none.
    """

    case: str
    image_xyz: NDArray[Any]
    spacing_mm: tuple[float, float, float]
    found_xyz: NDArray[Any]
    truth_xyz: NDArray[Any]


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

    @property
    def mean_label_dice(self) -> float | None:
        """Mean Dice over the labels of each patient, averaged over patients; None for binary labels."""
        return _mean(score.label_dice for score in self.scores)

    @property
    def mean_label_iou(self) -> float | None:
        """Mean intersection over union over the labels of each patient, averaged over them; None for binary ones."""
        return _mean(score.label_iou for score in self.scores)


def _mean(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return mean(known) if known else None


def evaluate(
    run: str | Path,
    splits: Sequence[str] = ("test",),
    store: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Predict every volume of some parts of a run's split, slice by slice, and compare it with its label map.

    Writes `evaluation/<parts>.csv` and `.json` into the run folder, for a run that tells labels apart
    `<parts>-labels.csv`, a row for each label of each patient, and the scores into its `MODEL_CARD.md`.

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
    segmented = segment_all(loaded, cohort, [case for _, case in wanted], progress)
    for (part, _), volume in zip(wanted, segmented, strict=True):
        scores.append(_score(volume, part, several=bool(record.label_values)))
    evaluation = _written(loaded, "-".join(splits), tuple(scores))
    write_card(loaded.path, record)
    return evaluation


def segment(loaded: LoadedRun, cohort: Cohort, case: str) -> Segmented:
    """Predict a case of a run's store, on the grid of the file that it came from.

    Raises
    ------
    RunError
        If the store holds other data of it than the run was trained on.
    CspineDataError
        If the store cannot be used.
    """
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
    prepared = cohort.prepared(case, variant)
    found = label_map([loaded], loaded.on_source_grid(prepared))
    corrected = prepared.corrected
    return Segmented(case, corrected.image_xyz, corrected.spacing_mm, found, cohort.label_xyz(case, variant))


def segment_all(
    loaded: LoadedRun, cohort: Cohort, cases: Sequence[str], progress: Callable[[int, int, str], None] | None = None
) -> Iterator[Segmented]:
    """Iterate over `segment` of cases; `progress` is called when what is done with one is done."""
    for number, case in enumerate(cases, start=1):
        yield segment(loaded, cohort, case)
        if progress:
            progress(number, len(cases), case)


def components_to_keep(
    loaded: LoadedRun, cohort: Cohort, most: int, progress: Callable[[int, int, str], None] | None = None
) -> int | None:
    """Return how many connected components of a prediction a run is to keep; None for all.

    As many as are asked for, if that gives the validation patients a higher mean Dice on whole volumes.

    Parameters
    ----------
    loaded : LoadedRun
        A trained run.
    cohort : Cohort
        The store that it was trained on.
    most : int
        How many are asked for.
    progress : callable, optional
        Called with (patients done, patients, case id).

    Raises
    ------
    RunError
        If the store holds other data than the run was trained on.
    CspineDataError
        If the store cannot be used.
    """
    whole = replace(loaded, record=loaded.record.model_copy(update={"kept_components": None}))
    gains = []
    for segmented in segment_all(whole, cohort, loaded.record.validation, progress):
        found, truth = segmented.found_xyz != 0, segmented.truth_xyz != 0
        gains.append(overlap(largest_components(found, most), truth).dice - overlap(found, truth).dice)
    gain = mean(gains)
    told = f"the {most} largest components alone change the mean validation Dice on whole volumes by {gain:+.4f}"
    _log.info("%s: %s", told, "they alone are kept" if gain > 0 else "all are kept")
    return most if gain > 0 else None


def _score(segmented: Segmented, part: str, several: bool) -> PatientScore:
    found, truth = segmented.found_xyz, segmented.truth_xyz
    labels = label_overlaps(found, truth) if several else None
    return PatientScore(segmented.case, part, overlap(found != 0, truth != 0), labels)


def _written(loaded: LoadedRun, name: str, scores: tuple[PatientScore, ...]) -> Evaluation:
    folder = loaded.path / EVALUATION_FOLDER
    folder.mkdir(exist_ok=True)
    several = bool(loaded.record.label_values)
    endings = (".csv", ".json", "-labels.csv") if several else (".csv", ".json")
    files = tuple(folder / f"{name}{ending}" for ending in endings)
    evaluation = Evaluation(scores, loaded.record.caveats(), files)
    note = "; ".join(evaluation.caveats)
    rows = [_row(score, note) for score in scores]
    write_rows(files[0], rows[0].keys(), rows)
    summary: dict[str, Any] = {
        "patients": rows,
        "mean_dice": evaluation.mean_dice,
        "mean_iou": evaluation.mean_iou,
        "caveats": evaluation.caveats,
        "settings": loaded.record.settings.model_dump(),
        # Of a run that goes on training, what was scored may not be what it keeps in the end.
        "kept_epoch": loaded.record.kept_epoch,
        "kept_components": loaded.record.kept_components,
        "digests": {score.case: loaded.record.digests[score.case] for score in scores},
    }
    if several:
        label_rows = [row for score in scores for row in _label_rows(score, note)]
        columns = ("case", "split", "label", *_figures(scores[0].voxels), "note")
        write_rows(files[2], columns, label_rows)
        means = {"mean_label_dice": evaluation.mean_label_dice, "mean_label_iou": evaluation.mean_label_iou}
        summary |= {"labels": label_rows, **means}
    write_text(files[1], json.dumps(summary, indent=1))
    return evaluation


def _row(score: PatientScore, note: str) -> dict[str, Any]:
    row = {"case": score.case, "split": score.split, **_figures(score.voxels)}
    if score.label_dice is not None and score.label_iou is not None:
        row |= {"label_dice": round(score.label_dice, 6), "label_iou": round(score.label_iou, 6)}
    return row | {"note": note}


def _label_rows(score: PatientScore, note: str) -> list[dict[str, Any]]:
    return [
        {"case": score.case, "split": score.split, "label": value, **_figures(voxels), "note": note}
        for value, voxels in (score.labels or {}).items()
    ]


def _figures(voxels: Overlap) -> dict[str, Any]:
    return {
        "dice": round(voxels.dice, 6),
        "iou": round(voxels.iou, 6),
        "true_positive_voxels": voxels.true_positive,
        "false_positive_voxels": voxels.false_positive,
        "false_negative_voxels": voxels.false_negative,
    }
