"""Names of the anatomical planes that slices lie in, by axis."""

from __future__ import annotations

#: What the slices along axes 0, 1 and 2 are called.
PLANES = ("sagittal", "coronal", "axial")
#: Which axes a model is for, by what users write.
AXES = {"0": (0,), "1": (1,), "2": (2,), "012": (0, 1, 2)}
