"""Commands that read or change a store: `info`, `report`, `verify`, `gc`, `remove`, `export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cspine_data.cli.field_command import FieldCommand
from cspine_data.terminal import PATH, can_go_on, print_notes, print_table, progress_bar

if TYPE_CHECKING:
    from cspine_data.store.schema import CaseRecord

STORE = click.argument("store", type=PATH, default="data/cspine.zarr")
VARIANT = click.option("--variant", help="n4 or raw; optional if the store has only one.")


def _labels(record: CaseRecord) -> str:
    from cspine_data.sources.cases import describe_labels

    return describe_labels((*record.labels, *record.ignored_values), record.segments, record.ignored_values) or "-"


@click.command()
@STORE
def info(store: Path) -> None:
    """List the cases of a store."""
    from cspine_data.datasets.cohort import open_cohort
    from cspine_data.datasets.tables import case_levels, labels_of_records
    from cspine_data.errors import count, printable

    cohort = open_cohort(store)
    rows: list[list[str]] = []
    levels_of: dict[str, str] = {}
    descriptions, chosen, meanings = [], [], []
    for variant in cohort.variants:
        part_of = cohort.split(variant=variant).part_of
        records = cohort.records(variant)
        labels = labels_of_records(records)
        meanings += [labels.text] if labels.text else []
        for record in records:
            levels_of[record.case] = case_levels(record, labels.levels)
            descriptions.append((variant, record.preprocessing.description))
            chosen += [record.chosen_labels] if record.chosen_labels else []
            deviation = f"{record.log_bias_deviation:.3f}" if record.preprocessing.bias else "-"
            rows.append(
                [
                    record.case, variant, " x ".join(map(str, record.size_xyz)),
                    " x ".join(f"{mm:.3g}" for mm in record.spacing_xyz_mm),
                    "".join(map(str, record.axes)), _labels(record),
                    part_of.get(record.case, "-"), deviation,
                ]
            )  # fmt: skip
    names = ["case", "variant", "size xyz", "spacing mm", "axes", "labels", "split", "log bias sd"]
    # Columns that say nothing are left out: most stores have no levels, and one case per patient.
    identities = ("patient", "site", "sequence")
    others = {name: {case: getattr(cohort.identity(case), name) for case in cohort.cases} for name in identities}
    for name, of_case in {"levels": levels_of, **others}.items():
        if any(value not in (None, "", case) for case, value in of_case.items()):
            names.append(name)
            rows = [[*row, of_case[row[0]] or "-"] for row in rows]
    print_table(names, rows)
    for (variant, description), number in Counter(descriptions).items():
        click.echo(f"{variant}: {number} cases prepared with {description}")
    for values, number in Counter(chosen).items():
        click.echo(printable(f"{count(number, 'case')} with --label-values {values}"))
    for note in (*cohort.notes, *dict.fromkeys(meanings)):
        click.echo(printable(f"note: {note}"))
    print_notes(
        (f"{record.case} ({variant})", record.warnings)
        for variant in cohort.variants
        for record in cohort.records(variant)
    )
    click.echo(f"{store}: {len(cohort.cases)} cases, variants {', '.join(cohort.variants) or 'none'}")


@click.command(cls=FieldCommand, fields=("workers",))
@STORE
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE.html", help="The page; replaced if it exists.")
@click.option("--variant", help="n4 or raw; default: n4 if the store has it.")
def report(store: Path, output: Path, variant: str | None, workers: int | None) -> None:
    """Write a page about STORE: suspicious cases first, with pictures before and after bias field correction."""
    from cspine_data.report.dataset import report_store

    with progress_bar("reading") as progress:
        found = report_store(store, output, variant=variant, workers=workers, progress=progress)
    for problem in found.problems:
        click.echo(f"problem: {problem.message}", err=True)
    click.echo(found)
    if found.problems:
        raise SystemExit(1)


@click.command(cls=FieldCommand, fields=("selection", "workers"))
@STORE
@click.option("--repair", "source", type=PATH, help="Prepare damaged cases again from the volumes in this folder.")
def verify(store: Path, source: Path | None, **options: Any) -> None:
    """Check all files of a store against their checksums."""
    from cspine_data.errors import InputError
    from cspine_data.preparation.options import PrepareOptions
    from cspine_data.store.records import repair_hint
    from cspine_data.store.verification import verify as verify_store

    if source is not None:
        _repair(store, source, **options)
        return
    given = [name for name, value in options.items() if value != PrepareOptions.model_fields[name].default]
    if given:
        raise InputError(f"--{given[0]}", "needs --repair", "give --repair SOURCE too, or leave it out")

    with progress_bar("verifying") as progress:
        damages = verify_store(store, progress)
    for damage in damages:
        click.echo(f"damaged: {damage}", err=True)
    if damages:
        click.echo(f"{store}: {len(damages)} damaged; {repair_hint(store)}")
        raise SystemExit(1)
    click.echo(f"{store}: sound")


def _repair(store: Path, source: Path, **options: Any) -> None:
    from cspine_data.preparation.repair import repair

    with can_go_on(store), progress_bar("repairing") as progress:
        summary = repair(store, source, progress=progress, **options)
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


@click.command()
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


@click.command()
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


@click.command()
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
    """Write CASE of STORE to a file, or all cases to a folder (--layout), on the grids of their source files."""
    from cspine_data.datasets.cohort import open_cohort
    from cspine_data.errors import InputError
    from cspine_data.volumes.io import write_volume

    if layout is not None:
        if case is not None or label:
            raise InputError("--layout", "exports all cases with their label maps", "leave CASE and --label out")
        _export_all(store, variant, layout, output)
        return
    if case is None:
        raise InputError("export", "needs a CASE", "give one, or --layout to export all")
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
        click.echo(f"note: nnU-Net needs consecutive label values; renumbered: {changes}")
    labelled = sum(case.label is not None for case in summary.cases)
    folds = f"{summary.folds} folds by patient" if summary.folds else "too few patients for folds"
    click.echo(f"{output}: {count(len(summary.cases), 'case')}, {labelled} with a label map; {folds}")
    if summary.problems:
        raise SystemExit(1)
