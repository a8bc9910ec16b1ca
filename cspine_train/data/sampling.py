"""Which slices make up an epoch, and in which order."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, Sampler

from cspine_train.errors import RunError, meant

Balance = Literal["slices", "cases"]
_BLOCK = 4096


def weights_of(cases: Sequence[str], asked: Mapping[str, float], known: Sequence[str]) -> NDArray[np.float64]:
    """Return each case's weight: what was asked, else 1.

    Parameters
    ----------
    cases : sequence of str
        The cases to train on.
    asked : mapping
        Weights by case.
    known : sequence of str
        All cases that a weight may be asked for; one that does not train in this fold is none of `cases`.

    Raises
    ------
    RunError
        If a weight is asked for a case that is not known.
    """
    there = {_composed(case) for case in known}
    asked = {_composed(case): weight for case, weight in asked.items()}
    for case in asked:
        if case not in there:
            raise RunError(
                f"case {case!r}: has a weight and is not in the store{meant(case, known)}; see --case-weight"
            )
    return np.array([asked.get(_composed(case), 1.0) for case in cases], dtype=np.float64)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class EpochSampler(Sampler[int]):
    """Labelled slices in random order and, among them, a changing choice of empty ones.

    Where all labelled slices weigh the same, each comes once. Else there are as many, and they are drawn by systematic
    sampling: the slices lie in order on a line, each as long as it is expected often, and a comb of distance 1 falls on
    it at a random place. So each slice, and each case, comes as often as expected, rounded down or up: no way to draw
    varies less. What is drawn of a case lies evenly along its axes. (W. G. Madow and L. H. Madow, On the theory of
    systematic sampling, Ann. Math. Statist. 15, 1944; unequal chances: W. G. Madow, ibid. 20, 1949.)

    An epoch's order depends on the seed and the epoch's number only, so that a resumed run goes on as it would have.

    Parameters
    ----------
    labelled_voxels : ndarray of int
        How many labelled voxels each slice has; the slices of a case lie side by side.
    empty_share : float
        Empty slices in an epoch, as a share of the labelled ones.
    seed : int
        Where the order comes from.
    case_numbers : ndarray of int, optional
        The case that each slice is of, as an index into `weights`; all of one by default.
    weights : ndarray of float, optional
        How much each case weighs; the slices of one that weighs 0 are left out. Empty slices weigh the same otherwise.
    balance : str
        Whether each of the case's labelled ``slices`` weighs that much, or all of them together do (``cases``).
    """

    def __init__(
        self,
        labelled_voxels: NDArray[Any],
        empty_share: float,
        seed: int,
        case_numbers: NDArray[Any] | None = None,
        weights: NDArray[np.float64] | None = None,
        balance: Balance = "slices",
    ) -> None:
        case_numbers = np.zeros(labelled_voxels.shape, np.int32) if case_numbers is None else case_numbers
        weights = np.ones(case_numbers.max(initial=0) + 1) if weights is None else weights
        counts = weights[case_numbers] > 0
        # A cohort of 10,000 cases has millions of slices.
        self._labelled = np.flatnonzero(counts & (labelled_voxels > 0)).astype(np.int32)
        self._empty = np.flatnonzero(counts & (labelled_voxels == 0)).astype(np.int32)
        self._empties = min(self._empty.size, round(empty_share * self._labelled.size))
        self._ends = _ends(case_numbers[self._labelled], weights, balance)
        self._seed = seed
        self._epoch = 0
        self._begun = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is for; Lightning calls this."""
        self._epoch = epoch

    def begin(self, epoch: int, seen: int) -> None:
        """Begin with an epoch of which some slices were seen before; its length is still the whole epoch's."""
        self._epoch = epoch
        self._begun = (epoch, seen)

    def order(self) -> NDArray[np.int32]:
        """Return the epoch's slices, in order, but for those seen before: 0.15 s for 5 million."""
        rng = np.random.default_rng([self._seed, self._epoch])
        chosen = rng.choice(self._empty, self._empties, replace=False) if self._empties else self._empty[:0]
        labelled = self._labelled if self._ends is None else np.repeat(self._labelled, _drawn(self._ends, rng.random()))
        begun, seen = self._begun
        return rng.permutation(np.concatenate([labelled, chosen]))[seen if self._epoch == begun else 0 :]

    def __len__(self) -> int:
        return int(self._labelled.size + self._empties)

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        # Numbers of Python take nine times the memory of the array: only a few exist at a time.
        return (item for start in range(0, order.size, _BLOCK) for item in order[start : start + _BLOCK].tolist())


class ProcessBatches(BatchSampler):
    """The slices of each batch that one process reads: every ``world``-th, from its rank on.

    Parameters
    ----------
    sampler : Sampler
        Slices of an epoch, in the same order in every process.
    batch_size : int
        Size of a whole batch.
    drop_last : bool
        Whether to leave out an incomplete last batch.
    rank, world : int
        The process, and how many there are.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, rank: int = 0, world: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        return (batch[self._rank :: self._world] for batch in super().__iter__())


def _ends(cases: NDArray[Any], weights: NDArray[np.float64], balance: Balance) -> NDArray[np.float64] | None:
    """Return where each labelled slice ends on the line of all, or None where each is as long as the others."""
    if balance == "cases":
        weights = weights / np.bincount(cases, minlength=weights.size).clip(1)
    lengths = weights[cases]
    if not cases.size or np.ptp(lengths) <= 1e-9 * lengths.max():
        return None
    ends = np.cumsum(lengths)
    ends *= cases.size / ends[-1]
    ends[-1] = cases.size
    return ends


def _drawn(ends: NDArray[np.float64], place: float) -> NDArray[np.int64]:
    """Return how many teeth of a comb, that begins at a place from 0 to 1, fall on each slice."""
    return np.diff(np.ceil(ends - place), prepend=0).astype(np.int64)
