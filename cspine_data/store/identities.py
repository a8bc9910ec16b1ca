"""Patient, site and sequence of stored cases."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from cspine_data.sources.cases import LONGEST_NAME, Case


class Identity(BaseModel):
    """Who and what a case shows. These are ids, neutral in an anonymised store.

    Attributes
    ----------
    patient : str
        The patient; splits are by patient.
    site : str or None
        The hospital or scanner.
    sequence : str or None
        The MRI sequence.
    """

    model_config = ConfigDict(frozen=True)

    patient: str = Field(min_length=1, max_length=LONGEST_NAME)
    site: str | None = Field(None, max_length=LONGEST_NAME)
    sequence: str | None = Field(None, max_length=LONGEST_NAME)


def identity_of(case: Case) -> Identity:
    """Return the identity of a listed case."""
    return Identity(patient=case.patient, site=case.site, sequence=case.sequence)
