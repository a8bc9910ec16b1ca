"""The 72 Dice scores of the reference study, in percent, of one test patient, averaged over batches."""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class PublishedCell(NamedTuple):
    """A cell of the reference study, which does not name its ``random`` encoder."""

    axes: str
    model: str
    encoder: str
    variant: str


@cache
def published_percent() -> dict[PublishedCell, float]:
    """Return the published Dice of each cell, in percent; compare it only with `batch_averaged_dice`."""
    lines = files("cspine_train.study").joinpath("reference_results.csv").read_text(encoding="utf-8").splitlines()
    return {
        PublishedCell(row["axis"], row["model"], row["encoder"], row["variant"]): float(row["dsc_percent"])
        for row in csv.DictReader(lines)
    }
