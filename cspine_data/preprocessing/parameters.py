"""Parameters of preprocessing, each defined once: type, bounds, default, and what it does, as the text below it.

Nothing here imports NumPy, so that the command line starts at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cspine_data.errors import InputError
from cspine_data.extensions import NAME

#: The percentiles of the tissue that Nyul's method matches (Nyul and Udupa 1999: the ends, and the deciles).
NYUL_PERCENTILES = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)
#: Changed when equal parameters give another result. 2: noise is excluded from tissue, and bounds the gain. 3: air of
#: whole grey values.
REVISION = 3
_FROZEN = ConfigDict(frozen=True)
Model = TypeVar("Model", bound=BaseModel)


class BiasParameters(BaseModel):
    """Parameters of N4; each is part of a case's digest. docs/bias-field.md has the comparisons behind the defaults."""

    model_config = _FROZEN

    iterations: tuple[NonNegativeInt, ...] = Field(default=(200, 200, 200, 200), min_length=1)
    """Maximum number of iterations at each level, such as 200,200,200. Each level has twice as many elements as the one
    before, limited by the distance between the control points."""
    threshold: float = Field(default=1e-6, gt=0)
    """A level ends when the field's coefficient of variation changes by less than this in one iteration."""
    control_points: int = Field(default=4, ge=4)
    """Number of control points along each axis at the first level; 4 are one cubic element."""
    spline_mm: float = Field(default=60.0, ge=0)
    """Distance, mm, between the spline's control points at the finest level; 0 doubles their number at every level, as
    ITK does."""
    bins: int = Field(default=200, ge=2)
    """Number of bins of the histogram of log intensities."""
    width: float = Field(default=0.2, gt=0)
    """Full width at half maximum of the Gaussian, in log intensity, that the histogram is deconvolved by."""
    noise: float = Field(default=0.1, gt=0)
    """Noise parameter of the Wiener filter for deconvolution; a larger value sharpens less."""
    stride: float = Field(default=8.0, ge=1)
    """Step length in iterations: consecutive iterations of N4 have similar directions, so a longer step saves time. A
    step that goes too far is undone and halved. 1 is N4 as published."""
    engine: Literal["separable", "itk"] = "separable"
    """N4 implementation: separable, matrix products on a regular grid; or itk, SimpleITK's filter, which is slow and
    has no distance between control points."""
    resolution_mm: float = Field(default=6.0, gt=0)
    """Voxel size, mm, at which the field is estimated; the image is only averaged, never interpolated."""
    mask_passes: int = Field(default=3, ge=0)
    """Number of updates of the tissue mask, each on an image corrected by a coarser estimate, before the final one."""

    @property
    def coarser(self) -> BiasParameters:
        """Coarser parameters for the tissue mask."""
        update = {"engine": "separable", "resolution_mm": max(self.resolution_mm, 9.0)}
        return self.model_copy(update=update)


#: Presets of `--n4-preset`; docs/bias-field.md has their accuracy and time.
PRESETS = {
    "fast": BiasParameters(iterations=(100, 100, 100, 100), width=0.3, mask_passes=2),
    "default": BiasParameters(),
    "thorough": BiasParameters(resolution_mm=4.0, iterations=(400, 400, 400, 400), mask_passes=5),
}


def bias_parameters(preset: str = "default", **changes: Any) -> BiasParameters:
    """Return the parameters of a preset with some changes.

    Parameters
    ----------
    preset : str
        ``fast``, ``default`` or ``thorough``.
    **changes
        Attributes of `BiasParameters`; iterations may be a text such as ``200,200,200``.

    Raises
    ------
    InputError
        If there is no such preset, or a value is out of range.
    """
    if preset not in PRESETS:
        raise InputError(f"N4 preset {preset!r}", "is not known", f"give one of {', '.join(PRESETS)}")
    iterations = changes.get("iterations")
    if isinstance(iterations, str):
        changes["iterations"] = iterations.split(",")
    if changes.get("engine") == "itk":
        if "spline_mm" in changes:
            raise InputError(
                "N4 parameter spline_mm", "is not supported by SimpleITK's filter, which doubles them each level",
                "leave it out",
            )  # fmt: skip
        changes["spline_mm"] = 0.0
    return checked(BiasParameters, "N4 parameter ", {**PRESETS[preset].model_dump(), **changes})


