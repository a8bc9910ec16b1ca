"""Synthetic labelled cervical-spine T2-weighted MRI phantoms.

Every shape is an analytic signed distance in millimetres (negative inside), so
one case can be sampled on any grid: the spacing only decides where the anatomy
is looked at.  World axes follow LPS (x to the patient's left, y to the back,
z to the head) with the origin at the centre of the field of view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PhantomCase", "make_case"]

Field = NDArray[np.floating[Any]]  # float32 on the grid, float64 for small tables
Triple = tuple[float, float, float]
Rng = np.random.Generator
Signal = dict[str, float]
Level = float | Field
Points = tuple[Field, Field, Field]  # x, y, z; a grid holds (nx, 1, 1), (1, ny, 1), (1, 1, nz)
Window = tuple[slice, slice, slice]
Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# Boundary ramp in millimetres, not voxels: a finer grid resolves the same edge, not a new one.
EDGE_MM = 1.2
RIM_MM = 0.9  # cortical bone, part of the label as in manual segmentations
BLEND_MM = 0.6  # rounds the creases where the parts of a vertebra meet
REACH_MM = 130.0  # half-size of the cube covered by random fields and tube paths

# Mean signal of each tissue before jitter, bias and noise (arbitrary units).
SIGNAL = {
    "air": 6.0, "skin": 230.0, "fat": 500.0, "muscle": 160.0, "mucosa": 400.0,
    "cartilage": 105.0, "artery": 25.0, "vein": 80.0, "csf": 680.0, "cord": 320.0,
    "cortical": 45.0, "marrow": 420.0, "annulus": 120.0, "nucleus": 330.0, "diploe": 330.0,
}  # fmt: skip

# C1..C7, millimetres: half width, half depth, half height of the body (C1 has none: only
# offsets), spinous length behind the canal, reach of the transverse process from the midline.
LEVEL_SIZES_MM = (
    (8.6, 7.8, 5.8, 0.0, 29.0), (8.8, 8.0, 6.8, 17.0, 23.5), (8.8, 7.9, 6.0, 12.0, 24.0),
    (9.1, 8.0, 6.0, 12.5, 24.5), (9.5, 8.1, 6.0, 14.5, 25.0), (10.0, 8.3, 6.1, 16.5, 26.0),
    (10.6, 8.5, 6.6, 20.5, 27.5),
)  # fmt: skip


@dataclass(frozen=True)
class PhantomCase:
    """One synthetic neck with its labels and the bias field it was given.

    Array axes are (x, y, z): x grows to the patient's left, y to the back, z to the head.
    """

    image_xyz: NDArray[np.int16]
    """T2-like magnitude image in arbitrary units, about 0 to 1500."""
    label_xyz: Labels
    """0 is background, 1..7 are C1..C7 (C1 is the highest)."""
    log_bias_xyz: NDArray[np.float32]
    """Natural log of the bias field, mean zero over the tissue (skin inwards, no airway)."""
    spacing_mm: Triple
    """Voxel size along x, y, z in millimetres."""


@dataclass(frozen=True)
class _Vertebra:
    """Pose and size of one vertebra; local axes are (left, back, up)."""

    level: int
    centre_mm: Field  # (3,) world
    axes: Field  # (3, 3), rows are the local axes in world coordinates
    sizes_mm: tuple[float, ...]  # (5,), one row of LEVEL_SIZES_MM, varied
    canal_mm: float  # from the back of the body to the middle of the canal
    droop: float  # downward slope of the spinous process
    scale: float

    def world(self, left: float, back: float, up: float) -> Field:
        """Map a local point to world millimetres, shape (3,)."""
        return np.asarray(self.centre_mm + np.array([left, back, up]) @ self.axes)


def _crop(grid: Points, low: Sequence[float], high: Sequence[float]) -> tuple[Window, Points]:
    """Index ranges and coordinates of the voxels inside a world box (may be empty)."""
    ends = zip(grid, low, high, strict=True)
    i, j, k = (slice(*np.searchsorted(axis.ravel(), pair).tolist()) for axis, *pair in ends)
    return (i, j, k), (grid[0][i], grid[1][:, j], grid[2][:, :, k])


def _local(grid: Points, centre_mm: Field, axes: Field) -> Points:
    """Coordinates along the rows of ``axes`` (3, 3), measured from ``centre_mm``."""
    # Python floats keep the large arrays in float32.
    x, y, z = (axis - c for axis, c in zip(grid, centre_mm.tolist(), strict=True))
    left, back, up = (x * a + y * b + z * c for a, b, c in axes.tolist())
    return left, back, up


def _paint(image: Field, distance: Field, value: Level, opacity: Level = 1.0) -> None:
    """Lay ``value`` over the inside of a signed distance, with a soft edge."""
    image += opacity * np.clip(0.5 - distance / EDGE_MM, 0, 1) * (value - image)


def _blend(parts: list[Field]) -> Field:
    """Union of shapes with creases rounded over about BLEND_MM."""
    # The cap keeps far voxels out of the slow denormal range of float32.
    weights = [np.exp(np.minimum(part, 20) / -BLEND_MM) for part in parts]
    return np.asarray(-BLEND_MM * np.log(sum(weights)))


def _ellipsoid(offsets: Sequence[Field], radii: Sequence[Level]) -> Field:
    """First-order distance to an ellipse or ellipsoid, finite and negative at its centre."""
    pairs = list(zip(offsets, radii, strict=True))
    level = np.sqrt(sum((o / r) ** 2 for o, r in pairs))
    slope = np.sqrt(sum((o / r**2) ** 2 for o, r in pairs))
    return np.asarray((level - 1) * (level + 1e-3) / (slope + 1e-5))


def _box(p: Points, centre: Triple, half: Triple, radius: float, shear: float = 0.0) -> Field:
    """Box with rounded edges; ``shear`` tips its top and bottom down to the back."""
    left, back, up = (axis - c for axis, c in zip(p, centre, strict=True))
    offsets = (left, back, up + shear * back)
    x, y, z = (np.abs(o) - (h - radius) for o, h in zip(offsets, half, strict=True))
    outside = np.sqrt(np.maximum(x, 0) ** 2 + np.maximum(y, 0) ** 2 + np.maximum(z, 0) ** 2)
    return np.asarray(outside + np.minimum(np.maximum(np.maximum(x, y), z), 0) - radius)


def _rod(p: Points, start: Triple, end: Triple, radius: float, tall: float = 1.0) -> Field:
    """Round-ended rod, ``tall`` times as high (local up) as it is thick."""
    dx, dy, dz = (e - s for s, e in zip(start, end, strict=True))
    x, y, z = (axis - s for axis, s in zip(p, start, strict=True))
    along = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
    x, y, z = x - along * dx, y - along * dy, (z - along * dz) / tall
    return np.asarray(np.sqrt(x * x + y * y + z * z) - radius)


def _atlas(p: Points, v: _Vertebra) -> Field:
    """C1: ring around dens and cord, lateral masses, transverse processes, back tubercle."""
    s = v.scale
    plane = _ellipsoid((p[0], p[1] - 8.6 * s), (17.5 * s, 18.6 * s))
    return _blend([
        np.asarray(np.sqrt(plane**2 + (p[2] / 1.35) ** 2) - 3.0 * s),
        _box(p, (16.8 * s, 4.0 * s, 0.0), (5.0 * s, 7.2 * s, 5.4 * s), 2.5),
        _rod(p, (18 * s, 5.5 * s, 0.0), (v.sizes_mm[4] - 3.2 * s, 6.5 * s, -1.0), 3.2 * s),
        _rod(p, (0, 26.5 * s, 0), (0, 29.5 * s, -1.0), 3.0 * s, 1.3),
    ])  # fmt: skip


def _typical_vertebra(p: Points, v: _Vertebra) -> Field:
    """C2..C7: body, pedicles, articular pillars, laminae, spinous, transverse parts."""
    s = v.scale
    width, depth, height, spinous, reach = v.sizes_mm
    waist = 1 + 0.09 * np.clip(1 - (p[2] / height) ** 2, 0, 1)
    trunk = (p[0] * waist, p[1] * waist, p[2])
    roof = (0.0, depth + 2 * v.canal_mm + 3.1 * s, -3.0 * s)  # where the laminae meet
    tip_back, tip_up = roof[1] + spinous, roof[2] - v.droop * spinous
    fork = 3.4 if v.level < 7 else 0.8  # the spinous processes above C7 are bifid
    parts = [
        _box(trunk, (0, 0, 0), (width, depth, height), 2.6),
        _rod(p, (width - 2.5, depth - 3.0, 1.5), (13.5 * s, depth + 4 * s, 0.5), 3.1 * s, 1.2),
        _box(p, (15 * s, depth + 5.5 * s, 0), (5.2 * s, 5.3 * s, height + 0.2), 2.2, 0.55),
        _rod(p, (15.5 * s, depth + 7.5 * s, -0.5), roof, 2.9 * s, 1.6),
        _rod(p, roof, (0.0, tip_back - 2, tip_up), 3.1 * s, 1.45),
        _rod(p, (0.0, tip_back - 4, tip_up), (fork, tip_back, tip_up - 1), 2.9 * s, 1.2),
        _rod(p, (width, 2.0, 0.0), (reach - 3 * s, 4.0 * s, -2.5 * s), 3.3 * s),
    ]
    if v.level == 2:
        parts.append(_rod(p, (0.0, 0.0, height - 2), (0.0, -0.6, height + 10.5 * s), 4.7 * s))
        parts.append(_box(p, (13 * s, 2.5, 2.6), (6 * s, 6 * s, 4.6 * s), 2.5))
    return _blend(parts)


def _draw_frames(rng: Rng) -> list[Field]:
    """Local frames of C1..C7: lordosis in pitch, slight scoliosis in roll and yaw."""
    low, high = np.deg2rad(rng.uniform([12, -9], [23, 3]))
    bow, sway, twist, nod = np.deg2rad(rng.uniform(-3.5, 3.5, 4))
    rise = np.array([0, 0, 1, 2, 3, 4, 5]) / 5  # 0 at C1 and C2, 1 at C7
    pitch = high + (low - high) * rise + bow * np.sin(2 * np.pi * rise) + nod * (np.arange(7) == 0)
    roll = sway * np.sin(1.5 * np.pi * rise + rng.uniform(0, 2 * np.pi))
    frames, yaw = [], twist * (rise - 0.5)
    for p, r, turn in zip(pitch, roll, yaw, strict=True):
        up = np.array([np.tan(r), -np.tan(p), 1.0])  # positive pitch leans to the throat
        up /= np.linalg.norm(up)
        back = np.cross(up, [np.cos(turn), np.sin(turn), 0.0])
        back /= np.linalg.norm(back)
        frames.append(np.stack([np.cross(back, up), back, up]))
    return frames


def _draw_spine(rng: Rng, height_mm: float) -> list[_Vertebra]:
    """Stack C7 up to C1 along the curve, C7 resting just above the lower edge."""
    frames = _draw_frames(rng)
    scales = rng.uniform(0.93, 1.05) * rng.uniform(0.98, 1.02, 7)
    sizes = np.array(LEVEL_SIZES_MM) * rng.uniform(0.95, 1.05, (7, 5)) * scales[:, None]
    discs = rng.uniform(3.6, 4.9) * rng.uniform(0.88, 1.12, 7)
    canal, droop = (rng.uniform([7.0, 0.2], [8.0, 0.4]) * [scales.mean(), 1]).tolist()
    centres = np.zeros((7, 3))
    for k in range(5, 0, -1):
        step = frames[k + 1][2] * (sizes[k + 1, 2] + discs[k] / 2)
        centres[k] = centres[k + 1] + step + frames[k][2] * (sizes[k, 2] + discs[k] / 2)
    centres[0] = centres[1] + frames[1][2] * (sizes[1, 2] + 9.3 * scales[0])
    x, y, gap = rng.uniform([-1.5, -15, 6.5], [1.5, -11, 8.0])
    centres += [x, y, gap + sizes[6, 2] - height_mm / 2]
    centres[:, :2] -= np.mean(centres[1:, :2] - [x, y], axis=0)
    rows = zip(range(1, 8), centres, frames, sizes.tolist(), scales.tolist(), strict=True)
    return [_Vertebra(k, c, axes, tuple(row), canal, droop, s) for k, c, axes, row, s in rows]


def _bumps(rng: Rng, grid: Points, pitch_mm: Triple) -> Field:
    """Smooth random field of unit variance; the draw does not depend on the grid."""
    weights = []
    for plane, pitch in zip(grid, pitch_mm, strict=True):
        nodes = np.arange(-REACH_MM, REACH_MM + pitch, pitch)
        weight = np.exp(-0.5 * ((plane.reshape(-1, 1) - nodes) / (0.7 * pitch)) ** 2)
        weights.append((weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype("f4"))
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for weight in weights:  # each pass consumes the first axis and appends the new one
        field = np.tensordot(field, weight, axes=(0, 1))
    return field


def _paint_tube(image: Field, grid: Points, path_mm: Field, radii_mm: Field, value: float) -> None:
    """Paint an elliptic tube along ``path_mm`` (n, 3), top first, ``radii_mm`` (n, 2)."""
    heights, bend = np.arange(-REACH_MM, REACH_MM), np.hanning(17) / np.hanning(17).sum()
    course = []
    for column in np.hstack([path_mm[::-1, :2], radii_mm[::-1]]).T:
        # Smoothed on a fixed lattice: the bends must not depend on the voxel size.
        coarse = np.convolve(np.interp(heights, path_mm[::-1, 2], column), bend, "same")
        course.append(np.interp(grid[2].ravel(), heights, coarse).astype(np.float32))
    x, y, wide, deep = course
    low = ((x - wide).min() - EDGE_MM, (y - deep).min() - EDGE_MM, -np.inf)
    high = ((x + wide).max() + EDGE_MM, (y + deep).max() + EDGE_MM, np.inf)
    window, part = _crop(grid, low, high)
    _paint(image[window], _ellipsoid((part[0] - x, part[1] - y), (wide, deep)), value)


def _skin_distance(rng: Rng, grid: Points) -> Field:
    """Outline of the neck: face in front at the top, shoulders at the bottom."""
    front, back, width = rng.uniform([48, 46, 56], [53, 51, 68]).tolist()
    x, y, z = grid
    chin = 30 / (1 + np.exp(-(z - rng.uniform(26, 34)) / 7))
    y_front = -(front + chin + 0.0015 * np.minimum(z, 0) ** 2)
    y_back = back + 0.0016 * (z - rng.uniform(0, 12)) ** 2
    x_half = width + 0.004 * np.minimum(z, 0) ** 2 + 0.3 * chin
    return _ellipsoid((x, y - (y_front + y_back) / 2), (x_half, (y_back - y_front) / 2))


def _paint_soft_tissue(rng: Rng, image: Field, grid: Points, skin: Field, signal: Signal) -> None:
    """Skin, subcutaneous fat and layered, streaky muscle."""
    x, y, _ = grid
    streaks, warp = _bumps(rng, grid, (3.0, 3.0, 12.0)), _bumps(rng, grid, (16.0, 16.0, 22.0))
    patches = _bumps(rng, grid, (9.0, 9.0, 14.0))
    fat_mm = rng.uniform(3.0, 5.0) + rng.uniform(2.0, 5.0) / (1 + np.exp(-y / 12))
    fascia = skin + 1.6 + fat_mm + 0.8 * warp
    _paint(image, skin, signal["skin"])
    _paint(image, skin + 1.6, signal["fat"] * (1 + 0.04 * patches))
    _paint(image, fascia, signal["muscle"] * (1 + 0.10 * streaks + 0.08 * patches))
    # Fat planes between muscle layers run roughly parallel to the skin and fade in and out.
    layer = np.abs(np.mod(skin + 3.0 * warp, 9.0) - 4.5)
    fade = np.clip(0.45 + 0.35 * patches, 0, 0.75)
    _paint(image, fascia, 0.7 * signal["fat"], fade * np.exp(-((layer / 0.8) ** 2)))
    nape = np.clip((y - 14) / 8, 0, 0.6) * np.exp(-((x + warp) ** 2))
    _paint(image, fascia, signal["fat"], fade * nape)


def _paint_canal(image: Field, grid: Points, spine: list[_Vertebra], signal: Signal) -> None:
    """Skull base and hindbrain, then cerebrospinal fluid and cord through the canal."""
    nodes = np.stack([v.world(0, v.sizes_mm[1] + v.canal_mm, 0) for v in spine])
    skull = _ellipsoid(_local(grid, nodes[0] + [0, 13, 46], np.eye(3)), (58.0, 47.0, 34.0))
    layers = ((0.0, "cortical"), (1.3, "diploe"), (4.0, "cortical"), (5.2, "csf"), (8.0, "cord"))
    for depth, tissue in layers:
        _paint(image, skull + depth, signal[tissue])
    above = nodes[0] + np.array([[0, -10.0, 60], [0, -4.0, 26], [0, -1.0, 12]])
    path = np.concatenate([above, nodes, nodes[-1:] - spine[-1].axes[2] * 40.0])
    fluid = [[18, 15], [14, 12], [11.5, 9.2], [10.8, 8.3], *[[9.6, 6.3]] * 7]
    cord = [[14, 11], [10, 8.8], [6.8, 5.6], [5.9, 4.3], *[[6.2, 3.9]] * 7]
    # Dura and ligaments line the canal and set the fluid off from fat and muscle.
    for radii, margin, tissue in ((fluid, 1.1, "cartilage"), (fluid, 0, "csf"), (cord, 0, "cord")):
        _paint_tube(image, grid, path, np.array(radii) * spine[0].scale + margin, signal[tissue])


def _paint_throat(image: Field, grid: Points, spine: list[_Vertebra], signal: Signal) -> None:
    """Airway with mucosa and cartilage, and the large neck vessels."""
    radii = np.array([[11, 4.5], [11, 5.5], [10, 6], [8.5, 5], [6, 6.5], [7.5, 7], [8, 7]])
    gaps = radii[:, 1] + [3.5, 4, 4, 5, 9, 10, 10]  # the gullet widens the gap below C4
    path = np.stack([v.world(0, -v.sizes_mm[1] - g, 0) for v, g in zip(spine, gaps, strict=True)])
    wall = np.array([[1.4, 1.4, 1.4, 2.9, 5.4, 4.9, 4.4]]).T
    _paint_tube(image, grid, path, radii + wall, signal["cartilage"])
    _paint_tube(image, grid, path, radii + 1.4, signal["mucosa"])
    _paint_tube(image, grid, path, radii, signal["air"])
    # Carotid, jugular and vertebral vessels: offset to the side, to the back, radius.
    vessels = ((23.0, -11.0, 3.0, "artery"), (28.0, -6.0, 4.2, "vein"), (14.5, 6.5, 1.7, "artery"))
    for left, back, radius, tissue in vessels:
        for side in (-left, left):
            course = np.stack([v.world(side, back, 0) for v in spine])
            _paint_tube(image, grid, course, np.full((7, 2), radius), signal[tissue])


def _paint_vertebrae(image: Field, grid: Points, spine: list[_Vertebra], marrow: Field, signal: Signal) -> Labels:
    """Paint discs and vertebrae from the top down and return the labels."""
    label = np.zeros(np.broadcast(*grid).shape, dtype=np.uint8)
    nearest = np.zeros(np.broadcast(*grid).shape, dtype=np.float32)
    for v in spine:
        x, y, z = v.centre_mm.tolist()
        window, part = _crop(grid, (x - 40, y - 22, z - 27), (x + 40, y + 60, z + 27))
        left, back, up = _local(part, v.centre_mm, v.axes)
        points = (np.abs(left), back, up)  # mirrored, so that a part on one side makes both
        distance = _atlas(points, v) if v.level == 1 else _typical_vertebra(points, v)
        if v.level > 1:  # the disc below: a dark ring and a brighter core
            width, depth, height = v.sizes_mm[:3]
            ring = _box(points, (0, 0, -height - 2.2), (width, depth + 0.4, 3.6), 1.8)
            middle = (points[0], points[1] - 0.5, points[2] + height + 2.2)
            core = _ellipsoid(middle, (0.62 * width, 0.55 * depth, 1.9))
            _paint(image[window], ring, signal["annulus"])
            _paint(image[window], core, signal["nucleus"])
        _paint(image[window], distance, signal["cortical"])
        _paint(image[window], distance + RIM_MM, marrow[window])
        mine = distance < nearest[window]  # deepest claim wins where shapes would overlap
        label[window][mine] = v.level
        nearest[window][mine] = distance[mine]
    return label


def _draw_log_bias(rng: Rng, grid: Points, tissue: Mask) -> Field:
    """Coil fall-off, low-order polynomial and slow bumps, standardised over the tissue."""
    x, y, z = (axis / 60 for axis in grid)
    behind = rng.uniform([-0.3, 1.4, -0.5], [0.3, 2.0, 0.5]).tolist()
    coil = -np.log(1 + (x - behind[0]) ** 2 + (y - behind[1]) ** 2 + (z - behind[2]) ** 2)
    a = rng.normal(size=8).tolist()
    curve = a[3] * x * x + a[4] * y * y + a[5] * z * z + a[6] * x * y + a[7] * y * z
    fields = (coil, a[0] * x + a[1] * y + a[2] * z, curve, _bumps(rng, grid, (45.0, 45.0, 45.0)))
    weights = rng.uniform([0.7, 0.15, 0.15, 0.3], [1.0, 0.5, 0.5, 0.6]).tolist()
    parts = zip(weights, fields, strict=True)
    mixed = np.asarray(sum(field * (w / float(field[tissue].std())) for w, field in parts))
    mixed *= rng.uniform(0.16, 0.34) / float(mixed[tissue].std())
    return np.asarray(mixed - float(mixed[tissue].mean(dtype=np.float64)))


def _paint_neck(rng: Rng, grid: Points, height_mm: float) -> tuple[Field, Labels, Mask]:
    """Noise-free image, labels and the mask of tissue, each on the whole grid."""
    signal = {name: value * rng.uniform(0.9, 1.1) for name, value in SIGNAL.items()}
    spine = _draw_spine(rng, height_mm)
    skin = _skin_distance(rng, grid)
    image = np.full(skin.shape, signal["air"], dtype=np.float32)
    _paint_soft_tissue(rng, image, grid, skin, signal)
    _paint_canal(image, grid, spine, signal)
    _paint_throat(image, grid, spine, signal)
    airless = image > 2 * signal["air"]
    marrow = signal["marrow"] * (1 + 0.05 * _bumps(rng, grid, (3.0, 3.0, 3.0)))
    label = _paint_vertebrae(image, grid, spine, marrow, signal)
    return image, label, (skin < 0) & (airless | (label > 0))


def make_case(
    seed: int, index: int, spacing_mm: Triple | None = None, extent_mm: Triple = (72, 120, 136)
) -> PhantomCase:
    """Make one labelled neck, fully decided by ``seed`` and ``index``, however many others are made.

    The voxel size is drawn per case when `spacing_mm` is None. Another spacing samples the same anatomy and bias;
    only the noise differs. `extent_mm`, the nominal field of view, is varied by up to 4 % per axis and at most 250.
    C7 rests just above its lower edge.
    """
    rng = np.random.default_rng([seed, index])
    dx, dy, dz = rng.uniform([1.2, 0.98, 0.98], [1.7, 1.22, 1.22]).round(3).tolist()
    spacing_mm = spacing_mm or (dx, dy, dz)
    extent = (np.asarray(extent_mm) * rng.uniform(0.96, 1.04, 3)).tolist()
    counts = [max(1, round(e / d)) for e, d in zip(extent, spacing_mm, strict=True)]
    axes = [(np.arange(n) - (n - 1) / 2) * d for n, d in zip(counts, spacing_mm, strict=True)]
    x, y, z = np.ix_(*(axis.astype(np.float32) for axis in axes))
    image, label, tissue = _paint_neck(rng, (x, y, z), extent[2])
    log_bias = _draw_log_bias(rng, (x, y, z), tissue)
    sigma = float(image[tissue].mean()) / rng.uniform(15, 35)
    # Noise comes last in the stream, as only its draw depends on the grid.
    noise = rng.standard_normal((2, *counts), dtype=np.float32) * sigma
    noisy = np.rint(np.hypot(image * np.exp(log_bias) + noise[0], noise[1]))
    return PhantomCase(noisy.astype(np.int16), label, log_bias.astype(np.float32), spacing_mm)
