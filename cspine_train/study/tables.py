"""Tables of a study, as Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cspine_data.tools import count
from cspine_train.metrics.overlap import MEASURES, Measure
from cspine_train.metrics.statistics import FEWEST_PATIENTS, MeanInterval, mean_interval, too_few
from cspine_train.run.evaluations import BATCH_AVERAGED, patient_measures
from cspine_train.run.settings import PLANES
from cspine_train.study.plan import IMAGENET, RANDOM, RANDOM_ENCODER, RANDOM_NOTE
from cspine_train.study.published import published_percent
from cspine_train.study.ranking import contrasts, levels, n4_answer, ranked
from cspine_train.study.results import CONDITION, conditions, scores

MARKDOWN, CSV, LATEX, HTML = "markdown", "csv", "latex", "html"
_DICE_NOTE = (
    "Dice: mean over patients of whole volumes, in brackets its 95 % confidence interval (Student's t) for at least "
    f"{FEWEST_PATIENTS} patients."
)
_PUBLISHED_NOTE = (
    "Published: the reference study's figure of one other patient, averaged over batches like the column before it; it "
    "does not name the encoder with random weights."
)
_NOT_PUBLISHED_NOTE = "The reference study published no figures of these encoders with these initial weights."
_FILE_NOTE = (
    "Encoders with weights from a file are compared with the published figure of ImageNet weights; whether the file "
    "holds these is not known."
)
_INTERVAL_NOTE = "Means over patients, on whole volumes, with 95 % confidence intervals in brackets."


@dataclass(frozen=True, eq=False)
class Table:
    """A titled table of text, with notes for below it."""

    title: str
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def text_columns(self) -> list[bool]:
        """Whether each column is text instead of figures, for its alignment."""
        return [bool(self.frame[name].str.match(r"[^-+\d]").any()) for name in self.frame]


@dataclass(frozen=True, eq=False)
class Findings:
    """Results of a study.

    Attributes
    ----------
    answer : str
        Whether N4 helps, in a sentence.
    conditions : DataFrame
        A row for each condition, in the order of the plan: the `MeanInterval` of each measure that its patients have,
        and of ``batch_averaged_percent``; ``published_percent`` (NaN if not published) and ``difference_percent``.
    cells : tuple of Table
        Conditions of each axis with the published figures.
    measures : Table
        The brief measures of all conditions.
    vertebrae : Table
        The brief measures of each vertebra and condition.
    sites : Table
        Dice of each condition on each test site, of models that were trained on the other sites.
    factors, pairs, ranking : Table
        Means of the levels of each factor, their differences, and all conditions compared with the best.
    caveats : tuple of str
        Notes that belong to every figure.
    """

    answer: str
    conditions: pd.DataFrame
    cells: tuple[Table, ...]
    measures: Table
    vertebrae: Table
    sites: Table
    factors: Table
    pairs: Table
    ranking: Table
    caveats: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables with rows, in order."""
        every = (*self.cells, self.measures, self.vertebrae, self.sites, self.factors, self.pairs, self.ranking)
        return tuple(table for table in every if len(table.frame))


def findings(table: pd.DataFrame, unfinished: Sequence[str] = (), vertebrae: pd.DataFrame | None = None) -> Findings:
    """Compute statistics and tables from the tidy table of a study.

    Parameters
    ----------
    table : DataFrame
        Result of `study_table`.
    unfinished : sequence of str
        Names of cells without results.
    vertebrae : DataFrame, optional
        Result of `study_levels`.
    """
    dice = scores(table)
    compared = contrasts(dice)
    figures = _figures(table, dice)
    # Where all conditions were trained for the same time and with the same batch size, tables leave them out.
    same_recipe = len(figures[["training", "batch_size"]].drop_duplicates()) < 2
    shown = CONDITION[:4] if same_recipe else CONDITION
    return Findings(
        n4_answer(compared),
        figures,
        tuple(_cells(axes, figures, shown) for axes in figures["axes"].unique()),
        _measures([measure for measure in _measured(table) if measure.brief], figures, shown),
        _vertebrae(vertebrae, shown),
        _sites(table, shown),
        _levels(levels(dice)),
        _pairs(compared),
        _ranking(ranked(dice), shown),
        tuple(_caveats(table, dice, unfinished)),
    )


def _caveats(table: pd.DataFrame, dice: pd.DataFrame, unfinished: Sequence[str]) -> Iterator[str]:
    yield from dict.fromkeys(part for note in table.note.unique() for part in note.split("; "))
    if ((table.encoder == RANDOM_ENCODER) & (table.weights == RANDOM)).any():
        yield RANDOM_NOTE
    if not dice.empty and (few := too_few(dice.count().max()) or too_few(len(dice.dropna()), "common")):
        yield few
    if table.folds.notna().any() or table.test_site.nunique() > 1:
        yield "folds share training patients, although tests and intervals assume independence"
    if unfinished:
        verb = "is" if len(unfinished) == 1 else "are"
        yield f"{count(len(unfinished), 'cell')} {verb} not done, and left out"
    seeds = table.groupby([series for _, series in conditions(table).items()]).seed.agg(frozenset)
    if table.seed.nunique() == 1:
        yield "one seed: differences between conditions include the randomness of single trainings"
    elif seeds.nunique() > 1:
        yield "not all conditions have every seed: figures are of the seeds that all have"
    if dice.isna().any(axis=None):
        yield "not all conditions have every patient: levels and ranking are of the patients that all have"


