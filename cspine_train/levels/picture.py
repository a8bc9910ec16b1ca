"""The picture of the named vertebrae of a volume."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import isotonic_regression

from cspine_data import LEVEL_NAMES, Orientation, Volume, as_seen, level_colour
from cspine_data.tools import atomic_write
from cspine_train.levels.naming import NamedSpine
from cspine_train.metrics.instances import label_centroids
from cspine_train.reports.figures import grey_values, window_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFont import FreeTypeFont

# Height of a panel: a cervical spine of 150 mm has nearly 4 pixels per millimetre.
_HEIGHT, _MOST_PIXELS_PER_MM = 520, 5.0
# Panels are higher if the names would not fit beside the vertebrae, as in a whole spine.
_MOST_HEIGHT = 1200
# Margins around the vertebrae; the front one has room for the names.
_ABOVE_MM, _FRONT_MM, _BACK_MM = 15.0, 45.0, 40.0
_OPACITY = 0.5
_FONT, _NAME_FONT, _LINE = 16, 20, 24
# Share of a vertebra's extent, from the front, that belongs to its body and not to its processes.
_FRONT_SHARE = 0.3
# Outlines are drawn at this multiple of the size, then reduced, against aliasing.
_SUPERSAMPLING = 2
_GAP = 8
_BACKGROUND, _TEXT = (16, 16, 16), (240, 240, 240)


@dataclass(frozen=True, eq=False)
class LevelSlice:
    """A curved sagittal slice along the spine (curved planar reformation), with its vertebrae.

    Attributes
    ----------
    grey_hw : ndarray
        Intensities from 0 to 255, head up and front on the left.
    label_hw : ndarray
        Levels.
    centres_hw : dict
        Row and column of the centroid of each whole vertebra, by level.
    spacing_mm : tuple of float
        Spacing of the rows and of the columns.
    """

    grey_hw: NDArray[np.uint8]
    label_hw: NDArray[Any]
    centres_hw: Mapping[int, tuple[float, float]]
    spacing_mm: tuple[float, float]


def level_slices(
    image_xyz: NDArray[Any],
    levels_xyz: Sequence[NDArray[Any]],
    spacing_mm: tuple[float, float, float],
    window: tuple[float, float],
) -> tuple[LevelSlice, ...]:
    """Return a curved slice for each level map of a volume, all cropped to the same part of it.

    Each slice runs through the centroids of its vertebrae, so that it shows all of them in scoliosis, too.

    Parameters
    ----------
    image_xyz : ndarray
        Intensities (x, y, z).
    levels_xyz : sequence of ndarray
        Level maps of the same shape, such as predicted and true.
    spacing_mm : tuple of float
        Voxel spacing along x, y and z.
    window : tuple of float
        The intensities that are black and white.
    """
    centres = [label_centroids(levels, (1, 1, 1)) for levels in levels_xyz]
    rows, columns = _part(levels_xyz, spacing_mm)
    slices = []
    for levels, of_levels in zip(levels_xyz, centres, strict=True):
        image, label = (
            as_seen(along[columns, rows], 0) for along in _along_spine(image_xyz, levels, list(of_levels.values()))
        )
        top = rows.stop - 1
        places = {value: (top - z, y - columns.start) for value, (_, y, z) in of_levels.items()}
        slices.append(LevelSlice(grey_values(image, window), label, places, (spacing_mm[2], spacing_mm[1])))
    return tuple(slices)


def _along_spine(
    image_xyz: NDArray[Any], levels_xyz: NDArray[Any], centres: Sequence[tuple[float, float, float]]
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Return image and levels, (y, z), of the curved slice: at each z, those at the x of the spine."""
    across, _, height = image_xyz.shape
    heights = np.arange(height)
    # Constant above the first and below the last vertebra; the middle of the volume if there is none.
    at = sorted((z, x) for x, _, z in centres) or [(0.0, (across - 1) / 2)]
    x = np.interp(heights, *np.array(at).T)
    left = np.minimum(x.astype(int), max(0, across - 2))
    right = np.minimum(left + 1, across - 1)
    share = (x - left).astype(np.float32)
    # Arrays of indices first: (z, y).
    image = image_xyz[left, :, heights] * (1 - share[:, None]) + image_xyz[right, :, heights] * share[:, None]
    return image.T, levels_xyz[x.round().astype(int), :, heights].T


