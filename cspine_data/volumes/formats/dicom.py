"""Reading DICOM: the volumes in a folder of slices, or in a multi-frame file.

pydicom parses the files, without native code unless voxels are compressed. Frames of one series and one grid form a
volume; they are split by echo time, image type, time point or b-value where two are at one position. This module checks
that no slice is missing.
"""

from __future__ import annotations

import filecmp
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError, count
from cspine_data.volumes.bounded import RESAMPLE, check_claim, grid
from cspine_data.volumes.formats.dicom_frames import (
    CONVERT,
    FETCH,
    Frame,
    frames_of,
    is_dicom,
    transfer_syntax,
    untrusted,
)
from cspine_data.volumes.geometry import MOST_SKEW, Geometry, skew
from cspine_data.volumes.volume import Volume

#: Separates a folder or file from the number of one of its volumes: ``folder#2``.
NUMBER_MARK = "#"
# Positions are rounded; a missing slice doubles a gap.
_UNEVEN = 0.1
_TILT_MM = 0.1
_SAME_PLACE_MM = 1e-3
_MOST_FILES = 20_000
_MOST_LISTED = 6
# In the order of `Frame.kinds`.
_KINDS = ("echo time {:g} ms", "image type {}", "time point {}", "b-value {:g}")


@dataclass(frozen=True, eq=False)
class DicomVolume:
    """The frames of one volume, in no order.

    Attributes
    ----------
    frames : tuple of Frame
        Their headers.
    kind : str
        What sets it apart from others of its series, such as "echo time 20 ms"; empty without others.
    """

    frames: tuple[Frame, ...]
    kind: str = ""

    @property
    def description(self) -> str:
        """A description without patient data: number of the series, what sets it apart, number of slices."""
        parts = [f"series {self.frames[0].series_number}", self.kind, count(len(self.frames), "slice")]
        return ", ".join(part for part in parts if part)


def exists(path: Path) -> bool:
    """Return whether a path is a folder, or a DICOM file by its content; ``path#2`` names one of its volumes."""
    base, _ = split_number(path)
    return base.is_dir() or (base.is_file() and is_dicom(base))


def split_number(path: Path) -> tuple[Path, int | None]:
    """Split ``folder#2`` into the folder and 2; the number is None where there is none."""
    name, mark, number = path.name.rpartition(NUMBER_MARK)
    if mark and name and number.isdecimal() and not path.exists():
        return path.with_name(name), int(number)
    return path, None


def dicom_files(path: Path) -> Iterator[Path]:
    """Iterate over the DICOM files of a folder, by name, or the one file that is given."""
    if path.is_file():
        yield path
        return
    home = path.resolve()
    paths = sorted(path.iterdir())
    if len(paths) > _MOST_FILES:
        raise InputError(path, f"holds {len(paths)} files", f"a series has at most {_MOST_FILES}: sort them first")
    for one in paths:
        # Links to files outside the folder are ignored.
        if one.is_file() and one.resolve().is_relative_to(home) and is_dicom(one):
            yield one


def volumes_at(path: Path) -> tuple[list[DicomVolume], tuple[str, ...]]:
    """List the volumes of a folder of slices or a multi-frame file, sorted by series, and notes on other objects.

    Parameters
    ----------
    path : Path
        The folder, whose subfolders are not searched, or the file.

    Raises
    ------
    InputError
        If a file is damaged.
    """
    frames: list[Frame] = []
    first_of: dict[str, Path] = {}
    others = copies = 0
    for file in dicom_files(path):
        of_file = frames_of(file)
        others += not of_file
        # An empty identifier identifies nothing.
        first = first_of.setdefault(of_file[0].instance or str(file), file) if of_file else file
        if first != file and filecmp.cmp(first, file, shallow=False):
            copies += 1
        else:
            frames += of_file
    volumes, strays = [], 0
    for series in _by_series(frames):
        for same_grid in _by_grid(series):
            volumes += _split_by_kind(same_grid)
    # Scouts are recorded as localisers, or as single slices across the volumes.
    proper = [one for one in volumes if len(one.frames) > 1 and not one.frames[0].localiser]
    if proper and len(proper) < len(volumes):
        strays = sum(len(one.frames) for one in volumes) - sum(len(one.frames) for one in proper)
        volumes = proper
    notes = [
        f"{count(number, noun)} left out{why}"
        for number, noun, why in (
            (others, "DICOM file", ": no images with a position in the patient"),
            (copies, "duplicate file", ""),
            (strays, "localiser slice", ""),
        )
        if number
    ]
    return volumes, tuple(notes)


