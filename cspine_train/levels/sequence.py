"""The most probable sequence of levels for the vertebrae of a volume: each level once, in order.

A network may label half of a vertebra L3 and the other half L4, or two vertebrae L3. But vertebrae are consecutive, so
the evidence of all of them decides the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from cspine_data import GAP_RATIO, LEVEL_NAMES, SACRUM, SPINE, T13, usual_distances
from cspine_train.errors import RunError

_T11, _T12, _L1, _L5, _L6 = 18, 19, 20, 24, 25
# Approximate frequency of anatomical variants: thirteen or eleven thoracic, or six lumbar vertebrae (Tins 2016).
_VARIANTS = {(_T12, T13): 0.02, (T13, _L1): 1.0, (_T11, _L1): 0.02, (_L5, _L6): 0.05, (_L6, SACRUM): 1.0}
# Share of the evidence that is spread over all levels: the network may be wrong, and it may not know all levels.
_SPREAD = 0.02


@dataclass(frozen=True)
class LevelSequence:
    """The most probable sequence of levels, from head to feet, and the second most probable one.

    Attributes
    ----------
    levels : tuple of int
        Level of each vertebra.
    probabilities : tuple of float
        Probability of each vertebra's level, summed over all sequences that have it.
    probability : float
        Probability of the sequence.
    second : tuple of int
        The second most probable sequence; empty if there is only one.
    second_probability : float
        Its probability.
    allowed : float
        Probability of all sequences with the given lowest or highest level, and `unrestricted` the most probable
        sequence without them.
    """

    levels: tuple[int, ...]
    probabilities: tuple[float, ...]
    probability: float = 1.0
    second: tuple[int, ...] = ()
    second_probability: float = 0.0
    allowed: float = 1.0
    unrestricted: tuple[int, ...] = ()


def find_sequence(
    evidence: NDArray[np.float64],
    known: Sequence[int],
    distances_mm: Sequence[float],
    temperature: float = 1.0,
    lowest: int | None = None,
    highest: int | None = None,
) -> LevelSequence:
    """Return the most probable sequence of levels.

    Parameters
    ----------
    evidence : ndarray
        (n, K): for each vertebra, from head to feet, the network's probability of each known level; rows sum to 1.
    known : sequence of int
        The K levels.
    distances_mm : sequence of float
        The n - 1 distances of neighbours. The sequence may skip a level only at a gap, see `gaps_of`.
    temperature : float
        Divides the logarithms of the evidence, as the errors of neighbouring vertebrae are not independent.
    lowest, highest : int, optional
        Level of the last or the first vertebra, if known.

    Raises
    ------
    RunError
        If no sequence is possible, as there are too many vertebrae.
    """
    scored = sorted(_scored(evidence, known, distances_mm, temperature), key=lambda one: -one[1])
    allowed = [lowest in (None, path[-1]) and highest in (None, path[0]) for path, _ in scored]
    found = list(compress(scored, allowed))
    if not found:
        between = [f"{word} {LEVEL_NAMES[v]}" for word, v in (("up to", highest), ("down to", lowest)) if v is not None]
        raise RunError(f"{len(evidence)} vertebrae were found, more than a spine has {' '.join(between)}".rstrip())
    weights = softmax([score for _, score in found])
    best = found[0][0]
    own = [
        float(sum(weight for (path, _), weight in zip(found, weights, strict=True) if path[row] == level))
        for row, level in enumerate(best)
    ]
    second = (found[1][0], float(weights[1])) if len(found) > 1 else ((), 0.0)
    share = float(softmax([score for _, score in scored])[allowed].sum())
    return LevelSequence(best, tuple(own), float(weights[0]), *second, allowed=share, unrestricted=scored[0][0])


def sequence_probability(
    levels: Sequence[int],
    evidence: NDArray[np.float64],
    known: Sequence[int],
    distances_mm: Sequence[float],
    temperature: float,
) -> float:
    """Return the probability of a sequence of levels; 0 if it is impossible. See `find_sequence`."""
    scored = dict(_scored(evidence, known, distances_mm, temperature))
    own = scored.get(tuple(levels))
    return 0.0 if own is None else math.exp(own - float(logsumexp(list(scored.values()))))


def _scored(
    evidence: NDArray[np.float64], known: Sequence[int], distances_mm: Sequence[float], temperature: float
) -> list[tuple[tuple[int, ...], float]]:
    """Return all sequences with the logarithms of their probabilities, up to a constant offset."""
    logs = np.full((len(evidence), len(SPINE) + 1), math.log(_SPREAD / len(SPINE)))
    column = {level: number for number, level in enumerate((*SPINE, SACRUM))}
    for number, level in enumerate(known):
        logs[:, column[level]] = np.log((1 - _SPREAD) * evidence[:, number] + _SPREAD / len(SPINE))
    gaps = gaps_of(distances_mm)
    return [
        (path, prior + sum(float(logs[row, column[level]]) for row, level in enumerate(path)) / temperature)
        for path, prior in _paths(len(evidence), gaps)
    ]


def _paths(count: int, gaps: Sequence[bool]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Iterate over all sequences of `count` levels, with the logarithms of their prior probabilities."""
    rare = {after: math.log(frequency) for (_, after), frequency in _VARIANTS.items() if after in (T13, _L6)}
    ends: list[tuple[tuple[int, ...], float]] = [((level,), rare.get(level, 0.0)) for level in (*SPINE, SACRUM)]
    for gap in gaps[: count - 1]:
        ends = [((*path, level), prior + more) for path, prior in ends for level, more in _next(path[-1], gap).items()]
    yield from ends


def _next(level: int, gap: bool) -> dict[int, float]:
    """Return the levels that may follow, with the logarithms of their probabilities."""
    following = {after: math.log(frequency) for (before, after), frequency in _VARIANTS.items() if before == level}
    if level in (T13, _L6, SACRUM):
        return following
    below = level + 1 if level < _L5 else SACRUM
    following[below] = 0.0
    # At a gap below T11, a missed T12 is more likely than a spine without T12.
    if gap and below < _L5:
        following[below + 1] = 0.0
    return following


def gaps_of(distances_mm: Sequence[float]) -> list[bool]:
    """Return whether each distance of neighbours is so long that a vertebra may be missing between them."""
    return [
        mm > GAP_RATIO * usual for mm, usual in zip(distances_mm, usual_distances(distances_mm).tolist(), strict=True)
    ]


def sequence_name(levels: Sequence[int]) -> str:
    """Return a sequence as text, such as ``T11-L5`` or ``T11-L5 with T13``."""
    text = LEVEL_NAMES[levels[0]] if len(levels) == 1 else f"{LEVEL_NAMES[levels[0]]}-{LEVEL_NAMES[levels[-1]]}"
    inside = [level for level in levels[1:-1] if level in (T13, _L6)]
    if (_T11, _L1) in pairwise(levels):
        return f"{text} without T12"
    return f"{text} with {LEVEL_NAMES[inside[0]]}" if inside else text
