"""Which validation slices a run segments best and worst, and pictures of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cspine_data import Cohort
from cspine_train.evaluation import Segmented, segment_all
from cspine_train.metrics import Overlap
from cspine_train.pictures import SliceView, as_seen, draw_overlays, window_of
from cspine_train.prediction import LoadedRun
from cspine_train.run_folder import OVERLAYS_FOLDER

#: How many validation patients are looked at: whole volumes are predicted, and a few show what there is to see.
MOST_PATIENTS = 8
_SHOWN = 4
# Neighbours look alike.
_APART_MM = 5.0


class _Kind(NamedTuple):
    name: str
    order: Callable[[Overlap], Any]


_KINDS = (
    _Kind("best", lambda voxels: (-voxels.dice, -voxels.true_positive)),
    _Kind("worst", lambda voxels: (voxels.dice, -voxels.false_positive - voxels.false_negative)),
)


def save_overlays(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> tuple[Path, ...]:
    """Predict validation patients' volumes, and write pictures of their best and their worst slices along each axis.

    Only slices count in which something is labelled, or was found. None is written where there is no such slice.

    Parameters
    ----------
    loaded : LoadedRun
        The run; `overlays/best.png` and `worst.png` are written into its folder.
    cohort : Cohort
        The store that it was trained on.
    progress : callable, optional
        Called with (patients done, patients, case id).

    Returns
    -------
    tuple of Path
        The pictures.

    Raises
    ------
    RunError
        If the store holds other data than the run was trained on.
    CspineDataError
        If the store cannot be used.
    """
    record = loaded.record
    cases = record.validation[:MOST_PATIENTS]
    found: dict[str, list[SliceView]] = {kind.name: [] for kind in _KINDS}
    for segmented in segment_all(loaded, cohort, cases, progress):
        for axis in record.settings.axes:
            for kind in _KINDS:
                found[kind.name] += extreme_slices(segmented, axis, kind.order)
    folder = loaded.path / OVERLAYS_FOLDER
    of = f"{len(record.validation)} validation patient{'s' if len(record.validation) > 1 else ''}"
    if len(cases) < len(record.validation):
        of = f"the first {len(cases)} of {of}"
    files = []
    for kind in _KINDS:
        views = [view for axis in record.settings.axes for view in _chosen(found[kind.name], axis, kind)]
        if views:
            folder.mkdir(exist_ok=True)
            files.append(folder / f"{kind.name}.png")
            draw_overlays(files[-1], views, f"{kind.name} slices of {of}", record.caveats())
    return tuple(files)


def _chosen(views: list[SliceView], axis: int, kind: _Kind) -> list[SliceView]:
    return heapq.nsmallest(_SHOWN, (view for view in views if view.axis == axis), lambda view: kind.order(view.voxels))


def extreme_slices(segmented: Segmented, axis: int, order: Callable[[Overlap], Any]) -> Iterator[SliceView]:
    """Iterate over a patient's first slices in some order, the first first; neighbours of one are left out.

    Parameters
    ----------
    segmented : Segmented
        The patient.
    axis : int
        Slices along which axis.
    order : callable
        What to sort by, of a slice's `Overlap`.
    """
    first, second = (number for number in range(3) if number != axis)
    along_mm = segmented.spacing_mm[axis]
    spacing_mm = segmented.spacing_mm[second], segmented.spacing_mm[first]
    window = window_of(segmented.image_xyz)
    found_xyz, truth_xyz = segmented.found_xyz != 0, segmented.truth_xyz != 0
    counts = slice_overlaps(found_xyz, truth_xyz, axis)
    chosen: list[int] = []
    for index in sorted(counts, key=lambda index: order(counts[index])):
        if any(abs(index - other) * along_mm < _APART_MM for other in chosen):
            continue
        chosen.append(index)
        image, found, truth = (
            as_seen(np.take(volume, index, axis), axis) for volume in (segmented.image_xyz, found_xyz, truth_xyz)
        )
        count = segmented.image_xyz.shape[axis]
        yield SliceView(segmented.case, axis, index, count, image, found, truth, spacing_mm, window, counts[index])
        if len(chosen) == _SHOWN:
            return


def slice_overlaps(found: NDArray[np.bool_], truth: NDArray[np.bool_], axis: int) -> dict[int, Overlap]:
    """Count how two masks of a volume overlap in each slice along an axis in which either marks anything, by index."""
    across = tuple(number for number in range(3) if number != axis)
    both, all_found, all_true = (np.count_nonzero(mask, axis=across) for mask in (found & truth, found, truth))
    return {
        int(index): Overlap(int(both[index]), int((all_found - both)[index]), int((all_true - both)[index]))
        for index in np.flatnonzero(all_found + all_true)
    }