def chosen(path: Path) -> tuple[DicomVolume, tuple[str, ...]]:
    """Return the volume that a path names, and notes.

    Raises
    ------
    InputError
        If there is no volume, or there are several and none is chosen.
    """
    base, number = split_number(path)
    volumes, notes = volumes_at(base)
    if not volumes:
        remedy = "give the folder with the files; its subfolders are not searched"
        raise InputError(path, "holds no NRRD, NIfTI, MetaImage or DICOM image", remedy)
    if number is None and len(volumes) == 1:
        return volumes[0], notes
    if number is not None and 1 <= number <= len(volumes):
        return volumes[number - 1], notes
    listed = [f"{NUMBER_MARK}{at} ({one.description})" for at, one in enumerate(volumes[:_MOST_LISTED], start=1)]
    more = [] if len(volumes) <= _MOST_LISTED else [f"{len(volumes) - _MOST_LISTED} more"]
    problem = f"holds {count(len(volumes), 'DICOM volume')}: {', '.join(listed + more)}"
    raise InputError(base, problem, f"choose one, as in {base.name}{NUMBER_MARK}1")


def files_of(path: Path) -> tuple[list[Path], int | None]:
    """Return the files that a path names, sorted by name, and the number of the volume if the path has one."""
    base, number = split_number(path)
    if number is None:
        return list(dicom_files(base)), None
    volume, _ = chosen(path)
    return sorted({frame.path for frame in volume.frames}), number


def read_geometry(path: Path) -> Geometry:
    """Read the grid of a DICOM volume."""
    return stacked(path, chosen(path)[0].frames)[1]


def read(path: Path) -> Volume:
    """Read a DICOM volume.

    Parameters
    ----------
    path : Path
        A folder of slices or a multi-frame file; ``path#2`` is the second of several volumes. Subfolders are not
        searched.

    Returns
    -------
    Volume
        Voxels: columns, rows, slices, scaled by the headers' slope and intercept; with notes on objects left out.

    Raises
    ------
    InputError
        If there is no volume or several, slices are missing, duplicated or not parallel, or a file is damaged.
    """
    volume, notes = chosen(path)
    frames, geometry = stacked(path, volume.frames)
    there = sum(file.stat().st_size for file in {one.path for one in frames})
    check_claim(path, sum(one.bytes for one in frames), there, compressed=True)
    pixels_of = _pixels(frames)
    array: NDArray[Any] | None = None
    for number, one in enumerate(frames):
        pixels = pixels_of(one)
        if array is None:
            array = np.empty(geometry.size, pixels.dtype, order="F")
        elif pixels.dtype != array.dtype:
            # If slices have different scales, some may be integers.
            array = array.astype(np.result_type(array, pixels), order="F")
        array[..., number] = pixels
    assert array is not None  # noqa: S101
    return Volume(array, geometry, path, notes=notes)


def _by_series(frames: Iterable[Frame]) -> list[list[Frame]]:
    groups: dict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[frame.series].append(frame)
    return sorted(groups.values(), key=lambda group: (group[0].series_number, group[0].series))


def _by_grid(frames: Iterable[Frame]) -> list[list[Frame]]:
    groups: list[list[Frame]] = []
    for frame in frames:
        group = next((group for group in groups if _same_grid(frame, group[0])), None)
        if group is None:
            groups.append([frame])
        else:
            group.append(frame)
    return groups


def _same_grid(one: Frame, other: Frame) -> bool:
    directions = np.allclose(one.directions, other.directions, atol=1e-3)
    spacing = np.allclose(one.spacing_mm, other.spacing_mm, rtol=1e-3)
    return one.columns_rows == other.columns_rows and directions and spacing


def _split_by_kind(frames: list[Frame]) -> list[DicomVolume]:
    """Split frames of one grid so that no two of a part are at one position, by as few attributes as possible."""
    for number in range(len(_KINDS) + 1):
        for attributes in combinations(range(len(_KINDS)), number):
            parts: dict[tuple[Any, ...], list[Frame]] = defaultdict(list)
            for frame in frames:
                parts[tuple(frame.kinds[at] for at in attributes)].append(frame)
            if all(map(_unique_positions, parts.values())):
                names = [_KINDS[at] for at in attributes]
                return [DicomVolume(tuple(part), _described(names, key)) for key, part in sorted(parts.items())]
    return [DicomVolume(tuple(frames))]


