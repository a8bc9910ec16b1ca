"""The model card of a run: a page for people who did not train the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cspine_train.metrics.statistics import mean_interval, too_few
from cspine_train.run.evaluations import (
    figures_of_patients,
    known_measures,
    mean_over_patients,
    number_of_patients,
    recorded_evaluations,
)
from cspine_train.run.folder import CARD_NAME, write_text
from cspine_train.run.record import RunRecord
from cspine_train.run.settings import PLANES

_MARKS = re.compile(r"([\\`*_\[\]<>|~$&])")
_NORMALISATIONS = {
    "zscore": "intensities brought to mean 0 and deviation 1 over the tissue",
    "percentile": "intensities scaled by percentiles of the tissue",
    "nyul": "intensities matched to the cohort's landmarks (Nyul)",
}
_SPLITS = ("train", "validation", "test")


def write_card(run: Path, record: RunRecord) -> Path:
    """Write a run's `MODEL_CARD.md`: intended use, data, results and limits.

    Cases are counted, not named. Scores are from the run folder's evaluations of the kept weights.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    # Names and notes come from files, and must be shown as text.
    pages = Environment(  # noqa: S701
        loader=PackageLoader("cspine_train.reports", "templates"),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else escaped(value),
    )
    pages.filters["with_interval"] = lambda dice: Markup(mean_interval(dice, (0.0, 1.0)).text())  # noqa: S704
    pages.filters["capitalize_first"] = lambda text: text[0].upper() + text[1:]
    text = pages.get_template("model_card.md.jinja").render(**_fields(run, record))
    write_text(run / CARD_NAME, text)
    return run / CARD_NAME


def escaped(value: Any) -> str:
    """Return a value as one line of Markdown, with special characters escaped."""
    return _MARKS.sub(r"\\\1", "".join(letter for letter in " ".join(str(value).split()) if letter.isprintable()))


def _fields(run: Path, record: RunRecord) -> dict[str, Any]:
    """Return the fields of the template."""
    several = len(record.label_values) > 1
    scores = _scores(run, record)
    patients = {part: number_of_patients(rows) for part, rows in scores.items()}
    chosen = [] if several else ["the threshold"]
    if record.settings.schedule == "plateau":
        chosen.append("the epoch")
    tables = {"vertebra or not": "dice", **({"by label": "label_dice"} if record.label_values else {})}
    return {
        "record": record,
        "settings": record.settings,
        "planes": _listed([PLANES[axis] for axis in record.settings.axes]),
        "normalisation": _NORMALISATIONS[record.preprocessing.normalisation],
        "several": several,
        # Chosen on the validation patients.
        "chosen": chosen,
        "tables": {
            what: {part: figures_of_patients(rows, measure) for part, rows in scores.items()}
            for what, measure in tables.items()
            if scores
        },
        "measures": _measures(scores) if scores else [],
        "intervals": any(too_few(number) is None for number in patients.values()),
        "too_few": [few for part, number in patients.items() if (few := too_few(number, part))],
        "tested": "test" in scores,
    }


def _measures(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return the means of brief measures, header first, then a row for each split. Dice has its own tables."""
    known = known_measures([row for rows in scores.values() for row in rows])
    shown = [measure for measure in known if measure.brief and measure.name not in ("dice", "label_dice")]
    rows = [["part", *(measure.heading for measure in shown)]]
    for part, patients in scores.items():
        means = [(measure, mean_over_patients(patients, measure)) for measure in shown]
        rows.append([part, *("" if mean is None else mean.text(one.digits) for one, mean in means)])
    return rows


def _scores(run: Path, record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of patients of each evaluated split."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for _, evaluation in recorded_evaluations(run, record):
        for row in evaluation["patients"]:
            found.setdefault(row["split"], {})[row["case"]] = row
    return {split: list(found[split].values()) for split in _SPLITS if split in found}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
