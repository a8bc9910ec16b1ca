"""Figures of a run: curves by epoch, and slices with predicted and true contours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.tools import atomic_write
from cspine_train.errors import reason_of
from cspine_train.metrics.overlap import Overlap
from cspine_train.run.folder import CURVES_NAME, METRICS_NAME, MONITOR, read_rows
from cspine_train.run.record import load_record
from cspine_train.run.settings import PLANES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Anatomical directions at the left, right, top and bottom of a slice in radiological orientation, by axis.
BORDERS = ("APSI", "RLSI", "RLAP")
# Colours of Okabe and Ito (2008), which the colour-blind can distinguish, also on grey.
_TRUTH, _FOUND, _KEPT = "#56B4E9", "#E69F00", "#009E73"
_WINDOW = (1.0, 98.0)


@dataclass(frozen=True, eq=False)
class SliceView:
    """A slice with its predicted and its true mask.

    Attributes
    ----------
    case : str
        Case id.
    axis, index, count : int
        Axis, index from 0, and number of slices along the axis.
    image_hw, found_hw, truth_hw : ndarray
        Intensities, predicted and true mask, oriented by `as_seen`.
    spacing_mm : tuple of float
        Spacing of rows and of columns.
    window : tuple of float
        Intensities shown as black and white.
    voxels : Overlap
        Overlap of the masks.
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
    """Return the intensities shown as black and white: percentiles 1 and 98, as fat near a coil is very bright."""
    low, high = np.percentile(image, _WINDOW)
    return float(low), float(high) if high > low else float(low) + 1


def grey_values(image: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Return intensities as grey values from 0 to 255; the window is the intensities of black and white."""
    low, high = window
    return (np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)


@contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Turn an error into a warning: a picture or a report that fails must not end a run."""
    try:
        yield
    # Fonts, disks, memory, a store that was removed.
    except Exception as error:  # noqa: BLE001
        warnings.warn(f"{what}: could not be made ({reason_of(error)}); the run goes on without it", stacklevel=3)


def draw_overlays(path: Path, views: Sequence[SliceView], title: str, notes: Sequence[str] = ()) -> None:
    """Draw slices, at least one, with the contours of their predicted and true masks, in a row for each axis.

    The picture is a PNG, written atomically, with a title above and notes below.
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


# The true contour is wider, so that it is visible below the predicted one.
_STROKES = ((_TRUTH, 2.4), (_FOUND, 1.0))


def _show(axes: Axes, view: SliceView) -> None:
    from matplotlib.patheffects import withStroke

    height, width = view.image_hw.shape
    down_mm, right_mm = view.spacing_mm
    low, high = view.window
    axes.imshow(view.image_hw, cmap="gray", vmin=low, vmax=high, extent=(0, width * right_mm, height * down_mm, 0))
    for mask_hw, (color, linewidth) in zip((view.truth_hw, view.found_hw), _STROKES, strict=True):
        if mask_hw.any():
            # Padded, so that contours at the border are closed, too.
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
    # A dollar in a case id starts no formula.
    axes.set_title(
        f"{view.case}\n{PLANES[view.axis]} {view.index} of 0 to {view.count - 1}, Dice {view.voxels.dice:.3f}",
        fontsize=8, parse_math=False,
    )  # fmt: skip


def draw_curves(run: Path) -> None:
    """Draw `curves.png` of a run folder from its `metrics.csv`: loss, validation Dice and learning rate by epoch."""
    record = load_record(run)
    shown = {"train_loss": "training loss", MONITOR: "validation Dice", "learning_rate": "learning rate"}
    rows = read_rows(run / METRICS_NAME, {"epoch": int, **dict.fromkeys(shown, float)})
    epochs = [row["epoch"] + 1 for row in rows]
    figure = _figure(6.4, 6.4)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        axes.plot(epochs, [row[name] for row in rows], color="black", marker=".", linewidth=1)
        axes.set_ylabel(label)
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
    # Curves are drawn after each epoch: the note that training is not finished is left out.
    caveats = record.model_copy(update={"finished": True}).caveats()
    _entitle(figure, f"{settings.model}, {settings.encoder}, seed {settings.seed}", caveats)
    _save(figure, run / CURVES_NAME)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which needs a display and keeps figures in memory.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _entitle(figure: Figure, title: str, notes: Sequence[str]) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    if notes:
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=7, color="dimgray", parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # A case id may have letters that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png")