def _described(names: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(name.format(value) for name, value in zip(names, values, strict=True))


def _unique_positions(frames: Sequence[Frame]) -> bool:
    places = np.sort(_along_normal(frames))
    return bool((np.diff(places) > _SAME_PLACE_MM).all())


def _along_normal(frames: Sequence[Frame]) -> NDArray[np.float64]:
    positions = np.array([one.position_mm for one in frames])
    return np.asarray(positions @ np.cross(*frames[0].directions))


def stacked(folder: Path, frames: Sequence[Frame]) -> tuple[list[Frame], Geometry]:
    """Sort frames along their normal, and check that they are evenly spaced."""
    first = frames[0]
    if len(frames) == 1:
        raise InputError(folder, "holds a single DICOM slice", "give the folder with the whole series")
    normal = np.cross(*first.directions)
    order = np.argsort(_along_normal(frames), kind="stable")
    slices = [frames[at] for at in order]
    positions = np.array([one.position_mm for one in slices])
    gaps = np.diff(positions @ normal)
    gap = float(np.median(gaps))
    twice = int(np.count_nonzero(gaps < _SAME_PLACE_MM))
    if twice or gap <= 0:
        raise InputError(
            folder, f"holds {twice} slices at places where there is another", "give one echo or time point a folder"
        )
    if (np.abs(gaps - gap) > _UNEVEN * gap).any():
        raise InputError(
            folder, f"misses slices (they are {gaps.min():.3g} to {gaps.max():.3g} mm apart)", "fetch the whole series"
        )
    shifts = positions - positions[0]
    along = shifts[-1] / np.linalg.norm(shifts[-1])
    lean = skew(np.stack([*first.directions, along], axis=1))
    # A sheared stack, as with a tilted gantry, is a grid whose axes are not at right angles. For a few thin slices the
    # rounding of positions alone can exceed the limit.
    if lean > MOST_SKEW and lean * np.linalg.norm(shifts[-1]) > _TILT_MM:
        angle = np.degrees(np.arcsin(lean))
        raise InputError(folder, f"has axes that are not at right angles ({angle:.2g} degrees off)", RESAMPLE)
    if np.abs(shifts - np.outer(shifts @ along, along)).max() > _TILT_MM:
        raise InputError(folder, "holds slices that are shifted against each other", "resample the series first")
    # The mean gap, since single positions are rounded.
    spacing = np.array([*first.spacing_mm, gaps.mean()])
    steps = np.stack([*first.directions, normal], axis=1) * spacing
    size = (*first.columns_rows, len(slices))
    return slices, grid(folder, size, steps, positions[0], spacing, "PixelSpacing")


def _pixels(frames: Sequence[Frame]) -> Callable[[Frame], NDArray[Any]]:
    """Return a function that returns the voxels of a frame: columns, rows. Multi-frame files are decoded once."""
    uses = Counter(one.path for one in frames)
    decoded: dict[Path, NDArray[Any]] = {}

    def pixels(one: Frame) -> NDArray[Any]:
        stored = decoded.get(one.path)
        if stored is None:
            stored = _decode(one.path)
            if uses[one.path] > 1:
                decoded[one.path] = stored
        frame = stored if one.index is None or stored.ndim == 2 else stored[one.index]
        if frame.shape != one.columns_rows[::-1]:
            raise InputError(one.path, "holds other voxels than its header claims", FETCH)
        if one.scaling != (1.0, 0.0):
            frame = (frame * one.scaling[0] + one.scaling[1]).astype(np.float32)
        return frame.T

    return pixels


def _decode(path: Path) -> NDArray[Any]:
    import pydicom

    with untrusted(path, "is no readable DICOM image", FETCH):
        dataset = pydicom.dcmread(path, force=True)
        dataset.file_meta.TransferSyntaxUID = transfer_syntax(dataset)
        compressed = bool(dataset.file_meta.TransferSyntaxUID.is_compressed)
    remedy = f"pip install 'cspine[dicom]' brings codecs, or {CONVERT}" if compressed else FETCH
    with untrusted(path, "cannot be decoded", remedy):
        return np.asarray(dataset.pixel_array)
