"""What it takes to stream slices for training: cspine, and other ways to keep the same arrays.

Run as ``python benchmarks/streaming.py [COHORT ...]``: on a phantom cohort made on the spot, and on each COHORT, a
folder of volumes or a store. Prints a table an axis; ``--json`` keeps all figures, ``--picture`` draws them. Each
contender works in a process of its own, and they take turns, so that none's memory is another's and what disturbs the
machine disturbs all. What is measured, and how: ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import layouts
import medical_layouts
import numpy as np
from contenders import CONTENDERS, Bench, Contender, bytes_of, write

from cspine_data import open_cohort, prepare

WORKERS = (0, 1, 2)
ROUNDS = 5
EPOCHS = 3
OURS = layouts.Ours.name
Figures = dict[str, float]


def measure_axis(
    chosen: Sequence[str], store: Path, work: Path, axis: int, settings: Any
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Measure all contenders along an axis, in turn; return their figures, and why some have not all of them."""
    rng = np.random.default_rng(axis)
    slices = open_cohort(store).slices(axis=axis)
    there = len(slices)
    items = rng.integers(0, np.searchsorted(slices.case_numbers, settings.volumes), settings.slices).tolist()
    order = rng.permutation(there)[: settings.epoch].tolist()
    figures: dict[str, Figures] = {name: {} for name in chosen}
    contenders = [Contender(name, Bench, name, store, work / name, axis, settings.float32) for name in chosen]
    for contender in contenders:
        contender.answer()
    by_slice = [contender for contender in contenders if CONTENDERS[contender.name].by_slice]
    for contender in by_slice:
        contender.ask("check", items)
    for kind in ("warm", "cold"):
        taken = measure_slices([c for c in by_slice if kind == "warm" or has_files(c.name)], items, kind == "cold")
        for name, seconds in taken.items():
            figures[name][f"{kind}_us"] = statistics.median(seconds) * 1e6
    for workers in WORKERS:
        measure_epochs(contenders, order, workers, figures)
    for contender in contenders:
        held = contender.ask("memory")
        if held:
            figures[contender.name]["process_mb"], figures[contender.name]["worker_mb"] = held
        contender.end()
    return figures, {contender.name: contender.failure for contender in contenders if contender.failure}


def has_files(name: str) -> bool:
    return CONTENDERS[name] is not medical_layouts.MonaiCache


def measure_slices(contenders: Sequence[Contender], items: Sequence[int], cold: bool) -> dict[str, list[float]]:
    """Return the seconds of a slice, in each batch, of each contender; some slices each in turn."""
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(ROUNDS):
        turn = number % len(contenders)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            taken[contender.name] += contender.ask("slices", items[number::ROUNDS], cold) or []
    return {contender.name: taken[contender.name] for contender in contenders if not contender.failure}


def measure_epochs(
    contenders: Sequence[Contender], order: Sequence[int], workers: int, figures: dict[str, Figures]
) -> None:
    """Measure epochs with so many workers, an epoch each in turn; the median counts."""
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        started = contender.ask("start", order, workers)
        if started:
            figures[contender.name][f"start_{workers}_s"] = started
    for _ in range(EPOCHS):
        for contender in contenders:
            seconds = contender.ask("epoch")
            if seconds:
                taken[contender.name].append(seconds)
    for contender in contenders:
        contender.ask("stop")
        if len(taken[contender.name]) == EPOCHS:
            figures[contender.name][f"epoch_{workers}_s"] = statistics.median(taken[contender.name])


def write_all(chosen: Sequence[str], store: Path, work: Path) -> dict[str, Figures]:
    """Let each contender write its files; those that read the store's have none of their own but ours."""
    figures: dict[str, Figures] = {}
    for name in chosen:
        folder = work / name
        folder.mkdir(parents=True)
        figures[name] = {}
        if name == OURS or not CONTENDERS[name].of_store:
            contender = Contender(name, write, name, store, folder)
            figures[name]["write_s"] = contender.answer(3600)
            contender.end()
        os.sync()
        if has_files(name):
            figures[name]["disk_mb"] = bytes_of(name, store, folder) / 1e6
    return figures


