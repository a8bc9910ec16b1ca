"""Which model, encoder, variant and axis are better, by patients that all were tried on, and whether that is sure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean
from typing import TypeVar

from cspine_train.comparison import FEWEST_PATIENTS, holm, paired_differences, signed_rank_p
from cspine_train.intervals import MeanInterval, mean_interval
from cspine_train.results import Condition

#: What a study varies, and compares the levels of.
FACTORS = ("model", "encoder", "variant", "axes")
SURE = 0.05
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
    """Two levels of a factor, patient by patient.

    Attributes
    ----------
    factor, better, worse : str
        Which two, the one of the higher mean first.
    difference : MeanInterval
        Over patients, of each the mean over pairs of conditions that differ in nothing else.
    pairs : int
        How many pairs there are.
    pairs_higher, pairs_lower : int
        In how many of them the mean over patients is higher, and lower.
    patients, patients_higher, patients_lower : int
        How many patients, and how many have a higher and a lower mean.
    p : float or None
        Of Wilcoxon's signed-rank test over patients, two-sided, after Holm's correction for all contrasts of the
        study; None of one patient.
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

    @property
    def sure(self) -> bool:
        """Whether the evidence decides."""
        return self.p is not None and self.p < SURE


@dataclass(frozen=True)
class Ranked:
    """A condition, its mean over patients, and how far it is from the best, patient by patient; None of the best."""

    condition: Condition
    mean: MeanInterval
    patients: int
    difference: MeanInterval | None = None
    p: float | None = None


Tested = TypeVar("Tested", Contrast, Ranked)


def levels(scores: Scores) -> list[Level]:
    """Return the levels of each factor that has several, the best of each first."""
    found = []
    for factor in FACTORS:
        blocks, patients = _complete(scores, factor)
        of_factor = [
            Level(
                factor,
                name,
                mean_interval(_over_blocks(scores, [block[name] for block in blocks], patients)),
                len(blocks),
            )
            for name in (blocks[0] if blocks and patients else ())
        ]
        found += sorted(of_factor, key=lambda level: -level.mean.mean)
    return found


def contrasts(scores: Scores) -> list[Contrast]:
    """Compare every two levels of each factor, over the conditions that are there with all of its levels."""
    found = []
    for factor in FACTORS:
        blocks, patients = _complete(scores, factor)
        if blocks and patients:
            found += [_contrast(scores, factor, pair, blocks, patients) for pair in combinations(blocks[0], 2)]
    return _corrected(found)


def ranked(scores: Scores) -> list[Ranked]:
    """Rank conditions by their mean over the patients that all have, and compare each with the best."""
    patients = _common(scores.values())
    if not patients:
        return []
    figures = {condition: [of[patient] for patient in patients] for condition, of in scores.items()}
    order = sorted(figures, key=lambda condition: -mean(figures[condition]))
    found = []
    for condition in order:
        differences = paired_differences(figures[condition], figures[order[0]])
        of_best = condition == order[0]
        found.append(
            Ranked(
                condition,
                mean_interval(figures[condition]),
                len(patients),
                None if of_best else mean_interval(differences),
                None if of_best else signed_rank_p(differences),
            )
        )
    return _corrected(found)


def _contrast(
    scores: Scores,
    factor: str,
    pair: tuple[str, str],
    blocks: Sequence[Mapping[str, Condition]],
    patients: Sequence[str],
) -> Contrast:
    means = [_over_blocks(scores, [block[name] for block in blocks], patients) for name in pair]
    if mean(means[1]) > mean(means[0]):
        pair, means = (pair[1], pair[0]), means[::-1]
    differences = paired_differences(*means)
    by_block = [
        round(sum(scores[block[pair[0]]][p] - scores[block[pair[1]]][p] for p in patients), 6) for block in blocks
    ]
    return Contrast(
        factor, *pair, mean_interval(differences),
        len(blocks), *_signs(by_block), len(patients), *_signs(differences), signed_rank_p(differences),
    )  # fmt: skip


def _signs(differences: Sequence[float]) -> tuple[int, int]:
    return sum(one > 0 for one in differences), sum(one < 0 for one in differences)


def _complete(scores: Scores, factor: str) -> tuple[list[dict[str, Condition]], list[str]]:
    """Return the conditions that are there with every level of a factor, by level, and the patients they all have."""
    grouped: dict[tuple[object, ...], dict[str, Condition]] = {}
    for condition in scores:
        others = tuple(value for name, value in condition._asdict().items() if name != factor)
        grouped.setdefault(others, {})[getattr(condition, factor)] = condition
    names = list(dict.fromkeys(getattr(condition, factor) for condition in scores))
    if len(names) < 2:
        return [], []
    blocks = [{name: block[name] for name in names} for block in grouped.values() if len(block) == len(names)]
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
        f"Dice with N4 less Dice without is {points:+.2f} points over {counted(contrast.patients, 'patient')} and "
        f"{counted(contrast.pairs, 'pair')} of conditions (higher with N4 in {patients} of {contrast.patients} "
        f"patients, {pairs} of {contrast.pairs} pairs)"
    )
    if interval.low is not None and interval.high is not None:
        ends = sorted((100 * sign * interval.low, 100 * sign * interval.high))
        evidence += f", 95 % interval {ends[0]:+.2f} to {ends[1]:+.2f}"
    if contrast.p is None:
        return (
            f"Does N4 help? The evidence does not decide: of one patient nothing is known about the next. {evidence}."
        )
    evidence += f", p = {contrast.p:.2g} after correction"
    if contrast.sure:
        return f"Does N4 help? {'Yes' if sign > 0 else 'No, it harms'}: {evidence}."
    few = " (fewer than 6 patients never can)" if contrast.patients < FEWEST_PATIENTS else ""
    return f"Does N4 help? The evidence does not decide{few}: {evidence}."


def counted(number: int, what: str) -> str:
    """Return a number of things as people say it: ``1 cell``, ``2 cells``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
