"""The command line's options for how one trains, whatever is trained: those of a run, and of all runs of a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cspine_train.cli.option_values import case_weights_of, size_of

if TYPE_CHECKING:
    from cspine_train.run.settings import RunSettings

Command = TypeVar("Command", bound=Callable[..., Any])

_RECIPE = (
    click.option("--epochs", type=click.IntRange(1), default=100, help="Most epochs."),
    click.option("--batch-size", type=click.IntRange(1), default=8, help="Slices in a step."),
    click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4, help="Largest rate."),
    click.option(
        "--schedule",
        type=click.Choice(["plateau", "onecycle", "cosine"]),
        default="plateau",
        help="plateau: rate / 3 after 5 epochs without a higher Dice, stop after 7; onecycle: up and down once, "
        "all epochs; cosine: quickly up, slowly down.",
    ),
    click.option(
        "--clip-norm",
        type=click.FloatRange(0, min_open=True),
        help="Shorten longer gradients to this; none by default.",
    ),
    click.option(
        "--average",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        help="Validate and keep a running average of the weights, of which a step leaves this share, such as 0.99.",
    ),
    click.option(
        "--coarse-share",
        type=click.FloatRange(0, 1),
        default=0.0,
        help="Share of the steps, the first ones, that see pixels larger by half.",
    ),
    click.option("--compile/--no-compile", default=False, help="Let torch.compile make the steps; slow to begin with."),
    click.option(
        "--context", type=click.IntRange(0, 64), default=0, help="Neighbouring slices seen on each side (2.5-D)."
    ),
    click.option(
        "--pixel-mm",
        type=click.FloatRange(0.05),
        help="Pixel size for the network; slices keep theirs by default.",
    ),
    click.option(
        "--size",
        "size_hw",
        metavar="H,W",
        callback=size_of,
        help="Pixels of a training slice, one number or two; cropped about its centre, but never what is labelled. The "
        "smallest that holds every slice by default.",
    ),
    click.option(
        "--crop-margin-mm",
        type=click.FloatRange(0),
        help="Train on random parts of slices, as large as the largest labelled region and this margin; whole by "
        "default.",
    ),
    click.option(
        "--empty-share",
        type=click.FloatRange(0),
        default=0.25,
        help="Empty slices in an epoch, as a share of labelled ones.",
    ),
    click.option(
        "--case-weight",
        "case_weights",
        metavar="CASE=WEIGHT",
        multiple=True,
        callback=case_weights_of,
        help="How often CASE's slices are seen, others being 1; 0 leaves them out. May be given more than once.",
    ),
    click.option(
        "--balance",
        type=click.Choice(["slices", "cases"]),
        default="slices",
        help="What is seen equally often, times its weight: every labelled slice, or every case.",
    ),
    click.option(
        "--loss",
        metavar="NAME",
        default="dice_bce",
        help="Loss: dice, dice_bce (with cross-entropy), dice_focal (with focal loss), tversky (false negatives weigh "
        "more), or a plug-in's.",
    ),
    click.option(
        "--labels",
        type=click.Choice(["binary", "stored"]),
        default="binary",
        help="Vertebra or not; or each label value as stored, the likeliest of those that training patients have.",
    ),
    click.option(
        "--augment",
        metavar="NAME[+NAME]",
        default="light",
        help="Augmentation: none; light: position, contrast, noise; reference: as in the reference study; strong: no "
        "contrast to memorise, for other scanners and sequences; or a plug-in's. +NAME adds a plug-in's change.",
    ),
    click.option(
        "--largest-components",
        type=click.IntRange(1),
        help="Keep at most so many connected components of a prediction, if validation is better for it; all by "
        "default.",
    ),
    click.option("--fill-holes", is_flag=True, help="Fill the holes of a prediction, if validation is better for it."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "32", "bf16"]),
        default="auto",
        help="Arithmetic; auto: bf16 where the processor has it, else 32 bits.",
    ),
)


def recipe_options(command: Command) -> Command:
    """Give a command the options of a training recipe, named as the fields of `RunSettings`."""
    for option in reversed(_RECIPE):
        command = option(command)
    return command


def settings_of(**options: Any) -> RunSettings:
    """Make settings of a command's options; what they do not go together with is told by the option's name."""
    from pydantic import ValidationError

    from cspine_train.run.settings import RunSettings

    try:
        return RunSettings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name, *within = map(str, first["loc"] or ("",))
        option = "--" + {"case_weights": "case-weight", "size_hw": "size"}.get(name, name.replace("_", "-"))
        where = " ".join([option, *within]) + ": " if name else ""
        raise click.UsageError(where + first["msg"].removeprefix("Value error, ")) from None
