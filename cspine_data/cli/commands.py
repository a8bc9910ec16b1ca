"""The `cspine-data` command: each command calls one public function and prints what it returns."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from cspine_data.terminal import PATH, CommandGroup, can_go_on, print_notes, print_table, progress_bar, warn_in_one_line

if TYPE_CHECKING:
    from cspine_data.store.schema import CaseRecord
    from cspine_data.volumes.label_options import LabelOptions

SOURCE = click.argument("source", type=PATH, default="data/raw")
STORE = click.argument("store", type=PATH, default="data/cspine.zarr")
VARIANT = click.option("--variant", help="n4 or raw; optional if the store has only one.")


class FieldCommand(click.Command):
    """A command whose options are made from typed fields when it is used; a list of commands does without them.

    Parameters
    ----------
    fields : tuple of str
        The fields of `PrepareOptions`; empty for all options of `prepare`.
    """

    def __init__(self, callback: Callable[..., Any], fields: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__(callback=callback, **attributes)
        self._function = callback
        self._fields = fields

    @cached_property
    def complete(self) -> click.Command:
        """The command with all its options."""
        from cspine_data.cli.options import field_options, prepare_options

        decorate = field_options(*self._fields) if self._fields else prepare_options
        return cloup.command(self.name, params=list(self.params), help=self.help)(decorate(self._function))

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parse the arguments of the command with all its options."""
        return self.complete.make_context(*args, **more)


