"""Settings of a training run: each field is the one definition of an option, its help, bounds and default.

Nothing here imports PyTorch, so that the command line starts at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cspine_data import GivenSplit
from cspine_data.tools import count
from cspine_data.typed_options import Spelling, spelling_of
from cspine_train.extensions import AUGMENTATIONS, LOSSES

#: Planes of the slices along axes 0, 1 and 2.
PLANES = ("sagittal", "coronal", "axial")
#: Axes of a model, by their name in options.
AXES = {"0": (0,), "1": (1,), "2": (2,), "012": (0, 1, 2)}
# A record may come from anybody: beyond these bounds, a run needs more memory than any machine has.
_MOST_CONTEXT = 64
_LEAST_PIXEL_MM = 0.05
# A year.
_MOST_MINUTES = 366 * 24 * 60
# Characters that names of folders must not have.
_UNSAFE = re.compile(r"[^\w-]")
_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _check_augmentations(names: str) -> str:
    return "+".join(AUGMENTATIONS.check(name) for name in names.split("+"))


def _axes(given: object) -> object:
    return AXES.get(str(given), given) if isinstance(given, str | int) else given


def _none_for(word: str) -> Callable[[object], object]:
    """Return a validator that reads a word as None."""
    return lambda given: None if given == word else given


def _size(given: object) -> object:
    if not isinstance(given, str | int):
        return given
    sides = str(given).split(",")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 7 for side in sides):
        raise ValueError(f"{given!r} is not H,W, such as 256,192, or one number for both")
    return int(sides[0]), int(sides[-1])


def _case_weights(given: object) -> object:
    """Read CASE=WEIGHT texts; names are compared in Unicode's composed form (NFC)."""
    if isinstance(given, list | tuple):
        pairs = {text: str(text).rpartition("=") for text in given}
        if bad := [text for text, (case, _, _) in pairs.items() if not case]:
            raise ValueError(f"{bad[0]!r} is not CASE=WEIGHT, such as CS_01=2")
        given = {case: weight for case, _, weight in pairs.values()}
    if isinstance(given, dict):
        return {unicodedata.normalize("NFC", str(case)): weight for case, weight in given.items()}
    return given


class ModelSettings(BaseModel):
    """Model: architecture, encoder and initial weights."""

    model_config = _FROZEN

    model: str = "linknet"
    """Architecture, by SMP's name; cspine-train models lists them."""
    encoder: str = "tu-resnet10t"
    """Encoder, by SMP's name; tu-NAME is any encoder of timm."""
    weights: str = "auto"
    """Initial weights of the encoder: auto, imagenet, none (random) or a file. auto takes ImageNet's where they are
    available and reports what it took."""
    from_run: Annotated[str | None, Spelling("--from", metavar="RUN")] = None
    """Fine-tune: start from all weights of this run, with a new head if the labels differ. Its settings replace the
    defaults, except split, case weights, seed and --frozen-share."""
    context: int = Field(default=1, ge=0, le=_MOST_CONTEXT)
    """Neighbouring slices on each side as further input channels (2.5-D)."""

    @property
    def channels(self) -> int:
        """Number of slices that the network sees at once."""
        return 2 * self.context + 1


