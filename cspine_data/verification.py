"""Finding what in a store is not what was written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cspine_data import schema
from cspine_data.schema import CaseRecord
from cspine_data.store import is_older, read_root, stored_record
from cspine_data.writer import METADATA


@dataclass(frozen=True)
class Damage:
    """One thing in a store that is not what was written: the case, the array or file, what is wrong."""

    case: str
    variant: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.case} ({self.variant}): {self.where}: {self.problem}"


def verify(path: str | Path) -> list[Damage]:
    """Hold every file of every published case, and every record, against its checksum.

    Parameters
    ----------
    path : str or Path
        The store.

    Returns
    -------
    list of Damage
        Empty where the store is sound.

    Raises
    ------
    StoreError
        If there is no store, or its root is damaged.
    """
    path = Path(path)
    root = read_root(path)
    damages: list[Damage] = []
    for case, variants in root.cases.items():
        for variant, digest in variants.items():
            record = stored_record(path, case, digest)
            if record is None:
                older = is_older(path, case, digest)
                problem = "was written by an older cspine; prepare it again" if older else "missing or damaged"
                damages.append(Damage(case, variant, "record", problem))
            else:
                damages += _verify_case(path / schema.case_path(case, digest), record)
    return damages


def _verify_case(folder: Path, record: CaseRecord) -> list[Damage]:
    found = {str(file.relative_to(folder)) for file in _files(folder)} - {METADATA}
    damages = []
    for name, checksum in record.files.items():
        if name not in found:
            damages.append(Damage(record.case, record.variant, name, "is missing"))
        elif _sha256(folder / name) != checksum:
            damages.append(Damage(record.case, record.variant, name, "is not what was written"))
    damages += [
        Damage(record.case, record.variant, name, "does not belong there") for name in sorted(found - set(record.files))
    ]
    return damages


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
