"""The record of a run, `run.json`: its settings, data, weights and outcome."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cspine_data import SPINE, RecordedPreprocessing, Split
from cspine_train.errors import RunError
from cspine_train.run.calibration import Calibration
from cspine_train.run.cohort_range import CohortLooks
from cspine_train.run.folder import RECORD_NAME, is_in_use, write_text
from cspine_train.run.origin import Origin
from cspine_train.run.settings import OF_ONE_RUN, PostprocessingSettings, RunSettings

RECORD_VERSION = 1
_MOST_LABELS = 255
# Settings that a fine-tuned run does not take over: of the start, of the cohort's size, and for binary labels only.
_NOT_INHERITED = {"weights", "frozen_share", "size_hw", *PostprocessingSettings.model_fields}
# Characters of a setting that a message shows; a split lists all cases.
_SHOWN = 60
_Side = Annotated[int, Field(gt=0, le=1 << 14)]


class RunRecord(BaseModel):
    """Record of a run: all that prediction and tables need.

    Attributes
    ----------
    store : str
        Location of the store at training.
    settings : RunSettings
        The settings.
    weights_used : str
        Initial weights of the encoder: ``imagenet``, ``none``, or the SHA-256 of a file; of all weights, if there is an
        `origin`.
    origin : Origin or None
        The run that a fine-tuned run starts from.
    size_hw : tuple of int
        Size of a training slice, after resampling, padding and cropping.
    preprocessing : Preprocessing
        Preprocessing of all volumes, also of those to predict.
    notes : tuple of str
        Notes of the store about the cohort, such as that it is synthetic.
    train, validation, test : tuple of str
        Case ids of each part.
    label_values : tuple of int
        Label values of the network's classes, in the order of its channels after the background. One value alone has a
        single channel. Empty for binary labels.
    label_meaning : dict
        Meaning of the values of predicted label maps.
    levels : tuple of int
        The `label_values` that are levels of vertebrae, from head to feet; empty if the labels mean something else.
    level_temperature : float
        Temperature of the probabilities of levels, chosen on the validation patients; see `find_sequence`.
    cohort_looks : CohortLooks or None
        Ranges of properties of the training volumes; None in old records.
    digests : dict
        The store's digest of each case.
    voxels_sha256 : dict
        Digest of the voxels of each case, which does not depend on how they were prepared.
    patients : dict
        The patient of each case that is not its patient's only one.
    versions : dict
        Versions of the libraries that decide the outcome.
    processes, deterministic
        Number of training processes, and whether only deterministic algorithms were used.
    finished : bool
        Whether training is complete.
    kept_epoch, kept_dice
        Epoch of the kept weights, from 0, and its mean validation Dice at the network's pixel size.
    threshold : float
        Threshold of the probability of vertebra, which gave that Dice. Several labels have none: the most probable
        label is predicted.
    kept_components : int or None
        Largest number of connected components of a prediction, by size; None for no limit.
    filled_holes : bool
        Whether holes of a prediction are filled.
    calibration : Calibration or None
        Calibration of the probabilities, for the expected Dice; None in old records and until training is finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    record_version: int = RECORD_VERSION
    store: str
    settings: RunSettings
    weights_used: str
    origin: Origin | None = None
    size_hw: tuple[_Side, _Side]
    preprocessing: RecordedPreprocessing
    notes: tuple[str, ...] = ()
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    label_values: tuple[int, ...] = Field(default=(), max_length=_MOST_LABELS)
    label_meaning: dict[int, str] = Field(default_factory=lambda: {0: "background", 1: "vertebra"})
    levels: tuple[int, ...] = ()
    level_temperature: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    cohort_looks: CohortLooks | None = None
    digests: dict[str, str]
    voxels_sha256: dict[str, str] = Field(default_factory=dict)
    patients: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str]
    processes: int = 1
    deterministic: bool = False
    finished: bool = False
    kept_epoch: int | None = None
    kept_dice: float | None = None
    threshold: float = Field(default=0.5, gt=0, lt=1)
    kept_components: int | None = Field(default=None, ge=1)
    filled_holes: bool = False
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _levels_are_labels(self) -> Self:
        if list(self.levels) != [level for level in SPINE if level in self.levels and level in self.label_values]:
            raise ValueError("levels must be label values of vertebrae, from head to feet")
        return self

    @property
    def vertebrae(self) -> frozenset[int]:
        """The vertebrae in its label maps, with levels that no training case has; none if the labels are not levels."""
        others = set(self.label_values) - set(self.levels)
        return frozenset(SPINE).difference(others) if self.levels else frozenset()

    @property
    def split(self) -> Split:
        """The cases of each part."""
        return Split(self.train, self.validation, self.test)

    @property
    def inherited_settings(self) -> dict[str, Any]:
        """The settings that a run that is fine-tuned from this one takes over."""
        return self.settings.model_dump(exclude={*OF_ONE_RUN, *_NOT_INHERITED})

    def patient(self, case: str) -> str:
        """Return the patient of a case."""
        return self.patients.get(case, case)

    def why_no_expected_dice(self) -> str:
        """Return why predictions of this run have no expected Dice; empty if they have one."""
        calibration = self.calibration
        if calibration is None and not self.finished:
            return "training is not finished"
        if calibration is None:
            reasons = "an earlier version, no labelled validation patient, or an error"
            return f"training did not calibrate its probabilities ({reasons})"
        if not calibration.agrees:
            expected, true = calibration.expected_dice, calibration.true_dice
            return (
                f"it would mislead: on the validation patients, the mean expected Dice is {expected:.3f} and the mean "
                f"true Dice {true:.3f}"
            )
        return ""

    @property
    def start(self) -> str:
        """What the weights started from."""
        used = self.weights_used
        if self.origin:
            return self.origin.text(used)
        start = {"none": "random weights", "imagenet": "ImageNet weights"}.get(
            used, f"weights from a file ({used[:12]})"
        )
        if self.settings.weights == "auto" and used == "none":
            start += " (ImageNet weights were unavailable)"
        return f"encoder {self.settings.encoder} started from {start}"

    def caveats(self) -> tuple[str, ...]:
        """Return notes that belong beside every figure of this run."""
        caveats = (self.start, *(f"data: {note}" for note in self.notes))
        if self.origin and (same := self.origin.same_names(self.split, self.patients)):
            caveats = (*caveats, same)
        if self.settings.test_site is not None:
            caveats = (*caveats, f"tested on site {self.settings.test_site}, trained on the others")
        if self.finished or self.kept_epoch is None:
            return caveats
        unfinished = f"training is not finished: weights of epoch {self.kept_epoch + 1}, of {self.settings.length}"
        return (*caveats, f"{unfinished}; the same cspine-train run command resumes it")


