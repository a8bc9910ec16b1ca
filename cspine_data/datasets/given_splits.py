"""Splits from a file: nnU-Net's JSON, or CSV."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cspine_data.datasets.splits import PART_NAMES, PARTS, TEST, TRAIN, VALIDATION, Split, hold_back_validation
from cspine_data.errors import InputError
from cspine_data.names import as_known, normalised

_PART, _CASE, _PATIENT = "part", "case", "patient"


class GivenSplit(BaseModel):
    """A split from a file, see `read_splits`; `Cohort.split` finds its cases in a store.

    Attributes
    ----------
    by : {"case", "patient"}
        Whether the names are those of cases or of patients.
    train, validation, test : tuple of str
        The names of each part. Without validation patients, some of the training patients are used.
    fold, folds : int
        Which fold this is, from 0, and the number of folds in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["case", "patient"] = "case"
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...]
    fold: int = 0
    folds: int = 1


def read_splits(path: str | Path) -> tuple[GivenSplit, ...]:
    """Read the folds of a split file.

    Parameters
    ----------
    path : str or Path
        nnU-Net's ``splits_final.json``, a list of folds with ``train`` and ``val``: the cases of ``val`` become the
        test cases. Or a CSV file, which is a single fold, with the columns ``part`` (``train``, ``validation``,
        ``test``) and ``case`` or ``patient``.

    Raises
    ------
    InputError
        If it cannot be read, or a part is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "is no file", "give nnU-Net's splits_final.json or a CSV file")
    return _of_json(path) if path.suffix.lower() == ".json" else (_of_csv(path),)


def given_split(
    given: GivenSplit,
    batches: Iterable[Sequence[str]],
    cases_of: Mapping[str, Sequence[str]],
    patients: Mapping[str, str],
) -> Split:
    """Return the labelled cases of a given split.

    Parameters
    ----------
    given : GivenSplit
        The split.
    batches : iterable of sequence of str
        The patients, see `by_patient`.
    cases_of : dict
        The labelled cases of each patient.
    patients : dict
        The patient of every case of the store.

    Raises
    ------
    InputError
        If a name is not in the store, a patient is in two parts, or a part holds no labelled case.
    """
    cases = {part: _cases(given, part, cases_of, patients) for part in PARTS}
    part_of: dict[str, str] = {}
    for part in PARTS:
        for case in cases[part]:
            other = part_of.setdefault(patients[case], part)
            if other != part:
                problem = f"is in two parts of the split, {other} and {part}"
                raise InputError(f"patient {patients[case]!r}", problem, "move all cases of a patient to one part")
    labelled = {case for patient in cases_of for case in cases_of[patient]}
    found = {part: tuple(sorted(labelled.intersection(cases[part]))) for part in PARTS}
    if not given.validation:
        trained = {patients[case] for case in found[TRAIN]}
        split = hold_back_validation([patient for patient in batch if patient in trained] for batch in batches)
        held = {*split.validation}
        found[VALIDATION] = tuple(case for case in found[TRAIN] if patients[case] in held)
        found[TRAIN] = tuple(case for case in found[TRAIN] if patients[case] not in held)
    for part in PARTS:
        if not found[part]:
            problem = f"has no labelled case of the store for {part}"
            raise InputError("the given split", problem, "add label maps, or name other cases")
    return Split(found[TRAIN], found[VALIDATION], found[TEST])


def _cases(
    given: GivenSplit, part: str, cases_of: Mapping[str, Sequence[str]], patients: Mapping[str, str]
) -> list[str]:
    """Return the cases of a part, with and without labels."""
    names: tuple[str, ...] = getattr(given, part)
    known = patients if given.by == _CASE else set(patients.values())
    cases: list[str] = []
    for name in names:
        one = as_known(name, known)
        if one not in known:
            raise InputError(f"{given.by} {name!r} of the split", "is not in the store", "cspine-data info lists all")
        cases += [one] if given.by == _CASE else cases_of.get(one, ())
    return cases


def _of_json(path: Path) -> tuple[GivenSplit, ...]:
    try:
        folds = [(_names(fold["train"]), _names(fold["val"])) for fold in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        problem = "is not nnU-Net's list of folds, each with the cases of train and val"
        raise InputError(path, problem, "give splits_final.json or a CSV file") from None
    for number, parts in enumerate(folds):
        for part, names in zip(("train", "val"), parts, strict=True):
            if not names:
                raise InputError(path, f"fold {number} has no case in {part!r}", "name some, or remove the fold")
    if not folds:
        raise InputError(path, "has no fold", "give a file with at least one")
    return tuple(
        GivenSplit(train=train, test=test, fold=number, folds=len(folds)) for number, (train, test) in enumerate(folds)
    )


def _names(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise TypeError
    return tuple(map(normalised, given))


def _of_csv(path: Path) -> GivenSplit:
    from cspine_data.sources.pair_lists import table_rows

    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    by: Literal["case", "patient"] = "case"
    for number, row in table_rows(path, (_PART,), (_CASE, _PATIENT, _PART)):
        if _CASE in row and _PATIENT in row:
            raise InputError(path, "has the columns case and patient", "keep one of them")
        by = "patient" if _PATIENT in row else "case"
        if not row.get(by):
            raise InputError(path, f"line {number} names no case or patient", "fill it in, or delete the line")
        part = PART_NAMES.get(row[_PART].lower())
        if part is None:
            raise InputError(path, f"line {number}: part is {row[_PART]!r}", f"write {', '.join(PARTS)}")
        parts[part].append(normalised(row[by]))
    for part, names in parts.items():
        if not names:
            raise InputError(path, f"names no {by} for {part}", "name some; all three parts are needed")
    return GivenSplit(by=by, train=parts[TRAIN], validation=parts[VALIDATION], test=parts[TEST])
