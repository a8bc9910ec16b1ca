"""Where a store lies: in a folder, or, to read only, at a URL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from cspine_data.errors import StoreError


def location(path: str | Path) -> Path:
    """Return where a store lies: a folder, or, for ``scheme://...``, a place that fsspec reaches.

    Raises
    ------
    StoreError
        If it cannot be reached, or what reaches it is not installed.
    """
    if "://" not in str(path):
        return Path(path)
    try:
        from upath import UPath

        place = UPath(path)
        # A scheme's own package is looked for here, and not before.
        _ = place.fs
    except (ImportError, ValueError, OSError) as error:
        hint = "pip install 'cspine[remote]', and what fsspec needs for this scheme"
        raise StoreError(f"{path}: cannot be reached ({error}); {hint}") from None
    return cast(Path, place)


def is_local(path: Path) -> bool:
    """Tell whether a path is of this machine's files, not what `location` returns for a URL."""
    return isinstance(path, Path)


def refuse_url(path: Path) -> None:
    """Refuse a URL where a folder is needed; as a path it has lost a slash.

    Raises
    ------
    StoreError
        If it is one.
    """
    if is_local(path) and re.search("(^|/)[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise StoreError(f"{path}: is a URL, which only open_cohort and cspine-train read from; give a folder")
