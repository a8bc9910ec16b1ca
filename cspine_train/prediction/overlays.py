"""Pictures of the slices with the best, the median and the worst Dice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from cspine_data import Cohort, as_seen
from cspine_data.tools import count, make_folder
from cspine_train.metrics.overlap import Overlap
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import Segmented, segment_all
from cspine_train.reports.figures import SliceView, draw_overlays
from cspine_train.run.folder import OVERLAYS_FOLDER

#: Largest number of validation patients that are predicted for pictures.
MOST_PATIENTS = 8
_SHOWN = 4
# Neighbouring slices are similar.
_APART_MM = 5.0


class Kind(NamedTuple):
    """A kind of slices: name, and sort key of a slice's overlap and the median Dice of all slices."""

    name: str
    order: Callable[[Overlap, float], Any]


BEST = Kind("best", lambda voxels, _: (-voxels.dice, -voxels.true_positive))
MEDIAN = Kind("median", lambda voxels, middle: (abs(voxels.dice - middle), -voxels.true_positive))
WORST = Kind("worst", lambda voxels, _: (voxels.dice, -voxels.false_positive - voxels.false_negative))


class Gallery:
    """Collects the slices of each kind, along some axes, over any number of patients.

    Slices that are empty in both masks are left out.
    """

    def __init__(self, axes: Sequence[int], kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._views: dict[int, dict[str, list[SliceView]]] = {axis: {kind.name: [] for kind in kinds} for axis in axes}
        self._dice: dict[int, list[float]] = {axis: [] for axis in axes}
        self._middle = dict.fromkeys(axes, 0.0)

    def add(self, segmented: Segmented) -> None:
        """Add a patient, and keep the slices that may be shown."""
        for axis, views in self._views.items():
            dice = self._dice[axis]
            dice += [voxels.dice for voxels in segmented.slices[axis].values()]
            # Fast, as the list is nearly sorted: there may be ten thousand patients.
            dice.sort()
            self._middle[axis] = median(dice) if dice else 0.0
            for kind in self._kinds:
                views[kind.name] += extreme_slices(segmented, axis, self._order(kind, axis))
                # More than are shown, as the median still changes.
                views[kind.name] = self._first(kind, axis, 4 * _SHOWN)

    def draw(self, folder: Path, stem: str, of: str, notes: Sequence[str]) -> tuple[Path, ...]:
        """Write a picture for each kind that has slices, ``<stem><kind>.png``, with a row for each axis.

        `of` names the patients in the title; notes stand below the picture. The folder is created if needed.
        """
        files = []
        for kind in self._kinds:
            shown = [view for axis in self._views for view in self._first(kind, axis, _SHOWN)]
            if shown:
                make_folder(folder)
                files.append(folder / f"{stem}{kind.name}.png")
                draw_overlays(files[-1], shown, f"{kind.name} slices of {of}", notes)
        return tuple(files)

    def _order(self, kind: Kind, axis: int) -> Callable[[Overlap], Any]:
        middle = self._middle[axis]
        return lambda voxels: kind.order(voxels, middle)

    def _first(self, kind: Kind, axis: int, count: int) -> list[SliceView]:
        order = self._order(kind, axis)
        return heapq.nsmallest(count, self._views[axis][kind.name], lambda view: order(view.voxels))


def save_overlays(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> tuple[Path, ...]:
    """Predict validation patients, and draw their best and worst slices: `overlays/best.png` and `worst.png`.

    `progress` is called with (patients done, patients, case id). Raises `RunError` if the store holds other data than
    at training.
    """
    record = loaded.record
    cases = record.validation[:MOST_PATIENTS]
    gallery = Gallery(record.settings.axes, (BEST, WORST))
    for segmented in segment_all(loaded, cohort, cases, progress):
        gallery.add(segmented)
    shown, patients = ({record.patient(case) for case in part} for part in (cases, record.validation))
    of = count(len(patients), "validation patient")
    if len(shown) < len(patients):
        of = f"the first {len(shown)} of {of}"
    return gallery.draw(loaded.path / OVERLAYS_FOLDER, "", of, record.caveats())


def extreme_slices(segmented: Segmented, axis: int, order: Callable[[Overlap], Any]) -> Iterator[SliceView]:
    """Iterate over a patient's first slices along an axis, in the order of a key of `Overlap`, without neighbours."""
    first, second = (number for number in range(3) if number != axis)
    along_mm = segmented.spacing_mm[axis]
    spacing_mm = segmented.spacing_mm[second], segmented.spacing_mm[first]
    counts = segmented.slices[axis]
    chosen: list[int] = []
    for index in sorted(counts, key=lambda index: order(counts[index])):
        if any(abs(index - other) * along_mm < _APART_MM for other in chosen):
            continue
        chosen.append(index)
        image, found, truth = (
            as_seen(np.take(volume, index, axis), axis)
            for volume in (segmented.image_xyz, segmented.scored(segmented.found_xyz), segmented.truth_xyz)
        )
        count = segmented.image_xyz.shape[axis]
        yield SliceView(
            segmented.case,
            axis,
            index,
            count,
            image,
            found != 0,
            truth != 0,
            spacing_mm,
            segmented.window,
            counts[index],
        )
        if len(chosen) == _SHOWN:
            return