def _part(levels_xyz: Sequence[NDArray[Any]], spacing_mm: tuple[float, float, float]) -> tuple[slice, slice]:
    """Return the shown ranges of z and y: the vertebrae of all maps with margins, or everything if there are none."""
    boxes = [
        box for levels in levels_xyz for box in ndimage.find_objects((levels != 0).astype(np.uint8)) if box is not None
    ]
    parts = []
    for axis, (before_mm, after_mm) in ((2, (_ABOVE_MM, _ABOVE_MM)), (1, (_FRONT_MM, _BACK_MM))):
        size, mm = levels_xyz[0].shape[axis], spacing_mm[axis]
        first = min((box[axis].start for box in boxes), default=0) - round(before_mm / mm)
        last = max((box[axis].stop for box in boxes), default=size) + round(after_mm / mm)
        parts.append(slice(max(0, first), min(size, last)))
    return parts[0], parts[1]


def draw_spine(path: Path, volume: Volume, level_map: Volume, spine: NamedSpine) -> None:
    """Draw the named vertebrae of a volume, see `draw_levels`; uncertain names have a question mark."""
    orientation = Orientation.of(volume.geometry)
    image, levels = (orientation.to_anatomical(one.array) for one in (volume, level_map))
    spacing_mm = orientation.geometry_xyz(volume.geometry).spacing_mm
    levels = np.where(np.isin(levels, [found.value for found in spine.levels]), levels, 0)
    slices = level_slices(image, [levels], spacing_mm, window_of(image[::2, ::2, ::2]))
    draw_levels(path, slices, notes=[spine.doubt], uncertain=spine.uncertain)


