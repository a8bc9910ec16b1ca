"""The commands that run a study and show its results."""

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
from cspine_train.run.recipes import read_recipe
from cspine_train.run.settings import AXES

if TYPE_CHECKING:
    from cspine_data import Cohort
    from cspine_train.run.settings import RunSettings
    from cspine_train.study.plan import Cell, Grid, Plan
    from cspine_train.study.runner import Outcome

# Fields that the grid varies.
_GRID_FIELDS = ("model", "encoder", "weights", "axes", "variant", "folds", "fold", "split", "test_site", "seed")
# Seconds between updates of the progress bar.
_UPDATE_S = 2.0
# Pause between two writings of the tables, as a multiple of the time that one took.
_WRITING_PAUSES = 50


_GRID = cloup.option_group(
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
    cloup.option(
        "--split", type=click.Path(path_type=Path), metavar="FILE", help="Split file, as in run; all its folds."
    ),
    cloup.option("--leave-site-out", is_flag=True, help="Test on each site in turn; train on the others."),
    cloup.option("--seeds", type=click.IntRange(1), default=1, help="Runs of each cell, from seed 0 on."),
    cloup.option(
        "--from", "queue", type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="CSV file (done,model,encoder,axis,epochs,batch), as in the reference study; replaces these options.",
    ),
)  # fmt: skip
_FILES = cloup.option_group(
    "Input and output",
    cloup.option("--store", default="data/cspine.zarr", help="Store to train on: a folder or a URL."),
    cloup.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the study."),
    cloup.option("--plan", "only_plan", is_flag=True, help="Show the cells and the expected time, and end."),
)
_MACHINE = cloup.option_group(
    "Machine",
    cloup.option(
        "--workers", type=click.IntRange(1), help="Runs at a time; default: one per GPU, or one for four cores."
    ),
    cloup.option("--scheduler", help="Address of a running Dask scheduler to use instead of local processes."),
)


@click.command(cls=cloup.Command)
@_GRID
@_FILES
@_MACHINE
@setting_options("reference", omit=(*_GRID_FIELDS, "from_run"))
def study(
    store: str, models: Sequence[str], encoders: Sequence[str], weights: dict[str, str], variants: Sequence[str],
    axes: Sequence[str], folds: int | None, split: Path | None, leave_site_out: bool, seeds: int, queue: Path | None,
    workers: int | None, scheduler: str | None, only_plan: bool, output: Path, recipe: str, **options: Any,
) -> None:  # fmt: skip
    """Train and evaluate a grid of models; the same command again resumes a study that was stopped.

    Finished cells are not repeated. A changed option repeats only the cells that it affects. The default grid is the
    reference study's: 72 cells.
    """
    from cspine_data import open_cohort, read_splits
    from cspine_train.study.plan import Grid, plan_study, sites_of
    from cspine_train.study.runner import check_not_run, check_output, is_done

    if workers is not None and scheduler is not None:
        raise click.UsageError("--workers and --scheduler: exclude each other, as a scheduler has its own workers")
    cohort = open_cohort(store)
    splits, sites = read_splits(split) if split else (), sites_of(cohort) if leave_site_out else ()
    grid = Grid(models, encoders, weights, variants, _axes(axes), folds, seeds, splits, sites)
    requested = _requested(grid, queue, settings_of(_recipe_of_cells(recipe), **options))
    if not requested:
        return
    if unused := set(weights) - {""} - {one.encoder for one in requested if one.weights != "none"}:
        problem = "no encoder of the study starts from it; name it in --encoders, without :random"
        raise click.UsageError(f"--weights {min(unused)}=...: {problem}")
    plan = plan_study(cohort, requested)
    check_output(output)
    if not only_plan:
        check_not_run(output)
    to_do = [cell for cell in plan.cells if not is_done(output, cell)]
    _print_plan(plan, output, to_do, len(requested))
    if to_do and not only_plan:
        _check_weights(to_do)
    if to_do:
        _print_cost(cohort, to_do, 1 if scheduler else workers)
    if to_do and only_plan:
        # Last, as the cost is known even if weights are unavailable.
        _check_weights(to_do)
    if not only_plan:
        _run(plan, output, to_do, workers, scheduler)


