"""Names of anatomical planes and axes."""

from __future__ import annotations

#: Planes of the slices along axes 0, 1 and 2.
PLANES = ("sagittal", "coronal", "axial")
#: Axes of a model, by their name in options.
AXES = {"0": (0,), "1": (1,), "2": (2,), "012": (0, 1, 2)}
