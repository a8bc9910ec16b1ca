"""Which cases may be the same patient under two names: similar names, or correlated fingerprints of volumes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise

import numpy as np
from numpy.typing import NDArray

from cspine_data.preprocessing.tissue import average_down
from cspine_data.volumes.geometry import Orientation, Triple
from cspine_data.volumes.volume import Volume

# Blocks along each axis, at most.
_BLOCKS = 16
# Voxels along each axis that are averaged, about.
_ENOUGH = 96
_SCALE = 127
#: Smallest correlation of two volumes that look like one patient. Different patients correlate by at most 0.68 in
#: spine14, 0.38 in spine_t1 and 0.72 in 40 phantoms. A volume correlates with itself by at least 0.95 after noise, a
#: bias field or a gamma curve, 0.97 after a shift of 1 mm, 0.89 after 2 mm; see
#: docs/decisions/0053-given-splits-sites-and-look-alikes.md.
LEAST_CORRELATION = 0.9
# Volumes that were registered to each other, or generated, are all alike: the median of their correlations is high.
# It is computed from this number of patients on, over at most this number of volumes.
_FEWEST_PATIENTS, _SAMPLE = 6, 200
# Number of volumes that are compared at a time, to limit the memory.
_CHUNK = 1000
# Where a part of a cohort was registered to a template, there are millions of pairs.
_MOST_PAIRS, _MOST_NOTES = 1000, 20
# Where a name has separators, or changes from letters to digits or back.
_WORD_ENDS = re.compile(r"[-_ .]+|(?<=\D)(?=\d)|(?<=\d)(?=\D)")


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """The fingerprint of a case's volume, see `fingerprint`, with the grid in anatomical order."""

    case: str
    patient: str
    size_xyz: tuple[int, ...]
    spacing_xyz_mm: Triple
    levels: NDArray[np.int8]

    @classmethod
    def of(cls, case: str, patient: str, image: Volume) -> Fingerprint:
        """Return the fingerprint of a volume in its file's index order."""
        orientation = Orientation.of(image.geometry)
        volume_xyz = orientation.to_anatomical(image.array)
        spacing_mm = orientation.geometry_xyz(image.geometry).spacing_mm
        return cls(case, patient, volume_xyz.shape, spacing_mm, fingerprint(volume_xyz))


@dataclass(frozen=True)
class LookAlike:
    """Two cases that look like one patient but have different ones, and the correlation of their fingerprints."""

    first: str
    second: str
    correlation: float


def fingerprint(volume_xyz: NDArray[np.number]) -> NDArray[np.int8]:
    """Return a volume's fingerprint, at most 4 kB: the ranks of its local contrast.

    The volume is averaged to at most 16 blocks along each axis. Their Laplacian suppresses coil sensitivity and the
    body outline, which is similar in all patients. Its ranks depend neither on the intensity scale nor on a few bright
    voxels.
    """
    from scipy.ndimage import laplace

    # A few voxels along each side of a block tell as much as all of them.
    some = volume_xyz[tuple(slice(None, None, max(1, size // _ENOUGH)) for size in volume_xyz.shape)]
    averaged = average_down(some, tuple(-(-size // _BLOCKS) for size in some.shape))
    _, place, counts = np.unique(laplace(averaged, mode="nearest"), return_inverse=True, return_counts=True)
    # Equal values have their mean rank.
    ranks = (np.cumsum(counts) - counts / 2)[place.ravel()]
    return np.rint(_SCALE * (2 * ranks / ranks.size - 1)).astype(np.int8)


def look_alikes(fingerprints: Iterable[Fingerprint]) -> list[LookAlike]:
    """Return the pairs of cases that look like one patient but have different ones, at most 1,000.

    The highest correlation is first. Only volumes of equal size and spacing are compared.
    """
    groups: dict[tuple[object, ...], list[Fingerprint]] = defaultdict(list)
    for one in fingerprints:
        groups[one.size_xyz, tuple(round(mm, 3) for mm in one.spacing_xyz_mm)].append(one)
    found = [pair for group in groups.values() if not _all_alike(group) for pair in _pairs(group)]
    return sorted(found, key=lambda pair: (-pair.correlation, pair.first, pair.second))[:_MOST_PAIRS]


def look_alike_notes(fingerprints: Iterable[Fingerprint]) -> list[str]:
    """Return a note for each of `look_alikes`, up to twenty."""
    pairs = look_alikes(fingerprints)
    return _first_of(
        [_note(one.first, one.second, f"correlation of their voxels {one.correlation:.2f}") for one in pairs]
    )


def name_notes(patient_of: Mapping[str, str]) -> list[str]:
    """Return a note for each two patients with similar names, such as ``P-07`` and ``p7``, up to twenty.

    Parameters
    ----------
    patient_of : dict
        The patient of each case.
    """
    alike: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for case, patient in patient_of.items():
        words = tuple(word.lstrip("0") or "0" for word in _WORD_ENDS.split(patient.casefold()) if word)
        alike[words].setdefault(patient, case)
    pairs = [pair for cases in alike.values() for pair in pairwise(cases.items())]
    return _first_of([_note(one, other, f"patients {first} and {second}") for (first, one), (second, other) in pairs])


def _note(first: str, second: str, why: str) -> str:
    return f"case {first} and case {second} look like one patient ({why}): if so, give them one patient in --pairs"


def _first_of(notes: list[str]) -> list[str]:
    more = len(notes) - _MOST_NOTES
    return [*notes[:_MOST_NOTES], f"at least {more} more pairs of cases look like one patient"] if more > 0 else notes


def _pairs(group: Sequence[Fingerprint]) -> Iterator[LookAlike]:
    patients = np.array([one.patient for one in group])
    for start, other in combinations_with_replacement(range(0, len(group), _CHUNK), 2):
        rows, columns = slice(start, start + _CHUNK), slice(other, other + _CHUNK)
        correlations = _standardised(group[rows]) @ _standardised(group[columns]).T
        alike = (correlations >= LEAST_CORRELATION) & (patients[rows, None] != patients[None, columns])
        places = np.argwhere(np.triu(alike) if start == other else alike)
        most = np.argsort(-correlations[tuple(places.T)], kind="stable")[:_MOST_PAIRS]
        for row, column in places[most]:
            first, second = sorted((group[start + row].case, group[other + column].case))
            yield LookAlike(first, second, float(correlations[row, column]))


def _all_alike(group: Sequence[Fingerprint]) -> bool:
    """Return whether most volumes look alike, so that this is no sign of the same patient."""
    if len({one.patient for one in group}) < _FEWEST_PATIENTS:
        return False
    some = _standardised(group[:: -(-len(group) // _SAMPLE)])
    correlations = (some @ some.T)[np.triu_indices(len(some), 1)]
    return bool(np.median(correlations) >= LEAST_CORRELATION)


def _standardised(group: Sequence[Fingerprint]) -> NDArray[np.float32]:
    """Return fingerprints as rows of mean 0 and length 1: the product of two is their correlation."""
    rows = np.stack([one.levels for one in group]).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6))
