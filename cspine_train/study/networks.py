"""Checks of a study's networks and initial weights, before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cspine_train.errors import ModelError
from cspine_train.models.build import build_model, check_names, encoders
from cspine_train.models.pretrained import weights_at_hand
from cspine_train.study.plan import Cell


def check_network_names(cells: Sequence[Cell]) -> None:
    """Refuse, with a `ModelError`, unknown models and encoders."""
    for model, encoder in dict.fromkeys((cell.settings.model, cell.settings.encoder) for cell in cells):
        check_names(model, encoder)


@torch.random.fork_rng(devices=[])
def check_weights(cells: Sequence[Cell]) -> None:
    """Refuse, with a `ModelError`, a study whose pretrained weights are unavailable or do not fit an encoder.

    The error has a line of details for each such encoder.
    """
    reasons: dict[tuple[str, str], str] = {}
    checked: set[tuple[str, str]] = set()
    for one in (cell.settings for cell in cells):
        key = one.encoder, one.weights
        if one.weights == "none" or key in checked:
            continue
        try:
            build_model(one.model, one.encoder, "none", one.channels)
        except ModelError:
            # Not a problem of weights; the cell will fail with this message.
            continue
        checked.add(key)
        try:
            build_model(one.model, one.encoder, one.weights, one.channels)
        except ModelError as error:
            reasons[key] = str(error)
    if not reasons:
        return
    names = ", ".join(encoder for encoder, _ in reasons)
    available = ", ".join(weights_at_hand(encoders()))
    raise ModelError(
        f"weights of {names}: are unavailable or do not fit, and a study never mixes them; give --weights none, which "
        f"starts all encoders from random weights, --weights {next(iter(reasons))[0]}=FILE for each"
        + (f", or only --encoders whose weights are available ({available})" if available else ""),
        [f"{encoder} from {weights}: {reason}" for (encoder, weights), reason in reasons.items()],
    )
