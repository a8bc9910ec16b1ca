"""What the reference study published: 72 Dice scores in percent, of one test patient, averaged over batches."""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class PublishedCell(NamedTuple):
    """A cell of the reference study; its ``random`` encoder has no name there."""

    axes: str
    model: str
    encoder: str
    variant: str


@cache
def published_percent() -> dict[PublishedCell, float]:
    """Return the published Dice of each cell, in percent; to be compared with `batch_averaged_dice` alone."""
    lines = files("cspine_train.study").joinpath("reference_results.csv").read_text(encoding="utf-8").splitlines()
    return {
        PublishedCell(row["axis"], row["model"], row["encoder"], row["variant"]): float(row["dsc_percent"])
        for row in csv.DictReader(lines)
    }
