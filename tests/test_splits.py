from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspine_data import InputError, Split, open_cohort
from cspine_data.datasets.splits import fold_split, leave_one_out, reference_split

names = st.lists(st.text("abcdefgh", min_size=1, max_size=4), unique=True, min_size=1, max_size=40)


def parts(split: Split) -> dict[str, str]:
    return {case: part for part in ("train", "validation", "test") for case in split.cases(part)}


def test_fourteen_cases_split_as_in_the_reference_study() -> None:
    cases = [f"VB2_{number:02d}" for number in range(1, 15)]
    split = reference_split([cases[::-1]])
    assert split.train == tuple(cases[:12])
    assert split.validation == (cases[12],)
    assert split.test == (cases[13],)


@pytest.mark.parametrize(
    ("cases", "sizes"), [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)),
                         (14, (12, 1, 1)), (28, (24, 2, 2)), (140, (120, 10, 10))],
)  # fmt: skip
def test_other_sizes_are_scaled(cases: int, sizes: tuple[int, int, int]) -> None:
    split = reference_split([[f"{number:04d}" for number in range(cases)]])
    assert (len(split.train), len(split.validation), len(split.test)) == sizes


@given(st.lists(names, min_size=1, max_size=5))
def test_added_cases_move_no_other(batches: list[list[str]]) -> None:
    batches = [[f"{number}{name}" for name in batch] for number, batch in enumerate(batches)]
    for count in range(1, len(batches)):
        before, after = parts(reference_split(batches[:count])), parts(reference_split(batches))
        assert before.items() <= after.items()
    assert sorted(parts(reference_split(batches))) == sorted(name for batch in batches for name in batch)


@given(st.lists(names, min_size=1, max_size=4), st.integers(3, 8))
def test_folds_test_every_case_once_and_stay(batches: list[list[str]], folds: int) -> None:
    batches = [[f"{number}{name}" for name in batch] for number, batch in enumerate(batches)]
    everyone = sorted(name for batch in batches for name in batch)
    if folds > len(everyone):
        with pytest.raises(InputError, match="cannot be made of"):
            fold_split(batches, folds, 0)
        return
    splits = [fold_split(batches, folds, fold) for fold in range(folds)]
    assert sorted(case for split in splits for case in split.test) == everyone
    assert max(len(s.test) for s in splits) - min(len(s.test) for s in splits) <= 1
    for split in splits:
        assert sorted(parts(split)) == everyone
        assert split.validation
    grown = [fold_split([*batches, ["new1", "new2"]], folds, fold) for fold in range(folds)]
    for before, after in zip(splits, grown, strict=True):
        assert parts(before).items() <= parts(after).items()


def test_leave_one_out() -> None:
    split = leave_one_out([["b", "a"], ["c"]], "c")
    assert (split.train, split.validation, split.test) == (("b",), ("a",), ("c",))
    with pytest.raises(InputError, match="'z': is no labelled"):
        leave_one_out([["a", "b", "c"]], "z")


def test_what_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match="none of 3"):
        fold_split([["a", "b", "c"]], 3, 3)
    with pytest.raises(InputError, match="made of 3 labelled"):
        fold_split([["a", "b", "c"]], 2, 0)
    with pytest.raises(InputError, match="'holdout': is not known"):
        reference_split([["a"]]).cases("holdout")


@pytest.mark.parametrize("arguments", [{"leave_out": "A", "folds": 3}, {"fold": 1}, {"folds": 0}])
def test_arguments_that_exclude_each_other_are_refused(arguments: dict[str, Any], store: Path) -> None:
    with pytest.raises(InputError, match="exclude each other|give folds too|0 folds"):
        open_cohort(store).split(**arguments)
