"""The scores of one patient's prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cspine_data import SACRUM
from cspine_train.metrics.instances import LevelAgreement, label_overlaps, level_agreement, true_levels
from cspine_train.metrics.overlap import (
    Agreement,
    Overlap,
    agreement,
    batch_averaged_dice,
    label_agreements,
    mean_over_labels,
)
from cspine_train.prediction.predictor import LoadedRun, fused_calibration
from cspine_train.prediction.stored_volumes import Segmented
from cspine_train.run.record import RunRecord


@dataclass(frozen=True)
class PatientScore:
    """Scores of one patient's volume.

    Attributes
    ----------
    case, split, patient : str
        Case id, its part of the split, and its patient.
    whole : Agreement
        All measures of the whole volume: vertebra or background, whatever the labels.
    batch_averaged_dice : float
        Dice as in the reference study, see `batch_averaged_dice`, over slices along the run's axes.
    labels : dict or None
        Measures for each true or predicted label value; None for binary labels.
    slices : dict
        Overlap in each slice along the run's axes, by axis and index; slices empty in both masks are left out.
    confusion : dict
        Number of voxels by (true, predicted) label value, 0 for none; empty for binary labels.
    levels : LevelAgreement or None
        Agreement of the named vertebrae; None if the run's labels are not levels.
    probabilities : dict
        Probability of each predicted vertebra's name, by level.
    true_levels : dict
        True level of each predicted vertebra, see `true_levels`.
    expected_dice : float or None
        See `Prediction`; None if the run has none.
    """

    case: str
    split: str
    whole: Agreement
    batch_averaged_dice: float
    labels: Mapping[int, Agreement] | None = None
    slices: Mapping[int, Mapping[int, Overlap]] = field(default_factory=dict)
    confusion: Mapping[tuple[int, int], int] = field(default_factory=dict)
    patient: str = ""
    levels: LevelAgreement | None = None
    probabilities: Mapping[int, float] = field(default_factory=dict)
    true_levels: Mapping[int, int] = field(default_factory=dict)
    expected_dice: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """Values of the `patient_measures` that the patient has, by name."""
        own = {"batch_averaged_dice": self.batch_averaged_dice}
        if self.label_dice is not None and self.label_iou is not None:
            own |= {"label_dice": self.label_dice, "label_iou": self.label_iou}
        return {**self.whole.figures, **own, **(self.levels.figures if self.levels else {})}

    @property
    def voxels(self) -> Overlap:
        """Numbers of voxels of the whole volume."""
        return self.whole.voxels

    @property
    def dice(self) -> float:
        """Dice of the whole volume."""
        return self.whole.dice

    @property
    def iou(self) -> float:
        """Intersection over union of the whole volume."""
        return self.whole.iou

    @property
    def label_dice(self) -> float | None:
        """Mean Dice over the patient's labels, see `mean_over_labels`; None for binary labels."""
        return None if self.labels is None else mean_over_labels(self.labels, "dice")

    @property
    def label_iou(self) -> float | None:
        """Mean intersection over union over the patient's labels; None for binary labels."""
        return None if self.labels is None else mean_over_labels(self.labels, "iou")


def _expected_dice(segmented: Segmented, record: RunRecord) -> float | None:
    calibration, probability = fused_calibration([record]), segmented.probability_xyz
    if calibration is None or probability is None:
        return None
    found = segmented.found_xyz != 0
    return calibration.expected_dice_of(probability[None], 1, found, segmented.spacing_mm, segmented.ignored_xyz)


def score_patient(segmented: Segmented, part: str, loaded: LoadedRun) -> PatientScore:
    """Score a patient's prediction by a run."""
    found, truth, spacing_mm = segmented.scored(segmented.found_xyz), segmented.truth_xyz, segmented.spacing_mm
    record, slices = loaded.record, segmented.slices
    several = bool(record.label_values)
    overlaps = label_overlaps(found, truth) if several else {}
    labelled = [v for of_axis in slices.values() for v in of_axis.values() if v.true_positive + v.false_negative]
    spine = segmented.spine.levels if segmented.spine else ()
    return PatientScore(
        segmented.case,
        part,
        agreement(found != 0, truth != 0, spacing_mm),
        batch_averaged_dice(labelled, record.settings.batch_size),
        label_agreements(found, truth, spacing_mm) if several else None,
        slices,
        overlaps,
        record.patient(segmented.case),
        level_agreement(found, truth, spacing_mm, overlaps, record.vertebrae) if record.levels else None,
        {vertebra.value: vertebra.probability for vertebra in spine},
        # A spine may end with the sacrum, which is no vertebra.
        true_levels(overlaps, {*record.vertebrae, SACRUM}) if record.levels else {},
        _expected_dice(segmented, record),
    )