COLUMNS = (
    ("warm, us", "warm_us"), ("cold, us", "cold_us"), ("epoch, s: 0 workers", "epoch_0_s"), ("1 worker", "epoch_1_s"),
    ("2 workers", "epoch_2_s"), ("disk, MB", "disk_mb"), ("process, MB", "process_mb"), ("a worker, MB", "worker_mb"),
    ("writing, s", "write_s"),
)  # fmt: skip


def table(figures: dict[str, Figures], slices: int) -> str:
    """Return a Markdown table: a row a contender, behind each figure how many times ours it is."""
    lines = [f"| | {' | '.join(title for title, _ in COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    for name, own in figures.items():
        cells = [cell(own.get(key), figures[OURS].get(key), slices if "epoch" in key else 0) for _, key in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(value: float | None, ours: float | None, slices: int) -> str:
    """Return a figure, slices a second where it is an epoch's, and its ratio to ours."""
    if value is None:
        return "-"
    rate = f", {slices / value:.0f}/s" if slices else ""
    ratio = f" ({short(value / ours, 2)})" if ours else ""
    return f"{short(value, 3)}{rate}{ratio}"


def short(value: float, digits: int) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.{digits}g}".rstrip(".")


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw the microseconds of a slice, warm page cache, by contender and axis, a panel a cohort."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(6.5 * len(results), 6), sharey=True, squeeze=False)
    for panel, (cohort, axes) in zip(panels[0], results.items(), strict=True):
        names = [name for name in next(iter(axes.values()))["figures"] if CONTENDERS[name].by_slice]
        for axis, measured in axes.items():
            values = [measured["figures"][name].get("warm_us", np.nan) for name in names]
            panel.barh(np.arange(len(names)) + (int(axis) - 1) * 0.27, values, 0.25, label=f"axis {axis}")
        panel.set_yticks(range(len(names)), names)
        panel.set(xscale="log", xlabel="microseconds a slice, image and mask", title=cohort)
        panel.grid(axis="x", which="both", alpha=0.3)
    panels[0][0].invert_yaxis()
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def stores(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[str, Path]]:
    """Yield cohorts as stores, made where they are not stores already."""
    from cspine_data.phantom.cohort import make_phantom_cohort

    if not arguments.no_phantom:
        make_phantom_cohort(work / "phantom", arguments.cases)
        arguments.cohorts.insert(0, work / "phantom")
    for cohort in arguments.cohorts:
        if (cohort / "zarr.json").exists():
            yield cohort.stem, cohort
            continue
        store = work / f"{cohort.name}.zarr"
        prepare(cohort, store, axes="012")
        yield cohort.name, store


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohorts", nargs="*", type=Path, help="folders of real volumes, or stores of one variant")
    parser.add_argument("--no-phantom", action="store_true", help="real cohorts alone")
    parser.add_argument("--cases", type=int, default=14, help="how many phantoms")
    parser.add_argument("--axes", default="012")
    parser.add_argument("--slices", type=int, default=400, help="random slices, warm and cold")
    parser.add_argument("--volumes", type=int, default=10**6, help="that those are of; all by default")
    parser.add_argument("--float32", action="store_true", help="deliver the intensities that levels stand for")
    parser.add_argument("--epoch", type=int, default=400, help="slices of an epoch, at most")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by name; ours is always one")
    parser.add_argument("--work", type=Path, help="where to write; some 6 GB for 14 spines")
    parser.add_argument("--json", type=Path, help="keep all figures")
    parser.add_argument("--picture", type=Path, help="draw them")
    return parser.parse_args()


def main() -> None:
    """Print a table a cohort and axis."""
    arguments = parse()
    chosen = [name for name in CONTENDERS if name == OURS or name in arguments.only.split(",")]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        for cohort, store in stores(arguments, Path(temporary)):
            work = Path(temporary) / f"{cohort}-files"
            written = write_all(chosen, store, work)
            results[cohort] = {}
            for axis in arguments.axes:
                measured, failures = measure_axis(chosen, store, work, int(axis), arguments)
                figures = {name: {**measured[name], **written[name]} for name in chosen}
                slices = min(arguments.epoch, len(open_cohort(store).slices(axis=int(axis))))
                results[cohort][axis] = {"slices": slices, "figures": figures, "failures": failures}
                print(f"\n{cohort}, axis {axis}, an epoch of {slices} slices\n\n{table(figures, slices)}", flush=True)
                for name, failure in failures.items():
                    print(f"\n{name} has no figures from where it failed: {failure}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
