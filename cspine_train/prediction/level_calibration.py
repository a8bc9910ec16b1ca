"""Calibration of a run that was trained on levels: the threshold of vertebra, and the temperature of the levels.

A network is overconfident about levels, as the errors of neighbouring vertebrae are not independent. In a small cohort,
all volumes may show the same part of the spine, but the volumes of other patients may end anywhere. Parts of volumes
are therefore predicted, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data import Cohort, PreparedVolume
from cspine_data.tools import count
from cspine_train.errors import RunError
from cspine_train.levels.instances import vertebra_instances
from cspine_train.levels.naming import distances_mm, evidence_of
from cspine_train.levels.sequence import sequence_probability
from cspine_train.metrics.instances import label_centroids
from cspine_train.metrics.overlap import overlap
from cspine_train.metrics.statistics import of_patients
from cspine_train.prediction.labelling import vertebra_probability
from cspine_train.prediction.predictor import LoadedRun

_log = logging.getLogger(__name__)
# Vertebrae in a part. Each part takes a prediction, so a case has only two, at other offsets than the case before.
_PART = 4
# Most cases that are predicted: more take longer and change little.
_MOST_CASES = 20
_TEMPERATURES = tuple(2 ** (step / 2) for step in range(15))
_THRESHOLDS = tuple(step / 20 for step in range(6, 15))


@dataclass(frozen=True, eq=False)
class LevelSample:
    """Evidence and true levels of the vertebrae in a volume, or in a part of it, from head to feet."""

    evidence: NDArray[np.float64]
    distances_mm: tuple[float, ...]
    levels: tuple[int, ...]


def calibrated_levels(
    loaded: LoadedRun, cohort: Cohort, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, float]:
    """Return `threshold` and `level_temperature` for the record of a run that was trained on levels.

    On the validation patients, the threshold maximises the mean Dice of vertebra, and the temperature the mean
    log-probability of the true sequences.
    `progress` is called with (patients done, patients, case id).
    """
    record = loaded.record
    cases = record.validation[:_MOST_CASES]
    dice, samples = [], list[LevelSample]()
    for number, case in enumerate(cases):
        volume = ValidationVolume(loaded, cohort, case)
        dice.append([overlap(volume.vertebra > threshold, volume.truth != 0).dice for threshold in _THRESHOLDS])
        samples += volume.samples((number, number + _PART // 2))
        if progress:
            progress(number + 1, len(cases), case)
    patients = [record.patient(case) for case in cases]
    means = [float(np.mean(list(of_patients(own, patients).values()))) for own in np.transpose(dice).tolist()]
    # Of equally good thresholds, the nearest to 0.5.
    best = max(range(len(means)), key=lambda one: (round(means[one], 4), -abs(_THRESHOLDS[one] - 0.5)))
    chosen = {"threshold": _THRESHOLDS[best], "level_temperature": best_temperature(samples, record.levels)}
    _log.info(
        "levels calibrated on %s and parts of them: threshold %.2f, temperature %.1f",
        count(len(cases), "validation volume"), *chosen.values(),
    )  # fmt: skip
    return chosen


def best_temperature(samples: Sequence[LevelSample], known: Sequence[int]) -> float:
    """Return the temperature, 1 or more, at which the mean log-probability of the true sequences is highest."""

    def mean_log(temperature: float) -> float:
        found = [
            sequence_probability(sample.levels, sample.evidence, known, sample.distances_mm, temperature)
            for sample in samples
        ]
        return float(np.mean(np.log(np.maximum(found, 1e-12)))) if found else 0.0

    return max(_TEMPERATURES, key=mean_log)


class ValidationVolume:
    """A stored case on the network's grid, and the predictions of a run that was trained on levels.

    Attributes
    ----------
    truth : ndarray
        The true levels, (x, y, z); 0 for other labels.
    """

    def __init__(self, loaded: LoadedRun, cohort: Cohort, case: str) -> None:
        self._loaded, self._levels = loaded, loaded.record.levels
        self._own = [loaded.record.label_values.index(level) for level in self._levels]
        variant = loaded.record.settings.variant
        self._prepared: PreparedVolume = cohort.prepared(case, variant)
        truth = self._prepared.label_on_network_grid(cohort.label_xyz(case, variant))
        self.truth: NDArray[Any] = np.where(np.isin(truth, self._levels), truth, 0)
        self._ignored = np.isin(truth, cohort.record(case, variant).ignored_values)

    @cached_property
    def _whole(self) -> NDArray[np.float32]:
        return self._predicted(slice(None))

    @cached_property
    def vertebra(self) -> NDArray[np.float32]:
        """The `vertebra_probability`, (x, y, z); 0 for ignored voxels, which no evaluation counts."""
        return np.where(self._ignored, np.float32(0), vertebra_probability(self._whole, self._own))

    def samples(self, offsets: Iterable[int], vertebrae: int = _PART) -> Iterator[LevelSample]:
        """Iterate over samples of the whole volume and of parts of it.

        A part ends halfway to the next vertebra. Parts whose instances do not correspond one to one to true vertebrae
        are left out: calibration is about names, not about instances.

        Parameters
        ----------
        offsets : iterable of int
            Index of the first vertebra of each part; too large ones start again from the first.
        vertebrae : int
            Number of vertebrae in a part. A volume with no more than that has no parts.
        """
        levels = [level for level in self._levels if (self.truth == level).any()]
        centres = [float(np.nonzero((self.truth == level).any((0, 1)))[0].mean()) for level in levels]
        between = [self.truth.shape[2], *((a + b) / 2 for a, b in pairwise(centres)), 0]
        last = len(levels) - vertebrae
        firsts = dict.fromkeys(offset % (last + 1) for offset in offsets) if last > 0 else ()
        parts = [slice(round(between[first + vertebrae]), round(between[first])) for first in firsts]
        for part, own in [(slice(None), self._whole), *((part, None) for part in parts)]:
            if sample := self._sample(self._predicted(part) if own is None else own, self.truth[:, :, part]):
                yield sample

    def _predicted(self, part: slice) -> NDArray[np.float32]:
        """Return the probability of each label in a range of z."""
        return self._loaded.on_network_grid(self._prepared, part)

    def _sample(self, total: NDArray[np.float32], truth: NDArray[Any]) -> LevelSample | None:
        spacing_mm, predicted = self._prepared.spacing_mm, [total[number] for number in self._own]
        try:
            instances = vertebra_instances(vertebra_probability(total, self._own) > 0.5, spacing_mm, predicted)
        except RunError:
            return None
        numbers = range(1, instances.max() + 1)
        true = tuple(int(np.bincount(truth[instances == number]).argmax()) for number in numbers)
        if not true or 0 in true or len(set(true)) < len(true):
            return None
        centroids = np.array(list(label_centroids(instances, spacing_mm).values()))
        return LevelSample(evidence_of(predicted, instances), tuple(distances_mm(centroids)), true)
