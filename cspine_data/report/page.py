"""The dataset report: one self-contained page about a cohort, outliers first."""

from __future__ import annotations

import base64
import glob
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cspine_data.errors import InputError, Problem, count
from cspine_data.files import atomic_write
from cspine_data.pages.page import render_page
from cspine_data.report.case_summary import CaseSummary, Histogram
from cspine_data.report.findings import Finding, Measure, find_outliers, measures, outliers_of
from cspine_data.volumes.cohort_labels import cohort_labels
from cspine_data.volumes.levels import levels_text

_BARS = 30
_MOST_PROBLEMS = 4
_SOURCE_LEGEND = "One slice along each axis, with the outlines of the label map."
_STORE_LEGEND = (
    "One slice along each axis, with the outlines of the label map. Corrected cases have three rows: before bias field "
    "correction; after it, with the outlines; and the logarithm of the bias field, from -1 (black) to 1 (white)."
)


@dataclass(frozen=True)
class About:
    """What the page says about a whole cohort.

    `command` is the part of suggested commands that names the source, as for `prepare`, or the store. `part_of` has the
    part of the split of each case.
    """

    title: str
    command: str
    stored: bool
    notes: tuple[str, ...] = ()
    part_of: Mapping[str, str] = field(default_factory=dict)


def check_page(path: Path) -> None:
    """Raise `InputError` unless a page can have this name. Called first, so that a wrong name wastes no work."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(path, "is no HTML file", "give a name that ends in .html")
    if not path.parent.is_dir():
        raise InputError(path.parent, "is no folder", "make it, or choose another place for the page")


def write_page(path: Path, about: About, cases: Sequence[CaseSummary], problems: Sequence[Problem]) -> int:
    """Write the page, atomically, and return the number of cases to look at; an existing file is replaced."""
    findings = [Finding(problem.case, problem.message, np.inf, "file") for problem in problems]
    findings += find_outliers(cases)
    # By case, the strongest first.
    of_case: dict[str, list[Finding]] = {}
    for finding in findings:
        of_case.setdefault(finding.case, []).append(finding)
    rank = {case: number for number, case in enumerate(of_case)}
    ordered = sorted(cases, key=lambda case: (rank.get(case.case, len(rank)), case.case))
    anchors = {case.case: f"case-{number}" for number, case in enumerate(ordered, start=1)}
    patients = len({case.identity.patient for case in cases})
    labels = cohort_labels([case.labels for case in cases])
    text = render_page(
        "cspine_data.report",
        "templates",
        "dataset.html.jinja",
        title=about.title,
        answer=f"{count(len(cases), 'case')} of {count(patients, 'patient')}; {len(of_case)} to look at.",
        notes=(*about.notes, *filter(None, [labels.text])),
        suspects=[_suspect(case, found, anchors, about) for case, found in of_case.items()],
        patients=_patients(cases, about.part_of),
        plots=[plot for measure in measures() if (plot := _plot(measure, cases, anchors))],
        table=_table(ordered, about, anchors, labels.levels),
        legend=_STORE_LEGEND if about.stored else _SOURCE_LEGEND,
        cases=list(_cards(ordered, anchors, of_case)),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return len(of_case)


def _suspect(case: str, findings: Sequence[Finding], anchors: Mapping[str, str], about: About) -> dict[str, Any]:
    problems = [finding.problem for finding in findings[:_MOST_PROBLEMS]]
    if len(findings) > _MOST_PROBLEMS:
        problems.append(f"and {len(findings) - _MOST_PROBLEMS} more problems")
    kinds = dict.fromkeys(finding.kind for finding in findings)
    remedies = [remedy for kind in kinds for remedy in _remedies(kind, case, about)]
    return {"case": case, "anchor": anchors.get(case), "problems": problems, "remedies": remedies}


def _remedies(kind: str, case: str, about: About) -> list[dict[str, str]]:
    if about.stored:
        command = f"cspine-data remove {about.command} {shlex.quote(case)}"
        leave_out = {"text": "To remove it:", "command": command}
    else:
        # An option, since all cases that are left out belong into one command.
        option = f"--exclude {shlex.quote(glob.escape(case))}"
        leave_out = {"text": "To leave it out, add to cspine-data prepare:", "command": option}
    if kind == "file":
        return [] if about.stored else [leave_out]
    if kind == "patient":
        command = f"cspine-data scan {'SOURCE' if about.stored else about.command} --write-pairs pairs.csv"
        text = (
            "If both are one patient: write a list with this command, correct its column patient, give it as --pairs:"
        )
        return [{"text": text, "command": command}, leave_out]
    if kind == "field":
        # Models cannot be trained on cases that were corrected in different ways.
        text = "If the bias field is wrong: prepare all cases with another --n4-preset, or with --no-n4."
        return [{"text": text, "command": ""}, leave_out]
    text = "Compare it with the original images in a viewer, and correct the file."
    return [{"text": text, "command": ""}, leave_out]


def _patients(cases: Sequence[CaseSummary], part_of: Mapping[str, str]) -> dict[str, Any]:
    """Return the number of patients and cases by site, sequence and part of the split."""
    groups: dict[tuple[str, ...], list[CaseSummary]] = defaultdict(list)
    for case in cases:
        key = (case.identity.site or "-", case.identity.sequence or "-", part_of.get(case.case, "-"))
        groups[key].append(case)
    rows = [
        (*key, str(len({case.identity.patient for case in group})), str(len(group)))
        for key, group in sorted(groups.items())
    ]
    return {"columns": ("site", "sequence", "split", "patients", "cases"), "rows": rows}


def _table(
    cases: Sequence[CaseSummary], about: About, anchors: Mapping[str, str], levels: Collection[int]
) -> dict[str, Any]:
    """Return a row for each case; columns without any value are left out."""
    rows = [_cells(case, about.part_of.get(case.case), levels) for case in cases]
    columns = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    return {
        "columns": ["case", *columns],
        "rows": [
            {"anchor": anchors[case.case], "case": case.case, "cells": [row[name] or "-" for name in columns]}
            for case, row in zip(cases, rows, strict=True)
        ],
    }


def _cells(case: CaseSummary, part: str | None, levels: Collection[int]) -> dict[str, str | None]:
    label, identity = case.label, case.identity
    return {
        "patient": identity.patient if identity.patient != case.case else None,
        "site": identity.site,
        "sequence": identity.sequence,
        "split": part,
        "size xyz": " x ".join(map(str, case.size_xyz)),
        "voxel size, mm": " x ".join(f"{mm:.3g}" for mm in case.spacing_mm),
        "field of view, mm": " x ".join(f"{mm:.0f}" for mm in case.field_of_view_mm),
        "orientation": case.orientation,
        "intensity": f"{case.intensity:.4g}",
        "labels": " ".join(map(str, label.volumes_ml)) if label else None,
        "levels": levels_text(label.volumes_ml.keys() & levels) if label else None,
        "labelled ml": f"{sum(label.volumes_ml.values()):.1f}" if label else None,
        "fit of labels": f"{label.fit.here:.1f}" if label else None,
        "log bias SD": None if case.log_bias_deviation is None else f"{case.log_bias_deviation:.3f}",
    }


def _plot(measure: Measure, cases: Sequence[CaseSummary], anchors: Mapping[str, str]) -> dict[str, Any] | None:
    having, values = measure.values(cases)
    if not having:
        return None
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, _BARS, (low, high if high > low else low + 1))
    width = 300 // _BARS
    bars = [
        {
            "x": f"{10 + n * width:.1f}",
            "y": f"{55 - height:.1f}",
            "width": f"{width - 1:.1f}",
            "height": f"{height:.1f}",
        }
        for n, height in enumerate(50 * counts / counts.max())
        if height
    ]
    outliers = [
        {
            "anchor": anchors[case.case],
            "x": f"{10 + 300 * (value - low) / max(high - low, 1e-9):.1f}",
            "caption": f"{case.case}: {measure.text(value)}",
        }
        for case, value, _ in outliers_of(measure, cases)
    ]
    return {
        "title": measure.title,
        "bars": bars,
        "outliers": outliers,
        "low": measure.text(low),
        "high": measure.text(high),
        "median": measure.text(float(np.median(values))),
    }


def _cards(cases: Sequence[CaseSummary], anchors: Mapping[str, str], of_case: Mapping[str, Sequence[Finding]]) -> Any:
    mean = tuple(np.mean([case.after.heights for case in cases], axis=0).tolist()) if len(cases) > 1 else ()
    for case in cases:
        identity = case.identity
        patient = f"patient {identity.patient}" if identity.patient != case.case else None
        known = (patient, identity.site, identity.sequence)
        yield {
            "anchor": anchors[case.case],
            "case": case.case,
            "caption": ", ".join([case.case, *filter(None, known)]),
            "problems": [finding.problem for finding in of_case.get(case.case, ())],
            "notes": case.notes,
            "picture": base64.b64encode(case.picture.content).decode(),
            "width": case.picture.width,
            "height": case.picture.height,
            "histograms": [
                _histogram("intensity", case.before, ()),
                _histogram("normalised", case.after, mean),
            ],
        }


def _histogram(title: str, histogram: Histogram, mean: Sequence[float]) -> dict[str, str]:
    return {
        "title": title,
        "path": _path(histogram.heights),
        "mean": _path(mean),
        "low": f"{histogram.low:.4g}",
        "high": f"{histogram.high:.4g}",
    }


def _path(heights: Sequence[float]) -> str:
    step = 300 / max(1, len(heights) - 1)
    points = (f"{10 + n * step:.0f} {45 - 40 * height:.0f}" for n, height in enumerate(heights))
    return "M" + "L".join(points) if heights else ""
