"""Pictures and animations of the slices of a predicted volume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cspine_data import Orientation, Volume, as_seen
from cspine_data.tools import atomic_write
from cspine_train.reports.figures import BORDERS, grey_values, window_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Colours of Okabe and Ito (2008), as in the other pictures.
_FOUND, _TRUTH = (230, 159, 0), (86, 180, 233)
_FILL = 0.4
_LONGEST_SIDE = 320
_ROWS, _COLUMNS = 3, 4
_MOST_FRAMES = 100
_FRAME_MS = 80
# Margin of slices around the labelled ones.
_MARGIN_MM = 15.0


def draw_overview(stem: Path, volume: Volume, label: Volume, truth: Volume | None = None) -> tuple[Path, ...]:
    """Write ``<stem>-axis<a>.png``, some labelled slices, and ``.gif``, all of them, for each axis.

    The prediction is filled; the true label map, if given, is an outline. Slices are in radiological orientation.

    Parameters
    ----------
    stem : Path
        Start of the names.
    volume, label : Volume
        The image and its predicted label map, on the same grid.
    truth : Volume, optional
        The true label map, on the same grid.

    Returns
    -------
    tuple of Path
        The pictures.
    """
    orientation = Orientation.of(volume.geometry)
    spacing_mm = orientation.geometry_xyz(volume.geometry).spacing_mm
    image, found = (orientation.to_anatomical(one.array) for one in (volume, label))
    true = None if truth is None else orientation.to_anatomical(truth.array) > 0
    shown = _Shown(image, found != 0, true, spacing_mm, window_of(image[::2, ::2, ::2]))
    files = []
    for axis in range(3):
        indices = shown.indices(axis)
        picture, animation = (stem.with_name(f"{stem.name}-axis{axis}{ending}") for ending in (".png", ".gif"))
        chosen = indices[np.linspace(0, len(indices) - 1, min(len(indices), _ROWS * _COLUMNS)).round().astype(int)]
        _save_picture(picture, [shown.frame(axis, index) for index in chosen])
        step = -(-len(indices) // _MOST_FRAMES)
        _save_animation(animation, (shown.frame(axis, index) for index in indices[::step]))
        files += [picture, animation]
    return tuple(files)


@dataclass(frozen=True, eq=False)
class _Shown:
    """A volume with its masks, (x, y, z), and pictures of its slices."""

    image: NDArray[Any]
    found: NDArray[np.bool_]
    truth: NDArray[np.bool_] | None
    spacing_mm: tuple[float, float, float]
    window: tuple[float, float]

    def indices(self, axis: int) -> NDArray[np.int64]:
        """Return the labelled slices and a margin; all slices if none is labelled."""
        others = tuple(a for a in range(3) if a != axis)
        marked: NDArray[np.bool_] = np.any(self.found, axis=others)
        if self.truth is not None:
            marked |= np.any(self.truth, axis=others)
        at = np.flatnonzero(marked)
        if not at.size:
            return np.arange(len(marked))
        margin = round(_MARGIN_MM / self.spacing_mm[axis])
        return np.arange(max(0, at[0] - margin), min(len(marked), at[-1] + margin + 1))

    def frame(self, axis: int, index: int) -> Picture:
        """Return a picture of a slice, with the aspect ratio of the patient."""
        from PIL import Image, ImageDraw

        grey = grey_values(as_seen(np.take(self.image, index, axis), axis), self.window)
        colours = np.repeat(grey[..., None], 3, axis=2)
        found = as_seen(np.take(self.found, index, axis), axis)
        colours[found] = ((1 - _FILL) * colours[found] + _FILL * np.array(_FOUND)).astype(np.uint8)
        right_mm, down_mm = (mm for a, mm in enumerate(self.spacing_mm) if a != axis)
        height, width = colours.shape[0] * down_mm, colours.shape[1] * right_mm
        scale = _LONGEST_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = Image.fromarray(colours).resize(size, Image.Resampling.BILINEAR)
        if self.truth is not None:
            truth = Image.fromarray(as_seen(np.take(self.truth, index, axis), axis).astype(np.uint8) * 255)
            mask = np.asarray(truth.resize(size, Image.Resampling.NEAREST)) > 0
            pixels = np.array(picture)
            pixels[mask & ~ndimage.binary_erosion(mask)] = _TRUTH
            picture = Image.fromarray(pixels)
        draw = ImageDraw.Draw(picture)
        left, right, top, bottom = list(BORDERS[axis])
        for letter, place, anchor in (
            (left, (2, size[1] / 2), "lm"),
            (right, (size[0] - 2, size[1] / 2), "rm"),
            (top, (size[0] / 2, 2), "mt"),
            (bottom, (size[0] / 2, size[1] - 2), "mb"),
            (str(index), (2, 2), "lt"),
        ):
            draw.text(place, letter, fill="white", anchor=anchor, stroke_width=1, stroke_fill="black")
        return picture


def _save_picture(path: Path, frames: list[Picture]) -> None:
    from PIL import Image

    width, height = frames[0].size
    columns = min(_COLUMNS, len(frames))
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * width + columns - 1, rows * height + rows - 1))
    for number, frame in enumerate(frames):
        sheet.paste(frame, ((number % columns) * (width + 1), (number // columns) * (height + 1)))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def _save_animation(path: Path, frames: Iterator[Picture]) -> None:
    first = next(frames)
    with atomic_write(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=frames, duration=_FRAME_MS, loop=0)
