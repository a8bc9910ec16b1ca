"""What the name of a file or folder says: label map or volume, patient, sequence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cspine_data.names import normalised
from cspine_data.volumes.io import SEGMENTATION_SUFFIX, volume_stem, volume_suffix

# Only the first group is unambiguous: "T2_seg" may be a sequence, "AB_GT" a patient.
_LABEL_ENDING = re.compile(r"(?P<volume>.+)[-_ ](?:(?P<sure>labels?)|seg|segmentation|masks?|gt)", re.IGNORECASE)
_LABEL_ALONE = re.compile(r"labels?|seg|segmentation|masks?|gt", re.IGNORECASE)
_IMAGE_ALONE = {"image", "img", "volume", "scan", "mri", "mr", "anat", "raw"}
_CONTRAST = re.compile(
    r"(t1|t2|pd|t1rho|t2star|stir|tirm|flair|mp2?rage|tof|dwi|adc|gre|ct)w?(ce|fs|gd)?", re.IGNORECASE
)
_QUALIFIER = re.compile(
    r"sag(ittal)?|cor(onal)?|ax(ial)?|tra(ns)?|tse|fse|se|space|vista|cube|dixon|water|fat|inphase|opphase|fs|fatsat|iso|2d|3d"
    r"|(ses|session|visit|run|acq|echo|part)(-\w+|\d+)|baseline|follow-?up",
    re.IGNORECASE,
)
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
# CSpineSeg: number of the patient, number of the examination.
_EXAMINATION = re.compile(r"(?P<patient>\d{6})-\d{6}")


def name_of(path: Path) -> str:
    """Return a file name for comparison: without suffixes, normalised."""
    return normalised(volume_stem(path))


def is_visible_volume(path: Path) -> bool:
    """Return whether a path has a volume's suffix and is not hidden, as macOS's ``._X.nii`` are."""
    return bool(volume_suffix(path)) and not path.name.startswith(".")


def is_plain_label_name(name: str) -> bool:
    """Return whether a name says nothing but that the file is a label map, such as ``seg``."""
    return _LABEL_ALONE.fullmatch(name) is not None


def is_plain_image_name(name: str) -> bool:
    """Return whether a name says nothing but that the file is an image, such as ``image``."""
    return name.lower() in _IMAGE_ALONE


def without_label_ending(name: str) -> str:
    """Return the name of a label map's volume: ``P1_seg`` is of ``P1``."""
    ending = _LABEL_ENDING.fullmatch(name)
    return ending["volume"] if ending else name


def label_maps(files: Iterable[Path]) -> dict[Path, str]:
    """Return the label maps in a folder by their names, with the names of their volumes.

    ``X.seg.nrrd`` and ``X-label`` always are label maps; ``X_seg``, ``X_mask`` and ``X_gt`` are if X exists.
    """
    endings = {path: _LABEL_ENDING.fullmatch(name_of(path)) for path in files}
    sure = {
        path for path, ending in endings.items()
        if path.name.lower().endswith(SEGMENTATION_SUFFIX) or (ending and ending["sure"])
    }  # fmt: skip
    volumes = {name_of(path) for path in endings if path not in sure}
    found = {}
    for path, ending in endings.items():
        name = ending["volume"] if ending else name_of(path)
        # Names of the reference study: X.nrrd and XS-label.nrrd.
        if ending and name not in volumes and name[-1:] in ("S", "s"):
            name = name[:-1]
        if path in sure or (ending and name in volumes):
            found[path] = name
    return found


def is_contrast(name: str) -> bool:
    """Return whether a name is that of an MRI contrast, such as ``T2w``."""
    return _CONTRAST.fullmatch(name) is not None


def patient_and_sequence(name: str) -> tuple[str, str | None]:
    """Return the patient and the sequence that a name gives.

    ``sub-07_T2w`` is patient ``sub-07``, sequence ``T2w``; ``1_t2_SPACE`` is patient ``1``. A name is a patient's own
    unless it contains a contrast, a session, a BIDS subject or CSpineSeg's two numbers.
    """
    examination = _EXAMINATION.fullmatch(name)
    if examination:
        return examination["patient"], None
    words = re.split(r"([-_ .])", name)
    # A BIDS entity, such as ses-01, is one word.
    words = re.split(r"([_ .])", name) if re.search(r"[A-Za-z]-[A-Za-z0-9]", name) else words
    names, separators = words[::2], words[1::2]
    said = [bool(_CONTRAST.fullmatch(word) or _QUALIFIER.fullmatch(word)) for word in names]
    first, last = 0, len(names)
    while first < last and said[first]:
        first += 1
    while last > first and said[last - 1]:
        last -= 1
    contrasts = [word for word in (*names[:first], *names[last:]) if _CONTRAST.fullmatch(word)]
    subject = _SUBJECT.match(name)
    if subject:
        patient = subject.group()
    elif first == last or (not contrasts and not any(map(_is_session, (*names[:first], *names[last:])))):
        patient = name
    else:
        kept = [word for pair in zip(names[first:last], [*separators[first:], ""], strict=False) for word in pair]
        patient = "".join(kept[:-1])
    return patient, contrasts[-1] if contrasts else None


def _is_session(word: str) -> bool:
    return re.match(r"(ses|session|visit|baseline|follow)", word, re.IGNORECASE) is not None
