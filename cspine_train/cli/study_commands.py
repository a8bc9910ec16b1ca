"""The commands that run a study and show what came out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import click
import cloup

from cspine_data.terminal import can_go_on, print_table, progress_bar, say
from cspine_train.cli.option_values import folds_of, list_of, weights_by_encoder
from cspine_train.cli.setting_options import setting_options, settings_of
from cspine_train.errors import ModelError
from cspine_train.run.planes import AXES

if TYPE_CHECKING:
    from cspine_data import Cohort
    from cspine_train.run.settings import RunSettings
    from cspine_train.study.plan import Cell, Grid, Plan
    from cspine_train.study.runner import Outcome

# Fields that the grid varies.
_GRID_FIELDS = ("model", "encoder", "weights", "axes", "variant", "folds", "fold", "seed")
# Between looks at how far cells have come, and between writings of what came out, in times that one took.
_LOOK_S, _WRITING_PAUSES = 2.0, 50


@click.command(cls=cloup.Command)
@cloup.option_group(
    "Grid: what the cells differ in",
    cloup.option("--models", callback=list_of, default="unet,fpn,linknet,pspnet", help="Architectures."),
    cloup.option(
        "--encoders", callback=list_of, default="random,resnet50,inceptionv4",
        help="Encoders; NAME:random has random initial weights, and random is resnet50:random.",
    ),
    cloup.option(
        "--weights", callback=weights_by_encoder, multiple=True, metavar="imagenet|none|ENCODER=FILE",
        help="Initial weights of the other encoders; default: imagenet. May be given several times.",
    ),
    cloup.option("--variants", callback=list_of, default="n4,raw", help="Bias field corrected, or not."),
    cloup.option(
        "--axes", callback=list_of, default="0,1,2", help="0 sagittal, 1 coronal, 2 axial; 012: one model for all."
    ),
    cloup.option("--folds", callback=folds_of, default="reference", help="reference split, or the number of folds."),
    cloup.option("--seeds", type=click.IntRange(1), default=1, help="Runs of each cell, from seed 0 on."),
    cloup.option(
        "--from", "queue", type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="CSV file (done,model,encoder,axis,epochs,batch), as in the reference study; replaces these options.",
    ),
)  # fmt: skip
@cloup.option_group(
    "Input and output",
    cloup.option("--store", default="data/cspine.zarr", help="Store to train on: a folder or a URL."),
    cloup.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the study."),
    cloup.option("--plan", "only_plan", is_flag=True, help="Show the cells and the expected time, and end."),
)
@cloup.option_group(
    "Machine",
    cloup.option(
        "--workers", type=click.IntRange(1), help="Runs at a time; default: one per GPU, or one for four cores."
    ),
    cloup.option("--scheduler", help="Address of a running Dask scheduler to use instead of local processes."),
)
@setting_options(omit=_GRID_FIELDS)
def study(
    store: str, models: Sequence[str], encoders: Sequence[str], weights: dict[str, str], variants: Sequence[str],
    axes: Sequence[str], folds: int | None, seeds: int, queue: Path | None, workers: int | None,
    scheduler: str | None, only_plan: bool, output: Path, **recipe: Any,
) -> None:  # fmt: skip
    """Train and evaluate a grid of models; the same command again resumes a study that was stopped.

    Finished cells are not repeated. A changed option repeats only the cells that it affects. The default grid is the
    reference study's: 72 cells.
    """
    from cspine_data import open_cohort
    from cspine_train.metrics.statistics import counted
    from cspine_train.study.plan import Grid, plan_study
    from cspine_train.study.report import write_outcome
    from cspine_train.study.runner import LOGS_FOLDER, cells_of_others, check_not_run, check_output, is_done, run_study

    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        several = ", and several stand with commas between them" if set(unknown[0]) < set("012") else ""
        raise click.UsageError(f"--axes {unknown[0]}: is none of {', '.join(AXES)}{several}")
    if workers is not None and scheduler is not None:
        raise click.UsageError("--workers and --scheduler: exclude each other, as a scheduler has its own workers")
    if queue is not None:
        _check_said_once()
    grid = Grid(models, encoders, weights, variants, [AXES[axis] for axis in axes], folds, seeds)
    cohort = open_cohort(store)
    asked = _asked(grid, queue, settings_of(**recipe))
    if not asked:
        return
    if unused := set(weights) - {""} - {one.encoder for one in asked if one.weights != "none"}:
        told = "no encoder of the study starts from it; name it in --encoders, without :random"
        raise click.UsageError(f"--weights {min(unused)}=...: {told}")
    plan = plan_study(cohort, asked)
    check_output(output)
    if not only_plan:
        check_not_run(output)
    to_do = [cell for cell in plan.cells if not is_done(output, cell)]
    if to_do:
        # PyTorch takes seconds to import, for nothing where all is done.
        from cspine_train.study.networks import check_network_names

        check_network_names(to_do)
    _tell_plan(plan, len(to_do), len(asked))
    if others := cells_of_others(output, plan):
        click.echo(f"note: {output} holds {counted(others, 'cell')} of other grids, which stay and are in no table")
    if to_do and not only_plan:
        _check_weights(to_do)
    if to_do:
        _tell_cost(cohort, to_do, 1 if scheduler else workers)
    if only_plan:
        if to_do:
            # Last: what it would cost is known all the same.
            _check_weights(to_do)
        return
    if to_do:
        click.echo(f"what each cell says, an epoch a line: {output / LOGS_FOLDER}")
    failed: list[Outcome] = []
    left = {cell.name: cell for cell in to_do}
    write_at = 0.0

    def ended(outcome: Outcome) -> None:
        nonlocal write_at
        del left[outcome.cell.name]
        if outcome.failure:
            failed.append(outcome)
            say(f"failed: {outcome.cell.name}: {outcome.failure}", err=True)
        else:
            done = len(plan.cells) - len(left) - len(failed)
            say(f"done {done} of {len(plan.cells)}: {outcome.cell.name} ({outcome.seconds:.0f} s)")
        # Whoever looks meanwhile sees what there is; in a large study not all the time.
        if left and (began := time.monotonic()) >= write_at:
            try:
                write_outcome(output)
            except Exception as error:  # noqa: BLE001
                # Cells at work are worth more than tables, which are written once more at the end.
                say(f"warning: {output}: tables could not be written ({error})", err=True)
            ready = time.monotonic()
            write_at = ready + _WRITING_PAUSES * (ready - began)

    with can_go_on(output), _shown_by_epochs(output, plan.cells, left):
        run_study(plan, output, workers, scheduler, ended)
    found, files = write_outcome(output)
    if not to_do:
        click.echo(f"nothing to do: all {len(plan.cells)} cells of {output} are done")
    else:
        for file in files:
            say(f"wrote {file}")
        say(found.answer)
    if failed:
        told = f"{len(failed)} of {counted(len(plan.cells), 'cell')} failed; give the command again to try again"
        click.echo(told, err=True)
        raise SystemExit(1)


@contextmanager
def _shown_by_epochs(study: Path, cells: Sequence[Cell], left: Mapping[str, Cell]) -> Iterator[None]:
    """Show on a terminal how many epochs of all cells are trained, as long as this lasts."""
    from cspine_train.study.runner import epochs_trained

    epochs = sum(cell.settings.epochs for cell in cells)

    with progress_bar("epochs") as progress:
        if progress is None:
            yield
            return

        def show() -> None:
            to_do = list(left.values())
            # A cell that is over has none to come, if it stopped early too.
            over = epochs - sum(cell.settings.epochs for cell in to_do)
            progress(over + epochs_trained(study, to_do), epochs, f"{len(cells) - len(to_do)} of {len(cells)} cells")

        ended = Event()

        def look() -> None:
            while not ended.wait(_LOOK_S):
                show()

        show()
        looking = Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()
            show()


def _check_said_once() -> None:
    """Refuse options that a queue says line by line."""
    context = click.get_current_context()
    for name in ("models", "encoders", "axes", "epochs", "batch_size"):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')}: is what the lines of --from say; leave it out")


def _asked(grid: Grid, queue: Path | None, recipe: RunSettings) -> list[RunSettings]:
    if queue is None:
        return grid.settings(recipe)
    from cspine_train.metrics.statistics import counted
    from cspine_train.study.plan import queued

    settings, done = queued(queue, grid, recipe)
    if done:
        click.echo(f"note: {counted(done, 'line')} of {queue} marked as done left out")
    if not settings:
        click.echo("nothing to do: all lines are marked as done")
    return settings


def _tell_plan(plan: Plan, to_do: int, asked: int) -> None:
    from cspine_train.metrics.statistics import counted
    from cspine_train.study.plan import RANDOM_ENCODER, RANDOM_TOLD

    cells = [cell.settings for cell in plan.cells]
    click.echo(f"{counted(len(cells), 'cell')}, {len(cells) - to_do} of them done")
    if any((one.encoder, one.weights) == (RANDOM_ENCODER, "none") for one in cells):
        click.echo(f"note: {RANDOM_TOLD}")
    if twice := asked - len(cells):
        click.echo(f"note: {counted(twice, 'run')} of the grid would be the same as others, and are done once")
    for name, values in {
        "models": [one.model for one in cells],
        "encoders": [
            f"{one.encoder} from {one.weights if one.weights != 'none' else 'random'} weights" for one in cells
        ],
        "variants": [one.variant for one in cells],
        "axes": [one.axes_name for one in cells],
        "folds": [f"{one.fold} of {one.folds}" if one.folds else "reference split" for one in cells],
        "seeds": [str(one.seed) for one in cells],
        "epochs": [str(one.epochs) for one in cells],
    }.items():
        click.echo(f"  {name}: {', '.join(dict.fromkeys(values))}")


def _check_weights(to_do: Sequence[Cell]) -> None:
    from cspine_train.study.networks import check_weights

    try:
        check_weights(to_do)
    except ModelError as error:
        for line in error.details:
            say(line, err=True)
        raise


def _tell_cost(cohort: Cohort, to_do: Sequence[Cell], workers: int | None) -> None:
    from cspine_train.metrics.statistics import counted
    from cspine_train.study.cost import costs, hours_told
    from cspine_train.study.runner import processes_here
    from cspine_train.training.allocator import keep_large_blocks, release_free_blocks

    side_by_side, threads, gpus = processes_here(workers, len(to_do))
    # Cells that share a GPU take turns.
    at_once = min(side_by_side, len(gpus) or side_by_side)
    # As in the cells, whose steps are slower without.
    keep_large_blocks()
    with progress_bar("timing steps of each network") as progress:
        found = costs(cohort, to_do, threads, progress)
    release_free_blocks()
    rows: dict[tuple[str, ...], list[Any]] = {}
    for cell in to_do:
        one = cell.settings
        rows.setdefault((one.model, one.encoder, one.axes_name), []).append(found[cell.name])
    columns = ("model", "encoder", "axis", "cells", "slices an epoch", "training")
    table = []
    for named, group in rows.items():
        cannot = any(cost.failure for cost in group)
        time_told = "cannot be trained" if cannot else hours_told(sum(cost.seconds for cost in group) / at_once)
        table.append((*named, str(len(group)), str(max(cost.slices for cost in group)), time_told))
    print_table(columns, table)
    for failure in dict.fromkeys(cost.failure for cost in found.values() if cost.failure):
        say(f"warning: {failure}", err=True)
    total = hours_told(sum(cost.seconds for cost in found.values()) / at_once)
    how = f", {side_by_side} at a time" if side_by_side > 1 else ""
    click.echo(
        f"to do: {counted(len(to_do), 'cell')}, about {total} of training steps on this machine{how}; validation and "
        "tests come on top, and early stopping saves some"
    )


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["markdown", "csv", "latex", "html"]), default="markdown",
    help="csv is a row a condition, in numbers; html is to be put into a page.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; printed by default.")
def table(study: Path, form: str, output: Path | None) -> None:
    """Show what came out of STUDY so far: each cell beside the published figure, what is better, and how sure."""
    from cspine_train.run.folder import write_text
    from cspine_train.study.report import study_findings
    from cspine_train.study.tables import rendered

    text = rendered(study_findings(study)[0], form)
    if output is None:
        for line in text.splitlines():
            say(line)
        return
    write_text(output, text)
    say(f"wrote {output}")


@click.command(hidden=True)
def cell() -> None:
    """Train and evaluate one cell of a study; the process that starts this says which, on standard input."""
    from cspine_train.study.runner import do_cell
    from cspine_train.training.allocator import keep_large_blocks
    from cspine_train.training.processes import end_with_the_first

    keep_large_blocks()
    # What else is said there is no answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    request = sys.stdin.buffer.readline()
    end_with_the_first()
    failure = do_cell(json.loads(request))
    # On a line of its own, whatever native code has said.
    answer.write(f"\n{json.dumps({'failure': failure})}\n")
    answer.flush()
