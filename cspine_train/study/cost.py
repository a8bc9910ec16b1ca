"""How long the runs of a study will take here: found out by steps of each of its networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cspine_data import Cohort
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.transforms import Sides
from cspine_train.errors import CspineTrainError, ModelError
from cspine_train.models.build import build_model, check_names, encoders, sides_of
from cspine_train.models.pretrained import weights_at_hand
from cspine_train.run.label_classes import label_values, network_classes
from cspine_train.run.patient_split import split_of
from cspine_train.run.settings import RunSettings
from cspine_train.study.plan import Cell
from cspine_train.study.step_timing import Step, StepTimer

# Without going back through the network, and in an inference mode.
_SEEN_SHARE = 1 / 3
# Beside the network a step has random changes, loss and optimiser, and a cell its start and pictures, a test patient
# distances and pictures.
_BESIDE_NETWORK, _START_S, _PATIENT_S = 1.2, 15.0, 2.0
# What a layer takes for itself, however large its input is, is nothing beside this.
_LONG_STEP_S = 0.5


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes
    ----------
    slices : int
        Training slices in an epoch.
    seconds : float
        About how long training and evaluation take in a process, with as many epochs as there may be.
    failure : str or None
        Why it cannot be trained, where that is seen already.
    """

    slices: int
    seconds: float
    failure: str | None = None


def check_names_of(cells: Sequence[Cell]) -> None:
    """Refuse a study of models or encoders that there are not.

    Raises
    ------
    ModelError
        If one is not known.
    """
    for model, encoder in dict.fromkeys((cell.settings.model, cell.settings.encoder) for cell in cells):
        check_names(model, encoder)


# Networks that are only looked at draw nothing from the caller's random generator.
@torch.random.fork_rng(devices=[])
def check_weights(cells: Sequence[Cell]) -> None:
    """Refuse a study whose encoders cannot all start from what was asked for.

    Raises
    ------
    ModelError
        If weights cannot be had or do not fit; its details say why, encoder by encoder.
    """
    asked: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for cell in cells:
        one = cell.settings
        if one.weights != "none":
            asked.setdefault((one.encoder, one.weights), set()).add((one.model, one.channels))
    reasons = {key: reason for key, ways in asked.items() if (reason := _why_not(*key, sorted(ways)))}
    if not reasons:
        return
    named = ", ".join(encoder for encoder, _ in reasons)
    at_hand = ", ".join(weights_at_hand(encoders()))
    raise ModelError(
        f"weights of {named}: cannot be had or do not fit, and a study never mixes them; give --weights none, which "
        f"starts all from random ones, --weights {next(iter(reasons))[0]}=FILE for each, of weights that fit"
        + (f", or only --encoders whose weights are at hand ({at_hand})" if at_hand else ""),
        [f"{encoder} from {weights}: {reason}" for (encoder, weights), reason in reasons.items()],
    )


def _why_not(encoder: str, weights: str, ways: Sequence[tuple[str, int]]) -> str:
    """Return why an encoder cannot start from weights; nothing where it can, or cannot be built at all."""
    for model, channels in ways:
        try:
            build_model(model, encoder, "none", channels)
        except ModelError:
            # That is no matter of weights; the run will say so.
            continue
        try:
            build_model(model, encoder, weights, channels)
        except ModelError as error:
            return str(error)
        return ""
    return ""


@torch.random.fork_rng(devices=[])
def costs(
    cohort: Cohort,
    cells: Sequence[Cell],
    threads: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Cost]:
    """Estimate what each cell takes on this machine, from timed steps of each different network.

    Parameters
    ----------
    cohort : Cohort
        What they will be fed.
    cells : sequence of Cell
        The runs.
    threads : int
        Of the process of each, see `processes_here`.
    progress : callable, optional
        Called with (cells estimated, cells, nothing).
    """
    timed: dict[tuple[Any, ...], _Timed] = {}
    found = {}
    with StepTimer(threads) as timer:
        for number, cell in enumerate(cells, start=1):
            found[cell.name] = _cost(cohort, cell.settings, timed, timer)
            if progress:
                progress(number, len(cells), "")
        if timer.disturbed:
            warnings.warn("other work keeps this machine busy: the times that follow are far too long", stacklevel=2)
    return found


@dataclass
class _Timed:
    """What is known of a network: what sizes it takes, and how long a step takes, for a pixel.

    Of an image's size; None where it cannot take a step. Under no size, what holds for all of them.
    """

    sides: Sides
    seconds_a_pixel: dict[tuple[int, int] | None, float | None]


def _cost(cohort: Cohort, settings: RunSettings, timed: dict[tuple[Any, ...], _Timed], timer: StepTimer) -> Cost:
    split = split_of(cohort, settings)
    classes = network_classes(values := label_values(cohort, split, settings))
    key = settings.model, settings.encoder, settings.channels, classes, settings.precision
    try:
        if key not in timed:
            network, _ = build_model(settings.model, settings.encoder, "none", settings.channels, classes)
            timed[key] = _Timed(sides_of(network), {})
        data = CohortSlices(cohort, split, settings, 0, timed[key].sides, values)
    except CspineTrainError as error:
        return Cost(0, 0.0, str(error))
    size_hw = data.crop_hw or data.size_hw
    batch_size = min(settings.batch_size, data.slices_of_an_epoch())
    known = timed[key].seconds_a_pixel
    if None not in known and size_hw not in known:
        # As large a batch as it will be: what small ones spend between layers is not spent for each slice.
        step = Step(*key, max(2, batch_size), size_hw)
        taken = timer.seconds(step)
        known[size_hw] = None if taken is None else taken / step.pixels
        if taken is not None and taken > _LONG_STEP_S:
            known[None] = known[size_hw]
    slices = len(data.train_dataloader()) * batch_size
    a_pixel = known.get(size_hw, known.get(None))
    if a_pixel is None:
        told = f"{settings.model} with encoder {settings.encoder!r}: cannot train on {batch_size} slices of"
        remedy = "choose another --size, --encoders or --models, or fewer slices at a time (--batch-size)"
        return Cost(slices, 0.0, f"{told} {size_hw[0]} x {size_hw[1]}; {remedy}")
    seen_pixels = math.prod(data.steps(half=False).validation_hw) * _SEEN_SHARE
    validated, tested = (
        len(cohort.slices(settings.axes, cases=cases, variant=settings.variant)) if cases else 0
        for cases in (split.validation, split.test)
    )
    pixels = float(settings.epochs * slices * math.prod(size_hw))
    pixels += (settings.epochs * validated + tested) * seen_pixels
    return Cost(slices, _START_S + _PATIENT_S * len(split.test) + _BESIDE_NETWORK * a_pixel * pixels)


def hours_told(seconds: float) -> str:
    """Return a time as people say it: ``3 h 20 min``, ``4 min``."""
    minutes = max(1, round(seconds / 60))
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
