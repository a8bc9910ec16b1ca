"""What runs along several axes are worth together: Dice of every test patient, of each run alone and of all as one.

Beside it what is said of a prediction when the truth is not known: the Dice that it is expected to have, and how the
runs agree; and how these follow the true Dice over the patients (Spearman's rank correlation).

Run as ``python benchmarks/axes_together.py STORE RUN,RUN,RUN [RUN,RUN,RUN ...]``, each group the runs of one fold. As
in `cspine-train predict`, probabilities are averaged on the grid of the source, above the average of the thresholds
that validation gave.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr, wilcoxon

from cspine_data import open_cohort
from cspine_train import LoadedRun, load_run
from cspine_train.metrics.overlap import overlap
from cspine_train.prediction.labelling import label_map
from cspine_train.prediction.predictor import fused_calibration

EXPECTED, AGREEMENT = "expected Dice", "agreement"


def name_of(run: LoadedRun) -> str:
    return "axis " + "".join(map(str, run.record.settings.axes))


def scores(store: str, runs: list[LoadedRun]) -> dict[str, dict[str, float]]:
    """Return Dice by way and test case of one fold."""
    cohort = open_cohort(store)
    found: dict[str, dict[str, float]] = {}
    for case in runs[0].record.split.test:
        ways, total = {}, None
        # Runs of equal digests were fed the same volumes.
        variant = runs[0].record.settings.variant
        prepared = cohort.prepared(case, variant)
        grid = prepared.corrected.geometry_xyz
        for run in runs:
            probabilities = run.on_source_grid(prepared)
            ways[name_of(run)] = label_map([run.record], probabilities, [1.0], grid).array_xyz
            total = probabilities if total is None else total + probabilities
        records = [run.record for run in runs]
        ways["together"] = label_map(records, total, [1.0] * len(runs), grid).array_xyz
        truth = cohort.label_xyz(case, variant) != 0
        for way, mask in ways.items():
            found.setdefault(way, {})[case] = overlap(mask != 0, truth).dice
        alone = [ways[name_of(run)] != 0 for run in runs]
        pairs = [overlap(one, other).dice for one, other in combinations(alone, 2)]
        if calibration := fused_calibration(records):
            mask, spacing_mm = ways["together"] != 0, prepared.corrected.spacing_mm
            expected = calibration.expected_dice_of(total, len(runs), mask, spacing_mm)
            found.setdefault(EXPECTED, {})[case] = expected
        found.setdefault(AGREEMENT, {})[case] = float(np.mean(pairs))
        print(f"| {case} | " + " | ".join(f"{dice[case]:.3f}" for dice in found.values()) + " |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("folds", nargs="+", metavar="RUN,RUN,RUN")
    arguments = parser.parse_args()
    folds = [[load_run(Path(path)) for path in fold.split(",")] for fold in arguments.folds]
    for runs in folds:
        for run in runs[1:]:
            if run.record.split != runs[0].record.split or run.record.digests != runs[0].record.digests:
                parser.error(f"{run.path} and {runs[0].path} are not of the same fold and data")
        if fused_calibration([run.record for run in runs]) is None:
            parser.error(f"the runs with {runs[0].path} have no expected Dice together")
    names = [*map(name_of, folds[0]), "together", EXPECTED, AGREEMENT]
    print("| test case | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    of_all: dict[str, dict[str, float]] = {name: {} for name in names}
    for runs in folds:
        for way, dice in scores(arguments.store, runs).items():
            of_all[way] |= dice
    means = {way: float(np.mean(list(dice.values()))) for way, dice in of_all.items()}
    print("| mean | " + " | ".join(f"{means[name]:.3f}" for name in names) + " |")
    together = list(of_all["together"].values())
    for name in (EXPECTED, AGREEMENT):
        estimates = list(of_all[name].values())
        off = np.abs(np.subtract(estimates, together)).mean()
        correlation = spearmanr(estimates, together)
        told = f"rank correlation {correlation.statistic:.2f} (p = {correlation.pvalue:.4f}), mean error {off:.3f}"
        print(f"{name} and the Dice of all together: {told}")
    for name in names[:-3]:
        gains = [dice - of_all[name][case] for case, dice in of_all["together"].items()]
        told = f"together against {name}: {np.mean(gains):+.4f}, better in {sum(g > 0 for g in gains)} of {len(gains)}"
        if len(gains) > 5:
            told += f", Wilcoxon signed-rank p = {wilcoxon(gains).pvalue:.4f}"
        print(told)


if __name__ == "__main__":
    main()
