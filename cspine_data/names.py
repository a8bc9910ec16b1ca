"""When two names are the same: accented letters can be one character (NFC) or two (NFD, as macOS writes them)."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path


def normalised(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which names are compared."""
    return unicodedata.normalize("NFC", name)


def by_normalised(names: Iterable[str]) -> dict[str, str]:
    """Return names as they are written, by their normalised form."""
    return {normalised(name): name for name in names}


def as_known(name: str, known: Collection[str]) -> str:
    """Return a name as it is known, where only the encoding of its letters differs; else as given."""
    return name if name in known else by_normalised(known).get(normalised(name), name)


def on_disk(path: Path) -> Path:
    """Return a path as the file system writes it, where only the encoding of its letters differs; else as given."""
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
