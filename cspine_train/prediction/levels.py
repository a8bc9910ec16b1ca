"""Named vertebrae of a prediction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FoundLevel:
    """A predicted vertebra.

    Attributes
    ----------
    value : int
        Its level, the label value in the level map.
    name : str
        Name of the level, such as ``C5``.
    probability : float
        Probability that the vertebra has this level, from 0 to 1; 1 if the user named the lowest or highest level.
    centroid_mm : tuple of float
        World coordinates, LPS.
    volume_ml : float
        Its volume.
    height_mm : float
        Its extent along the spine, as its volume divided by its mean cross-section; see docs/levels.md.
    """

    value: int
    name: str
    probability: float
    centroid_mm: tuple[float, float, float]
    volume_ml: float
    height_mm: float


@dataclass(frozen=True)
class NamedSpine:
    """The named vertebrae of a volume.

    Attributes
    ----------
    levels : tuple of FoundLevel
        The vertebrae, from head to feet; each level at most once.
    doubt : str
        Why the names may be wrong, one line; empty if they are certain enough.
    """

    levels: tuple[FoundLevel, ...]
    doubt: str = ""
