"""Paired comparison of models over the same patients."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cspine_data import level_value
from cspine_train.errors import RunError
from cspine_train.metrics.overlap import Measure
from cspine_train.metrics.statistics import (
    FEWEST_PATIENTS,
    MeanInterval,
    holm,
    mean_interval,
    of_patients,
    paired_differences,
    signed_rank_p,
    too_few,
)
from cspine_train.run.evaluations import known_measures, level_rows, patient_measures, patient_of, recorded_evaluations
from cspine_train.run.record import RunRecord, load_record
from cspine_train.run.settings import RunSettings


@dataclass(frozen=True)
class Compared:
    """A model compared with the first model, over the patients that all models have.

    Attributes
    ----------
    name : str
        Name of the run folder, or the common part of the names of all folds.
    runs : tuple of Path
        The run folder, or that of each fold.
    scores : dict
        The measure by patient.
    mean : MeanInterval
        Its mean.
    difference : MeanInterval or None
        Mean difference from the first model by patient; None for the first.
    higher, lower : int
        Number of patients with a higher and a lower figure than with the first model.
    p : float or None
        Two-sided p of Wilcoxon's signed-rank test (1945) after Holm's correction (1979) for all comparisons; None for
        the first model, and for fewer than `FEWEST_PATIENTS` patients.
    """

    name: str
    runs: tuple[Path, ...]
    scores: Mapping[str, float]
    mean: MeanInterval
    difference: MeanInterval | None = None
    higher: int = 0
    lower: int = 0
    p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Compared models, with the measure, the patients and caveats."""

    models: tuple[Compared, ...]
    measure: Measure
    patients: tuple[str, ...]
    caveats: tuple[str, ...]


def compare(
    runs: Sequence[str | Path], split: str = "test", measure: str = "dice", level: str | None = None
) -> Comparison:
    """Compare evaluated runs over the patients that all have.

    Runs that differ only in their fold or test site are one model, with the patients of all its folds or sites.

    Parameters
    ----------
    runs : sequence of str or Path
        Evaluated run folders. The others are compared with the model of the first.
    split : str
        ``train``, ``validation`` or ``test``.
    measure : str
        Name of one of `patient_measures`.
    level : str, optional
        Compare the scores of this vertebra, such as ``C5``, over the patients who have it.

    Raises
    ------
    RunError
        If a run was not evaluated on the split, a fold is given twice, there is only one model, no patient is common to
        all, or the measure or the level is unknown.
    """
    known = {one.name: one for one in patient_measures()}
    if measure not in known:
        raise RunError(f"measure {measure!r}: is unknown; choose from {', '.join(known)}")
    if level is not None and level_value(level) is None:
        raise RunError(f"level {level!r}: is unknown; give the name of a vertebra, such as C5")
    records = {Path(run): load_record(Path(run)) for run in runs}
    models = [(folders, _scores(folders, records, split, measure, level)) for folders in _models(records)]
    if len(models) < 2:
        raise RunError("one model cannot be compared; name a run of another (runs of all folds are one model)")
    patients = [case for case in models[0][1] if all(case in scores for _, scores in models)]
    if not patients:
        raise RunError(f"no {split} patient is common to all of these runs; compare runs of the same folds")
    caveats = list(dict.fromkeys(caveat for record in records.values() for caveat in record.caveats()))
    left_out = {case for _, scores in models for case in scores} - set(patients)
    if left_out:
        caveats.append(f"left out, as not all models have scores of them: {', '.join(sorted(left_out))}")
    if any(_parts_of_model(record.settings) for record in records.values()):
        caveats.append("folds share training patients, although the test assumes independence")
    first = [models[0][1][case] for case in patients]
    of = known[measure]
    compared = [_beside(folders, {case: scores[case] for case in patients}, first, of) for folders, scores in models]
    differ = max(one.higher + one.lower for one in compared[1:])
    if few := too_few(len(patients)):
        caveats.append(few)
    elif differ < FEWEST_PATIENTS:
        caveats.append(
            f"figures of only {differ} patients differ: the test cannot reach 5 % with fewer than {FEWEST_PATIENTS}"
        )
    return Comparison(tuple(_corrected(compared)), of, tuple(patients), tuple(caveats))


