"""The run that a fine-tuned run starts from, and the cases that its weights have seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cspine_data import Split
from cspine_data.tools import some_of

# Bounds of what an untrusted record may hold, and of what every further run takes over.
MOST_SEEN = 100_000
_LONGEST_START = 1000
_Name = Annotated[str, Field(max_length=1000)]
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class SeenCase(BaseModel):
    """A case that trained weights have seen.

    Attributes
    ----------
    case, patient : str
        Names in the store of the run that saw it.
    trained : bool
        Whether it trained the weights; otherwise it only validated them.
    """

    model_config = _FROZEN

    case: _Name
    patient: _Name
    trained: bool

    def spoils(self, part: str) -> bool:
        """Return whether scores are too high if the case is in a part of the split of a further run.

        A validation case may validate again: figures of validation cases are known to be optimistic.
        """
        return part == "test" or (part == "validation" and self.trained)


class Origin(BaseModel):
    """The run that a fine-tuned run starts from.

    Attributes
    ----------
    name : str
        Name of its folder.
    start : str
        What its own weights started from.
    new_head : bool
        Whether the segmentation head was not taken over, as the labels differ.
    seen : dict
        The cases that its weights, and those that they started from, have seen, by the digest of their voxels.
    """

    model_config = _FROZEN

    name: _Name
    start: Annotated[str, Field(max_length=_LONGEST_START)]
    new_head: bool
    seen: Annotated[dict[str, SeenCase], Field(max_length=MOST_SEEN)]

    def text(self, weights_used: str) -> str:
        """Return what a run started from: this run, and what that started from."""
        head = ", with a new head" if self.new_head else ""
        return f"started from the run {self.name} ({weights_used[:12]}){head}; in that run, {self.start}"

    def same_names(self, split: Split, patients: Mapping[str, str]) -> str:
        """Return a note about validation and test cases that have the name of a seen case or patient.

        `patients` is the patient of each case with another name than its own. The note is empty if there are none.
        """
        spoiled = {
            part: {name for seen in self.seen.values() if seen.spoils(part) for name in (seen.case, seen.patient)}
            for part in ("validation", "test")
        }
        same = [case for part, case in _scored(split) if {case, patients.get(case, case)} & spoiled[part]]
        if not same:
            return ""
        return (
            f"{some_of(same)}: the names are those of cases or patients that {self.name} has seen; if the patients are "
            "the same, the scores are too high"
        )

    def seen_cases(self, split: Split, voxels_sha256: Mapping[str, str]) -> list[str]:
        """Return the validation and test cases of a split that are among the seen cases and would spoil scores."""
        found = ((part, case, self.seen.get(voxels_sha256[case])) for part, case in _scored(split))
        return [case for part, case, seen in found if seen is not None and seen.spoils(part)]


def start_of(text: str) -> str:
    """Return what a run started from, cut to the length that an `Origin` holds."""
    return text if len(text) <= _LONGEST_START else f"{text[: _LONGEST_START - 3]}..."


def _scored(split: Split) -> Iterator[tuple[str, str]]:
    for part in ("validation", "test"):
        yield from ((part, case) for case in split.cases(part))
