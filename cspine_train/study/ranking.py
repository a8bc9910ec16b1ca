"""Which model, encoder, variant and axis are better, by patients that all were tried on, and whether that is sure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean
from typing import TypeVar

from cspine_train.evaluation.comparison import holm, paired_differences, signed_rank_p
from cspine_train.metrics.statistics import FEWEST_PATIENTS, MeanInterval, mean_interval, too_few
from cspine_train.study.results import Condition

#: What a study varies, and compares the levels of.
FACTORS = ("model", "encoder", "variant", "axes")
SURE = 0.05
_DICE = (0.0, 1.0)
Scores = Mapping[Condition, Mapping[str, float]]


@dataclass(frozen=True)
class Level:
    """One of the values that a factor has in a study, and the mean figure under it.

    Attributes
    ----------
    factor, name : str
        Such as ``model`` and ``unet``.
    mean : MeanInterval
        Over patients, of each the mean over the conditions that are there with every level of the factor.
    conditions : int
        How many these are.
    """

    factor: str
    name: str
    mean: MeanInterval
    conditions: int


@dataclass(frozen=True)
class Contrast:
    """Two levels of a factor, patient by patient, over the pairs of conditions that differ in nothing else.

    Attributes
    ----------
    factor, better, worse : str
        Which two, the one of the higher mean first.
    difference : MeanInterval
        Over patients, of each the mean over the pairs in which both conditions have it.
    pairs : int
        How many pairs there are.
    pairs_higher, pairs_lower : int
        In how many of them the mean over patients is higher, and lower.
    patients, patients_higher, patients_lower : int
        How many patients, and how many have a higher and a lower mean.
    p : float or None
        Of Wilcoxon's signed-rank test over patients, two-sided, after Holm's correction for all contrasts of the
        study; None of fewer than `FEWEST_PATIENTS`.
    ranks_agree : bool
        Whether the ranks that are tested are for the level of the higher mean.
    """

    factor: str
    better: str
    worse: str
    difference: MeanInterval
    pairs: int
    pairs_higher: int
    pairs_lower: int
    patients: int
    patients_higher: int
    patients_lower: int
    p: float | None
    ranks_agree: bool

    @property
    def sure(self) -> bool:
        """Whether the evidence decides: the test is of ranks, and one patient may turn the mean against them."""
        return _is_sure(self)


@dataclass(frozen=True)
class Ranked:
    """A condition, its mean over patients, and how far it is from the best, patient by patient; None of the best.

    Equal ones share a place.
    """

    place: int
    condition: Condition
    mean: MeanInterval
    patients: int
    difference: MeanInterval | None = None
    p: float | None = None
    ranks_agree: bool = False

    @property
    def sure(self) -> bool:
        """Whether it is worse than the best; see `Contrast.sure`."""
        return _is_sure(self)


Tested = TypeVar("Tested", Contrast, Ranked)


def _is_sure(tested: Contrast | Ranked) -> bool:
    return tested.p is not None and tested.p < SURE and tested.ranks_agree


def levels(scores: Scores) -> list[Level]:
    """Return the levels of each factor that has several, the best of each first; none of too few patients."""
    found = []
    for factor in FACTORS:
        blocks, patients = _complete(scores, factor)
        of_factor = [
            Level(
                factor,
                name,
                mean_interval(_over_blocks(scores, [block[name] for block in blocks], patients), _DICE),
                len(blocks),
            )
            for name in (blocks[0] if blocks and len(patients) >= FEWEST_PATIENTS else ())
        ]
        found += sorted(of_factor, key=lambda level: -level.mean.mean)
    return found


def contrasts(scores: Scores) -> list[Contrast]:
    """Compare every two levels of each factor, over the conditions and patients that are there with both."""
    found = []
    for factor in FACTORS:
        names = dict.fromkeys(getattr(condition, factor) for condition in scores)
        blocks = _blocks(scores, factor)
        for pair in combinations(names, 2):
            pairs = [(scores[block[pair[0]]], scores[block[pair[1]]]) for block in blocks if set(pair) <= block.keys()]
            if pairs := [both for both in pairs if _common(both)]:
                found.append(_contrast(factor, pair, pairs))
    return _corrected(found)


def ranked(scores: Scores) -> list[Ranked]:
    """Rank conditions by their mean over the patients that all have, and compare each with the best.

    Too few patients rank nothing.
    """
    patients = _common(scores.values())
    if len(patients) < FEWEST_PATIENTS:
        return []
    figures = {condition: [of[patient] for patient in patients] for condition, of in scores.items()}
    means = {condition: mean(several) for condition, several in figures.items()}
    order = sorted(means, key=lambda condition: -means[condition])
    found = []
    for condition in order:
        differences = paired_differences(figures[condition], figures[order[0]])
        of_best = condition == order[0]
        found.append(
            Ranked(
                1 + sum(other > means[condition] for other in means.values()),
                condition,
                mean_interval(figures[condition], _DICE),
                len(patients),
                None if of_best else mean_interval(differences),
                None if of_best else signed_rank_p(differences),
                _ranks(differences) < 0,
            )
        )
    return _corrected(found)


def _contrast(
    factor: str, pair: tuple[str, str], pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]
) -> Contrast:
    of_patients: dict[str, list[float]] = {}
    by_pair = []
    for first, second in pairs:
        both = _common((first, second))
        differences = paired_differences([first[p] for p in both], [second[p] for p in both])
        by_pair.append(round(mean(differences), 6))
        for patient, difference in zip(both, differences, strict=True):
            of_patients.setdefault(patient, []).append(difference)
    differences = [round(mean(several), 6) for several in of_patients.values()]
    if mean(differences) < 0:
        pair = pair[1], pair[0]
        differences, by_pair = [-one for one in differences], [-one for one in by_pair]
    return Contrast(
        factor, *pair, mean_interval(differences), len(by_pair), *_signs(by_pair), len(differences),
        *_signs(differences), signed_rank_p(differences), _ranks(differences) > 0,
    )  # fmt: skip


def _ranks(differences: Sequence[float]) -> float:
    """Return by how much the ranks of what is higher outweigh those of what is lower."""
    from scipy.stats import rankdata

    told = [one for one in differences if one]
    ranks = rankdata([abs(one) for one in told]).tolist()
    return float(sum(rank if one > 0 else -rank for one, rank in zip(told, ranks, strict=True)))


def _signs(differences: Sequence[float]) -> tuple[int, int]:
    return sum(one > 0 for one in differences), sum(one < 0 for one in differences)


def _blocks(scores: Scores, factor: str) -> list[dict[str, Condition]]:
    """Return the conditions that differ in a factor alone, by its level."""
    grouped: dict[tuple[object, ...], dict[str, Condition]] = {}
    for condition in scores:
        others = tuple(value for name, value in condition._asdict().items() if name != factor)
        grouped.setdefault(others, {})[getattr(condition, factor)] = condition
    return list(grouped.values())


def _complete(scores: Scores, factor: str) -> tuple[list[dict[str, Condition]], list[str]]:
    """Return the conditions that are there with every level of a factor, by level, and the patients they all have."""
    names = list(dict.fromkeys(getattr(condition, factor) for condition in scores))
    if len(names) < 2:
        return [], []
    blocks = [{name: block[name] for name in names} for block in _blocks(scores, factor) if len(block) == len(names)]
    return blocks, _common(scores[condition] for block in blocks for condition in block.values())


def _common(of_patients: Iterable[Mapping[str, float]]) -> list[str]:
    every = list(of_patients)
    return [patient for patient in every[0] if all(patient in one for one in every)] if every else []


def _over_blocks(scores: Scores, conditions: Sequence[Condition], patients: Sequence[str]) -> list[float]:
    return [mean(scores[condition][patient] for condition in conditions) for patient in patients]


def _corrected(found: Sequence[Tested]) -> list[Tested]:
    """Correct the tests for their number."""
    return [replace(one, p=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def n4_answer(found: Sequence[Contrast]) -> str:
    """Answer whether N4 helps, in a sentence with its evidence; or say that the evidence does not decide."""
    contrast = next((one for one in found if {one.better, one.worse} == {"n4", "raw"}), None)
    if contrast is None:
        return "Does N4 help? Nothing can be said: no condition was run both with it and without."
    sign = 1 if contrast.better == "n4" else -1
    interval = contrast.difference
    points = 100 * sign * interval.mean
    patients, pairs = (
        (contrast.patients_higher, contrast.pairs_higher)
        if sign > 0
        else (contrast.patients_lower, contrast.pairs_lower)
    )
    evidence = (
        f"Dice with N4 minus Dice without is {points:+.2f} points over {counted(contrast.patients, 'patient')} and "
        f"{counted(contrast.pairs, 'pair')} of conditions (higher with N4 in {patients} of {contrast.patients} "
        f"patients, {pairs} of {contrast.pairs} pairs)"
    )
    if interval.low is not None and interval.high is not None:
        ends = sorted((100 * sign * interval.low, 100 * sign * interval.high))
        evidence += f", 95 % interval {ends[0]:+.2f} to {ends[1]:+.2f}"
    if contrast.p is None:
        return f"Does N4 help? The evidence does not decide: {too_few(contrast.patients)}. {evidence}."
    evidence += f", p = {contrast.p:.2g} after correction"
    if contrast.sure:
        return f"Does N4 help? {'Yes' if sign > 0 else 'No, it harms'}: {evidence}."
    if contrast.p < SURE:
        return f"Does N4 help? The evidence does not decide, mean and ranks point to different sides: {evidence}."
    tests = sum(one.p is not None for one in found)
    fewest = next(n for n in range(1, 99) if tests * 2 / 2**n < SURE)
    few = f" (after {counted(tests, 'comparison')} fewer than {fewest} patients never can)"
    # Those whom nothing is different for count for nothing in the test.
    few = few if contrast.patients_higher + contrast.patients_lower < fewest else ""
    return f"Does N4 help? The evidence does not decide{few}: {evidence}."


def counted(number: int, what: str) -> str:
    """Return a number of things as people say it: ``1 cell``, ``2 cells``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