def _recipe_of_cells(name: str) -> dict[str, Any]:
    """Return the settings of a recipe that the grid does not vary; print which others are left out."""
    settings = read_recipe(name).settings
    # The grid always has models and encoders of its own.
    varied = sorted((settings.keys() & set(_GRID_FIELDS)) - {"model", "encoder"})
    if varied:
        say(f"note: {name}: the grid of a study varies {', '.join(varied)}; these settings of the recipe are left out")
    return {field: value for field, value in settings.items() if field not in _GRID_FIELDS}


def _axes(names: Sequence[str]) -> list[tuple[int, ...]]:
    unknown = [axis for axis in names if axis not in AXES]
    if unknown:
        several = "; separate axes by commas" if set(unknown[0]) < set("012") else ""
        raise click.UsageError(f"--axes {unknown[0]}: is none of {', '.join(AXES)}{several}")
    return [AXES[axis] for axis in names]


def _run(plan: Plan, output: Path, to_do: Sequence[Cell], workers: int | None, scheduler: str | None) -> None:
    """Run the cells of a plan that are not done, print their outcomes, and write the tables."""
    from cspine_data.tools import count
    from cspine_train.study.report import write_outcome
    from cspine_train.study.runner import LOGS_FOLDER, run_study

    if to_do:
        click.echo(f"logs of the cells, a line per epoch: {output / LOGS_FOLDER}")
    cells = len(plan.cells)
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
            done = cells - len(left) - len(failed)
            say(f"done {done} of {cells}: {outcome.cell.name} ({outcome.seconds:.0f} s)")
        if left and (began := time.monotonic()) >= write_at:
            try:
                write_outcome(output)
            except Exception as error:  # noqa: BLE001
                # The other cells go on; tables are written again at the end.
                say(f"warning: {output}: tables could not be written ({error})", err=True)
            ready = time.monotonic()
            write_at = ready + _WRITING_PAUSES * (ready - began)

    with can_go_on(output), _epoch_progress(output, plan.cells, left):
        run_study(plan, output, workers, scheduler, ended)
    found, files = write_outcome(output)
    if not to_do:
        click.echo(f"nothing to do: all {cells} cells of {output} are done")
    else:
        for file in files:
            say(f"wrote {file}")
        say(found.answer)
    if failed:
        click.echo(f"{len(failed)} of {count(cells, 'cell')} failed; run the command again to retry", err=True)
        raise SystemExit(1)


@contextmanager
def _epoch_progress(study: Path, cells: Sequence[Cell], left: Mapping[str, Cell]) -> Iterator[None]:
    """Show the number of trained epochs of all cells in a progress bar on a terminal."""
    from cspine_train.study.runner import epochs_of, epochs_trained

    epochs = sum(map(epochs_of, cells))
    with progress_bar("epochs") as progress:
        if progress is None:
            yield
            return

        def show() -> None:
            to_do = list(left.values())
            # Cells that stopped early count with all their epochs.
            done = epochs - sum(map(epochs_of, to_do))
            progress(done + epochs_trained(study, to_do), epochs, f"{len(cells) - len(to_do)} of {len(cells)} cells")

        ended = Event()

        def update() -> None:
            while not ended.wait(_UPDATE_S):
                show()

        show()
        updater = Thread(target=update, daemon=True)
        updater.start()
        try:
            yield
        finally:
            ended.set()
            updater.join()
            show()


def _requested(grid: Grid, queue: Path | None, recipe: RunSettings) -> list[RunSettings]:
    """Return the settings of all runs of the grid, or of the queue file."""
    if queue is None:
        return grid.settings(recipe)
    from cspine_data.tools import count
    from cspine_train.study.plan import queued

    context = click.get_current_context()
    for name in ("models", "encoders", "axes", "epochs", "batch_size"):
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')}: is a column of the file of --from; leave it out")
    settings, done = queued(queue, grid, recipe)
    if done:
        click.echo(f"note: {count(done, 'line')} of {queue} marked as done left out")
    if not settings:
        click.echo("nothing to do: all lines are marked as done")
    return settings


