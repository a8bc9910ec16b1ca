"""A synthetic cervical cohort on disk: volumes, label maps and true bias fields."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from cspine_data.errors import InputError
from cspine_data.files import atomic_write, make_folder
from cspine_data.phantom.anatomy import PhantomCase, make_case
from cspine_data.progress import Progress
from cspine_data.sources.cases import NOTE_FILE, cohort_note
from cspine_data.volumes.geometry import Geometry, Orientation, as_rows
from cspine_data.volumes.io import volume_stem, volume_suffix, write_volume
from cspine_data.volumes.volume import Volume

#: Folder, beside the volumes, of the natural logarithms of the true bias fields.
TRUTH_FOLDER = "truth"
_NOTE = "synthetic cervical phantom, not patients"

# Storage orders of scanners: index axes of the file for x, y, z, and flipped axes.
_STORED_AS = (
    Orientation((0, 1, 2), (False, False, False)),
    Orientation((2, 0, 1), (False, False, True)),
    Orientation((0, 1, 2), (True, True, False)),
    Orientation((2, 1, 0), (True, False, False)),
    Orientation((0, 2, 1), (False, True, True)),
)


def make_phantom_cohort(
    folder: str | Path, cases: int = 14, seed: int = 0, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write a synthetic labelled T2-weighted cohort in the naming of the reference study; return the volumes.

    `CS_01.nrrd` and `CS_01S-label.nrrd` (1 to 7 for C1 to C7), and `truth/CS_01-log-bias.nrrd`. Anatomy, contrast,
    noise, bias field, spacing and orientation vary from case to case. A case depends on the seed and its number
    only. `progress` is called with (cases written, cases, case id). The folder must not contain other volumes, so
    that real and synthetic data are not mixed.
    """
    folder = Path(folder)
    if not 1 <= cases <= 9999:
        raise InputError(f"cases {cases}", "is out of range", "give 1 to 9999")
    if seed < 0:
        raise InputError(f"seed {seed}", "is negative", "give 0 or more")
    digits = max(2, len(str(cases)))
    names = [f"CS_{number:0{digits}d}" for number in range(1, cases + 1)]
    _refuse_other_volumes(folder, names)
    make_folder(folder)
    with atomic_write(folder / NOTE_FILE) as temporary:
        temporary.write_text(f"{_NOTE} (seed {seed})\n", encoding="utf-8")
    paths = []
    for number, name in enumerate(names):
        case = make_case(seed, number)
        geometry, stored_as = _scanner_grid(case, seed, number)

        def stored(array_xyz: np.ndarray, geometry: Geometry = geometry, order: Orientation = stored_as) -> Volume:
            return Volume(np.asfortranarray(order.to_file(array_xyz)), geometry)

        write_volume(folder / f"{name}S-label.nrrd", stored(case.label_xyz))
        write_volume(folder / TRUTH_FOLDER / f"{name}-log-bias.nrrd", stored(case.log_bias_xyz))
        paths.append(folder / f"{name}.nrrd")
        write_volume(paths[-1], stored(case.image_xyz))
        if progress:
            progress(number + 1, cases, name)
    return tuple(paths)


def _refuse_other_volumes(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder with volumes that are no phantoms of these names."""
    if folder.is_dir():
        known = {name for number in names for name in (number, f"{number}S-label")}
        others = [file for file in folder.iterdir() if volume_suffix(file) and volume_stem(file) not in known]
        if others:
            raise InputError(folder, f"holds other volumes ({sorted(others)[0].name})", "choose an empty folder")
        if any(map(volume_suffix, folder.iterdir())) and not (cohort_note(folder) or "").startswith(_NOTE):
            raise InputError(folder, "holds volumes that are no cspine phantoms", "choose an empty folder")
    elif folder.exists():
        raise InputError(folder, "is a file", "choose a folder")


def _scanner_grid(case: PhantomCase, seed: int, number: int) -> tuple[Geometry, Orientation]:
    """Return the grid of the file, slightly oblique in every third case, and its orientation."""
    rng = np.random.default_rng([seed, number, 1])
    angles = rng.uniform(-8, 8, 3) if number % 3 == 2 else np.zeros(3)
    directions = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    extent_mm = np.array(case.image_xyz.shape) * case.spacing_mm
    anatomical = Geometry(
        size=case.image_xyz.shape,
        spacing_mm=case.spacing_mm,
        directions=as_rows(directions),
        origin_mm=tuple((directions @ (-extent_mm / 2)).tolist()),
    )
    stored_as = _STORED_AS[number % len(_STORED_AS)]
    return stored_as.geometry_in_file(anatomical), stored_as
