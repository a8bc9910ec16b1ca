"""Convert label maps of instances, or with the label values of another tool, to vertebra levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cspine_data.errors import CspineDataError, InputError, Problem, describe_problem
from cspine_data.files import make_folder
from cspine_data.preprocessing.parameters import checked
from cspine_data.progress import Progress
from cspine_data.sources.cases import Case, Listing, load_case
from cspine_data.sources.pair_lists import write_pairs
from cspine_data.volumes.formats.nrrd_writer import SEGMENTATION_SUFFIX
from cspine_data.volumes.instances import Instance, find_instances, order_problems
from cspine_data.volumes.io import label_name, volume_stem, write_volume
from cspine_data.volumes.label_options import LabelOptions
from cspine_data.volumes.levels import LEVEL_NAMES, SCHEMES, consecutive_levels, level_value
from cspine_data.volumes.segments import Segment, relabelled
from cspine_data.volumes.volume import Volume

#: The list of volumes and new label maps, in the output folder.
PAIRS_NAME = "pairs.csv"


@dataclass(frozen=True)
class RelabelSummary:
    """The result of `relabel`.

    Attributes
    ----------
    pairs : Path
        The list of the volumes and new label maps, for ``--pairs``; not written if there are none.
    levels : dict of str to tuple of str
        The levels of each case, from head to feet.
    problems : tuple of Problem
        Cases that were not written: ambiguous ones, or files that cannot be used.
    """

    pairs: Path
    levels: dict[str, tuple[str, ...]]
    problems: tuple[Problem, ...]


def relabel(
    listing: Listing,
    output: str | Path,
    *,
    lowest: str | None = None,
    highest: str | None = None,
    scheme: str | None = None,
    to_scheme: str = "verse",
    label_values: str | Sequence[int | str] | None = None,
    progress: Progress | None = None,
) -> RelabelSummary:
    """Write label maps whose values are levels, as named segments; the volumes stay where they are.

    Instances are ordered from head to feet and named from the lowest or the highest one, whose level is in the list of
    pairs or given here. With `scheme`, label values are converted instead. Named segments keep their names. A case with
    a doubtful order, see `order_problems`, is a problem and not written.

    Parameters
    ----------
    listing : Listing
        From `find_cases`.
    output : str or Path
        A new or empty folder for the label maps and ``pairs.csv``.
    lowest, highest : str, optional
        The level of the lowest or the highest instance, such as ``L5``.
    scheme, to_scheme : str, optional
        The scheme of the label values that are read, and of those that are written: ``verse``, ``totalspineseg`` or
        ``sct``.
    label_values : str or sequence of int or str, optional
        Label values or names of the vertebrae, such as ``1-25`` for SPIDER; other structures become background.
    progress : callable, optional
        Called with (cases finished, cases, case id) after each case.

    Raises
    ------
    InputError
        If the folder is not empty, or options are unknown or contradict each other.
    """
    output = Path(output)
    for name in (scheme, to_scheme):
        if name is not None and name not in SCHEMES:
            raise InputError(f"scheme {name!r}", "is not known", f"choose one of {', '.join(SCHEMES)}")
    if scheme and (lowest or highest):
        raise InputError("--scheme", "excludes --lowest and --highest", "leave out one of them")
    if lowest or highest:
        consecutive_levels(lowest, highest, 1)
    if output.exists() and any(output.iterdir()):
        raise InputError(output, "is not empty", "choose a new folder")
    options = checked(LabelOptions, "", {"label_values": label_values})
    make_folder(output)
    written: list[Case] = []
    levels: dict[str, tuple[str, ...]] = {}
    problems = list(listing.problems)
    for number, case in enumerate(listing.cases, start=1):
        try:
            label = _label_of(case, options)
            if label is not None:
                own = (case.lowest, case.highest) if case.lowest or case.highest else (lowest, highest)
                # Once, as connected components take a second.
                instances = find_instances(label)
                if scheme:
                    values = _converted(label, instances, scheme)
                else:
                    values = _named(label, instances) or _ordered(label, instances, *own)
                target = output / case.id / _file_name(case, to_scheme)
                _write(target, label, values, SCHEMES[to_scheme])
                written.append(replace(case, label=target))
                levels[case.id] = tuple(LEVEL_NAMES[value] for value in values.values())
        except (CspineDataError, OSError, MemoryError) as error:
            problems.append(describe_problem(case.id, error))
        if progress:
            progress(number, len(listing.cases), case.id)
    # Without label maps, the folder stays empty, so that the command can be repeated with other options.
    if written:
        write_pairs(output / PAIRS_NAME, written)
    return RelabelSummary(output / PAIRS_NAME, levels, tuple(problems))


def _file_name(case: Case, scheme: str) -> str:
    """Return the name of a case's new label map: a segmentation, which keeps names, or a plain file for other tools."""
    return f"{volume_stem(case.volume)}{SEGMENTATION_SUFFIX}" if scheme == "verse" else label_name(case.volume)


def _label_of(case: Case, options: LabelOptions) -> Volume | None:
    """Return the checked label map of a case, on its volume's grid; None if there is none or it is empty."""
    return load_case(case, options).label if case.label else None


def _converted(label: Volume, instances: Sequence[Instance], scheme: str) -> dict[int, int]:
    """Return the level of each value of a scheme, from head to feet; other structures become background."""
    # Values of segments that name levels are VerSe's already, see `common_values`.
    named = {one.value: level for one in label.segments if (level := level_value(one.name))}
    known = named or {theirs: ours for ours, theirs in SCHEMES[scheme].items()}
    values = {one.value: known[one.value] for one in instances if one.value in known}
    if not values:
        raise InputError(label.name, f"has no label value of {scheme}", "give the right --scheme")
    return values


def _named(label: Volume, instances: Sequence[Instance]) -> dict[int, int]:
    """Return the level of each value, from head to feet, if segments name all of them; else nothing."""
    levels = {one.value: level_value(one.name) for one in label.segments}
    found = {one.value: levels.get(one.value) for one in instances}
    return {value: level for value, level in found.items() if level} if all(found.values()) else {}


def _ordered(label: Volume, instances: Sequence[Instance], lowest: str | None, highest: str | None) -> dict[int, int]:
    """Return the level of each instance, from head to feet."""
    doubts = order_problems(instances)
    if doubts:
        raise InputError(label.name, f"is ambiguous: {'; '.join(doubts)}", "correct it, or leave it out")
    if not (lowest or highest):
        remedy = "give --lowest or --highest, or the column lowest or highest in --pairs"
        raise InputError(label.name, "has instances, and none has a known level", remedy)
    try:
        levels = consecutive_levels(lowest, highest, len(instances))
    except InputError as error:
        raise InputError(label.name, f"{error.subject} {error.problem}", error.remedy) from None
    return {one.value: level for one, level in zip(instances, levels, strict=True)}


def _write(path: Path, label: Volume, values: Mapping[int, int], scheme: Mapping[int, int]) -> None:
    missing = [LEVEL_NAMES[level] for level in values.values() if level not in scheme]
    if missing:
        raise InputError(label.name, f"has {', '.join(missing)}, which --to-scheme lacks", "choose another --to-scheme")
    array = relabelled(label.array, {value: scheme[level] for value, level in values.items()}).astype(np.uint8)
    segments = tuple(Segment(LEVEL_NAMES[level], scheme[level]) for level in values.values())
    write_volume(path, Volume(array, label.geometry, segments=segments))
