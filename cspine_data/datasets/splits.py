"""Splits into training, validation and test cases that do not change when cases are added.

Splits are computed from the batches in which labelled cases were added to the store, each sorted by name. For a cohort
prepared at once this is the reference study's split by sorted name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cspine_data.errors import InputError, count

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)
#: Names of the parts that users write.
PART_NAMES = {TRAIN: TRAIN, VALIDATION: VALIDATION, "valid": VALIDATION, "val": VALIDATION, TEST: TEST}
# The reference study: 14 patients by sorted name, 12 to train, 1 to validate, 1 to test.
_REFERENCE_COHORT = 14


@dataclass(frozen=True)
class Split:
    """Case ids for training, for validation (model selection) and for testing (reporting)."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def part_of(self) -> dict[str, str]:
        """The part of each case."""
        return {case: part for part in PARTS for case in self.cases(part)}

    def cases(self, part: str) -> tuple[str, ...]:
        """Return the cases of ``train``, ``validation`` or ``test``.

        Raises
        ------
        InputError
            If there is no such part.
        """
        parts = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}
        if part not in parts:
            raise InputError(f"split {part!r}", "is not known", f"choose one of {', '.join(parts)}")
        return parts[part]


def check_ways(fold: int, **ways: object) -> None:
    """Raise `InputError` if a split is requested in several ways, or a fold without a number of folds."""
    named = [name for name, value in ways.items() if value is not None]
    if len(named) > 1:
        raise InputError(" and ".join(named), "exclude each other", "give one of them")
    if fold and ways["folds"] is None:
        raise InputError(f"fold={fold}", "needs a number of folds", "give folds too")


def by_patient(batches: Iterable[Sequence[str]], patient_of: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the patients of batches of cases; a patient is in the first batch that contains one of its cases."""
    seen: set[str] = set()
    patients = []
    for batch in batches:
        new = {patient_of[case] for case in batch} - seen
        patients.append(tuple(sorted(new)))
        seen |= new
    return patients


def cases_by_patient(cases: Iterable[str], patient_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the cases of each patient, sorted."""
    found: dict[str, list[str]] = {}
    for case in sorted(cases):
        found.setdefault(patient_of[case], []).append(case)
    return found


def reference_split(batches: Iterable[Sequence[str]]) -> Split:
    """Split as the reference study did, 12 : 1 : 1 by sorted name, scaled to the cohort's size.

    The last cases of each batch go to the test part and those before them to validation, as many as the cohort
    lacks up to this batch: one in 14 each, and at least one each from three cases on.
    """
    train: list[str] = []
    validation: list[str] = []
    test: list[str] = []
    for batch in batches:
        names = sorted(batch)
        total = len(train) + len(validation) + len(test) + len(names)
        share = max(1, round(total / _REFERENCE_COHORT))
        # The first case is for training, the second for testing, the third for validation.
        to_spare = len(names) - (not train)
        to_test = max(0, min(share - len(test), to_spare))
        to_validate = max(0, min(share - len(validation), to_spare - to_test))
        cut = len(names) - to_test - to_validate
        train += names[:cut]
        validation += names[cut : cut + to_validate]
        test += names[cut + to_validate :]
    return Split(tuple(train), tuple(validation), tuple(test))


def fold_split(batches: Iterable[Sequence[str]], folds: int, fold: int) -> Split:
    """Return one split of a k-fold cross-validation: this fold for testing, the next for validation.

    Cases are assigned to the folds in turn, in the order of their batches, so that fold sizes differ by at most one
    and an added case does not move others. With as many folds as cases this is leave-one-out.
    """
    return _deal(_order(batches), folds, fold)


def leave_one_out(batches: Iterable[Sequence[str]], case: str) -> Split:
    """Return the split that tests one case and validates on the next; the others are for training."""
    order = _order(batches)
    if case not in order:
        raise InputError(f"case {case!r}", "is no labelled case of the store", "cspine-data info lists them")
    return _deal(order, len(order), order.index(case))


def hold_back_validation(batches: Iterable[Sequence[str]]) -> Split:
    """Split training patients into training and validation patients.

    Validation patients are chosen as the reference split chooses test patients: the last ones of each batch, one in 14,
    at least one.
    """
    split = reference_split(batches)
    return Split((*split.train, *split.validation), split.test, ())


def site_split(
    batches: Iterable[Sequence[str]], cases_of: Mapping[str, Sequence[str]], sites: Mapping[str, str | None], site: str
) -> Split:
    """Return the split that tests on one site, and trains and validates on patients of the others.

    Parameters
    ----------
    batches : iterable of sequence of str
        The patients, see `by_patient`.
    cases_of : dict
        The labelled cases of each patient.
    sites : dict
        The site of each case.
    site : str
        The test site. Cases of its patients from other sites are left out.
    """
    cases = [case for patient in cases_of for case in cases_of[patient]]
    without = sorted(case for case in cases if sites[case] is None)
    if without:
        named = f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
        remedy = "name it in the column site of --pairs, and prepare again"
        raise InputError(f"{count(len(without), 'case')} of the store", f"without a site ({named})", remedy)
    test = tuple(case for case in cases if sites[case] == site)
    known = sorted({sites[case] or "" for case in cases})
    if not test or len(known) < 2:
        problem = f"is {'the only' if test else 'no'} site of the store's labelled cases"
        raise InputError(f"site {site!r}", problem, f"known are {', '.join(known) or 'none'}")
    others = {patient for patient in cases_of if {*test}.isdisjoint(cases_of[patient])}
    split = hold_back_validation([patient for patient in batch if patient in others] for batch in batches)
    return Split(_cases(split.train, cases_of), _cases(split.validation, cases_of), test)


def of_patients(split: Split, cases_of: Mapping[str, Sequence[str]]) -> Split:
    """Convert a split of patients to one of their cases."""
    return Split(*(_cases(split.cases(part), cases_of) for part in PARTS))


def _cases(patients: Iterable[str], cases_of: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(case for patient in patients for case in cases_of.get(patient, ()))


def _order(batches: Iterable[Sequence[str]]) -> list[str]:
    return [case for batch in batches for case in sorted(batch)]


def _deal(order: Sequence[str], folds: int, fold: int) -> Split:
    if not 3 <= folds <= len(order):
        raise InputError(
            f"{folds} folds", f"cannot be made of {len(order)} labelled cases", f"choose 3 to {len(order)}"
        )
    if not 0 <= fold < folds:
        raise InputError(f"fold {fold}", f"is none of {folds}", f"choose 0 to {folds - 1}")
    validating = (fold + 1) % folds
    parts: dict[str, list[str]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for position, case in enumerate(order):
        own = position % folds
        parts[TEST if own == fold else VALIDATION if own == validating else TRAIN].append(case)
    return Split(tuple(parts[TRAIN]), tuple(parts[VALIDATION]), tuple(parts[TEST]))