def _figures(table: pd.DataFrame, dice: pd.DataFrame) -> pd.DataFrame:
    """Return the means of each condition, see `Findings`."""
    found = {"patients": dice.count()}
    for measure in _measured(table):
        found[measure.name] = _means(scores(table, measure.name), dice, measure.within)
    found["batch_averaged_percent"] = _means(100 * scores(table, "batch_averaged_dice"), dice, (0.0, 100.0))
    figures = dice.columns.to_frame(index=False)
    figures = figures.assign(**{name: list(column) for name, column in found.items()})
    published = [_published(row) for row in figures.itertuples()]
    differences = [
        None if percent is None or there is None else percent.less(there)
        for percent, there in zip(figures.batch_averaged_percent, published, strict=True)
    ]
    return figures.assign(
        published_percent=pd.Series(published, dtype="float64"),
        difference_percent=pd.Series(differences, dtype="object"),
    )


def _measured(table: pd.DataFrame) -> list[Measure]:
    """Return the measures that a patient of the study has, except the reference study's, which has its own columns."""
    return [one for one in patient_measures() if one is not BATCH_AVERAGED and table[one.name].notna().any()]


def _means(measured: pd.DataFrame, dice: pd.DataFrame, within: tuple[float, float]) -> pd.Series:
    """Return the mean of a measure for each condition; None unless all patients with a Dice have it."""
    known = {condition: list(measured[condition].dropna()) for condition in measured}
    return pd.Series(
        [
            mean_interval(known[condition], within) if len(known.get(condition, ())) == number else None
            for condition, number in dice.count().items()
        ],
        dtype="object",
    )


def _published(condition: Any) -> float | None:
    encoder, _, weights = condition.encoder.partition(" ")
    if weights == f"({RANDOM})":
        encoder = RANDOM if encoder == RANDOM_ENCODER else ""
    return published_percent().get((condition.axes, condition.model, encoder, condition.variant))


def _cells(axes: str, figures: pd.DataFrame, shown: Sequence[str]) -> Table:
    own = figures[figures["axes"] == axes]
    published = bool(figures.published_percent.notna().any())
    frame = _condition_columns(own, [name for name in shown if name != "axes"]).assign(
        **{
            "patients": own.patients.astype(str),
            "Dice": own.dice.map(_text),
            "batch-averaged Dice, %": own.batch_averaged_percent.map(lambda one: _text(one, 1)),
        }
    )
    if published:
        frame["published, %"] = own.published_percent.map(lambda one: "" if pd.isna(one) else f"{one:.0f}")
        frame["difference"] = own.difference_percent.map(lambda one: _text(one, 1, sign=True))
    from_file = ~own.encoder.str.endswith((f" ({RANDOM})", f" ({IMAGENET})"))
    notes = [_DICE_NOTE, _PUBLISHED_NOTE if published else _NOT_PUBLISHED_NOTE]
    notes += [_FILE_NOTE] if published and from_file.any() else []
    return Table(f"Axis {axes} ({', '.join(PLANES[int(axis)] for axis in axes)} slices)", frame, tuple(notes))


def _measures(brief: Sequence[Measure], figures: pd.DataFrame, shown: Sequence[str]) -> Table:
    frame = _condition_columns(figures, shown)
    for measure in brief:
        frame[measure.heading] = [_text(one, measure.digits) for one in figures[measure.name]]
    lower = ", ".join(measure.title for measure in brief if measure.better == "lower")
    notes = (
        _INTERVAL_NOTE,
        f"Lower is better: {lower}.",
    )
    return Table("All measures", frame, notes)


def _sites(table: pd.DataFrame, shown: Sequence[str]) -> Table:
    frame = _parts(table, "test_site", MEASURES[:1], shown)
    return Table("Dice per test site, of models trained on the other sites", frame, (_DICE_NOTE,))


def _vertebrae(levels: pd.DataFrame | None, shown: Sequence[str]) -> Table:
    if levels is None or levels.empty:
        return Table("Each vertebra", pd.DataFrame())
    frame = _parts(levels, "level", [measure for measure in _measured(levels) if measure.brief], shown)
    notes = (_INTERVAL_NOTE, "Patients: those who have the vertebra. A missed vertebra has a Dice of 0.")
    return Table("Each vertebra", frame, notes)


