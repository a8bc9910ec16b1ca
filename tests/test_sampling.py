"""Which slices an epoch has: how often each, in which order, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from cspine_data import open_cohort
from cspine_train import RunError, RunSettings, train
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sampling import EpochSampler

#: Labelled voxels of each slice of each case.
cohorts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6)
some_weights = st.lists(st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5]), min_size=6, max_size=6)
balances = st.sampled_from(["slices", "cases"])


def flat(cohort: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    numbers = np.repeat(np.arange(len(cohort), dtype=np.int32), [len(case) for case in cohort])
    return np.array([voxels for case in cohort for voxels in case]), numbers


def as_first_written(voxels: NDArray[np.int64], empty_share: float, seed: int, epoch: int) -> list[int]:
    """The order of a run that was started before there were weights."""
    labelled, empty = np.flatnonzero(voxels), np.flatnonzero(voxels == 0)
    empties = min(empty.size, round(empty_share * labelled.size))
    rng = np.random.default_rng([seed, epoch])
    chosen = rng.choice(empty, empties, replace=False) if empties else empty[:0]
    return rng.permutation(np.concatenate([labelled, chosen])).tolist()


@given(cohorts, st.sampled_from([0, 0.25, 1, 9]), st.integers(0, 9), st.integers(0, 9), st.sampled_from([1.0, 0.3]))
def test_equal_weights_leave_the_order_as_it_was(
    cohort: list[list[int]], empty_share: float, seed: int, epoch: int, weight: float
) -> None:
    voxels, numbers = flat(cohort)
    weighted = EpochSampler(voxels, empty_share, seed, numbers, np.full(len(cohort), weight))
    for sampler in (EpochSampler(voxels, empty_share, seed), weighted):
        sampler.set_epoch(epoch)
        assert list(sampler) == as_first_written(voxels, empty_share, seed, epoch)


def test_the_order_of_many_slices_is_as_it_was() -> None:
    """NumPy draws in other ways from larger arrays."""
    voxels = np.random.default_rng(0).integers(0, 2, 40_000)
    assert list(EpochSampler(voxels, 0.25, 3)) == as_first_written(voxels, 0.25, 3, 0)


@given(cohorts, some_weights, balances, st.sampled_from([0, 0.25, 9]), st.integers(0, 99))
def test_each_slice_and_each_case_comes_as_often_as_expected(
    cohort: list[list[int]], weights: list[float], balance: str, empty_share: float, seed: int
) -> None:
    voxels, numbers = flat(cohort)
    weight = np.array(weights[: len(cohort)])
    sampler = EpochSampler(voxels, empty_share, seed, numbers, weight, balance)
    epoch = list(sampler)
    seen = np.bincount(epoch, minlength=voxels.size)
    used = weight[numbers] > 0
    assert not seen[~used].any()
    labelled, empty = used & (voxels > 0), used & (voxels == 0)
    assert seen[labelled].sum() == labelled.sum()
    assert seen[empty].sum() == min(empty.sum(), round(empty_share * labelled.sum()))
    assert seen[empty].max(initial=0) <= 1
    assert len(epoch) == len(sampler)
    if not labelled.any():
        return
    each = weight[numbers] * labelled
    if balance == "cases":
        each = each / np.bincount(numbers, labelled)[numbers].clip(1)
    expected = each * labelled.sum() / each.sum()
    close = 1e-6  # An expected count of 2 may have come out as a hair less or more.
    for counts, means in (
        (seen[labelled], expected[labelled]),
        (np.bincount(numbers, seen * labelled), np.bincount(numbers, expected)),
    ):
        assert (counts >= np.floor(means - close)).all()
        assert (counts <= np.ceil(means + close)).all()


@given(cohorts, some_weights, balances, st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_depends_on_its_number_and_the_seed_only(
    cohort: list[list[int]], weights: list[float], balance: str, seed: int, epoch: int
) -> None:
    voxels, numbers = flat(cohort)
    arguments = (voxels, 0.5, seed, numbers, np.array(weights[: len(cohort)]), balance)
    first, second = EpochSampler(*arguments), EpochSampler(*arguments)
    for earlier in range(3):
        first.set_epoch(earlier)
        list(first)
    for sampler in (first, second):
        sampler.set_epoch(epoch)
    assert list(first) == list(second) == list(first)


def test_over_many_epochs_cases_are_seen_by_their_weights() -> None:
    voxels, numbers = flat([[1] * 50, [1] * 10 + [0] * 5, [1] * 3, [1] * 7])
    weights = np.array([1.0, 1.0, 2.0, 0.0])
    for balance, shares in (("slices", [50 / 66, 10 / 66, 6 / 66, 0]), ("cases", [0.25, 0.25, 0.5, 0])):
        sampler = EpochSampler(voxels, 0, 0, numbers, weights, balance)
        seen = np.zeros(voxels.size)
        for epoch in range(400):
            sampler.set_epoch(epoch)
            seen += np.bincount(list(sampler), minlength=voxels.size)
        assert len(sampler) == 63
        np.testing.assert_allclose(np.bincount(numbers, seen) / seen.sum(), shares, atol=0.003)
        # Within a case no slice is preferred.
        for case in range(3):
            of_case = seen[(numbers == case) & (voxels > 0)]
            np.testing.assert_allclose(of_case / of_case.mean(), 1, atol=0.2)


class Numbers:
    """A dataset whose items are their own numbers."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, item: int) -> int:
        return item