def checked(model: type[Model], subject: str, values: dict[str, Any]) -> Model:
    """Return a model of some values.

    Raises
    ------
    InputError
        If one is not valid; the name of the first one follows the `subject`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise cause from None
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"{subject}{name}", "is not known", f"give one of {', '.join(model.model_fields)}"
            ) from None
        raise InputError(f"{subject}{name} {values.get(name)!r}", "is out of range", first["msg"].lower()) from None


def parse_spacing(text: str) -> tuple[float, float, float] | None:
    """Convert ``native``, ``1`` or ``0.5,0.5,1`` to the voxel spacing along x, y and z in mm; None for ``native``.

    Raises
    ------
    InputError
        If it is none of these, or not positive.
    """
    if text.strip().lower() == "native":
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not all(0 < value < math.inf for value in values):
        raise InputError(f"spacing {text!r}", "is not known", "give native, one size in mm, or three as in 0.5,0.5,1")
    return values[0], values[1], values[2]


def _spacing(given: object) -> object:
    return parse_spacing(given) if isinstance(given, str) else given


class Preprocessing(BaseModel):
    """Preprocessing parameters of a variant; each is part of a case's digest."""

    model_config = _FROZEN

    bias: BiasParameters | None = BiasParameters()
    """Parameters of the bias field estimate; None for no correction (the variant ``raw``)."""
    normalisation: str = Field(default="zscore", pattern=NAME)
    """Intensity normalisation: zscore, mean and standard deviation of tissue; percentile, its percentiles 1 and 99;
    nyul, the cohort's histogram; or a plug-in's."""
    standard: tuple[float, ...] | None = None
    """For nyul: the cohort's histogram landmarks."""
    spacing_mm: Annotated[tuple[float, float, float] | None, BeforeValidator(_spacing)] = None
    """Voxel size, mm, of the slices: native, 1 or 0.5,0.5,1 (along x, y and z)."""
    revision: int = REVISION
    """Revision of the algorithm. Volumes can only be prepared with the current one."""

    @field_validator("spacing_mm")
    @classmethod
    def _positive(cls, spacing_mm: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if spacing_mm is not None and not all(0 < mm < math.inf for mm in spacing_mm):
            raise ValueError("spacing_mm: give three positive sizes in mm")
        return spacing_mm

    @model_validator(mode="after")
    def _standard_fits(self) -> Preprocessing:
        standard = self.standard
        if standard is None:
            return self
        ascending = all(low <= high for low, high in itertools.pairwise(standard))
        if self.normalisation != "nyul" or len(standard) != len(NYUL_PERCENTILES) or not ascending:
            raise ValueError(f"standard: give {len(NYUL_PERCENTILES)} ascending values, with nyul only")
        if not standard[0] < standard[-1] < math.inf:
            raise ValueError("standard: its first value is not below its last")
        return self

    @property
    def variant(self) -> str:
        """The name of the variant: ``n4`` or ``raw``."""
        return "raw" if self.bias is None else "n4"

    @property
    def description(self) -> str:
        """A short description: ``N4 default, zscore, native voxels``; different for different parameters."""
        names = [f"N4 {name}" for name, preset in PRESETS.items() if preset == self.bias]
        bias = "no N4" if self.bias is None else names[0] if names else f"N4 with {_changed_parameters(self.bias)}"
        method: str = self.normalisation
        if self.standard is not None:
            method += f" (standard {hashlib.sha256(repr(self.standard).encode()).hexdigest()[:6]})"
        spacing = (
            "native voxels" if self.spacing_mm is None else f"{' x '.join(f'{mm:g}' for mm in self.spacing_mm)} mm"
        )
        before = "" if self.revision == REVISION else f", revision {self.revision} of {REVISION}"
        return f"{bias}, {method}, {spacing}{before}"


def _with_revision(recorded: Any) -> Any:
    return {"revision": 1, **recorded} if isinstance(recorded, dict) else recorded


#: As in records, where a missing revision means 1.
RecordedPreprocessing = Annotated[Preprocessing, BeforeValidator(_with_revision)]


def _changed_parameters(bias: BiasParameters) -> str:
    default = PRESETS["default"].model_dump()
    return ", ".join(f"{name} {value}" for name, value in bias.model_dump().items() if value != default[name])