def _parts(table: pd.DataFrame, part: str, measured: Sequence[Measure], shown: Sequence[str]) -> pd.DataFrame:
    """Return the means of measures over the patients of each condition and part; `part` is a column of the table."""
    known = table.drop(columns=CONDITION).join(conditions(table)).dropna(subset=[part, "dice"])
    by, names = [*CONDITION, part], [measure.name for measure in measured]
    patients = known.groupby([*by, "patient"], sort=False)[names].mean()
    figures = patients.groupby(level=by, sort=False).agg(list).reset_index()
    frame = _condition_columns(figures, shown)
    frame[part.replace("_", " ")] = figures[part].astype(str)
    frame["patients"] = figures.dice.map(len).astype(str)
    for measure in measured:
        # Older evaluations lack the measure: NaN.
        means = [None if np.isnan(of).any() else mean_interval(of, measure.within) for of in figures[measure.name]]
        frame[measure.heading] = [_text(mean, measure.digits) for mean in means]
    return frame


def _levels(found: pd.DataFrame) -> Table:
    frame = found[["factor", "level"]].assign(
        **{"mean Dice": found["mean"].map(_text), "conditions of each": found.conditions.astype(str)}
    )
    note = "Means over the conditions that exist with all levels of a factor, the best level first."
    return Table("What is better", frame, (note,))


def _pairs(found: pd.DataFrame) -> Table:
    frame = found[["factor", "better", "worse"]].set_axis(["factor", "higher", "lower"], axis=1)
    frame["difference of Dice"] = found.difference.map(lambda one: _text(one, sign=True))
    for name in ("patients", "pairs"):
        frame[name] = found[f"{name}_higher"].astype(str) + " of " + found[name].astype(str)
    frame["p"] = found.p.map(_p)
    frame["sure"] = _decided(found).where(found.p.notna(), "too few patients")
    note = (
        "Paired by patient, over pairs of conditions that differ in nothing else. p: two-sided Wilcoxon signed-rank "
        "test over patients, after Holm's correction for all rows of this table; intervals are not corrected."
    )
    return Table("By how much, and how sure", frame, (note,))


def _ranking(found: pd.DataFrame, shown: Sequence[str]) -> Table:
    frame = found[["place"]].astype(str).join(_condition_columns(found, shown))
    frame["patients"] = found.patients.astype(str)
    frame["Dice"] = found["mean"].map(_text)
    frame["beside the best"] = found.difference.map(lambda one: _text(one, sign=True))
    frame["p"] = found.p.map(_p)
    frame["worse"] = _decided(found).where(found.p.notna(), "")
    note = (
        "The best condition was chosen and tested on the same patients, so that its figure is optimistic. p: as above, "
        "corrected for the rows of this table; intervals are not corrected."
    )
    return Table("All conditions", frame, (note,))


def _condition_columns(figures: pd.DataFrame, shown: Sequence[str]) -> pd.DataFrame:
    return figures[list(shown)].astype(str).rename(columns={"axes": "axis", "batch_size": "batch"})


def _text(interval: MeanInterval | None, digits: int = 4, sign: bool = False) -> str:
    return interval.text(digits, sign) if isinstance(interval, MeanInterval) else ""


def _p(p: float) -> str:
    return "" if pd.isna(p) else f"{p:.2g}"


def _decided(found: pd.DataFrame) -> pd.Series:
    return found.sure.map({True: "yes", False: "not decided"}).astype(object)


def rendered(found: Findings, form: str) -> str:
    """Return findings as text: ``markdown``, ``csv`` (a row for each condition), ``latex`` or ``html``."""
    return {MARKDOWN: _markdown, CSV: _csv, LATEX: _latex, HTML: _html}[form](found)


def _csv(found: Findings) -> str:
    columns: dict[str, Any] = {}
    for name, column in found.conditions.items():
        if column.dtype != object or name in CONDITION:
            columns[name] = column
            continue
        for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high")):
            columns[f"{name}{suffix}"] = column.map(lambda one, end=end: getattr(one, end, None)).astype("float64")
    return str(pd.DataFrame(columns).round(6).assign(note="; ".join(found.caveats)).to_csv(index=False))


def _markdown(found: Findings) -> str:
    def safe(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    parts = [found.answer, *(f"- {safe(caveat)}" for caveat in found.caveats), ""]
    for table in found.tables:
        grid = table.frame.map(safe).to_markdown(index=False, tablefmt="github", disable_numparse=True)
        parts += [f"## {table.title}", "", grid, "", *table.notes, ""]
    return "\n".join(parts)


def _latex(found: Findings) -> str:
    parts = [f"{_as_latex(line)}\n" for line in (found.answer, *found.caveats)]
    for table in found.tables:
        grid = table.frame.to_latex(index=False, escape=True)
        parts += [f"\\paragraph{{{_as_latex(table.title)}}}\n", grid, *(f"{_as_latex(note)}\n" for note in table.notes)]
    return "\n".join(parts)


def _as_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in " ".join(text.split()))


def _html(found: Findings) -> str:
    from html import escape

    parts = [f"<p>{escape(line)}</p>" for line in (found.answer, *found.caveats)]
    # By default, pandas truncates long texts.
    with pd.option_context("display.max_colwidth", None):
        for table in found.tables:
            grid = table.frame.to_html(index=False, border=0)
            parts += [f"<h2>{escape(table.title)}</h2>", grid, *(f"<p>{escape(note)}</p>" for note in table.notes)]
    return "\n".join(parts) + "\n"