@click.group(cls=CommandGroup, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cspine")
def main() -> None:
    """Correct the bias field of spine MRI once, and store volumes and slices for training."""
    warn_in_one_line()


@main.command()
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


@main.command(
    cls=FieldCommand,
    fields=(
        "layout",
        "pairs",
        "sequence",
        "include",
        "exclude",
        "label_values",
        "ignore_label",
        "trust_voxels",
        "resample_labels",
        "workers",
    ),
)
@SOURCE
@click.option("--quick", is_flag=True, help="Read headers only: fast, and without the checks of voxels.")
@click.option("--write-pairs", type=PATH, metavar="FILE.csv", help="Write a list of the cases, for --pairs.")
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page with pictures, outliers first.")
def scan(
    source: Path,
    quick: bool,
    write_pairs: Path | None,
    report: Path | None,
    workers: int | None,
    **options: Any,
) -> None:
    """List the cases in SOURCE and all problems; only --write-pairs and --report write a file."""
    from cspine_data.errors import InputError, count, printable
    from cspine_data.preprocessing.parameters import checked
    from cspine_data.sources.cases import scan_cases
    from cspine_data.sources.duplicates import look_alike_notes
    from cspine_data.sources.listing import find_cases
    from cspine_data.sources.pair_lists import write_pairs as write_list
    from cspine_data.volumes.label_options import LabelOptions

    if report and quick:
        raise InputError("--report and --quick", "exclude each other", "a report needs the voxels: leave out --quick")
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
    for problem in problems:
        click.echo(f"problem: {problem.message}", err=True)
    if write_pairs is not None:
        write_list(write_pairs, listing.cases)
        click.echo(f"wrote {write_pairs}: {count(len(listing.cases), 'case')}; correct it and give it as --pairs")
    if report is not None:
        click.echo(
            f"wrote {report}: {count(found.suspects, 'case')} to look at; it shows patients, keep it confidential"
        )
    state = "with a readable header" if quick else "can be prepared"
    unlabelled = sum(not case.labelled for case in cases)
    click.echo(
        f"{count(len(cases), 'case')} {state}, {unlabelled} without a label map; {count(len(problems), 'problem')}"
    )
    if problems:
        raise SystemExit(1)


def _report_line(page: Path, suspects: int) -> str:
    from cspine_data.errors import count

    return f"wrote {page}: {count(suspects, 'case')} to look at; the page shows patients, keep it confidential"


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


@main.command(cls=FieldCommand)
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
    """Correct, normalise and slice the volumes in SOURCE into a store; cases that are stored already are reused."""
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


def _labels(record: CaseRecord) -> str:
    from cspine_data.sources.cases import describe_labels

    return describe_labels((*record.labels, *record.ignored_values), record.segments, record.ignored_values) or "-"


@main.command()
@STORE
def info(store: Path) -> None:
    """List the cases of a store."""
    from cspine_data.datasets.cohort import open_cohort
    from cspine_data.errors import count, printable

    cohort = open_cohort(store)
    rows, descriptions, chosen = [], [], []
    for variant in cohort.variants:
        part_of = cohort.split(variant=variant).part_of
        for record in cohort.records(variant):
            descriptions.append((variant, record.preprocessing.description))
            chosen += [record.chosen_labels] if record.chosen_labels else []
            deviation = f"{record.log_bias_deviation:.3f}" if record.preprocessing.bias else "-"
            rows.append(
                (
                    record.case, variant, " x ".join(map(str, record.size_xyz)),
                    " x ".join(f"{mm:.3g}" for mm in record.spacing_xyz_mm),
                    "".join(map(str, record.axes)), _labels(record),
                    part_of.get(record.case, "-"), deviation,
                )
            )  # fmt: skip
    print_table(("case", "variant", "size xyz", "spacing mm", "axes", "labels", "split", "log bias sd"), rows)
    for (variant, description), number in Counter(descriptions).items():
        click.echo(f"{variant}: {number} cases prepared with {description}")
    for values, number in Counter(chosen).items():
        click.echo(printable(f"{count(number, 'case')} with --label-values {values}"))
    for note in cohort.notes:
        click.echo(printable(f"note: {note}"))
    print_notes(
        (f"{record.case} ({variant})", record.warnings)
        for variant in cohort.variants
        for record in cohort.records(variant)
    )
    click.echo(f"{store}: {len(cohort.cases)} cases, variants {', '.join(cohort.variants) or 'none'}")


@main.command(cls=FieldCommand, fields=("workers",))
@STORE
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE.html", help="The page; replaced if it exists.")
@VARIANT
def report(store: Path, output: Path, variant: str | None, workers: int | None) -> None:
    """Write a page about the cases of STORE: outliers first, pictures before and after bias field correction."""
    from cspine_data.report.dataset import report_store

    with progress_bar("reading") as progress:
        found = report_store(store, output, variant=variant, workers=workers, progress=progress)
    for problem in found.problems:
        click.echo(f"problem: {problem.message}", err=True)
    click.echo(_report_line(output, found.suspects))
    if found.problems:
        raise SystemExit(1)


@main.command(cls=FieldCommand, fields=("pairs", "workers"))
@STORE
@click.option("--repair", "source", type=PATH, help="Prepare damaged cases again from the volumes in this folder.")
def verify(store: Path, source: Path | None, pairs: Path | None, workers: int | None) -> None:
    """Check all files of a store against their checksums."""
    from cspine_data.errors import InputError
    from cspine_data.store.records import repair_hint
    from cspine_data.store.verification import verify as verify_store

    if source is not None:
        _repair(store, source, pairs, workers)
        return
    if pairs is not None or workers is not None:
        raise InputError("--pairs and --workers", "are for --repair", "give --repair SOURCE too, or leave them out")

    with progress_bar("verifying") as progress:
        damages = verify_store(store, progress)
    for damage in damages:
        click.echo(f"damaged: {damage}", err=True)
    if damages:
        click.echo(f"{store}: {len(damages)} damaged; {repair_hint(store)}")
        raise SystemExit(1)
    click.echo(f"{store}: sound")


def _repair(store: Path, source: Path, pairs: Path | None, workers: int | None) -> None:
    from cspine_data.preparation.repair import repair

    with can_go_on(store), progress_bar("repairing") as progress:
        summary = repair(store, source, pairs=pairs, workers=workers, progress=progress)
    for damage in summary.damages:
        click.echo(f"damaged: {damage}", err=True)
    for problem in summary.failed:
        click.echo(f"failed: {problem.message}", err=True)
    for case, variant in summary.differing:
        click.echo(
            f"note: {case} ({variant}) is sound, but its bytes differ from before: a library has another version",
            err=True,
        )
    if summary.failed:
        click.echo(f"{store}: {len(summary.mended)} repaired, {len(summary.failed)} still damaged")
        raise SystemExit(1)
    click.echo(f"{store}: sound" + (f"; {len(summary.damages)} damaged files were repaired" if summary.damages else ""))


@main.command()
@STORE
@click.option("--delete", is_flag=True, help="Delete; without this option, only list.")
@click.option(
    "--grace-days",
    type=click.FloatRange(min=0),
    default=7.0,
    help="Keep data that were in use within this many days; 0 may stop a training run that still reads them.",
)
def gc(store: Path, delete: bool, grace_days: float) -> None:
    """List or delete unused data of a store: replaced and removed cases, files of killed runs."""
    from cspine_data.store.garbage import collect_garbage, find_garbage, unused_for

    grace_s = grace_days * 24 * 3600
    garbage = find_garbage(store)
    found = collect_garbage(store, grace_s=grace_s, delete=True) if delete else unused_for(garbage, grace_s)
    for one in found:
        days = one.unused_s / 24 / 3600
        click.echo(f"{one.path.relative_to(store)}: {one.size_bytes / 1e6:.1f} MB, unused for {days:.1f} days")
    size = f"{len(found)} folders and files, {sum(one.size_bytes for one in found) / 1e6:.1f} MB"
    listed = {one.path for one in found}
    recent = [one for one in garbage if one.path not in listed]
    if recent:
        recent_mb = sum(one.size_bytes for one in recent) / 1e6
        click.echo(f"{recent_mb:.1f} MB more may still be in use: unused for less than {grace_days:g} days")
    if not found:
        click.echo(f"{store}: nothing has been unused for {grace_days:g} days")
    elif delete:
        click.echo(f"{store}: {size} deleted")
    else:
        click.echo(f"{store}: {size} can be deleted with --delete")


@main.command()
@click.argument("store", type=PATH)
@click.argument("cases", nargs=-1, required=True)
@click.option("--variant", help="Only this variant, n4 or raw. [default: all]")
def remove(store: Path, cases: tuple[str, ...], variant: str | None) -> None:
    """Remove CASES from STORE; gc deletes their files later, when no reader uses them any more."""
    from cspine_data.store.publishing import remove_cases

    remove_cases(store, cases, variant)
    click.echo(
        f"{store}: removed {', '.join(cases)}{f' ({variant})' if variant else ''}; cspine-data gc --delete deletes "
        "the files after a week, with --grace-days 0 at once; prepare adds the cases again if the source has them"
    )


@main.command()
@click.argument("store", type=PATH)
@click.argument("case", required=False)
@VARIANT
@click.option("--label", is_flag=True, help="Export the label map instead of the image.")
@click.option(
    "--layout",
    type=click.Choice(["nnunet", "bids", "msd"]),
    help="Export all cases, with their label maps, to a new folder in this layout.",
)
@click.option(
    "-o", "--output", type=PATH, required=True, help="A .nrrd, .nii, .nii.gz or .mha file; with --layout a folder."
)
def export(
    store: Path, case: str | None, variant: str | None, label: bool, layout: str | None, output: Path
) -> None:  # fmt: skip
    """Write CASE of STORE to a file, on the grid of its source file; with --layout all cases to a folder."""
    from cspine_data.datasets.cohort import open_cohort
    from cspine_data.errors import InputError
    from cspine_data.volumes.io import write_volume

    if layout is not None:
        if case is not None or label:
            raise InputError("--layout", "exports all cases with their label maps", "leave CASE and --label out")
        _export_all(store, variant, layout, output)
        return
    if case is None:
        raise InputError("export", "needs a case", "name one, or give --layout to export all")
    if output.exists():
        raise InputError(output, "exists already", "remove it or choose another -o")
    write_volume(output, open_cohort(store).export(case, variant, label=label))
    click.echo(f"{output}: {'label map' if label else 'volume'} of {case}")


def _export_all(store: Path, variant: str | None, layout: str, output: Path) -> None:
    from cspine_data.datasets.cohort import open_cohort
    from cspine_data.datasets.export import export_cohort
    from cspine_data.errors import count

    with progress_bar("exporting") as progress:
        summary = export_cohort(open_cohort(store), output, layout, variant, progress)
    for problem in summary.problems:
        click.echo(f"failed: {problem.message}", err=True)
    if summary.renumbered:
        changes = ", ".join(f"{value} as {number}" for value, number in summary.renumbered.items())
        click.echo(f"note: nnU-Net needs consecutive label values; written: {changes}")
    labelled = sum(case.label is not None for case in summary.cases)
    folds = f"{summary.folds} folds by patient" if summary.folds else "too few patients for folds"
    click.echo(f"{output}: {count(len(summary.cases), 'case')}, {labelled} with a label map; {folds}")
    if summary.problems:
        raise SystemExit(1)
