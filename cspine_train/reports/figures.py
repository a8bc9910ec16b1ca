"""How a run looks: its curves by epoch, and slices with what was found in them beside what is true."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.tools import atomic_write
from cspine_train.metrics.overlap import Overlap
from cspine_train.run.folder import CURVES_NAME, METRICS_NAME, MONITOR
from cspine_train.run.planes import PLANES
from cspine_train.run.record import load_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What lies at the left, right, top and bottom of a slice as radiologists see it, by axis.
BORDERS = ("APSI", "RLSI", "RLAP")
# Okabe and Ito (2008): told apart by the colour-blind, and on grey.
_TRUTH, _FOUND, _KEPT = "#56B4E9", "#E69F00", "#009E73"
_WINDOW = (1.0, 98.0)


def as_seen(slice_ab: NDArray[Any], axis: int) -> NDArray[Any]:
    """Turn a slice of a volume in anatomical order to how radiologists look at it; a view, no copy.

    Sagittal slices: the head is up, anterior on the left. Coronal: the head is up, the patient's right on the left.
    Axial: anterior is up, the patient's right on the left, as seen from the feet.

    Parameters
    ----------
    slice_ab : ndarray
        Along axis 0 (y, z), 1 (x, z), 2 (x, y); x grows to the patient's left, y to the back, z to the head.
    axis : int
        The axis that it is a slice along.
    """
    return slice_ab.T if axis == 2 else slice_ab.T[::-1]


@dataclass(frozen=True, eq=False)
class SliceView:
    """A slice, what was found in it and what is true.

    Attributes
    ----------
    case : str
        Whose slice.
    axis, index, count : int
        Which slice along which axis, from 0, and how many there are.
    image_hw, found_hw, truth_hw : ndarray
        Intensities, and masks, as `as_seen` turns them.
    spacing_mm : tuple of float
        Distance of rows and of columns.
    window : tuple of float
        The intensities that are shown black and white.
    voxels : Overlap
        How both masks overlap.
    """

    case: str
    axis: int
    index: int
    count: int
    image_hw: NDArray[Any]
    found_hw: NDArray[np.bool_]
    truth_hw: NDArray[np.bool_]
    spacing_mm: tuple[float, float]
    window: tuple[float, float]
    voxels: Overlap


def window_of(image: NDArray[Any]) -> tuple[float, float]:
    """Return the intensities to show black and white: percentiles 1 and 98, as fat beside a coil outshines all else."""
    low, high = np.percentile(image, _WINDOW)
    return float(low), float(high) if high > low else float(low) + 1


@contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Warn where a picture, or whatever else people look at, fails: a network that is trained is worth more."""
    try:
        yield
    # Fonts, disks, memory, a store that has gone meanwhile.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(f"{what}: could not be made ({reason}); the run goes on without it", stacklevel=3)


def draw_overlays(path: Path, views: Sequence[SliceView], title: str, notes: Sequence[str] = ()) -> None:
    """Write a picture of slices with the contours of what was found and of what is true; a row an axis.

    Parameters
    ----------
    path : Path
        A PNG to write, in one step.
    views : sequence of SliceView
        At least one.
    title : str
        What they have in common.
    notes : sequence of str
        What has to be said beside them.
    """
    rows = [[view for view in views if view.axis == axis] for axis in sorted({view.axis for view in views})]
    columns = max(map(len, rows))
    figure = _figure(2.7 * columns, 3.3 * len(rows) + 0.6)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes, view in zip(
        (panels[row][column] for row in range(len(rows)) for column in range(columns)),
        (view for row in rows for view in [*row, *[None] * (columns - len(row))]),
        strict=True,
    ):
        axes.set_axis_off()
        if view:
            _show(axes, view)
    lines = [panels[0][0].plot([], [], color=color, linewidth=width)[0] for color, width in _STROKES]
    figure.legend(lines, ["true", "predicted"], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    _entitle(figure, title, notes)
    _save(figure, path)


# The truth is the broader line: it shows on both sides where the lines lie on each other.
_STROKES = ((_TRUTH, 2.4), (_FOUND, 1.0))


def _show(axes: Axes, view: SliceView) -> None:
    from matplotlib.patheffects import withStroke

    height, width = view.image_hw.shape
    down_mm, right_mm = view.spacing_mm
    low, high = view.window
    axes.imshow(view.image_hw, cmap="gray", vmin=low, vmax=high, extent=(0, width * right_mm, height * down_mm, 0))
    for mask_hw, (color, linewidth) in zip((view.truth_hw, view.found_hw), _STROKES, strict=True):
        if mask_hw.any():
            # With a margin, so that what touches the border has a closed contour too.
            closed = np.pad(mask_hw.astype(np.float32), 1)
            x, y = ((np.arange(n + 2) - 0.5) * mm for n, mm in ((width, right_mm), (height, down_mm)))
            axes.contour(x, y, closed, levels=[0.5], colors=[color], linewidths=linewidth)
    axes.set_xlim(0, width * right_mm)
    axes.set_ylim(height * down_mm, 0)
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x_at, y_at), (across, along) in zip(BORDERS[view.axis], places, sides, strict=True):
        axes.text(
            x_at, y_at, letter, transform=axes.transAxes, ha=across, va=along, color="white", fontsize=8,
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )  # fmt: skip
    # A case's id is a file's name, and a dollar in it no formula.
    axes.set_title(
        f"{view.case}\n{PLANES[view.axis]} {view.index} of 0 to {view.count - 1}, Dice {view.voxels.dice:.3f}",
        fontsize=8, parse_math=False,
    )  # fmt: skip


def draw_curves(run: Path) -> None:
    """Write `curves.png` of a run folder from its `metrics.csv`: loss, validation Dice and learning rate by epoch.

    Raises
    ------
    RunError
        If the folder is no run.
    """
    record = load_record(run)
    with (run / METRICS_NAME).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) + 1 for row in rows]
    figure = _figure(6.4, 6.4)
    panels = figure.subplots(3, 1, sharex=True)
    shown = (("train_loss", "training loss"), (MONITOR, "validation Dice"), ("learning_rate", "learning rate"))
    for axes, (name, told) in zip(panels, shown, strict=True):
        axes.plot(epochs, [float(row[name]) for row in rows], color="black", marker=".", linewidth=1)
        axes.set_ylabel(told)
        axes.grid(alpha=0.3)
        if record.kept_epoch is not None:
            axes.axvline(record.kept_epoch + 1, color=_KEPT, linewidth=1, linestyle="--")
    if record.kept_epoch is not None:
        panels[1].set_title(
            f"kept: epoch {record.kept_epoch + 1}, Dice {record.kept_dice:.4f}", fontsize=9, color=_KEPT, loc="right"
        )
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    settings = record.settings
    # Curves are drawn after each epoch: that training is not finished is no news there.
    caveats = record.model_copy(update={"finished": True}).caveats()
    _entitle(figure, f"{settings.model}, {settings.encoder}, seed {settings.seed}", caveats)
    _save(figure, run / CURVES_NAME)


def _figure(width: float, height: float) -> Figure:
    # Not through pyplot: nothing here depends on a display, or stays when the picture is written.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _entitle(figure: Figure, title: str, notes: Sequence[str]) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    if notes:
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=7, color="dimgray", parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # A case may bear a name that the font has no letters for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png")
