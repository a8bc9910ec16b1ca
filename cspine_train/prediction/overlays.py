"""Pictures of the slices with the best, median and worst Dice, and of the levels of such patients."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from cspine_data import Cohort, as_seen
from cspine_data.tools import count, make_folder
from cspine_train.levels.naming import NamedSpine
from cspine_train.levels.picture import LevelSlice, draw_levels, level_slices
from cspine_train.metrics.overlap import Overlap
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.prediction.stored_volumes import Segmented, segment_all
from cspine_train.reports.figures import SliceView, draw_overlays
from cspine_train.run.folder import OVERLAYS_FOLDER

#: Largest number of validation patients that are predicted for pictures.
MOST_PATIENTS = 8
_SHOWN = 4
# Patients of each kind that are kept until the end, as the median changes with each patient. This is enough for some
# thousand patients in random order. Each takes about 0.1 MB.
_CANDIDATES = 64
# Neighbouring slices are similar.
_APART_MM = 5.0


class Kind(NamedTuple):
    """A kind of slices and patients that are shown.

    Attributes
    ----------
    name : str
        Its name.
    order : callable
        Sort key of a slice, from its overlap and the median Dice of all slices.
    order_of_patients : callable
        Sort key of a patient, from its Dice and the median Dice of all patients.
    """

    name: str
    order: Callable[[Overlap, float], Any]
    order_of_patients: Callable[[float, float], float]


BEST = Kind("best", lambda voxels, _: (-voxels.dice, -voxels.true_positive), lambda dice, _: -dice)
MEDIAN = Kind(
    "median",
    lambda voxels, middle: (abs(voxels.dice - middle), -voxels.true_positive),
    lambda dice, middle: abs(dice - middle),
)
WORST = Kind(
    "worst", lambda voxels, _: (voxels.dice, -voxels.false_positive - voxels.false_negative), lambda dice, _: dice
)


class LevelView(NamedTuple):
    """Mean Dice over labels of a case, its slices with predicted and true levels, and the predicted vertebrae."""

    dice: float
    case: str
    slices: tuple[LevelSlice, ...]
    spine: NamedSpine


class LevelGallery:
    """Collects the pictures of levels for each kind of patients, over any number of patients."""

    def __init__(self, kinds: Sequence[Kind], levels: Collection[int]) -> None:
        self._kinds = kinds
        self._levels = list(levels)
        self._views: list[LevelView] = []
        self._dice: list[float] = []

    def add(self, segmented: Segmented, dice: float) -> None:
        """Add a patient with its mean Dice over labels, and keep the patients that may be shown."""
        maps = [
            np.where(np.isin(one, self._levels), one, 0)
            for one in (segmented.scored(segmented.found_xyz), segmented.truth_xyz)
        ]
        slices = level_slices(segmented.image_xyz, maps, segmented.spacing_mm, segmented.window)
        insort(self._dice, dice)
        views = [*self._views, LevelView(dice, segmented.case, slices, segmented.spine or NamedSpine(()))]
        kept = [view for kind in self._kinds for view in self._first(kind, views, _CANDIDATES)]
        self._views = list({view.case: view for view in kept}.values())

    def draw(self, folder: Path, stem: str, of: str, notes: Sequence[str]) -> Iterator[Path]:
        """Write a picture of the first patient of each kind, ``<stem>levels-<kind>.png``."""
        shown: set[str] = set()
        # With one or two patients, the median is also the best or the worst.
        for kind in sorted(self._kinds, key=lambda kind: kind == MEDIAN):
            for view in self._first(kind, self._views, 1):
                if view.case not in shown:
                    shown.add(view.case)
                    path = folder / f"{stem}levels-{kind.name}.png"
                    title = f"{view.case}: {kind.name} mean Dice over labels of {of}, {view.dice:.3f}"
                    below = (view.spine.doubt, *notes)
                    draw_levels(path, view.slices, ("predicted", "true"), title, below, view.spine.uncertain)
                    yield path

    def _first(self, kind: Kind, views: Sequence[LevelView], count: int) -> list[LevelView]:
        middle = median(self._dice) if self._dice else 0.0
        return heapq.nsmallest(count, views, lambda view: kind.order_of_patients(view.dice, middle))


class Gallery:
    """Collects the slices of each kind, along some axes, over any number of patients.

    Slices that are empty in both masks are left out. Patients with levels are also added to a `LevelGallery`.
    """

    def __init__(self, axes: Sequence[int], kinds: Sequence[Kind], levels: Collection[int] = ()) -> None:
        self._kinds = kinds
        self._levels = LevelGallery(kinds, levels) if levels else None
        self._views: dict[int, dict[str, list[SliceView]]] = {axis: {kind.name: [] for kind in kinds} for axis in axes}
        self._dice: dict[int, list[float]] = {axis: [] for axis in axes}
        self._middle = dict.fromkeys(axes, 0.0)

    def add(self, segmented: Segmented, label_dice: float | None = None) -> None:
        """Add a patient with its mean Dice over labels, and keep the slices that may be shown."""
        if self._levels and label_dice is not None:
            self._levels.add(segmented, label_dice)
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

        Levels are in ``<stem>levels-<kind>.png``. `of` names the patients in the title; notes stand below the picture.
        The folder is created if needed.
        """
        files = []
        for kind in self._kinds:
            shown = [view for axis in self._views for view in self._first(kind, axis, _SHOWN)]
            if shown:
                make_folder(folder)
                files.append(folder / f"{stem}{kind.name}.png")
                draw_overlays(files[-1], shown, f"{kind.name} slices of {of}", notes)
        return (*files, *(self._levels.draw(folder, stem, of, notes) if self._levels else ()))

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