def draw_levels(
    path: Path,
    slices: Sequence[LevelSlice],
    headings: Sequence[str] = ("",),
    title: str = "",
    notes: Sequence[str] = (),
    uncertain: Collection[int] = (),
) -> None:
    """Draw slices of the same size side by side, each vertebra in its colour with its name in front of it.

    Parameters
    ----------
    path : Path
        The PNG, written atomically.
    slices : sequence of LevelSlice
        From `level_slices`.
    headings : sequence of str
        Text above each slice.
    title : str
        Text above all slices.
    notes : sequence of str
        Lines below the slices.
    uncertain : collection of int
        Levels of the first slice whose names have a question mark.
    """
    from PIL import Image, ImageDraw

    scale = max(map(_scale, slices))
    panels = [_panel(one, scale, uncertain if number == 0 else ()) for number, one in enumerate(slices)]
    font = _font(_FONT)
    width = sum(panel.width + _GAP for panel in panels) + _GAP
    titles = list(_wrapped(title, font, width - 2 * _GAP))
    lines = [line for note in notes for line in _wrapped(note, font, width - 2 * _GAP)]
    top = _GAP + _LINE * (len(titles) + any(headings))
    bottom = top + panels[0].height + _GAP
    sheet = Image.new("RGB", (width, bottom + _LINE * len(lines) + (_GAP if lines else 0)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for start, block in ((_GAP, titles), (bottom, lines)):
        for number, line in enumerate(block):
            draw.text((_GAP, start + _LINE * number), line, _TEXT, font, "la")
    left = _GAP
    for panel, heading in zip(panels, headings, strict=True):
        draw.text((left, top - _LINE), heading, _TEXT, font, "la")
        sheet.paste(panel, (left, top))
        left += panel.width + _GAP
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _scale(shown: LevelSlice) -> float:
    """Return the pixels per millimetre at which names have room beside their vertebrae."""
    down_mm, _ = shown.spacing_mm
    height_mm = len(shown.grey_hw) * down_mm
    distances_mm = down_mm * np.diff(sorted(row for row, _ in shown.centres_hw.values()))
    # Typical of the cervical spine; a few smaller distances are errors of the prediction.
    least_mm = np.percentile(distances_mm, 20) if distances_mm.size else np.inf
    scale = max(_HEIGHT / height_mm, min(_LINE / max(least_mm, 1e-3), _MOST_HEIGHT / height_mm))
    # All names must fit below each other.
    return max(min(scale, _MOST_PIXELS_PER_MM), _LINE * len(shown.centres_hw) / height_mm)


def _panel(shown: LevelSlice, scale: float, uncertain: Collection[int]) -> Picture:
    from PIL import Image, ImageDraw

    (rows, columns), (down_mm, right_mm) = shown.grey_hw.shape, shown.spacing_mm
    width, height = (max(1, round(n * mm * scale)) for n, mm in ((columns, right_mm), (rows, down_mm)))
    fine = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    grey = Image.fromarray(shown.grey_hw).resize(fine, Image.Resampling.BICUBIC)
    pixels = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    masks = {value: _resized(shown.label_hw == value, fine) for value in shown.centres_hw}
    for value, mask in masks.items():
        colour = np.array(level_colour(value))
        pixels[mask] = ((1 - _OPACITY) * pixels[mask] + _OPACITY * colour).astype(np.uint8)
        pixels[mask & ~ndimage.binary_erosion(mask, iterations=_SUPERSAMPLING + 1, border_value=1)] = (
            2 * colour + 255
        ) // 3
    picture = Image.fromarray(pixels).reduce(_SUPERSAMPLING)
    draw = ImageDraw.Draw(picture)
    for name, place in _names(shown, masks, (width, height), uncertain):
        draw.text(place, name, _TEXT, _font(_NAME_FONT), "rm", stroke_width=2, stroke_fill=(0, 0, 0))
    return picture


def _names(
    shown: LevelSlice, masks: Mapping[int, NDArray[np.bool_]], size: tuple[int, int], uncertain: Collection[int]
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Iterate over the name of each vertebra and the place of its right end; names do not overlap."""
    width, height = size
    rows, columns = shown.grey_hw.shape
    places = {}
    for value, (row, column) in shown.centres_hw.items():
        places[value] = _body(masks[value]) or ((row + 0.5) * height / rows, (column + 0.5) * width / columns)
    order = sorted(places, key=lambda value: places[value])
    for value, down in zip(order, _apart([places[value][0] for value in order], _LINE, height), strict=True):
        text = LEVEL_NAMES.get(value, str(value)) + ("?" if value in uncertain else "")
        # In front of all vertebrae at the height of the text.
        band = slice(max(0, round(down - _LINE / 2) * _SUPERSAMPLING), round(down + _LINE / 2) * _SUPERSAMPLING)
        front = np.flatnonzero(np.any([mask[band].any(axis=0) for mask in masks.values()], axis=0))
        right = front[0] / _SUPERSAMPLING if front.size else places[value][1]
        yield text, (max(right - 6, _font(_NAME_FONT).getlength(text) + 4), down)


def _body(mask: NDArray[np.bool_]) -> tuple[float, float] | None:
    """Return row and column, in the picture, of the front of the vertebral body; processes may lie lower."""
    rows, columns = np.nonzero(mask)
    if not columns.size:
        return None
    front = columns <= columns.min() + _FRONT_SHARE * np.ptp(columns)
    return float(rows[front].mean()) / _SUPERSAMPLING, float(columns.min()) / _SUPERSAMPLING


def _apart(places: Sequence[float], gap: float, size: float) -> list[float]:
    """Return ascending places, moved as little as possible to be a gap apart and within the size."""
    if not places:
        return []
    steps = gap * np.arange(len(places))
    moved = isotonic_regression(np.array(places) - steps).x
    return list((np.clip(moved, gap / 2, max(gap / 2, size - gap / 2 - steps[-1])) + steps).tolist())


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    from PIL import Image

    smooth = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth) > 127


def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)  # type: ignore[return-value]


def _wrapped(text: str, font: FreeTypeFont, width: float) -> Iterator[str]:
    """Iterate over lines of whole words that fit a width; a longer word has a line of its own."""
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    if line:
        yield line
