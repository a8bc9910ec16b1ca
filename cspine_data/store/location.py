"""Location of a store: a folder, or a URL for reading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from cspine_data.errors import StoreError


def location(path: str | Path) -> Path:
    """Return the path of a store: a folder, or a path of fsspec for ``scheme://...``."""
    if "://" not in str(path):
        return Path(path)
    try:
        from upath import UPath

        remote = UPath(path)
        # This imports the package for the scheme.
        _ = remote.fs
    except (ImportError, ValueError, OSError) as error:
        hint = "pip install 'cspine[remote]', and what fsspec needs for this scheme"
        raise StoreError(f"{path}: cannot be reached ({error}); {hint}") from None
    return cast(Path, remote)


def is_local(path: Path) -> bool:
    """Return whether a path is local, not a URL from `location`."""
    return isinstance(path, Path)


def refuse_url(path: Path) -> None:
    """Raise an error for a URL where a folder is needed; `Path` has removed one of its slashes."""
    if is_local(path) and re.search("(^|/)[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise StoreError(f"{path}: is a URL, which only open_cohort and cspine-train can read; give a folder")
