"""Commands that read or write a cohort of files: `phantom`, `scan`, `prepare`, `relabel`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cspine_data.cli.field_command import FieldCommand
from cspine_data.terminal import PATH, can_go_on, print_notes, print_table, progress_bar

if TYPE_CHECKING:
    from cspine_data.volumes.label_options import LabelOptions

SOURCE = click.argument("source", type=PATH, default="data/raw")


@click.command()
@click.argument("folder", type=PATH)
@click.option("--cases", type=int, default=14, help="Number of volumes.")
@click.option("--seed", type=int, default=0, help="Random seed.")
def phantom(folder: Path, cases: int, seed: int) -> None:
    """Write a synthetic labelled cervical cohort into FOLDER."""
    from cspine_data.phantom.cohort import TRUTH_FOLDER, make_phantom_cohort

    with progress_bar("making phantoms") as progress:
        paths = make_phantom_cohort(folder, cases, seed, progress)
    click.echo(
        f"{len(paths)} synthetic volumes with label maps in {folder}, their bias fields in {folder / TRUTH_FOLDER}"
    )


@click.command(cls=FieldCommand, fields=("selection", "labels", "workers"))
@SOURCE
@click.option("--quick", is_flag=True, help="Read headers only: fast, and without the checks of voxels.")
@click.option("--write-pairs", type=PATH, metavar="FILE.csv", help="Write a list of the cases, for --pairs.")
@click.option(
    "--report",
    type=PATH,
    metavar="FILE.html",
    help="Write a page with pictures, suspicious cases first; uses --workers.",
)
def scan(
    source: Path,
    quick: bool,
    write_pairs: Path | None,
    report: Path | None,
    workers: int | None,
    **options: Any,
) -> None:
    """List the cases in SOURCE and all problems. Only --write-pairs and --report write a file."""
    from cspine_data.errors import InputError, count, printable
    from cspine_data.preprocessing.parameters import checked
    from cspine_data.sources.cases import scan_cases
    from cspine_data.sources.duplicates import look_alike_notes
    from cspine_data.sources.listing import find_cases
    from cspine_data.sources.pair_lists import write_pairs as write_list
    from cspine_data.volumes.cohort_labels import cohort_labels
    from cspine_data.volumes.label_options import LabelOptions

    if report and quick:
        raise InputError("--report and --quick", "exclude each other", "a report needs the voxels: leave out --quick")
    if workers is not None and report is None:
        raise InputError("--workers", "is for --report", "give --report FILE.html too, or leave it out")
    labels = checked(LabelOptions, "", {name: options.pop(name) for name in LabelOptions.model_fields})
    listing = find_cases(source, **options)
    for note in listing.notes:
        click.echo(printable(f"note: {note}"))
    with progress_bar("reading") as progress:
        if report:
            from cspine_data.report.dataset import report_source

            found = report_source(
                listing,
                report,
                labels,
                command=_source_arguments(source, labels, options),
                workers=workers,
                progress=progress,
            )
            cases, problems = found.cases, found.problems
        else:
            cases, problems = scan_cases(listing, labels, quick=quick, progress=progress)
    print_table(("case", "size", "spacing mm", "orientation", "labels", "label map"), [case.row for case in cases])
    print_notes((case.row[0], case.notes) for case in cases)
    for note in look_alike_notes(case.fingerprint for case in cases if case.fingerprint):
        click.echo(f"note: {note}")
    meaning = cohort_labels([case.labels for case in cases])
    if meaning.text:
        click.echo(f"note: {meaning.text}")
    print_notes((case.row[0], meaning.problems(case.labels, case.instances)) for case in cases)
    for problem in problems:
        click.echo(f"problem: {problem.message}", err=True)
    if write_pairs is not None:
        write_list(write_pairs, listing.cases)
        click.echo(f"wrote {write_pairs}: {count(len(listing.cases), 'case')}; correct it and give it as --pairs")
    if report is not None:
        click.echo(found)
    state = "with a readable header" if quick else "can be prepared"
    unlabelled = sum(not case.labelled for case in cases)
    click.echo(
        f"{count(len(cases), 'case')} {state}, {unlabelled} without a label map; {count(len(problems), 'problem')}"
    )
    if problems:
        raise SystemExit(1)


def _source_arguments(source: Path, labels: LabelOptions, selection: dict[str, Any]) -> str:
    """Return the arguments that select the same cases and labels again, quoted for a shell."""
    from cspine_data.volumes.label_options import label_values_text

    arguments = [str(source)] if selection["pairs"] is None else []
    values = (
        ("label_values", label_values_text(labels.label_values or ()) or None),
        ("ignore_label", labels.ignore_label),
    )
    for name, given in (*selection.items(), *values):
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and (name, value) != ("layout", "auto"):
                arguments += [f"--{name.replace('_', '-')}", str(value)]
    arguments += ["--trust-voxels"] * labels.trust_voxels + ["--resample-labels"] * labels.resample_labels
    return shlex.join(arguments)


@click.command(cls=FieldCommand)
@SOURCE
def prepare(
    source: Path,
    store: Path,
    n4: bool,
    n4_preset: str | None,
    normalisation: str,
    spacing: str | None,
    **others: Any,
) -> None:
    """Correct, normalise and slice the volumes in SOURCE into a store; stored cases are reused."""
    from cspine_data.cli.options import preprocessing_of
    from cspine_data.errors import printable
    from cspine_data.preparation.pipeline import prepare as prepare_cohort
    from cspine_data.preparation.pseudonyms import key_file

    bias = {name: others.pop(name) for name in list(others) if name.startswith("n4_")}
    preprocessing = preprocessing_of(n4, n4_preset, normalisation, spacing, **bias)
    with can_go_on(store), progress_bar("preparing") as progress:
        summary = prepare_cohort(source, store, preprocessing=preprocessing, progress=progress, **others)
    for note in summary.source_notes:
        click.echo(printable(f"note: {note}"))
    print_notes(summary.notes.items())
    for problem in summary.failed:
        click.echo(f"failed: {problem.message}", err=True)
    click.echo(
        f"{store}: {len(summary.done)} done, {len(summary.reused)} reused, {len(summary.failed)} failed; "
        f"{summary.seconds:.1f} s, {summary.written_bytes / 1e6:.1f} MB written"
    )
    if summary.replaced:
        click.echo(
            f"{len(summary.replaced)} of them replace cases with other parameters; now: {preprocessing.description}"
        )
    if others["anonymise"]:
        click.echo(f"the key to the case names is {key_file(store)}; keep it safe and confidential")
    if summary.standard_cases:
        click.echo(
            f"nyul: matched to the mean histogram of {len(summary.standard_cases)} cases, which this store keeps"
        )
    if not summary.done and not summary.failed:
        click.echo("nothing to do: all cases are stored with these parameters")
    if summary.failed:
        raise SystemExit(1)


@click.command(cls=FieldCommand, fields=("selection", "label_values"))
@SOURCE
@click.option("-o", "--output", type=PATH, required=True, help="New folder for the label maps and pairs.csv.")
@click.option("--lowest", metavar="LEVEL", help="Level of the lowest labelled vertebra in all cases, such as L5.")
@click.option("--highest", metavar="LEVEL", help="Level of the highest labelled vertebra in all cases, such as C2.")
@click.option("--scheme", metavar="NAME", help="Instead, convert label values of verse, totalspineseg or sct.")
@click.option("--to-scheme", metavar="NAME", default="verse", help="Values to write: verse, totalspineseg or sct.")
def relabel(
    source: Path,
    output: Path,
    lowest: str | None,
    highest: str | None,
    scheme: str | None,
    to_scheme: str,
    label_values: str | None,
    **selection: Any,
) -> None:
    """Convert the label maps of SOURCE to vertebra levels, in a new folder; the volumes stay where they are."""
    from cspine_data.errors import count
    from cspine_data.preparation.relabelling import relabel as relabel_cohort
    from cspine_data.sources.listing import find_cases

    listing = find_cases(source, **selection)
    with progress_bar("relabelling") as progress:
        found = relabel_cohort(
            listing,
            output,
            lowest=lowest,
            highest=highest,
            scheme=scheme,
            to_scheme=to_scheme,
            label_values=label_values,
            progress=progress,
        )
    print_table(("case", "levels, head to feet"), [(case, " ".join(names)) for case, names in found.levels.items()])
    for problem in found.problems:
        click.echo(f"problem: {problem.message}", err=True)
    written = f"{count(len(found.levels), 'label map')} written, {count(len(found.problems), 'problem')}"
    prepare_them = f"; prepare them with: cspine-data prepare --pairs {shlex.quote(str(found.pairs))}"
    click.echo(f"{written}{prepare_them if found.levels else ''}")
    if found.problems:
        raise SystemExit(1)
