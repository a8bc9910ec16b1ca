"""Comparing names in Unicode: accented letters are one character (NFC) or two (NFD, as macOS writes them)."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path


def normalised(name: str) -> str:
    """Return a name in composed form (NFC), for comparison."""
    return unicodedata.normalize("NFC", name)


def as_known(name: str, known: Collection[str]) -> str:
    """Return the known name that equals a name after normalisation; else the name itself."""
    if name in known:
        return name
    return next((one for one in known if normalised(one) == normalised(name)), name)


def on_disk(path: Path) -> Path:
    """Return the existing path that equals a path after normalisation; else the path itself."""
    try:
        if path.exists() or path.parent == path:
            return path
    except OSError:
        # The name is too long for any file.
        return path
    folder = on_disk(path.parent)
    if folder.is_dir():
        wanted = normalised(path.name)
        for entry in folder.iterdir():
            if normalised(entry.name) == wanted:
                return entry
    return path
