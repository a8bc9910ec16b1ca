"""The report of a run: one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cspine_data import LEVEL_NAMES
from cspine_data.tools import count, render_page
from cspine_train.metrics.calibration import BINS, CERTAIN
from cspine_train.metrics.overlap import Measure
from cspine_train.metrics.statistics import too_few
from cspine_train.run.evaluations import (
    NameReliability,
    known_measures,
    mean_over_patients,
    means_of_levels,
    number_of_patients,
    recorded_evaluations,
    reliability_of_names,
)
from cspine_train.run.folder import CURVES_NAME, EVALUATION_FOLDER, OVERLAYS_FOLDER, REPORT_NAME, read_rows, write_text
from cspine_train.run.record import RunRecord
from cspine_train.run.settings import PLANES

#: Largest number of plots of slices: those of the lowest Dice.
MOST_PLOTS = 48


def write_report(run: Path, record: RunRecord) -> Path:
    """Write a run's `report.html` from the files of its folder: scores, slices, overlays, curves.

    Only evaluations of the kept weights are shown. Names and notes are escaped.
    """
    settings = record.settings
    planes = ", ".join(PLANES[axis] for axis in settings.axes)
    text = page(
        "report.html.jinja",
        title=f"{settings.model}, {settings.encoder}, {planes} slices, {settings.variant}",
        caveats=record.caveats(),
        certain=CERTAIN,
        parts=[_part(run, record, name, evaluation) for name, evaluation in recorded_evaluations(run, record)],
        training=[
            *embedded_pictures([(run / CURVES_NAME, "loss, validation Dice and learning rate by epoch")]),
            *embedded_pictures(
                (run / OVERLAYS_FOLDER / f"{kind}.png", f"validation slices of {kind} Dice")
                for kind in ("best", "worst")
            ),
        ],
    )
    write_text(run / REPORT_NAME, text)
    return run / REPORT_NAME


def page(template: str, **known: Any) -> str:
    """Render one of the package's page templates; all values are escaped."""
    return render_page("cspine_train.reports", "templates", template, **known)


