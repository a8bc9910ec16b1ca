"""What a training run is asked to do, and what it did: typed records, saved beside the model."""

from __future__ import annotations

import json
import os
import unicodedata
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cspine_data import RecordedPreprocessing, Split
from cspine_train.errors import RunError
from cspine_train.extensions import AUGMENTATIONS, LOSSES, check_name
from cspine_train.run.cohort_range import CohortLooks
from cspine_train.run.folder import RECORD_NAME, write_text

RECORD_VERSION = 1
# Beyond these a record asks for more memory than anybody has: somebody may have written it who wants that.
_MOST_CONTEXT = 64
_LEAST_PIXEL_MM = 0.05
_MOST_LABELS = 255
_Axis = Annotated[int, Field(ge=0, le=2)]
_Side = Annotated[int, Field(gt=0, le=1 << 14)]


def _check_augmentations(names: str) -> str:
    return "+".join(check_name(AUGMENTATIONS, name) for name in names.split("+"))


class RunSettings(BaseModel):
    """What decides the outcome of a run; two runs of equal settings on equal data give equal models.

    Attributes
    ----------
    model, encoder : str
        Architecture and encoder, by the names of `segmentation_models_pytorch`; ``tu-`` reaches any timm encoder.
    weights : str
        ``auto``, ``imagenet``, ``none`` or a file.
    axes : tuple of int
        The axes whose slices one model learns from; its probabilities are averaged over them.
    variant : str
        ``n4`` or ``raw``.
    epochs, batch_size, learning_rate, seed
        As everywhere.
    schedule : str
        ``plateau``: the rate divided by 3 after 5 epochs in a row without a higher validation Dice, stop after 7 (the
        reference study);
        ``onecycle``: the rate rises and falls once over exactly `epochs` (Smith and Topin 2018); ``cosine``: it rises
        over the first 20th of them and falls as a cosine does.
    clip_norm : float or None
        Longest gradient; longer ones are shortened to it.
    average : float
        Keep a running average of the weights, of which a step leaves this share as it is; 0 keeps the weights
        themselves.
    compile : bool
        Let `torch.compile` make the training step; on a CPU it needs a C++ compiler.
    context : int
        Neighbouring slices on each side that the network sees as channels (2.5-D).
    coarse_share : float
        Share of the steps, the first ones, that see pixels larger by half (progressive resolution).
    pixel_mm : float or None
        Pixel size that slices are resampled to for the network; None leaves them as they are.
    size_hw : tuple of int or None
        Height and width of a training slice at the network's pixel size: padded, or cropped about its centre, which may
        cut off nothing labelled. None is the smallest that holds every slice. Validation and prediction always see
        whole slices.
    crop_margin_mm : float or None
        Train on a part of each slice, at a random place: as large as the largest labelled region of a training
        patient and this margin around it. None trains on whole slices; validation and prediction always do.
    empty_share : float
        Slices without a label seen in an epoch, as a share of those with one.
    case_weights : dict
        How often slices of a case are seen, in comparison with the others; 1 where nothing is said, 0 leaves the case's
        slices out of training. A case that does not train has no use for its weight.
    balance : str
        ``slices``: every labelled slice is seen equally often, times its case's weight; ``cases``: every case, however
        many labelled slices it has. An epoch has as many slices either way.
    loss : str
        The loss: a name in the group ``cspine.losses``, see `SegmentationLoss`.
    labels : str
        ``binary``: vertebra or not; ``stored``: each label value that training patients have is a class.
    augment : str
        Augmentation: ``none``, ``light`` (position, contrast, noise), ``reference`` (as in the reference study),
        ``strong`` (leaves no contrast to memorise), or a name in the group ``cspine.augmentations``; several are joined
        by ``+``, see `Augmentation`.
    largest_components : int or None
        Keep at most so many connected components of a prediction, the largest, if that gives the validation patients a
        higher Dice on whole volumes; None keeps all. For binary labels.
    fill_holes : bool
        Fill the holes of a prediction, if that gives the validation patients a higher Dice on whole volumes. For binary
        labels.
    folds, fold : int or None
        Cross-validation instead of the reference split.
    precision : str
        ``auto``: bfloat16 where the processor has it, else ``32``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = "unet"
    encoder: str = "resnet18"
    weights: str = "auto"
    axes: tuple[_Axis, ...] = Field(default=(0,), min_length=1)
    variant: str = "n4"
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["plateau", "onecycle", "cosine"] = "plateau"
    clip_norm: float | None = Field(default=None, gt=0)
    average: float = Field(default=0, ge=0, lt=1)
    compile: bool = False
    context: int = Field(default=0, ge=0, le=_MOST_CONTEXT)
    coarse_share: float = Field(default=0, ge=0, le=1)
    pixel_mm: float | None = Field(default=None, ge=_LEAST_PIXEL_MM)
    size_hw: tuple[PositiveInt, PositiveInt] | None = None
    crop_margin_mm: float | None = Field(default=None, ge=0)
    empty_share: float = Field(default=0.25, ge=0)
    case_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    balance: Literal["slices", "cases"] = "slices"
    loss: Annotated[str, AfterValidator(partial(check_name, LOSSES))] = "dice_bce"
    labels: Literal["binary", "stored"] = "binary"
    augment: Annotated[str, AfterValidator(_check_augmentations)] = "light"
    largest_components: int | None = Field(default=None, ge=1)
    fill_holes: bool = False
    seed: int = Field(default=0, ge=0)
    folds: int | None = Field(default=None, ge=3)
    fold: int = Field(default=0, ge=0)
    precision: Literal["auto", "32", "bf16"] = "auto"

    @field_validator("augment", mode="before")
    @classmethod
    def _older_runs_said_yes_or_no(cls, augment: object) -> object:
        return {True: "light", False: "none"}.get(augment, augment) if isinstance(augment, bool) else augment

    @field_validator("case_weights")
    @classmethod
    def _names_are_composed(cls, case_weights: dict[str, float]) -> dict[str, float]:
        return {unicodedata.normalize("NFC", case): weight for case, weight in case_weights.items()}

    def weight_of(self, case: str) -> float:
        """Return a case's weight; names are compared in Unicode's composed form (NFC)."""
        return self.case_weights.get(unicodedata.normalize("NFC", case), 1.0)

    @model_validator(mode="after")
    def _fold_is_one_of_folds(self) -> Self:
        if self.fold and not self.folds:
            raise ValueError("a fold needs --folds, the number of all")
        if self.folds and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} is none of {self.folds}, which are counted from 0")
        return self

    @model_validator(mode="after")
    def _components_and_holes_are_of_one_label(self) -> Self:
        for asked, option in ((self.largest_components, "--largest-components"), (self.fill_holes, "--fill-holes")):
            if asked and self.labels == "stored":
                raise ValueError(f"{option} is for binary labels; leave it out")
        return self

    @property
    def axes_name(self) -> str:
        """The axes as users write them: ``0``, or ``012``."""
        return "".join(map(str, self.axes))

    def run_name(self, start: str = "") -> str:
        """Return what a run's folder is called for people; `start` says what its encoder starts from, if anything."""
        fold = f"-fold{self.fold}of{self.folds}" if self.folds else ""
        encoder = f"{self.encoder}-{start}" if start else self.encoder
        return f"{self.model}-{encoder}-axis{self.axes_name}-{self.variant}{fold}-seed{self.seed}"

    @property
    def channels(self) -> int:
        """How many slices the network sees at once."""
        return 2 * self.context + 1


