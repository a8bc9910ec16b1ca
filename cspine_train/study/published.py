"""The 72 Dice scores of the reference study, in percent, of one test patient, averaged over batches."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import pandas as pd


@cache
def published_percent() -> dict[tuple[str, str, str, str], float]:
    """Return the published Dice by axes, model, encoder and variant; compare it only with `batch_averaged_dice`.

    The reference study does not name its ``random`` encoder.
    """
    with files("cspine_train.study").joinpath("reference_results.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, dtype={"axis": str, "dsc_percent": float})
    return dict(table.set_index(["axis", "model", "encoder", "variant"]).dsc_percent.items())
