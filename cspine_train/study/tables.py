"""A study's figures as tables, and these as Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cspine_train.metrics.statistics import FEWEST_PATIENTS, MeanInterval, mean_interval, too_few
from cspine_train.run.planes import PLANES
from cspine_train.study.plan import IMAGENET, RANDOM, RANDOM_ENCODER, RANDOM_TOLD
from cspine_train.study.published import PublishedCell, published_percent
from cspine_train.study.ranking import Contrast, Level, Ranked, Scores, contrasts, counted, levels, n4_answer, ranked
from cspine_train.study.results import Condition, condition_of, scores

MARKDOWN, CSV, LATEX, HTML = "markdown", "csv", "latex", "html"
_OF_FILES = (
    "What starts from a file stands beside the published figure of ImageNet's weights: whether the file holds those is "
    "not known here."
)


@dataclass(frozen=True)
class Table:
    """A title, what stands above the columns, rows of text, and what has to be said beneath."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def of_words(self) -> tuple[bool, ...]:
        """Which columns hold words, and not figures."""
        places = range(len(self.columns))
        return tuple(any(row[at] and row[at][0] not in "+-0123456789" for row in self.rows) for at in places)


@dataclass(frozen=True)
class Figures:
    """What came out of a condition, beside what the reference study published of it.

    Attributes
    ----------
    condition : Condition
        Which.
    patients : int
        How many were tested.
    dice : MeanInterval
        Over whole volumes.
    batch_averaged : MeanInterval
        In percent, as the reference study has it.
    published : float or None
        In percent; None of what it has not.
    difference : MeanInterval or None
        Batch-averaged minus published.
    """

    condition: Condition
    patients: int
    dice: MeanInterval
    batch_averaged: MeanInterval
    published: float | None
    difference: MeanInterval | None


