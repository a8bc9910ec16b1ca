"""Options of `prepare`, each defined once: type, default, and its help as the text below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from cspine_data.errors import InputError
from cspine_data.extensions import NORMALISATIONS
from cspine_data.parallel.workers import Workers
from cspine_data.preprocessing.parameters import Preprocessing
from cspine_data.sources.cases import Listing
from cspine_data.sources.listing import find_cases
from cspine_data.volumes.label_options import LabelOptions


def parse_axes(axes: str | Sequence[int]) -> tuple[int, ...]:
    """Convert ``"012"`` or ``[0, 1, 2]`` to sorted axis numbers.

    Raises
    ------
    InputError
        If there is no axis, or one that is not 0, 1 or 2.
    """
    known = {"0": 0, "1": 1, "2": 2}
    digits = [str(axis) for axis in axes]
    if not digits or any(digit not in known for digit in digits):
        raise InputError(f"axes {''.join(digits)!r}", "are not known", "give some of 0, 1 and 2, as in 012")
    return tuple(sorted({known[digit] for digit in digits}))


class Selection(BaseModel):
    """Which cases of a source to use; see `find_cases`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: str = "auto"
    """How SOURCE is arranged: flat, folders, bids, nnunet, msd, dicom, or auto to recognise it."""
    pairs: Path | None = None
    """CSV file with the columns case,volume,label and, optionally, patient,site,sequence; replaces SOURCE."""
    sequence: str | None = None
    """Use only volumes of this sequence, such as T2w."""
    include: tuple[str, ...] = ()
    """Use only cases that match this pattern, such as 'sub-0*'; can be repeated."""
    exclude: tuple[str, ...] = ()
    """Ignore files that match this pattern, such as '*disc*'; can be repeated."""

    patient_pattern: str | None = None
    """Regular expression whose first group is the patient in a volume's path, such as '(P[0-9]+)_'; by default, the
    layout decides."""

    def find_cases(self, source: str | Path) -> Listing:
        """List the selected cases of a source."""
        return find_cases(source, **{name: getattr(self, name) for name in Selection.model_fields})


class PrepareOptions(Selection, LabelOptions):
    """Options of `prepare`; `cspine-data prepare --help` lists them too."""

    note: str | None = None
    """Description of stand-in data, such as synthetic; shown beside every figure. Default: the first line of COHORT.txt
    in SOURCE."""
    anonymise: bool = False
    """Name cases case0001 and so on; the key is STORE.key.csv."""
    n4: bool | None = None
    """Correct the bias field (variant n4), or not (variant raw)."""
    preprocessing: Preprocessing | None = None
    """Preprocessing parameters instead of the defaults; `n4` must agree with them."""
    axes: Annotated[tuple[int, ...], BeforeValidator(parse_axes)] = (0, 1, 2)
    """Slice directions: 0 sagittal, 1 coronal, 2 axial. A stored case keeps its axes. If axes are added, runs
    trained on it must be trained again."""
    workers: int | None = None
    """Number of worker processes; default: one per core."""
    scheduler: str | None = None
    """Address of a running Dask scheduler to use instead of local processes; its workers must see the same paths."""
    rehash: bool = False
    """Hash all files again, even those with unchanged size and times."""

    @model_validator(mode="after")
    def _agree(self) -> PrepareOptions:
        preprocessing = self.preprocessing
        if preprocessing and self.n4 not in (None, preprocessing.bias is not None):
            problem = f"contradicts preprocessing ({preprocessing.description})"
            raise InputError(f"n4={self.n4}", problem, "leave out one of them")
        NORMALISATIONS.load(self.parameters.normalisation)
        _ = self.processes
        return self

    @property
    def label_options(self) -> LabelOptions:
        """How label maps are read."""
        return LabelOptions(**{name: getattr(self, name) for name in LabelOptions.model_fields})

    @property
    def parameters(self) -> Preprocessing:
        """The preprocessing parameters."""
        return self.preprocessing or (Preprocessing(bias=None) if self.n4 is False else Preprocessing())

    @property
    def processes(self) -> Workers:
        """The processes that do the work."""
        return Workers(self.workers, self.scheduler)
