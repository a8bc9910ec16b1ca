"""Statistics of a study: levels of a factor, their paired differences, and a ranking of all conditions.

The functions take the result of `scores`, a measure by patient (rows) and condition (columns). Their frames hold means
as `MeanInterval`. The column ``sure`` is true if p is below `SURE` and mean and ranks have the same sign: a single
patient can reverse the sign of the mean.
"""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from cspine_data.tools import count
from cspine_train.metrics.statistics import (
    FEWEST_PATIENTS,
    holm,
    mean_interval,
    paired_differences,
    signed_rank_p,
    too_few,
)
from cspine_train.study.results import CONDITION

#: Factors whose levels a study compares.
FACTORS = ("model", "encoder", "variant", "axes")
SURE = 0.05
_DICE = (0.0, 1.0)
_LEVEL_COLUMNS = ["factor", "level", "mean", "conditions"]
_CONTRAST_COLUMNS = [
    "factor", "better", "worse", "difference", "pairs", "pairs_higher", "pairs_lower", "patients", "patients_higher",
    "patients_lower", "p", "ranks_agree",
]  # fmt: skip
_RANKING_COLUMNS = ["place", *CONDITION, "patients", "mean", "difference", "p", "ranks_agree"]


def levels(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each level of each factor, the best level first.

    Means are over patients, and over the conditions that exist with all levels of the factor (``conditions`` of each
    level). There are no rows for too few patients.
    """
    rows = []
    for factor in FACTORS:
        blocks = _blocks(scores, factor)
        if blocks.shape[1] < 2:
            continue
        complete = blocks[blocks.notna().groupby(level=_others(factor)).transform("any").all(axis=1)]
        number = complete.groupby(level=_others(factor)).ngroups
        measured = complete.dropna().groupby(level="patient", sort=False)
        means = measured.agg(fmean)[measured.size() == number]
        if len(means) >= FEWEST_PATIENTS:
            of_factor = [(factor, level, mean_interval(list(means[level]), _DICE), number) for level in means]
            rows += sorted(of_factor, key=lambda row: -row[2].mean)
    return pd.DataFrame(rows, columns=_LEVEL_COLUMNS)


def contrasts(scores: pd.DataFrame) -> pd.DataFrame:
    """Compare all pairs of levels of each factor, over pairs of conditions that differ in nothing else.

    The difference of a patient is the mean over pairs in which both conditions have the patient. ``better`` is the
    level with the higher mean, and p that of the signed-rank test over patients after Holm's correction for all rows.
    """
    rows = []
    for factor in FACTORS:
        blocks = _blocks(scores, factor)
        for better, worse in combinations(blocks.columns, 2):
            pairs = blocks[[better, worse]].dropna()
            if pairs.empty:
                continue
            by_pair_and_patient = pd.Series(paired_differences(pairs[better], pairs[worse]), pairs.index)
            by_patient = by_pair_and_patient.groupby(level="patient", sort=False).agg(fmean).round(6)
            by_pair = by_pair_and_patient.groupby(level=_others(factor), sort=False).agg(fmean).round(6)
            if fmean(by_patient) < 0:
                better, worse, by_patient, by_pair = worse, better, -by_patient, -by_pair
            difference = list(by_patient)
            rows.append(
                (
                    factor, better, worse, mean_interval(difference), *_counts(by_pair), *_counts(by_patient),
                    signed_rank_p(difference), _rank_sum(difference) > 0,
                )
            )  # fmt: skip
    return _corrected(pd.DataFrame(rows, columns=_CONTRAST_COLUMNS))


def ranked(scores: pd.DataFrame) -> pd.DataFrame:
    """Rank conditions by their mean over common patients, and compare each with the best.

    Equal means share a place. There are no rows for too few patients.
    """
    common = scores.dropna()
    rows: list[tuple[Any, ...]] = []
    if len(common) >= FEWEST_PATIENTS:
        means = common.agg(fmean).sort_values(ascending=False, kind="stable")
        places = means.rank(ascending=False, method="min").astype(int)
        best = common[means.index[0]]
        for condition in means.index:
            figures = list(common[condition])
            row = (places[condition], *condition, len(common), mean_interval(figures, _DICE))
            difference = paired_differences(figures, best)
            compared = (mean_interval(difference), signed_rank_p(difference), _rank_sum(difference) < 0)
            rows.append((*row, *(compared if rows else (None, None, False))))
    return _corrected(pd.DataFrame(rows, columns=_RANKING_COLUMNS))


def _others(factor: str) -> list[str]:
    return [name for name in CONDITION if name != factor]


def _blocks(scores: pd.DataFrame, factor: str) -> pd.DataFrame:
    """Return scores with a column for each level of a factor, and rows by the other factors and patient."""
    names = scores.columns.get_level_values(factor).unique()
    # Sorted by condition, so that the order of the study's rows does not matter.
    return scores.unstack().dropna().unstack(factor).reindex(columns=names)


def _counts(differences: pd.Series) -> tuple[int, int, int]:
    return len(differences), int((differences > 0).sum()), int((differences < 0).sum())


def _rank_sum(differences: list[float]) -> float:
    """Return the sum of the signed ranks of differences that are not zero."""
    from scipy.stats import rankdata

    nonzero = np.array([difference for difference in differences if difference])
    return float((np.sign(nonzero) * rankdata(np.abs(nonzero))).sum())


def _corrected(found: pd.DataFrame) -> pd.DataFrame:
    """Correct the p values for their number, and add the column ``sure``."""
    p = pd.Series(holm([None if pd.isna(one) else float(one) for one in found.p]), found.index, dtype="float64")
    return found.assign(p=p, sure=(p < SURE) & found.ranks_agree.astype(bool))


def n4_answer(found: pd.DataFrame) -> str:
    """Answer in a sentence whether N4 helps, with the evidence from `contrasts`, or say that it does not decide."""
    of_n4 = found[found.better.isin(["n4", "raw"]) & found.worse.isin(["n4", "raw"])]
    if of_n4.empty:
        return "Does N4 help? Nothing can be said: no condition was run both with it and without."
    contrast = next(of_n4.itertuples())
    helps = contrast.better == "n4"
    sign = 1 if helps else -1
    patients, pairs = (
        (contrast.patients_higher, contrast.pairs_higher) if helps else (contrast.patients_lower, contrast.pairs_lower)
    )
    evidence = (
        f"Dice with N4 minus Dice without is {100 * sign * contrast.difference.mean:+.2f} points over "
        f"{count(contrast.patients, 'patient')} and {count(contrast.pairs, 'pair')} of conditions (higher with N4 "
        f"in {patients} of {contrast.patients} patients, {pairs} of {contrast.pairs} pairs)"
    )
    if (few := too_few(contrast.patients)) is not None:
        return f"Does N4 help? The evidence does not decide: {few}. {evidence}."
    low, high = sorted((100 * sign * contrast.difference.low, 100 * sign * contrast.difference.high))
    evidence += f", 95 % interval {low:+.2f} to {high:+.2f}, p = {contrast.p:.2g} after correction"
    if contrast.sure:
        return f"Does N4 help? {'Yes' if helps else 'No, it harms'}: {evidence}."
    if contrast.p < SURE:
        return f"Does N4 help? The evidence does not decide, mean and ranks point to different sides: {evidence}."
    tests = int(found.p.notna().sum())
    fewest = next(n for n in range(1, 99) if tests * 2 / 2**n < SURE)
    note = ""
    # The test leaves out patients without a difference.
    if contrast.patients_higher + contrast.patients_lower < fewest:
        note = f" (after {count(tests, 'comparison')} fewer than {fewest} patients never can)"
    return f"Does N4 help? The evidence does not decide{note}: {evidence}."