@dataclass(frozen=True)
class Findings:
    """All that a study's figures say.

    Attributes
    ----------
    answer : str
        Whether N4 helps, in a sentence.
    conditions : tuple of Figures
        One of each, in the order of the plan.
    cells : tuple of Table
        The reference study's tables: for the slices of each axis its conditions, beside what it published.
    factors, pairs, ranking : Table
        Levels of each factor; their differences; all conditions beside the best.
    caveats : tuple of str
        What has to be said beside every figure.
    """

    answer: str
    conditions: tuple[Figures, ...]
    cells: tuple[Table, ...]
    factors: Table
    pairs: Table
    ranking: Table
    caveats: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table, in order."""
        return tuple(table for table in (*self.cells, self.factors, self.pairs, self.ranking) if table.rows)


def findings(rows: Sequence[Mapping[str, Any]], unfinished: Sequence[str] = ()) -> Findings:
    """Tell what came out of a study.

    Parameters
    ----------
    rows : sequence of mapping
        What `study_rows` returns.
    unfinished : sequence of str
        Cells that are not done.
    """
    dice, batch_averaged = scores(rows), scores(rows, "batch_averaged_dice")
    compared = contrasts(dice)
    caveats = list(dict.fromkeys(part for row in rows for part in row["note"].split("; ")))
    if any(row["encoder"] == RANDOM_ENCODER and row["weights"] == RANDOM for row in rows):
        caveats.append(RANDOM_TOLD)
    caveats += _few(dice)
    if any(row["folds"] for row in rows):
        caveats.append("folds share training patients, which tests and intervals take for independent")
    if unfinished:
        are = "is" if len(unfinished) == 1 else "are"
        caveats.append(f"{counted(len(unfinished), 'cell')} {are} not done, and in no figure")
    conditions = tuple(_figures(condition, dice[condition], batch_averaged[condition]) for condition in dice)
    axes = dict.fromkeys(condition.axes for condition in dice)
    recipes = len({(condition.epochs, condition.batch_size) for condition in dice}) > 1
    caveats += _uneven(rows, dice)
    return Findings(
        n4_answer(compared),
        conditions,
        tuple(_cells(axis, conditions, recipes) for axis in axes),
        _levels(levels(dice)),
        _pairs(compared),
        _ranking(ranked(dice), recipes),
        tuple(caveats),
    )


def _few(dice: Scores) -> Iterator[str]:
    """Iterate over why there is no interval, test or ranking."""
    if not dice:
        return
    few = too_few(max(map(len, dice.values())))
    if few := few or too_few(len(set.intersection(*map(set, dice.values()))), "common"):
        yield few


def _uneven(rows: Sequence[Mapping[str, Any]], dice: Scores) -> Iterator[str]:
    """Iterate over what has to be said of seeds and patients that not all conditions have."""
    seeds: dict[Condition, set[int]] = {}
    for row in rows:
        seeds.setdefault(condition_of(row), set()).add(row["seed"])
    if len(set().union(*seeds.values())) == 1:
        yield "one seed: what two conditions differ by has the luck of their trainings in it"
    elif len(set(map(frozenset, seeds.values()))) > 1:
        yield "not all conditions have every seed: figures are of the seeds that all have"
    if len({frozenset(patients) for patients in dice.values()}) > 1:
        yield "not all conditions have every patient: levels and ranking are of the patients that all have"


def _figures(condition: Condition, dice: Mapping[str, float], batch_averaged: Mapping[str, float]) -> Figures:
    percent = mean_interval([100 * one for one in batch_averaged.values()], (0.0, 100.0))
    published = published_percent().get(_published(condition))
    difference = None if published is None else percent.less(published)
    return Figures(condition, len(dice), mean_interval(list(dice.values()), (0.0, 1.0)), percent, published, difference)


def _cells(axes: str, conditions: Sequence[Figures], recipes: bool) -> Table:
    own = [one for one in conditions if one.condition.axes == axes]
    published = any(one.published is not None for one in conditions)
    columns = (
        "model", "encoder", "variant", *(("epochs", "batch") if recipes else ()), "patients", "Dice",
        "batch-averaged Dice, %", *(("published, %", "difference") if published else ()),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for one in own:
        known = [*one.condition[:3], *(map(str, one.condition[4:]) if recipes else ())]
        there, less = one.published, one.difference
        beside = ("", "") if there is None or less is None else (f"{there:.0f}", less.told(1, sign=True))
        told = (str(one.patients), one.dice.told(), one.batch_averaged.told(1))
        rows.append((*known, *told, *(beside if published else ())))
    planes = ", ".join(PLANES[int(axis)] for axis in axes)
    return Table(
        f"Axis {axes} ({planes} slices)",
        columns,
        tuple(rows),
        (
            "Dice: over whole volumes, mean over patients, in brackets 95 % confidence intervals (Student's t) of at "
            f"least {FEWEST_PATIENTS} patients.",
            "Published: the reference study's figure of one other patient, averaged over batches, as the column before "
            "it; what it calls random names no encoder."
            if published
            else "The reference study published no figure of these encoders and what they start from.",
            *((_OF_FILES,) if published and any(_starts_from_file(one.condition) for one in own) else ()),
        ),
    )


def _starts_from_file(condition: Condition) -> bool:
    return not condition.encoder.endswith((f" ({RANDOM})", f" ({IMAGENET})"))


def _published(condition: Condition) -> PublishedCell:
    encoder, _, start = condition.encoder.partition(" ")
    of_random = RANDOM if encoder == RANDOM_ENCODER else ""
    there = of_random if start == f"({RANDOM})" else encoder
    return PublishedCell(condition.axes, condition.model, there, condition.variant)


def _levels(found: Sequence[Level]) -> Table:
    rows = tuple((one.factor, one.name, one.mean.told(), str(one.conditions)) for one in found)
    note = "Over the conditions that are there with every level of the factor; the best of each first."
    return Table("What is better", ("factor", "level", "mean Dice", "conditions of each"), rows, (note,))


def _pairs(found: Sequence[Contrast]) -> Table:
    rows = tuple(
        (
            one.factor, one.better, one.worse, one.difference.told(sign=True),
            f"{one.patients_higher} of {one.patients}", f"{one.pairs_higher} of {one.pairs}",
            *(("", "too few patients") if one.p is None else (f"{one.p:.2g}", "yes" if one.sure else "not decided")),
        )
        for one in found
    )  # fmt: skip
    columns = ("factor", "higher", "lower", "difference of Dice", "patients", "pairs", "p", "sure")
    note = (
        "Patient by patient, over pairs of conditions that differ in nothing else. p: Wilcoxon's signed-rank test over "
        "patients, two-sided, after Holm's correction for all rows of this table; intervals are not corrected."
    )
    return Table("By how much, and how sure", columns, rows, (note,))


def _ranking(found: Sequence[Ranked], recipes: bool) -> Table:
    rows = tuple(
        (
            str(one.place), *one.condition[:4], *(map(str, one.condition[4:]) if recipes else ()), str(one.patients),
            one.mean.told(), _difference(one.difference), "" if one.p is None else f"{one.p:.2g}",
            "" if one.difference is None else "yes" if one.sure else "not decided",
        )
        for one in found
    )  # fmt: skip
    columns = (
        "place", "model", "encoder", "variant", "axis", *(("epochs", "batch") if recipes else ()), "patients", "Dice",
        "beside the best", "p", "worse",
    )  # fmt: skip
    note = (
        "Chosen and judged on the same patients, the best looks better than it is. p: as above, corrected for the rows "
        "of this table; intervals are not corrected."
    )
    return Table("All conditions", columns, rows, (note,))


def _difference(interval: MeanInterval | None) -> str:
    return "" if interval is None else interval.told(sign=True)


def rendered(found: Findings, form: str) -> str:
    """Return findings as text: ``markdown``, ``csv`` (a row a condition, in numbers), ``latex`` or ``html``."""
    if form == CSV:
        return _csv(found)
    return {MARKDOWN: _markdown, LATEX: _latex, HTML: _html}[form](found)


def _csv(found: Findings) -> str:
    rows = [
        {
            **one.condition._asdict(), "patients": one.patients, **_ends("dice", one.dice),
            **_ends("batch_averaged_percent", one.batch_averaged), "published_percent": one.published,
            **_ends("difference_percent", one.difference), "note": "; ".join(found.caveats),
        }
        for one in found.conditions
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _ends(name: str, interval: MeanInterval | None) -> dict[str, float | None]:
    mean, low, high = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
    rounded = {name: mean, f"{name}_low": low, f"{name}_high": high}
    return {name: None if figure is None else round(figure, 6) for name, figure in rounded.items()}


def _markdown(found: Findings) -> str:
    from tabulate import tabulate

    def safe(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    parts = [found.answer, *(f"- {safe(caveat)}" for caveat in found.caveats), ""]
    for table in found.tables:
        rows = [[safe(cell) for cell in row] for row in table.rows]
        grid = tabulate(rows, table.columns, tablefmt="github", disable_numparse=True)
        parts += [f"## {table.title}", "", grid, "", *table.notes, ""]
    return "\n".join(parts)


def _latex(found: Findings) -> str:
    from tabulate import tabulate

    parts = [f"{_as_latex(line)}\n" for line in (found.answer, *found.caveats)]
    for table in found.tables:
        grid = tabulate(table.rows, table.columns, tablefmt="latex_booktabs", disable_numparse=True)
        title, notes = _as_latex(table.title), (_as_latex(note) for note in table.notes)
        parts += [f"\\paragraph{{{title}}}\n", str(grid), "", *(f"{note}\n" for note in notes)]
    return "\n".join(parts)


def _as_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in " ".join(text.split()))


def _html(found: Findings) -> str:
    from html import escape

    from tabulate import tabulate

    parts = [f"<p>{escape(line)}</p>" for line in (found.answer, *found.caveats)]
    for table in found.tables:
        grid = tabulate(table.rows, table.columns, tablefmt="html", disable_numparse=True)
        parts += [f"<h2>{escape(table.title)}</h2>", str(grid), *(f"<p>{escape(note)}</p>" for note in table.notes)]
    return "\n".join(parts) + "\n"
