"""Small pictures of a volume: one slice along each axis through the label map, with its outlines."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.bias_field import field_at, field_factors, uncorrect
from cspine_data.preprocessing.steps import CorrectedVolume
from cspine_data.volumes.geometry import Triple, as_seen

#: Longest side of a slice, pixels; a page of 1,000 cases with nine slices each has about 30 MB.
_LONGEST_SIDE = 320
_GAP = 4
_QUALITY = 60
# Percentiles that are black and white, since fat near a coil is very bright.
_WINDOW = (1, 99.5)
# A field of 1 / e is black, of e white.
_FIELD_WINDOW = (-1.0, 1.0)
# Colours of Okabe and Ito (2008).
_COLOURS = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)])


@dataclass(frozen=True, eq=False)
class Row:
    """Slices of one array: `at(axis, index)` returns one, in anatomical order; `window` are black and white."""

    at: Callable[[int, int], NDArray[Any]]
    window: tuple[float, float]
    outlines: bool = False


@dataclass(frozen=True)
class Picture:
    """A WebP picture."""

    content: bytes
    width: int
    height: int


def image_row(image_xyz: NDArray[Any]) -> Row:
    """Return the row of an image, with outlines."""
    return Row(lambda axis, index: np.take(image_xyz, index, axis), _window(image_xyz), outlines=True)


def correction_rows(corrected: CorrectedVolume) -> tuple[Row, ...]:
    """Return rows of the image before correction, after it with outlines, and of the log field."""
    log_bias = corrected.log_bias_xyz
    after = image_row(corrected.image_xyz)
    if log_bias is None:
        return (after,)
    factors = field_factors(corrected.image_xyz.shape, corrected.spacing_mm)

    def field(axis: int, index: int) -> NDArray[np.float32]:
        indices = [np.arange(n) for n in corrected.image_xyz.shape]
        indices[axis] = np.array([index])
        x, y, z = indices
        return field_at(log_bias, factors, (x, y, z))

    def before(axis: int, index: int) -> NDArray[np.float32]:
        slab = np.take(corrected.image_xyz, [index], axis)
        found = uncorrect(slab, field(axis, index), corrected.air_level, corrected.noise_ratio)
        return np.asarray(np.take(found, 0, axis))

    middle = before(0, corrected.image_xyz.shape[0] // 2)
    return (
        Row(before, _window(middle)),
        after,
        Row(lambda axis, index: np.take(field(axis, index), 0, axis), _FIELD_WINDOW),
    )


def draw_slices(
    rows: Sequence[Row], label_xyz: NDArray[Any] | None, size_xyz: Sequence[int], spacing_mm: Triple
) -> Picture:
    """Return a picture: a column for each axis, a row for each array, in radiological orientation.

    The slice along each axis is that with most labelled voxels, or the middle one. Sagittal and coronal slices have
    the head up, sagittal ones the front on the left, the others the patient's right on the left.
    """
    from PIL import Image

    pixel_mm = max(n * mm for n, mm in zip(size_xyz, spacing_mm, strict=True)) / _LONGEST_SIDE
    indices = [_most_labelled(label_xyz, axis, size) for axis, size in enumerate(size_xyz)]
    pictures = []
    for row in rows:
        of_row = []
        for axis, index in enumerate(indices):
            in_plane = tuple(mm for other, mm in enumerate(spacing_mm) if other != axis)
            label = None if label_xyz is None or not row.outlines else np.take(label_xyz, index, axis)
            of_row.append(_picture(row.at(axis, index), label, axis, in_plane, pixel_mm, row.window))
        pictures.append(of_row)
    widths = [picture.shape[1] for picture in pictures[0]]
    height = max(picture.shape[0] for picture in pictures[0])
    sheet = np.zeros((len(rows) * (height + _GAP) - _GAP, sum(widths) + 2 * _GAP, 3), np.uint8)
    for down, of_row in enumerate(pictures):
        left = 0
        for picture, width in zip(of_row, widths, strict=True):
            top = down * (height + _GAP)
            sheet[top : top + picture.shape[0], left : left + width] = picture
            left += width + _GAP
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, "WEBP", quality=_QUALITY)
    return Picture(content.getvalue(), sheet.shape[1], sheet.shape[0])


def _window(image: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(image[(slice(None, None, 2),) * image.ndim], _WINDOW)
    return float(low), float(high) if high > low else float(low) + 1


def _most_labelled(label_xyz: NDArray[Any] | None, axis: int, size: int) -> int:
    if label_xyz is None:
        return size // 2
    return int(np.count_nonzero(label_xyz, axis=tuple(other for other in range(3) if other != axis)).argmax())


def _picture(
    slice_ab: NDArray[Any],
    label_ab: NDArray[Any] | None,
    axis: int,
    spacing_mm: Sequence[float],
    pixel_mm: float,
    window: tuple[float, float],
) -> NDArray[np.uint8]:
    from PIL import Image

    low, high = window
    grey = np.clip((as_seen(slice_ab, axis).astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    width, height = (max(1, round(n * mm / pixel_mm)) for n, mm in zip(slice_ab.shape, spacing_mm, strict=True))
    shown = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
    picture = np.repeat(shown[..., None], 3, axis=2)
    if label_ab is not None:
        values = np.unique(label_ab)
        numbers = np.searchsorted(values, as_seen(label_ab, axis)).astype(np.int32)
        label = values[np.asarray(Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST))]
        outline = (label != 0) & _differs_from_neighbour(label)
        picture[outline] = _COLOURS[(label[outline].astype(np.int64) - 1) % len(_COLOURS)]
    return picture


def _differs_from_neighbour(label: NDArray[Any]) -> NDArray[np.bool_]:
    around = np.pad(label, 1)
    shifted = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    return np.asarray(np.any([label != other for other in shifted], axis=0))
