"""Folder layouts of other tools: the file names of each case, and the files that describe the data set."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.errors import InputError, printable
from cspine_data.sources.cases import Case
from cspine_data.sources.file_names import is_contrast
from cspine_data.store.identities import Identity

#: Ending of all exported volumes; BIDS and the Decathlon need NIfTI.
ENDING = ".nii.gz"
#: Folds of a cross-validation, in nnU-Net's format.
SPLITS = "splits_final.json"
#: List of the cases, for ``--pairs``.
PAIRS = "cases.csv"
_UNKNOWN_SEQUENCE = "MRI"
_LABELS = "derivatives/labels"
_BIDS_VERSION = "1.9.0"
_BIDS_NAME = re.compile(r"(?P<subject>sub-[A-Za-z0-9]+)(_[A-Za-z0-9]+-[A-Za-z0-9]+)*_(?P<suffix>[A-Za-z0-9]+)")
_BIDS_SUFFIXES = {"t1": "T1w", "t2": "T2w", "pd": "PDw", "t2star": "T2starw", "flair": "FLAIR"}


@dataclass(frozen=True)
class LabelTable:
    """Label values of exported files.

    Attributes
    ----------
    numbers : dict
        Maps label values of the store to those in the files.
    names : dict
        Maps label values in the files to names: the background, the labels in ascending order, then ignored voxels.
    """

    numbers: Mapping[int, int]
    names: Mapping[int, str]

    @property
    def changes(self) -> bool:
        """Whether label values are changed."""
        return any(value != number for value, number in self.numbers.items())

    def apply(self, label: NDArray[Any]) -> NDArray[Any]:
        """Return a label map with the values of the files, in the same integer dtype for all cases."""
        # Only the value of ignored voxels may be negative.
        dtype = np.result_type(*map(np.min_scalar_type, self.names))
        if not self.changes:
            return label.astype(dtype)
        values = sorted({0, *self.numbers})
        numbers = np.array([self.numbers.get(value, 0) for value in values], dtype)
        return numbers[np.searchsorted(values, label)]


# Names of classes with a meaning of their own, and those that values without a name get.
_RESERVED = re.compile(r"background|ignore|label_\d+", re.IGNORECASE)


def label_table(
    labels: Iterable[int], ignored: Iterable[int], named: Iterable[tuple[int, str]] = (), *, consecutive: bool
) -> LabelTable:
    """Return the label values of exported files for a store's label values and those of ignored voxels.

    With `consecutive`, labels are 1, 2, 3, ... and ignored voxels have the next number. `named` has the named label
    values of each case. A name is used only if its value has no other name, and the name no other value, in any case.
    """
    labels, ignored = sorted(set(labels)), sorted(set(ignored))
    both = sorted(set(labels) & set(ignored))
    if both:
        problem = "is a label in some cases and ignored in others"
        raise InputError(f"label value {both[0]}", problem, "prepare all cases with the same --ignore-label")
    if consecutive:
        numbers = {value: number for number, value in enumerate(labels, start=1)}
        numbers |= dict.fromkeys(ignored, len(labels) + 1)
    else:
        numbers = {value: value for value in (*labels, *ignored)}
    known = set(named)
    values, texts = Counter(value for value, _ in known), Counter(name.casefold() for _, name in known)
    own = {v: name for v, name in known if values[v] == texts[name.casefold()] == 1 and not _RESERVED.fullmatch(name)}
    names = {0: "background", **{numbers[value]: own.get(value, f"label_{value}") for value in labels}}
    return LabelTable(numbers, {**names, **{numbers[value]: "ignore" for value in ignored}})


@dataclass(frozen=True)
class ExportLayout:
    """How a store is written for another tool.

    Attributes
    ----------
    names : callable
        Takes the identities by case id; returns the cases' names in this layout.
    image : callable
        Takes a name and whether the case has a label map; returns the path of its image.
    label : callable
        Takes a name; returns the path of its label map.
    describe : callable
        Takes the cases, the label table and the variant; returns the contents of the files that describe the data set,
        by path.
    for_training : bool
        Whether at least one case must have a label map.
    consecutive : bool
        Whether the tool needs consecutive label values.
    folders : tuple of str
        Folders that tools expect, even if they are empty.
    """

    names: Callable[[Mapping[str, Identity]], dict[str, str]]
    image: Callable[[str, bool], Path]
    label: Callable[[str], Path]
    describe: Callable[[Sequence[Case], LabelTable, str], dict[str, str]]
    for_training: bool = True
    consecutive: bool = False
    folders: tuple[str, ...] = ()


def _case_ids(identities: Mapping[str, Identity]) -> dict[str, str]:
    return {case: case for case in identities}


def _images_folder(labelled: bool) -> str:
    return "imagesTr" if labelled else "imagesTs"


def _sequence(cases: Iterable[Case]) -> str:
    """Return the contrast that all cases share, else "MRI"; never "CT", which nnU-Net normalises differently."""
    sequences = {case.sequence or "" for case in cases}
    only = sequences.pop() if len(sequences) == 1 else ""
    return only if is_contrast(only) and only.upper() != "CT" else _UNKNOWN_SEQUENCE


def _describe_nnunet(cases: Sequence[Case], table: LabelTable, _variant: str) -> dict[str, str]:
    content = {
        "channel_names": {"0": _sequence(cases)},
        "labels": {name: number for number, name in table.names.items()},
        "numTraining": sum(case.label is not None for case in cases),
        "file_ending": ENDING,
    }
    if table.changes:
        # From label values of the store to those of the files; nnU-Net ignores it.
        content["renumbered"] = {str(value): number for value, number in table.numbers.items()}
    return {"dataset.json": _json(content)}


def _describe_msd(cases: Sequence[Case], table: LabelTable, _variant: str) -> dict[str, str]:
    training = [case for case in cases if case.label]
    test = [case for case in cases if not case.label]
    content = {
        "name": "cspine",
        "description": "exported by cspine",
        "tensorImageSize": "3D",
        "modality": {"0": _sequence(cases)},
        "labels": {str(number): name for number, name in table.names.items()},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{"image": f"./{case.volume}", "label": f"./{case.label}"} for case in training],
        "test": [f"./{case.volume}" for case in test],
    }
    return {"dataset.json": _json(content)}


def _bids_names(identities: Mapping[str, Identity]) -> dict[str, str]:
    """Return BIDS names: a case id that is one is kept, others consist of patient, sequence and, if needed, a number.

    Names in BIDS are letters and digits; a number is added if those of two patients would be equal.
    """
    own = {case: _BIDS_NAME.fullmatch(case) for case in identities}
    names = {case: case for case, match in own.items() if match and _is_own_name(match, identities[case])}
    subjects = {identities[case].patient: identities[case].patient for case in names}
    taken = {name.casefold() for name in (*names.values(), *subjects.values())}
    for case, identity in sorted(identities.items()):
        if case in names:
            continue
        if identity.patient not in subjects:
            subjects[identity.patient] = _free(f"sub-{_alphanumeric(identity.patient)}{{}}", taken)
        suffix = _BIDS_SUFFIXES.get((identity.sequence or "").lower().removesuffix("w"), _UNKNOWN_SEQUENCE)
        subject = subjects[identity.patient]
        names[case] = _free(f"{subject}{{}}_{suffix}", taken, "_run-")
    return names


def _is_own_name(match: re.Match[str], identity: Identity) -> bool:
    return match["subject"] == identity.patient and is_contrast(match["suffix"])


def _alphanumeric(patient: str) -> str:
    plain = unicodedata.normalize("NFKD", patient.removeprefix("sub-"))
    return re.sub("[^A-Za-z0-9]", "", plain) or "x"


def _free(pattern: str, taken: set[str], mark: str = "x") -> str:
    """Return a name that is not taken, with a number from 2 if necessary, and add it."""
    number, name = 1, pattern.format("")
    while name.casefold() in taken:
        number += 1
        name = pattern.format(f"{mark}{number}")
    taken.add(name.casefold())
    return name


def _bids_folder(name: str) -> Path:
    subject, *others = name.split("_")
    return Path(subject, *(other for other in others[:1] if other.startswith("ses-")), "anat")


def _describe_bids(cases: Sequence[Case], table: LabelTable, variant: str) -> dict[str, str]:
    generated = {"BIDSVersion": _BIDS_VERSION, "GeneratedBy": [{"Name": "cspine", "Version": version("cspine")}]}
    # Corrected volumes are derivatives.
    kind = "raw" if variant == "raw" else "derivative"
    sites = {case.volume.parts[0]: printable(case.site or "n/a") for case in cases}
    index = [f"{number}\t{name}" for number, name in table.names.items()]
    files = {
        "dataset_description.json": _json({"Name": "cspine", "DatasetType": kind, **generated}),
        "README": f"Exported by cspine: volumes, variant {variant}; label maps in {_LABELS}.\n",
        "participants.tsv": _lines(
            ["participant_id\tsite", *(f"{one}\t{site}" for one, site in sorted(sites.items()))]
        ),
        ".bidsignore": _lines([SPLITS, PAIRS, "COHORT.txt"]),
    }
    if any(case.label for case in cases):
        label_maps = {"Name": "cspine label maps", "DatasetType": "derivative", **generated}
        files[f"{_LABELS}/dataset_description.json"] = _json(label_maps)
        files[f"{_LABELS}/dseg.tsv"] = _lines(["index\tname", *index])
    return files


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


#: The layouts in which a store can be exported, by name.
EXPORT_LAYOUTS = {
    "nnunet": ExportLayout(
        _case_ids,
        lambda name, labelled: Path(_images_folder(labelled), f"{name}_0000{ENDING}"),
        lambda name: Path("labelsTr", name + ENDING),
        _describe_nnunet,
        consecutive=True,
    ),
    "bids": ExportLayout(
        _bids_names,
        lambda name, labelled: _bids_folder(name) / (name + ENDING),
        lambda name: Path(_LABELS) / _bids_folder(name) / f"{name}_dseg{ENDING}",
        _describe_bids,
        for_training=False,
    ),
    "msd": ExportLayout(
        _case_ids,
        lambda name, labelled: Path(_images_folder(labelled), name + ENDING),
        lambda name: Path("labelsTr", name + ENDING),
        _describe_msd,
        folders=("imagesTs",),
    ),
}