class DataSettings(BaseModel):
    """Data: which slices train the model, at which size, and how often."""

    model_config = _FROZEN

    axes: Annotated[
        tuple[Annotated[int, Field(ge=0, le=2)], ...],
        BeforeValidator(_axes),
        Field(min_length=1),
        Spelling("--axis", choices=tuple(AXES)),
    ] = (0,)
    """Slices: 0 sagittal, 1 coronal, 2 axial, 012 one model for all three."""
    variant: Annotated[str, Spelling(choices=("n4", "raw"))] = "n4"
    """Bias field corrected (n4) or not (raw)."""
    labels: Literal["binary", "stored"] = "binary"
    """binary: vertebra or background; stored: each label value of the training patients is a class."""
    folds: int | None = Field(default=None, ge=3)
    """Number of folds for cross-validation, instead of the reference split."""
    fold: int = Field(default=0, ge=0)
    """The fold of --folds or --split whose patients are the test patients, from 0."""
    split: Annotated[GivenSplit | None, Spelling(metavar="FILE")] = None
    """Split from a file: nnU-Net's splits_final.json (the val cases of --fold become the test cases), or a CSV file
    with the columns case (or patient) and part (train, validation, test)."""
    test_site: str | None = None
    """Test on this site; train and validate on the others."""
    pixel_mm: Annotated[float | None, BeforeValidator(_none_for("own")), Spelling(metavar="MM|own", text=True)] = Field(
        default=2.0, ge=_LEAST_PIXEL_MM
    )
    """Resample slices to this pixel size, mm; own: no resampling."""
    size_hw: Annotated[
        tuple[PositiveInt, PositiveInt] | None, BeforeValidator(_size), Spelling("--size", metavar="H,W")
    ] = None
    """Pixels of a training slice, one number or two: padded, or cropped about the centre, which may cut off nothing
    labelled. Default: the smallest size that holds every slice. Validation and prediction see whole slices."""
    crop_margin_mm: Annotated[
        float | None, BeforeValidator(_none_for("whole")), Spelling(metavar="MM|whole", text=True)
    ] = Field(default=40.0, ge=0)
    """Train on random crops of the size of the largest labelled region plus this margin, mm; whole: no crops."""
    empty_share: float = Field(default=0.25, ge=0)
    """Empty slices in an epoch, as a share of the labelled ones."""
    case_weights: Annotated[
        dict[str, Annotated[float, Field(ge=0)]],
        BeforeValidator(_case_weights),
        Spelling("--case-weight", metavar="CASE=WEIGHT", multiple=True),
    ] = Field(default_factory=dict)
    """How often slices of CASE are seen, relative to the others; 0 leaves them out. May be given several times."""
    balance: Literal["slices", "cases"] = "slices"
    """Sample each labelled slice, or each case, equally often, times its weight."""
    augment: Annotated[str, AfterValidator(_check_augmentations), Spelling(metavar="NAME[+NAME]")] = "light"
    """Augmentation: none; light: position, contrast, noise; reference: the 2020 study's; strong: for scans of other
    scanners and sequences; or a plug-in's. +NAME adds a plug-in's transform."""

    @field_validator("augment", mode="before")
    @classmethod
    def _older_runs_said_yes_or_no(cls, augment: object) -> object:
        return {True: "light", False: "none"}.get(augment, augment) if isinstance(augment, bool) else augment

    def weight_of(self, case: str) -> float:
        """Return a case's weight; names are compared in Unicode's composed form (NFC)."""
        return self.case_weights.get(unicodedata.normalize("NFC", case), 1.0)

    @property
    def fold_of(self) -> tuple[int, int] | None:
        """The fold, and the number of folds; None without cross-validation."""
        if self.split and self.split.folds > 1:
            return self.split.fold, self.split.folds
        return (self.fold, self.folds) if self.folds else None

    @property
    def split_name(self) -> str:
        """How the patients are split, such as ``fold 0 of 5``."""
        if self.test_site is not None:
            return f"test site {self.test_site}"
        if self.fold_of:
            return "fold {} of {}".format(*self.fold_of)
        return "given split" if self.split else "reference split"

    @property
    def axes_name(self) -> str:
        """The axes as users write them: ``0``, or ``012``."""
        return "".join(map(str, self.axes))


