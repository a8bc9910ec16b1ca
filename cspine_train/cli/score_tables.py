"""Printed tables of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import click

from cspine_data.terminal import print_table, say
from cspine_train.evaluation.scoring import Evaluation
from cspine_train.metrics.instances import LEVEL_MEASURES
from cspine_train.metrics.overlap import Measure
from cspine_train.metrics.statistics import too_few
from cspine_train.run.evaluations import LevelMeans, known_measures


def print_scores(evaluation: Evaluation) -> None:
    """Print three tables: scores of patients, scores of their vertebrae, and means of levels."""
    brief = [measure for measure in known_measures([score.figures for score in evaluation.scores]) if measure.brief]
    of_levels = [measure for measure in brief if measure in LEVEL_MEASURES]
    print_table(*_score_table(evaluation, [measure for measure in brief if measure not in of_levels]))
    if evaluation.levels:
        click.echo()
        print_table(*_score_table(evaluation, of_levels))
        click.echo()
        print_table(*_level_table(evaluation.levels))
    few = (too_few(evaluation.patients(split), split) for split in evaluation.means)
    names = (
        f"{one.size}: expected calibration error {one.calibration_error:.3f}; {one.uncertainty}"
        for one in evaluation.names
    )
    errors = {split: evaluation.expected_dice_errors(split) for split in evaluation.means}
    expected = (
        f"expected minus true Dice of {split} patients: mean {mean(own):+.3f}, largest {max(own, key=abs):+.3f}"
        for split, own in errors.items()
        if own
    )
    for note in (*evaluation.caveats, *filter(None, few), *names, *expected):
        say(f"note: {note}")


def _score_table(evaluation: Evaluation, measures: Sequence[Measure]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table of scores and means."""
    rows = [
        [score.case, score.split, *(one.figure(score.figures[one.name]) for one in measures)]
        for score in evaluation.scores
    ]
    for split, of_split in evaluation.means.items():
        means = [(one, of_split[one.name]) for one in measures]
        rows.append([f"mean of {evaluation.patients(split)}", split, *(one.figure(own.mean) for one, own in means)])
        if any(own.low is not None for _, own in means):
            rows.append(["95 % interval of the mean", split, *(own.between(one.digits) for one, own in means)])
    return ["case", "split", *(one.heading for one in measures)], rows


def _level_table(levels: Sequence[LevelMeans]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table of the means of levels."""
    brief = [one for one in levels[0].means if one.brief]
    rows = [[level.level, level.split, str(level.patients), *(level.text(one) for one in brief)] for level in levels]
    return ["level", "split", "patients", *(f"mean {one.heading}" for one in brief)], rows