def _part(run: Path, record: RunRecord, name: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    folder = run / EVALUATION_FOLDER
    known = known_measures(evaluation["patients"])
    patients = [
        {"case": row["case"], "figures": [_figure(measure, row.get(measure.name)) for measure in known]}
        for row in evaluation["patients"]
    ]
    plots = sorted(slice_plots(folder / f"{name}-slices.csv"), key=lambda plot: plot["lowest"])
    return {
        "title": f"{name.replace('-', ' and ')} patients".capitalize(),
        "headings": [measure.heading for measure in known],
        "patients": patients,
        "splits": list(_splits(evaluation["patients"], known)),
        "levels": _levels(evaluation),
        "names": [_diagram(of_split) for of_split in reliability_of_names(evaluation)],
        "confusion": _confusion(folder / f"{name}-confusion.csv", _label_names(record)),
        "pictures": embedded_pictures(
            (folder / f"{name}-{what}{kind}.png", f"{caption} {kind} Dice")
            for what, caption in (("levels-", "levels of the patient with the"), ("", "slices of"))
            for kind in ("best", "median", "worst")
        ),
        "plots": plots[:MOST_PLOTS],
        "left_out": max(0, len(plots) - MOST_PLOTS),
    }


def _splits(rows: Sequence[Mapping[str, Any]], measured: Sequence[Measure]) -> Iterator[dict[str, Any]]:
    """Iterate over the means of each split; validation patients, which chose epoch and threshold, are apart."""
    for split in dict.fromkeys(row["split"] for row in rows):
        of_split = [row for row in rows if row["split"] == split]
        patients = number_of_patients(of_split)
        means = [(measure, mean_over_patients(of_split, measure)) for measure in measured]
        yield {
            "title": f"mean of {count(patients, f'{split} patient')}",
            "few": too_few(patients, split),
            "means": [_figure(measure, one.mean if one else None) for measure, one in means],
            "intervals": [one.between(measure.digits) if one else "" for measure, one in means],
        }


def _levels(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    levels = means_of_levels(evaluation)
    if not levels:
        return None
    several = len({level.split for level in levels}) > 1
    return {
        "headings": [measure.heading for measure in levels[0].means],
        "rows": [
            {
                "level": f"{level.level}, {level.split}" if several else level.level,
                "patients": level.patients,
                "means": [level.text(measure) for measure in level.means],
            }
            for level in levels
        ],
    }


def _diagram(names: NameReliability) -> dict[str, Any]:
    """Return a reliability diagram, 200 x 200 from (60, 10): a dot and a number of names for each bin."""
    width = 200 / BINS
    return {
        "split": names.split,
        "caption": f"{names.size}: expected calibration error {names.calibration_error:.3f}",
        "uncertainty": names.uncertainty,
        "numbers": [
            {"x": f"{60 + (place + 0.5) * width:.0f}", "text": one.number if one else ""}
            for place, one in enumerate(names.bins)
        ],
        "dots": [
            {
                "x": f"{60 + 200 * one.probability:.1f}",
                "y": f"{210 - 200 * one.accuracy:.1f}",
                "caption": f"{count(one.number, 'name')}: mean {one.probability:.3f}, accuracy {one.accuracy:.3f}",
            }
            for one in names.bins
            if one
        ],
    }


def _figure(measure: Measure, figure: float | None) -> str:
    return "" if figure is None else measure.figure(figure)


def embedded_pictures(named: Iterable[tuple[Path, str]]) -> list[dict[str, str]]:
    """Return the existing pictures as text for a page, with their captions."""
    return [
        {"data": base64.b64encode(path.read_bytes()).decode(), "caption": caption}
        for path, caption in named
        if path.exists()
    ]


def slice_plots(table: Path) -> Iterator[dict[str, Any]]:
    """Iterate over curves of Dice by slice, for each patient and axis, on an area of 285 x 95 at (30, 5)."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in read_rows(table, {"case": str, "axis": _plane, "slice": int, "dice": float}):
        curves.setdefault((row["case"], row["axis"]), []).append((row["slice"], row["dice"]))
    for (case, plane), points in curves.items():
        first, last = points[0][0], points[-1][0]
        step = 285 / max(1, last - first)
        path, before = "", None
        for index, dice in points:
            # A gap at slices that are empty in both masks.
            command = "L" if before == index - 1 else "M"
            path += f"{command}{30 + (index - first) * step:.1f} {100 - 95 * dice:.1f}"
            before = index
        mean = sum(dice for _, dice in points) / len(points)
        caption = f"{case}, {plane}: mean {mean:.3f} over {len(points)} slices"
        yield {"caption": caption, "path": path, "first": first, "last": last, "lowest": mean}


def _plane(axis: str) -> str:
    return PLANES[int(axis)]


def _label_names(record: RunRecord) -> dict[int, str]:
    """Return the names of label values in tables; runs of levels may predict levels that no training case has."""
    others = set(record.label_values) - set(record.levels)
    levels = {value: name for value, name in LEVEL_NAMES.items() if record.levels and value not in others}
    return {0: "none", **levels}


def _confusion(table: Path, names: Mapping[int, str]) -> dict[str, Any] | None:
    import pandas as pd

    rows = read_rows(table, dict.fromkeys(("true_label", "found_label", "voxels"), int))
    if not rows:
        return None
    counts = pd.DataFrame(rows).pivot_table("voxels", "true_label", "found_label", "sum", fill_value=0)
    # No row for unlabelled voxels: those predicted as unlabelled are not counted.
    counts = counts[counts.index != 0]
    return {
        "found": [names.get(value, value) for value in counts.columns],
        "rows": [
            {
                "value": names.get(value, value),
                "voxels": int(voxels.sum()),
                "shares": [
                    {"text": f"{100 * share:.1f}", "own": value == other}
                    for other, share in (voxels / voxels.sum()).items()
                ],
            }
            for value, voxels in counts.iterrows()
        ],
    }