class OptimisationSettings(BaseModel):
    """Training: loss, optimiser, schedule and precision."""

    model_config = _FROZEN

    epochs: int | None = Field(default=20, ge=1)
    """Number of epochs; with --schedule plateau the largest number."""
    minutes: float | None = Field(default=None, gt=0, le=_MOST_MINUTES)
    """Train for this many minutes, validation included, instead of --epochs. The schedule follows the clock, so the
    model depends on the speed of the machine."""
    batch_size: int = Field(default=8, ge=1)
    """Slices in a step."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Largest learning rate."""
    schedule: Literal["plateau", "onecycle", "cosine"] = "onecycle"
    """Learning-rate schedule. plateau: divide by 3 after 5 epochs without a higher validation Dice, stop after 7;
    onecycle: rise and fall once (Smith and Topin 2018); cosine: rise over the first 5 %, then fall as a cosine."""
    loss: Annotated[str, AfterValidator(LOSSES.check), Spelling(metavar="NAME")] = "dice_bce"
    """Loss: dice, dice_bce (with cross-entropy), dice_focal (with focal loss), tversky (false negatives weigh more), or
    a plug-in's."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Clip the gradient norm to this; default: no clipping."""
    average: float = Field(default=0, ge=0, lt=1)
    """EMA decay of the weights, for example 0.99; 0 disables it."""
    coarse_share: float = Field(default=0, ge=0, le=1)
    """Share of the steps, the first ones, with pixels larger by half (progressive resolution)."""
    frozen_share: float = Field(default=0, ge=0, lt=1)
    """Freeze the encoder in this share of the steps, at the start."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Numeric precision; auto: bf16 where the processor has it, else 32."""
    compile: Annotated[bool, Spelling("--compile/--no-compile")] = False
    """Compile the training step with torch.compile; needs a C++ compiler on a CPU."""
    seed: int = Field(default=0, ge=0)
    """Seed of all random numbers."""

    @model_validator(mode="before")
    @classmethod
    def _minutes_replace_the_default_epochs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("minutes") is not None:
            return {"epochs": None} | given
        return given

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.epochs is None) == (self.minutes is None):
            raise ValueError("give either --epochs or --minutes")
        return self

    @property
    def length(self) -> str:
        """How long training takes at most, such as ``8 epochs`` or ``10 minutes``."""
        if self.minutes is not None:
            return "1 minute" if self.minutes == 1 else f"{self.minutes:g} minutes"
        return count(self.epochs or 0, "epoch")


class PostprocessingSettings(BaseModel):
    """Postprocessing of predictions, kept only where it raises the validation Dice."""

    model_config = _FROZEN

    largest_components: int | None = Field(default=None, ge=1)
    """Keep at most this many connected components, the largest; default: all. Binary labels only."""
    fill_holes: bool = False
    """Fill holes. Binary labels only."""


class RunSettings(ModelSettings, DataSettings, OptimisationSettings, PostprocessingSettings):
    """Settings that decide the outcome of a run: equal settings and data give equal models, unless `minutes` is set.

    The four parts define the fields; `cspine-train run --help` lists them.
    """

    model_config = _FROZEN

    @model_validator(mode="after")
    def _is_split_in_one_way(self) -> Self:
        ways = {"--folds": self.folds, "--split": self.split, "--test-site": self.test_site}
        given = [option for option, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        return self

    @model_validator(mode="after")
    def _starts_in_one_way(self) -> Self:
        if self.from_run is not None and self.weights != "auto":
            raise ValueError("--weights and --from exclude each other; give one of them")
        return self

    @model_validator(mode="after")
    def _fold_is_one_of_folds(self) -> Self:
        if self.fold and not self.folds:
            raise ValueError("a fold needs --folds, the number of folds, or --split")
        if self.folds and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} is none of {self.folds}, which are counted from 0")
        return self

    @model_validator(mode="after")
    def _postprocessing_is_for_one_label(self) -> Self:
        for requested, option in ((self.largest_components, "--largest-components"), (self.fill_holes, "--fill-holes")):
            if requested and self.labels == "stored":
                raise ValueError(f"{option} is for binary labels; leave it out")
        return self

    def run_name(self, start: str = "") -> str:
        """Return the name of a run's folder; `start` names the encoder's initial weights, if given."""
        split = "-fold{}of{}".format(*self.fold_of) if self.fold_of else ""
        if self.test_site is not None:
            split = f"-site-{_UNSAFE.sub('_', self.test_site)}"
        encoder = f"{self.encoder}-{start}" if start else self.encoder
        return f"{self.model}-{encoder}-axis{self.axes_name}-{self.variant}{split}-seed{self.seed}"


#: Settings that belong to a cohort or to one run, and not to a recipe.
OF_ONE_RUN = frozenset({"folds", "fold", "split", "test_site", "case_weights", "seed", "from_run"})
#: The parts of `RunSettings`, in the order in which people read them.
PARTS: tuple[type[BaseModel], ...] = (ModelSettings, DataSettings, OptimisationSettings, PostprocessingSettings)


def problem_of(error: ValidationError, model: type[BaseModel] = RunSettings) -> str:
    """Return the first problem of invalid settings in one line, with the name of the option."""
    first = error.errors()[0]
    name, *within = map(str, first["loc"] or ("",))
    field = model.model_fields.get(name)
    option = spelling_of(field, name).option if field else name
    where = " ".join([option, *within]) + ": " if name else ""
    return where + str(first["msg"]).removeprefix("Value error, ")
