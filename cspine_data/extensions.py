"""Extension points: what a name stands for, in the project or in an installed plug-in.

A plug-in is a package with entry points in the group of an extension point. CONTRIBUTING.md shows one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cspine_data.errors import InputError, meant

#: Pattern of names, which may become part of folder names.
NAME = r"^[a-z0-9][a-z0-9_.-]*$"


@dataclass(frozen=True)
class ExtensionPoint:
    """A group of names, each of which stands for a Python object."""

    group: str
    """The entry-point group of plug-ins."""
    built_in: Mapping[str, str]
    """Where each name of the project is, as ``module:attribute`` or ``module``; imported when it is used."""
    error: Callable[[str, str, str], Exception] = InputError
    """The error of `load`, made from subject, problem and remedy."""

    def names(self) -> tuple[str, ...]:
        """Return the names: the project's own, then those of installed plug-ins, which replace none."""
        return tuple({**self.built_in, **_plug_ins(self.group, tuple(sys.path))})

    def check(self, name: str) -> str:
        """Return a known name.

        Raises
        ------
        ValueError
            If it is not known.
        """
        # Plug-ins are looked up only for other names: that reads the metadata of every installed package.
        if name not in self.built_in and name not in self.names():
            known = self.names()
            raise ValueError(
                f"{name!r} is unknown{meant(name, known)}; choose {', '.join(known)}, or install its plug-in"
            )
        return name

    def load(self, name: str) -> Any:
        """Import what a name stands for.

        Raises
        ------
        InputError
            Or another `error`, if there is no such name, or its plug-in cannot be imported.
        """
        from importlib.metadata import EntryPoint

        if name in self.built_in:
            return EntryPoint(name, self.built_in[name], self.group).load()
        try:
            self.check(name)
        except ValueError as error:
            raise self.error(self.group, *str(error).split("; ", 1)) from None
        try:
            return _plug_ins(self.group, tuple(sys.path))[name].load()
        except Exception as error:
            # A plug-in may raise anything as it is imported.
            problem = f"cannot be imported ({error})"
            raise self.error(f"plug-in {name!r} of {self.group}", problem, "correct or remove it") from error


@cache
def _plug_ins(group: str, _path: tuple[str, ...]) -> dict[str, Any]:
    """Return the entry points of a group, by name, with this search path of modules."""
    from importlib.metadata import entry_points

    return {one.name: one for one in entry_points(group=group) if re.fullmatch(NAME, one.name)}


#: File formats by suffix, without its first dot; see `cspine_data.volumes.formats`.
FORMATS = ExtensionPoint(
    "cspine.formats",
    {
        "seg.nrrd": "cspine_data.volumes.formats.nrrd",
        "nii.gz": "cspine_data.volumes.formats.nifti",
        "nrrd": "cspine_data.volumes.formats.nrrd",
        "nhdr": "cspine_data.volumes.formats.nrrd",
        "nii": "cspine_data.volumes.formats.nifti",
        "mha": "cspine_data.volumes.formats.metaimage",
        "mhd": "cspine_data.volumes.formats.metaimage",
    },
)
#: Intensity normalisations; see `cspine_data.preprocessing.normalisation`.
NORMALISATIONS = ExtensionPoint(
    "cspine.normalisations",
    {
        "zscore": "cspine_data.preprocessing.normalisation:zscore",
        "percentile": "cspine_data.preprocessing.normalisation:percentile",
        "nyul": "cspine_data.preprocessing.normalisation:nyul",
    },
)
#: Cohort layouts, in the order in which detection tries them; see `cspine_data.sources.layout`.
LAYOUTS = ExtensionPoint(
    "cspine.layouts",
    {
        "nnunet": "cspine_data.sources.nnunet:NNUNET",
        "msd": "cspine_data.sources.nnunet:MSD",
        "bids": "cspine_data.sources.bids:BIDS",
        "flat": "cspine_data.sources.flat:FLAT",
        "folders": "cspine_data.sources.folders:FOLDERS",
        "dicom": "cspine_data.sources.dicom_tree:DICOM",
    },
)
