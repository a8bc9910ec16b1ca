"""The cases of a run: its split, and their fields of the run's record."""

from __future__ import annotations

import warnings
from typing import Any

from cspine_data import Cohort, Split
from cspine_train.errors import RunError
from cspine_train.run.cohort_range import CohortLooks
from cspine_train.run.settings import DataSettings


def split_of(cohort: Cohort, settings: DataSettings) -> Split:
    """Return the training, validation and test cases; cases with an empty label map are left out, with a warning.

    Raises `RunError` if there are too few cases to train and validate.
    """
    split = cohort.split(
        folds=settings.folds,
        fold=settings.fold,
        test_site=settings.test_site,
        given=settings.split,
        variant=settings.variant,
    )
    empty = cohort.empty_label_maps(settings.variant)
    note = f"the label map of {', '.join(empty)} labels nothing" if empty else ""
    if not split.train or not split.validation:
        raise RunError(
            f"{cohort.path}: has too few labelled cases to train and validate on "
            f"({len(split.train)} and {len(split.validation)}{f'; {note}' if note else ''}); prepare at least three"
        )
    if note:
        warnings.warn(f"{cohort.path}: {note}: left out of training, validation and test", stacklevel=2)
    return split


def cohort_fields(cohort: Cohort, split: Split, variant: str) -> dict[str, Any]:
    """Return the fields of a run's record about its cases; a `RunError` if their preprocessing differs."""
    cases = (*split.train, *split.validation, *split.test)
    first = cohort.record(cases[0], variant)
    ignored: set[int] = set()
    chosen: dict[str, None] = {}
    digests, voxels, looks = {}, {}, CohortLooks.of(cohort.record(case, variant) for case in split.train)
    for case in cases:
        record = cohort.record(case, variant)
        digests[case], voxels[case] = record.digest, record.voxels_sha256
        ignored.update(record.ignored_values)
        chosen |= {record.chosen_labels: None} if record.chosen_labels else {}
        if record.preprocessing != first.preprocessing:
            raise RunError(
                f"{cohort.path}: holds {first.case} and {case} as {variant}, prepared in different ways; "
                "run cspine-data prepare with the same options over all of them"
            )
    notes = cohort.notes
    if ignored:
        notes = (*notes, f"voxels labelled {', '.join(map(str, sorted(ignored)))} do not count")
    notes = (*notes, *(f"only labels {values} of the label maps are segmented" for values in chosen))
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    patients = {case: patient for case, patient in cohort.patients.items() if case in digests and patient != case}
    what = {"preprocessing": first.preprocessing, "notes": notes, "digests": digests, "cohort_looks": looks}
    what |= {"patients": patients, "voxels_sha256": voxels}
    return {"store": cohort.location, **what, **parts}
