"""Find the cases of a cohort: in any supported layout, or in a list of pairs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from cspine_data.errors import InputError, Problem, count, some_of
from cspine_data.extensions import LAYOUTS
from cspine_data.names import normalised
from cspine_data.sources.cases import Case, Listing, is_case_id
from cspine_data.sources.duplicates import name_notes
from cspine_data.sources.flat import FLAT
from cspine_data.sources.label_tables import with_label_names
from cspine_data.sources.layout import Found, Layout, Wanted
from cspine_data.sources.pair_lists import read_pairs

AUTO = "auto"
_DICOM = "dicom"
_MOST_NAMED = 3


def find_cases(
    source: str | Path,
    pairs: str | Path | None = None,
    *,
    layout: str = AUTO,
    sequence: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    patient_pattern: str | None = None,
) -> Listing:
    """List the cases of a folder: volumes, label maps, patients, sequences and problems.

    NRRD, NIfTI and MetaImage files are not opened, DICOM headers are read. Names are compared, and become case ids, in
    Unicode's composed form (NFC).

    Parameters
    ----------
    source : str or Path
        The folder.
    pairs : str or Path, optional
        A CSV file that lists the cases instead, see `read_pairs`.
    layout : str
        How the folder is arranged: ``flat``, ``folders``, ``bids``, ``nnunet``, ``msd``, ``dicom``, or ``auto`` to
        detect it. docs/layouts.md describes them.
    sequence : str, optional
        Use only volumes of this sequence, such as ``T2w``; capitals do not matter.
    include, exclude : sequence of str
        Patterns such as ``sub-0*``, compared with case ids, file names and paths in the folder. Files that match one of
        `exclude` are ignored; cases must match one of `include`, if there is any.
    patient_pattern : str, optional
        A regular expression that is searched for in each volume's path in the folder. Its first group is the patient.

    Returns
    -------
    Listing
        The cases, problems and notes.

    Raises
    ------
    InputError
        If the source or the list is missing, there is no volume, or nothing is selected.
    """
    if pairs is not None:
        source = Path(pairs)
        home, found = source.parent, read_pairs(source)
    else:
        source = home = Path(source)
        found = _find(source, layout, lambda path: not _matches(exclude, home, path))
    cases = found.cases
    notes = list(found.notes)
    if sequence is not None:
        notes += _without_sequence(cases)
        cases = _of_sequence(source, [*found.cases, *found.others], sequence)
    cases = [case for case in cases if not _matches(exclude, home, case.volume, case.id)]
    if include:
        cases = [case for case in cases if _matches(include, home, case.volume, case.id)]
    if (include or exclude) and found.cases and not cases:
        raise InputError(source, "holds no case that --include and --exclude select", "change the patterns")
    if patient_pattern is not None:
        cases = [_with_patient(case, patient_pattern, home) for case in cases]
    usable = [case for case in cases if case.volume not in found.unclear]
    usable, unnamed, table_notes = with_label_names(usable, home)
    notes += [*table_notes, *_patient_notes(usable), *name_notes({case.id: case.patient for case in usable})]
    return _checked(source, usable, [*found.problems, *found.label_problems, *unnamed], notes)


def find_volumes(source: str | Path) -> Listing:
    """List the volumes of a folder for prediction, as in `find_cases` but without problems of label maps."""
    source = Path(source)
    found = _find(source, AUTO, lambda _: True)
    return _checked(source, found.cases, found.problems, found.notes)


def volumes_in(folder: str | Path) -> list[Path]:
    """Return the volumes of a folder, sorted by case, without label maps, as in `find_cases`."""
    return [case.volume for case in find_volumes(folder).cases]


def _find(folder: Path, name: str, wanted: Wanted) -> Found:
    if not folder.is_dir():
        is_list = folder.suffix.lower() == ".csv" and folder.is_file()
        raise InputError(folder, "is no folder", "give it as --pairs" if is_list else "give the folder of the volumes")
    if name != AUTO:
        layout: Layout = LAYOUTS.load(name)
        return layout.find(folder, wanted)
    for one in LAYOUTS.names():
        layout = LAYOUTS.load(one)
        reason = layout.recognise(folder)
        if reason is not None:
            found = layout.find(folder, wanted)
            found.notes.insert(0, f"layout {one}: {reason}")
            if one != _DICOM and (missed := LAYOUTS.load(_DICOM).recognise(folder)):
                found.notes.insert(1, f"{missed}, which are left out; --layout {_DICOM} reads them")
            return found
    return FLAT.find(folder, wanted)


def _matches(patterns: Iterable[str], home: Path, path: Path, case_id: str = "") -> bool:
    inside = path.relative_to(home).as_posix() if path.is_relative_to(home) else ""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (path.name, inside, case_id))


def _with_patient(case: Case, pattern: str, home: Path) -> Case:
    """Return a case with the patient that a pattern finds in its path."""
    path = case.volume.relative_to(home) if case.volume.is_relative_to(home) else case.volume
    try:
        found = re.search(pattern, normalised(path.as_posix()))
        patient = found and (found.group(1) or "")
    except (re.error, IndexError) as error:
        remedy = "give one with a group, such as '(P[0-9]+)_'"
        raise InputError(
            f"--patient-pattern {pattern!r}", f"is no regular expression with a group ({error})", remedy
        ) from None
    if not patient:
        raise InputError(
            case.volume, f"has no patient by --patient-pattern {pattern!r}", "change it, or --exclude the file"
        )
    return replace(case, patient=patient)


def _of_sequence(source: Path, cases: list[Case], sequence: str) -> list[Case]:
    wanted = sequence.casefold()
    of_sequence = [case for case in cases if (case.sequence or "").casefold() == wanted]
    if not of_sequence:
        known = sorted({case.sequence for case in cases if case.sequence}) or ["none"]
        raise InputError(source, f"holds no volume of sequence {sequence!r}", f"known are {', '.join(known)}")
    return of_sequence


def _without_sequence(cases: Iterable[Case]) -> list[str]:
    """Return a note on the volumes that `_of_sequence` leaves out because their sequence is not known."""
    names = [str(case.volume) for case in cases if case.sequence is None]
    return [f"{count(len(names), 'volume')} of unknown sequence left out: {some_of(names)}"] if names else []


def _checked(source: Path, cases: Iterable[Case], found: Iterable[Problem], notes: Iterable[str]) -> Listing:
    """Return a listing in which each case id is usable and unique."""
    by_id: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_id[case.id].append(case)
    kept, problems = [], list(found)
    for case_id, claims in sorted(by_id.items()):
        if len(claims) > 1:
            names = " and ".join(str(claim.volume) for claim in claims)
            problems.append(Problem(case_id, f"{names}: claim the same case {case_id!r}; keep one of them"))
        elif not is_case_id(case_id):
            message = f"{claims[0].volume}: {case_id!r} is no usable case id; rename the file"
            problems.append(Problem(case_id, message))
        elif unusable := claims[0].unusable_name:
            message = f"{claims[0].volume}: {unusable!r} cannot name a patient, site or sequence; give a shorter name"
            problems.append(Problem(case_id, message))
        else:
            kept.append(claims[0])
    if not kept and not problems:
        remedy = "put .nrrd or .nii.gz files there, or give --pairs"
        raise InputError(source, "holds no volume", remedy)
    return Listing(tuple(kept), tuple(problems), tuple(notes))


def _patient_notes(cases: Iterable[Case]) -> list[str]:
    """Return a note on patients with several cases, since they are inferred from names."""
    by_patient: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        by_patient[case.patient].append(case.id)
    several = {patient: ids for patient, ids in by_patient.items() if len(ids) > 1}
    if not several:
        return []
    named = "; ".join(
        f"{patient}: {', '.join(ids[:_MOST_NAMED])}" for patient, ids in list(several.items())[:_MOST_NAMED]
    )
    return [f"{count(len(several), 'patient')} with several cases ({named}): data are split by patient"]