def test_the_order_is_the_same_whoever_reads() -> None:
    voxels, numbers = flat([[1] * 40, [1] * 5 + [0] * 30, [2, 0, 1]])
    orders = []
    for workers in (0, 1, 2):
        sampler = EpochSampler(voxels, 0.3, 1, numbers, np.array([1.0, 3.0, 1.0]), "cases")
        loader = DataLoader(Numbers(voxels.size), 4, sampler=sampler, num_workers=workers)
        sampler.set_epoch(2)
        orders.append([batch.tolist() for batch in loader])
        sampler.set_epoch(3)
        orders[-1] += [batch.tolist() for batch in loader]
    assert orders[0] == orders[1] == orders[2]


def test_millions_of_slices_are_numbers_of_four_bytes() -> None:
    numbers = np.repeat(np.arange(1000, dtype=np.int32), 500)
    sampler = EpochSampler(np.ones(numbers.size, np.int64), 0, 0, numbers, np.linspace(1, 2, 1000))
    order = sampler.order()
    assert order.dtype == np.int32
    assert order.size == numbers.size


def test_a_run_sees_the_cases_by_their_weights(phantom_store: Path) -> None:
    cohort = open_cohort(phantom_store)
    split = cohort.split(variant="n4")
    options = RunSettings(weights="none", case_weights={"CS_01": 3, "CS_04": 7}, empty_share=0, pixel_mm=12, context=0)
    data = CohortSlices(cohort, split, options)
    numbers = np.concatenate([batch.numbers.numpy() for batch in data.train_dataloader()])
    labelled = [np.count_nonzero(cohort.record(case, "n4").labelled_voxels[0]) for case in split.train]
    share = 3 * labelled[0] / (3 * labelled[0] + labelled[1])
    assert np.mean(numbers == 0) == pytest.approx(share, abs=8 / sum(labelled))
    without = CohortSlices(cohort, split, options.model_copy(update={"case_weights": {"CS_01": 0}}))
    assert without.labelled_slices == labelled[1]
    assert all((batch.numbers == 1).all() for batch in without.train_dataloader())


def test_a_weight_of_no_case_is_refused(phantom_store: Path, tmp_path: Path) -> None:
    common = {"weights": "none", "pixel_mm": 12.0}
    with pytest.raises(RunError, match=r"\(did you mean CS_\d+\?\)"):
        train(phantom_store, tmp_path / "run", RunSettings(**common, case_weights={"CS_1": 2}))
    with pytest.raises(RunError, match="choose another --case-weight"):
        train(phantom_store, tmp_path / "run", RunSettings(**common, case_weights={"CS_01": 0, "CS_02": 0}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("CS_01=-1", "--case-weight CS_01: Input should"),
        ("CS_01=nan", "--case-weight CS_01: Input should"),
        ("CS_01=inf", "--case-weight CS_01: Input should"),
        ("CS_01=much", "--case-weight CS_01: Input should"),
        ("CS_01", "'CS_01' is not CASE=WEIGHT"),
        ("=2", "'=2' is not CASE=WEIGHT"),
    ],
)
def test_what_is_no_weight_is_told(weight: str, message: str, run_train: Callable[..., Result]) -> None:
    done = run_train("run", "--case-weight", weight)
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_line_passes_weights_on(
    phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    done = run_train(
        "run", "--store", phantom_store, "--encoder", "tu-test_resnet", "--weights", "none", "--epochs", 1,
        "--pixel-mm", 12, "--case-weight", "CS_01=2", "--case-weight", "CS_02=0.5", "--balance", "cases",
        "-o", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = (tmp_path / "run" / "run.json").read_text()
    assert '"CS_01": 2.0' in record
    assert '"balance": "cases"' in record