class RunRecord(BaseModel):
    """What a run is and what was fed to it: everything that prediction and an honest table need.

    Attributes
    ----------
    store : str
        Where the store was, to evaluate from.
    settings : RunSettings
        What was asked.
    weights_used : str
        What the encoder started from: ``imagenet``, by name or from an installed package; ``none``; or the SHA-256 of
        a file.
    size_hw : tuple of int
        The fixed size of a training slice, after resampling, padding and cropping.
    preprocessing : Preprocessing
        What was done to every volume, and is done to a volume to predict.
    notes : tuple of str
        What the cohort is, where it is not what it stands for: said beside every figure.
    train, validation, test : tuple of str
        The case ids of each part.
    label_values : tuple of int
        The label values that the network tells apart, in the order of its channels after the background's; one alone
        is a sigmoid's, as are binary labels, for which there are none.
    label_meaning : dict
        What the values of a label map that the run predicts mean.
    cohort_looks : CohortLooks or None
        What training volumes look like, so that a volume that is unlike them can be told; an older cspine kept none.
    digests : dict
        The store's digest of every case of the run.
    versions : dict
        Of the libraries that decide the outcome.
    processes, deterministic
        In how many processes it trained at last, and whether with deterministic algorithms only.
    finished : bool
        False until training ended by itself.
    kept_epoch, kept_dice
        The epoch whose weights the run keeps, from 0 (the best on validation, or the last of one cycle), and its mean
        Dice over the validation patients at the network's pixel size.
    threshold : float
        The probability above which a voxel is vertebra: the one that gave that Dice. Of several labels the likeliest is
        taken.
    kept_components : int or None
        How many connected components of a prediction are kept at most, the largest; None where all are.
    filled_holes : bool
        Whether the holes of a prediction are filled then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    record_version: int = RECORD_VERSION
    store: str
    settings: RunSettings
    weights_used: str
    size_hw: tuple[_Side, _Side]
    preprocessing: RecordedPreprocessing
    notes: tuple[str, ...] = ()
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    label_values: tuple[int, ...] = Field(default=(), max_length=_MOST_LABELS)
    label_meaning: dict[int, str] = Field(default_factory=lambda: {0: "background", 1: "vertebra"})
    cohort_looks: CohortLooks | None = None
    digests: dict[str, str]
    versions: dict[str, str]
    processes: int = 1
    deterministic: bool = False
    finished: bool = False
    kept_epoch: int | None = None
    kept_dice: float | None = None
    threshold: float = Field(default=0.5, gt=0, lt=1)
    kept_components: int | None = Field(default=None, ge=1)
    filled_holes: bool = False

    @property
    def split(self) -> Split:
        """The cases by part."""
        return Split(self.train, self.validation, self.test)

    def caveats(self) -> tuple[str, ...]:
        """Return what has to be said beside every figure of this run."""
        asked, used = self.settings.weights, self.weights_used
        start = {"none": "random weights", "imagenet": "ImageNet weights"}.get(
            used, f"weights from a file ({used[:12]})"
        )
        if asked == "auto" and used == "none":
            start += " (ImageNet weights could not be had)"
        return (f"encoder {self.settings.encoder} started from {start}", *(f"data: {note}" for note in self.notes))


def save_record(run: Path, record: RunRecord) -> None:
    """Write a run's record in one step."""
    write_text(run / RECORD_NAME, record.model_dump_json(indent=1))


def load_record(run: Path) -> RunRecord:
    """Read a run's record.

    Raises
    ------
    RunError
        If the folder is no run, a link in it leads elsewhere, its record is damaged, or a newer cspine wrote it.
    """
    # A run may come from anywhere: nothing outside it is read, sent on in a report, or written over.
    for folder, folders, files in os.walk(run):
        for inside in (Path(folder, name) for name in (*folders, *files)):
            if inside.is_symlink() and not inside.resolve().is_relative_to(run.resolve()):
                raise RunError(f"{inside}: leads out of the run folder; copy the run whole, without links")
            if not inside.is_symlink() and not (inside.is_file() or inside.is_dir()):
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
        raise RunError(f"{run / RECORD_NAME}: is damaged ({where}: {first['msg']}); train it anew") from None