def _print_plan(plan: Plan, output: Path, to_do: Sequence[Cell], requested: int) -> None:
    """Print the cells of a plan; refuse unknown networks."""
    from cspine_data.tools import count
    from cspine_train.study.plan import RANDOM_ENCODER, RANDOM_NOTE
    from cspine_train.study.runner import cells_of_others

    if to_do:
        # Not if all cells are done, as importing PyTorch takes seconds.
        from cspine_train.study.networks import check_network_names

        check_network_names(to_do)
    cells = [cell.settings for cell in plan.cells]
    click.echo(f"{count(len(cells), 'cell')}, {len(cells) - len(to_do)} of them done")
    if any((one.encoder, one.weights) == (RANDOM_ENCODER, "none") for one in cells):
        click.echo(f"note: {RANDOM_NOTE}")
    if twice := requested - len(cells):
        click.echo(f"note: {count(twice, 'run')} of the grid would be the same as others, and are done once")
    for name, values in {
        "models": [one.model for one in cells],
        "encoders": [
            f"{one.encoder} from {one.weights if one.weights != 'none' else 'random'} weights" for one in cells
        ],
        "variants": [one.variant for one in cells],
        "axes": [one.axes_name for one in cells],
        "splits": [one.split_name for one in cells],
        "seeds": [str(one.seed) for one in cells],
        "training": [one.length for one in cells],
    }.items():
        click.echo(f"  {name}: {', '.join(dict.fromkeys(values))}")
    if others := cells_of_others(output, plan):
        click.echo(f"note: {output} holds {count(others, 'cell')} of other grids, which stay and are in no table")


def _check_weights(to_do: Sequence[Cell]) -> None:
    from cspine_train.study.networks import check_weights

    try:
        check_weights(to_do)
    except ModelError as error:
        for line in error.details:
            say(line, err=True)
        raise


def _print_cost(cohort: Cohort, to_do: Sequence[Cell], workers: int | None) -> None:
    from cspine_data.tools import count
    from cspine_train.planning.run_plan import duration
    from cspine_train.study.cost import costs
    from cspine_train.study.runner import processes_here
    from cspine_train.training.allocator import keep_large_blocks, release_free_blocks

    side_by_side, threads, gpus = processes_here(workers, len(to_do))
    # Cells that share a GPU take turns.
    at_once = min(side_by_side, len(gpus) or side_by_side)
    # As in the processes of the cells.
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
        seconds = sum(cost.seconds for cost in group) / at_once
        expected = "cannot be trained" if any(cost.failure for cost in group) else duration(seconds)
        table.append((*named, str(len(group)), str(max(cost.slices for cost in group)), expected))
    print_table(columns, table)
    for failure in dict.fromkeys(cost.failure for cost in found.values() if cost.failure):
        say(f"warning: {failure}", err=True)
    total = duration(sum(cost.seconds for cost in found.values()) / at_once)
    how = f", {side_by_side} at a time" if side_by_side > 1 else ""
    click.echo(
        f"to do: {count(len(to_do), 'cell')}, about {total} of training on this machine{how}, plus tests, less with "
        "early stopping"
    )


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["markdown", "csv", "latex", "html"]), default="markdown",
    help="csv has a row for each condition; html is a part of a page.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Output file; default: print.")
def table(study: Path, form: str, output: Path | None) -> None:
    """Show the results of STUDY so far: Dice beside published figures, paired comparisons and a ranking."""
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
    """Train and evaluate one cell of a study; the request is read from standard input."""
    from cspine_train.study.runner import do_cell
    from cspine_train.training.allocator import keep_large_blocks
    from cspine_train.training.processes import end_with_the_first

    keep_large_blocks()
    # Standard output is for the answer only.
    answer, sys.stdout = sys.stdout, sys.stderr
    request = sys.stdin.buffer.readline()
    end_with_the_first()
    failure = do_cell(json.loads(request))
    # On a separate line, as native code may have printed there.
    answer.write(f"\n{json.dumps({'failure': failure})}\n")
    answer.flush()
