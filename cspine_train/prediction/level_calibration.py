"""Calibration of the probabilities of levels on the validation patients.

A network is surer of its levels than it should be: neighbouring vertebrae are wrong together. Whole volumes of a small
cohort show the same part of the spine, so that parts of them are predicted, too: a volume of another patient may end
anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cspine_data import Cohort, PreparedVolume
from cspine_data.tools import count
from cspine_train.levels.instances import vertebra_instances
from cspine_train.levels.naming import distances_mm, evidence_of
from cspine_train.levels.sequence import sequence_probability
from cspine_train.prediction.predictor import LoadedRun

_log = logging.getLogger(__name__)
# Vertebrae in a part of a volume. Each case has two parts, other ones than the case before: a part costs a prediction.
_PART = 4
# Cases that are predicted; more take longer and change little.
_MOST_CASES = 20
_TEMPERATURES = tuple(2 ** (step / 2) for step in range(15))


@dataclass(frozen=True, eq=False)
class LevelSample:
    """The evidence for the levels of a volume or a part of it, and the true levels, from head to feet."""

    evidence: NDArray[np.float64]
    distances_mm: tuple[float, ...]
    levels: tuple[int, ...]


def level_temperature(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> float:
    """Return the temperature at which the true sequences of the validation patients are most probable."""
    samples: list[LevelSample] = []
    cases = loaded.record.validation[:_MOST_CASES]
    for number, case in enumerate(cases):
        samples += level_samples(loaded, cohort, case, (number, number + _PART // 2))
        if progress:
            progress(number + 1, len(cases), case)
    best = best_temperature(samples, loaded.record.levels)
    _log.info("levels calibrated on %s of validation volumes: temperature %.1f", count(len(samples), "part"), best)
    return best


def best_temperature(samples: Sequence[LevelSample], known: Sequence[int]) -> float:
    """Return the temperature, 1 or more, at which the mean log-probability of the true sequences is highest."""

    def mean_log(temperature: float) -> float:
        found = [
            sequence_probability(sample.levels, sample.evidence, known, sample.distances_mm, temperature)
            for sample in samples
        ]
        return float(np.mean(np.log(np.maximum(found, 1e-12)))) if found else 0.0

    return max(_TEMPERATURES, key=mean_log)


def level_samples(
    loaded: LoadedRun, cohort: Cohort, case: str, offsets: Iterable[int], vertebrae: int = _PART
) -> Iterator[LevelSample]:
    """Predict a stored case, and parts of it, on the network's grid.

    A part ends halfway to the next vertebra. Parts whose vertebrae were not found one by one are left out: their levels
    are no question of calibration.

    Parameters
    ----------
    loaded : LoadedRun
        A run that was trained on levels.
    cohort : Cohort
        Its store.
    case : str
        The case.
    offsets : iterable of int
        The first vertebra of each part; after the last possible one, the first follows.
    vertebrae : int
        Vertebrae of a part; a case with no more of them has no parts.
    """
    variant = loaded.record.settings.variant
    prepared = cohort.prepared(case, variant)
    truth = prepared.label_on_network_grid(cohort.label_xyz(case, variant))
    levels = [level for level in loaded.record.levels if (truth == level).any()]
    centres = [float(np.nonzero((truth == level).any((0, 1)))[0].mean()) for level in levels]
    between = [truth.shape[2], *((a + b) / 2 for a, b in pairwise(centres)), 0]
    parts = [(0, truth.shape[2])]
    if len(levels) > vertebrae:
        firsts = dict.fromkeys(offset % (len(levels) - vertebrae + 1) for offset in offsets)
        parts += [(round(between[first + vertebrae]), round(between[first])) for first in firsts]
    for low, high in parts:
        if sample := _sample(loaded, prepared, truth, slice(low, high)):
            yield sample


def _sample(loaded: LoadedRun, prepared: PreparedVolume, truth: NDArray[np.int_], part: slice) -> LevelSample | None:
    record = loaded.record
    total = loaded.on_network_grid(prepared, part)
    own = [total[record.label_values.index(level)] for level in record.levels]
    vertebra = np.sum(own, 0)
    instances = vertebra_instances(vertebra > 0.5, prepared.spacing_mm)
    true = tuple(_most_frequent(truth[:, :, part][instances == number]) for number in range(1, instances.max() + 1))
    if not true or 0 in true or len(set(true)) < len(true):
        return None
    places = ndimage.center_of_mass(instances > 0, instances, range(1, len(true) + 1))
    distances = distances_mm(np.array(places) * prepared.spacing_mm)
    return LevelSample(evidence_of(own, instances), tuple(distances), true)


def _most_frequent(values: NDArray[np.int_]) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])