def save_record(run: Path, record: RunRecord) -> None:
    """Write a run's record atomically."""
    write_text(run / RECORD_NAME, record.model_dump_json(indent=1))


def load_record(run: Path) -> RunRecord:
    """Read a run's record.

    Raises `RunError` if the folder is no run, holds a link to the outside, its record is damaged, or a newer cspine
    wrote it.
    """
    # A run may come from anywhere: files outside it must not be read, copied into a report, or overwritten.
    for folder, folders, files in os.walk(run):
        for inside in (Path(folder, name) for name in (*folders, *files)):
            try:
                mode = inside.lstat().st_mode
            except FileNotFoundError:
                # Another process renamed or removed it.
                continue
            if stat.S_ISLNK(mode) and not inside.resolve().is_relative_to(run.resolve()):
                raise RunError(f"{inside}: leads out of the run folder; copy the run whole, without links")
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunError(f"{inside}: is neither a file nor a folder; remove it")
    try:
        content = (run / RECORD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RunError(f"{run}: is no run folder; make one with cspine-train run") from None
    try:
        version = json.loads(content)["record_version"]
    except (ValueError, KeyError, TypeError):
        version = None
    if isinstance(version, int) and version > RECORD_VERSION:
        raise RunError(f"{run}: was written by a newer cspine; install that")
    try:
        return RunRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise RunError(f"{run / RECORD_NAME}: is damaged ({where}: {first['msg']}); train it again") from None


def record_to_resume(run: Path, settings: RunSettings, digests: dict[str, str], first: bool) -> RunRecord | None:
    """Return the record of the run that a folder holds; None if there is none yet.

    Only rank 0 (`first`) refuses a folder without a record that is not empty: the others may find its files. Raises
    `RunError` if the folder holds a run of other settings or data, or something else.
    """
    if not (run / RECORD_NAME).exists():
        if first and is_in_use(run):
            raise RunError(f"{run}: is there and is no run folder; choose another with -o")
        return None
    record = load_record(run)
    wanted, found = settings.model_dump(), record.settings.model_dump()
    other = [
        f"{name} {_short(value)}, not {_short(wanted[name])}" for name, value in found.items() if value != wanted[name]
    ]
    if other:
        raise RunError(f"{run}: holds a run of other settings ({'; '.join(other)}); choose another folder with -o")
    if record.digests != digests:
        raise RunError(f"{run}: was trained on other data than the store holds now; choose another folder with -o")
    return record


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