def _models(records: Mapping[Path, RunRecord]) -> list[tuple[Path, ...]]:
    """Group runs that differ only in their fold or test site, in the order of the first of each group."""
    groups: dict[str, list[Path]] = {}
    for path, record in records.items():
        parts = _parts_of_model(record.settings)
        alike = record.settings.model_dump(exclude={"fold", "split", "test_site"} if parts else set())
        fields = record.preprocessing.model_dump(mode="json"), record.digests
        key = json.dumps([alike, parts, record.weights_used, *fields], sort_keys=True)
        # Without folds, equal runs are different models: their machines or stores may differ.
        groups.setdefault(key if parts else str(path), []).append(path)
    for paths in groups.values():
        folds = [records[path].settings.split_name for path in paths]
        if len(set(folds)) < len(folds):
            raise RunError(f"{paths[-1]}: has the same fold as another of these runs; name each fold once")
    return [tuple(paths) for paths in groups.values()]


def _parts_of_model(settings: RunSettings) -> str | None:
    """Return what the runs of a model differ in, such as ``5 folds``; None if it is a single run."""
    if settings.test_site is not None:
        return "sites"
    return f"{settings.fold_of[1]} folds" if settings.fold_of else None


def _scores(
    folders: Sequence[Path], records: Mapping[Path, RunRecord], split: str, measure: str, level: str | None
) -> dict[str, float]:
    # A patient may have cases at several test sites.
    of_cases: dict[str, tuple[str, float]] = {}
    for folder in folders:
        rows = [
            row
            for _, evaluation in recorded_evaluations(folder, records[folder])
            for row in (evaluation["patients"] if level is None else _of_level(evaluation, level))
            if row["split"] == split
        ]
        if not rows:
            again = f"run cspine-train evaluate {folder} --split {split}"
            if level:
                # Evaluating again does not help a run that does not know the level.
                again = f"choose a level that the run was trained on; if it is one, {again}"
            raise RunError(f"{folder}: has no {split} scores{f' of {level}' if level else ''}; {again}")
        found = {
            row["case"]: (unicodedata.normalize("NFC", patient_of(row)), row[measure]) for row in rows if measure in row
        }
        if not found:
            have = ", ".join(one.name for one in known_measures(rows))
            raise RunError(f"{folder}: its {split} scores have no {measure}; evaluate it again, or choose from {have}")
        if split == "test" and (twice := found.keys() & of_cases.keys()):
            problem = f"tests {min(twice)}, as another fold does"
            raise RunError(f"{folder}: {problem}; compare folds of one --split file only")
        of_cases |= found
    patients, figures = zip(*of_cases.values(), strict=True)
    return of_patients(figures, patients)


def _of_level(evaluation: Mapping[str, Any], level: str) -> list[dict[str, Any]]:
    return [row for row in level_rows(evaluation) if row["label"] == level_value(level)]


def _beside(folders: Sequence[Path], scores: Mapping[str, float], first: Sequence[float], measure: Measure) -> Compared:
    differences = paired_differences(scores.values(), first)
    return Compared(
        _name(folders),
        tuple(folders),
        scores,
        mean_interval(list(scores.values()), measure.within),
        mean_interval(differences),
        sum(difference > 0 for difference in differences),
        sum(difference < 0 for difference in differences),
        signed_rank_p(differences),
    )


def _name(folders: Sequence[Path]) -> str:
    if len(folders) == 1:
        return folders[0].name
    # Default names of run folders differ only in the fold.
    names = {re.sub(r"-fold\d+of\d+", "", folder.name) for folder in folders}
    alike = names.pop() if len(names) == 1 else os.path.commonprefix([f.name for f in folders])  # noqa: RUF071
    return f"{alike.rstrip('-_. ') or folders[0].name} ({len(folders)} folds)"


def _corrected(compared: Sequence[Compared]) -> list[Compared]:
    """Correct the p values for their number; the first model has none."""
    tested = [replace(compared[0], difference=None, p=None), *compared[1:]]
    return [replace(one, p=p) for one, p in zip(tested, holm([one.p for one in tested]), strict=True)]
