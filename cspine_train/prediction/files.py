"""Prediction of files and folders, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cspine_data import (
    CspineDataError,
    Volume,
    consecutive_levels,
    digest_source,
    find_cases,
    label_name,
    read_volume,
    segmentation_source,
    usable_image,
    volume_stem,
    volume_suffix,
    write_segmentation,
    write_volume,
)
from cspine_data import find_volumes as volumes_of
from cspine_data.tools import make_folder
from cspine_train.errors import RunError
from cspine_train.levels.naming import NamedSpine
from cspine_train.levels.picture import draw_spine
from cspine_train.prediction.output_tables import OutputTable, level_rows, level_table
from cspine_train.prediction.predictor import LoadedRun, check_runs, predict
from cspine_train.prediction.preview import draw_overview
from cspine_train.run.folder import MODEL_FOLDER, only_one
from cspine_train.run.record import RunRecord

#: Table of the predictions in a folder, a row for each volume.
INDEX_NAME = "predictions.csv"
#: Suffix of DICOM segmentations, which refer to the series that they were predicted from.
DICOM_SUFFIX = ".dcm"
_LOCK_NAME = ".predictions.lock"
_LEVEL_OPTIONS = ("levels", "lowest", "highest")
_COLUMNS = ("volume", "label", "expected_dice", "agreement", "warnings", "volume_sha256", "made_by")


@dataclass(frozen=True)
class Options:
    """Options of the prediction of files.

    Attributes
    ----------
    weights, mirror
        See `predict`.
    format : str or None
        Ending of the label maps in a folder, such as ``seg.nrrd``, or ``dcm`` for DICOM segmentations of DICOM volumes;
        None: that of each volume.
    probability : bool
        Also write ``<volume>-probability.nrrd``.
    pictures : bool
        Also write ``<volume>-axis0.png`` and ``.gif``, and those of the other axes.
    levels : bool
        Also write ``levels.csv``, one row per vertebra, and ``<volume>-levels.png``.
    lowest, highest : str or None
        With `levels`: level of the lowest or highest vertebra in all volumes, see `predict`. Runs with binary labels
        need one of them.
    """

    weights: tuple[float, ...] | None = None
    mirror: bool = False
    format: str | None = None
    probability: bool = False
    pictures: bool = False
    levels: bool = False
    lowest: str | None = None
    highest: str | None = None


@dataclass(frozen=True)
class Predicted:
    """Outcome for one volume: `label` was written now or `already`, or there is an `error`."""

    volume: Path
    label: Path | None = None
    expected_dice: float | None = None
    agreement: float | None = None
    warnings: tuple[str, ...] = ()
    already: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class Target:
    """A volume to predict, the folder for its label map within the output folder, and its true label map if found."""

    volume: Path
    place: Path = Path()
    truth: Path | None = None


def find_targets(sources: Sequence[Path]) -> tuple[list[Target], tuple[str, ...]]:
    """Return the volumes among files and folders, and problems with others.

    Of a folder, these are all volumes in any layout, without label maps; its subfolders are mirrored in the output.
    """
    found: list[Target] = []
    problems: list[str] = []
    for source in sources:
        if not source.is_dir():
            found.append(Target(source))
            continue
        listing = volumes_of(source)
        problems += [problem.message for problem in listing.problems]
        for case in listing.cases:
            # One of several DICOM volumes that the folder itself holds is beside it: exam#2.
            inside = case.volume != source and case.volume.is_relative_to(source)
            place = case.volume.relative_to(source).parent if inside else Path()
            found.append(Target(case.volume, place, case.label))
    return found, tuple(problems)


def find_volumes(sources: Sequence[Path]) -> list[Path]:
    """Return the volumes among files and folders, see `find_targets`."""
    return [target.volume for target in find_targets(sources)[0]]


def predict_files(
    runs: Sequence[LoadedRun],
    volumes: Sequence[Path | Target],
    output: Path,
    options: Options | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[Predicted]:
    """Predict files one after the other; a volume that fails does not stop the others.

    `predictions.csv` beside the label maps records the runs and the digest of each volume. Volumes that it lists, and
    whose label maps exist, are not predicted again, so that the same call resumes.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more runs, fused.
    volumes : sequence of Path or Target
        Files, or folders of DICOM slices.
    output : Path
        A file for one volume, or a folder, in which each label map has its volume's name with ``-label``, in the
        subfolder of its target.
    options : Options
        Options.
    progress : callable, optional
        Called with (volumes done, volumes, name of the last).

    Raises
    ------
    RunError
        If the runs' labels differ, weights do not match, the runs cannot name levels, two volumes have the same output
        file, `output` is unsuitable or a folder of input volumes, or another command predicts into it. Files of other
        runs are never overwritten: the volume fails.
    InputError
        If `lowest` or `highest` is not a level, or if both are given.
    """
    options = options or Options()
    check_runs(runs, options.weights)
    _check_levels(runs, options)
    chosen = [one if isinstance(one, Target) else Target(one) for one in volumes]
    paths = [one.volume for one in chosen]
    to_file = _to_file(paths, output)
    if to_file and options.format and not output.name.lower().endswith(f".{options.format}"):
        raise RunError(f"{output}: does not end in .{options.format}; leave --format out, or change the name")
    targets = [output if to_file else output / one.place / _name(one.volume, options) for one in chosen]
    if len({_beside(target) for target in targets}) < len(targets):
        raise RunError(f"{output}: two of the volumes have the same name; predict them into two folders")
    homes = {volume.resolve().parent for volume in paths if volume.is_file()}
    # A segmentation among the slices would be part of the volume when it is read again.
    homes_of_slices = {volume.resolve() for volume in paths if volume.is_dir()}
    among_slices = any(_is_dicom(target) and target.parent.resolve() in homes_of_slices for target in targets)
    if among_slices or (not to_file and output.resolve() in homes):
        raise RunError(f"{output}: holds the volumes, and predictions could be mistaken for volumes; choose another -o")
    truths = _truths(chosen) if options.pictures else {}
    home = output.parent if to_file else output
    for folder in {home, *(target.parent for target in targets)}:
        make_folder(folder)
    with only_one(home / _LOCK_NAME, f"{home}: another command predicts into it"):
        index = _Index(home, made_by(runs, options), options.levels)
        for number, (volume, target) in enumerate(zip(paths, targets, strict=True), start=1):
            try:
                yield _predicted(runs, volume, target, options, index, truths.get(volume))
            # Files, networks and codecs raise errors of many kinds.
            except Exception as error:  # noqa: BLE001
                yield Predicted(volume, error=error)
            if progress:
                progress(number, len(paths), volume.name)


def made_by(runs: Sequence[LoadedRun], options: Options) -> str:
    """Return a digest of all that decides the predictions and the written files: runs and options."""
    # Without levels, the digest is the same as before the options for levels existed.
    asked = {name: value for name, value in vars(options).items() if options.levels or name not in _LEVEL_OPTIONS}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for run in runs:
        for path in sorted((run.path / MODEL_FOLDER).iterdir()):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        record = run.record
        parts = record.settings, record.preprocessing
        kept = (record.size_hw, record.label_values, record.threshold, record.kept_components, record.filled_holes)
        named = [record.levels, record.level_temperature] if record.levels else []
        decide = [*(part.model_dump(mode="json") for part in parts), kept, *named]
        digest.update(json.dumps(decide, sort_keys=True).encode())
    return digest.hexdigest()


def _check_levels(runs: Sequence[LoadedRun], options: Options) -> None:
    """Refuse levels that the runs cannot name."""
    named = bool(options.lowest or options.highest)
    if not options.levels:
        if named:
            raise RunError("--lowest and --highest have no effect without --levels; add it")
        return
    if named:
        consecutive_levels(options.lowest, options.highest, 1)
    single = len(runs[0].record.label_values) < 2
    if single and not named:
        raise RunError(
            f"{runs[0].path}: was trained on binary labels, so it knows no levels; give --lowest or --highest, "
            "the level of the lowest or highest vertebra in all volumes"
        )
    if not single and not runs[0].record.levels:
        raise RunError(f"{runs[0].path}: the labels of the runs are not levels; leave out --levels")


def _to_file(volumes: Sequence[Path], output: Path) -> bool:
    named = bool(volume_suffix(output)) or _is_dicom(output)
    if len(volumes) > 1 and (named or output.is_file()):
        raise RunError(f"{output}: is a file; give a folder for several volumes")
    if len(volumes) == 1 and output.suffix and not named and not output.is_dir():
        wanted = "a name that ends in .nrrd, .nii, .nii.gz, .mha, .seg.nrrd or .dcm, or a folder that exists"
        raise RunError(f"{output}: is no name for a label map; give {wanted}")
    return len(volumes) == 1 and named


def _is_dicom(target: Path) -> bool:
    return target.suffix.lower() == DICOM_SUFFIX


def _name(volume: Path, options: Options) -> str:
    # "." has a name, too.
    name = label_name(Path(os.path.abspath(volume)))  # noqa: PTH100
    return name if options.format is None else f"{volume_stem(Path(name))}.{options.format}"


def _beside(target: Path) -> Path:
    """Return the common start of the names of a volume's other files."""
    stem = target.stem if _is_dicom(target) else volume_stem(target)
    return target.parent / (stem.removesuffix("-label") or stem)


def _predicted(
    runs: Sequence[LoadedRun], path: Path, target: Path, options: Options, index: _Index, truth: Path | None
) -> Predicted:
    held = digest_source(path)
    digest = held.sha256
    known = index.known(path, target, digest)
    if known and target.exists():
        return known
    probability_file = _beside(target).with_name(f"{_beside(target).name}-probability.nrrd")
    for file in (target, *((probability_file,) if options.probability else ())):
        # A file that a row lists may be left by a killed command.
        if file.exists() and not known:
            raise RunError(f"{file}: exists already, and is not of these runs; remove it or choose another -o")
    # Before the long work: it refuses volumes that a segmentation cannot refer to.
    source = segmentation_source(path) if _is_dicom(target) else None
    volume = usable_image(read_volume(path))
    prediction = predict(
        runs, volume, options.weights, options.mirror, options.probability, options.lowest, options.highest
    )
    if not held.is_still(path):
        raise RunError(f"{path}: changed while it was read; run the command again when it is complete")
    spine = prediction.spine
    warnings = (*prediction.warnings, *([spine.doubt] if spine and spine.doubt else ()))
    done = Predicted(path, target, prediction.expected_dice, prediction.agreement, warnings)
    index.add(done, digest, spine)
    if prediction.probability is not None:
        write_volume(probability_file, prediction.probability)
    if options.pictures:
        draw_overview(_beside(target), volume, prediction.label, _read_truth(truth, volume) if truth else None)
    if options.levels and spine:
        draw_spine(_beside(target).with_name(f"{_beside(target).name}-levels.png"), volume, prediction.label, spine)
    meaning = _meaning(runs[0].record, spine)
    # Last, so that a label map is there only if all other files are.
    if source is not None:
        write_segmentation(target, prediction.label, source, meaning)
    else:
        write_volume(target, prediction.label, meaning)
    return done


def _meaning(record: RunRecord, spine: NamedSpine | None) -> dict[int, str]:
    """Return the meaning of the values of a label map; for a binary run, 1 may now mean C1 instead of vertebra."""
    if spine is None:
        return record.label_meaning
    others = record.label_meaning if record.levels else {0: "background"}
    return others | {found.value: found.name for found in spine.levels}


def _truths(targets: Sequence[Target]) -> dict[Path, Path]:
    """Return the known label maps of volumes, and those beside single files; pictures show them."""
    labels: dict[Path, Path] = {}
    for folder in {target.volume.parent for target in targets if target.truth is None}:
        with suppress(CspineDataError):
            labels |= {case.volume: case.label for case in find_cases(folder).cases if case.label}
    return labels | {target.volume: target.truth for target in targets if target.truth}


def _read_truth(path: Path, volume: Volume) -> Volume | None:
    """Return a label map; None if it cannot be read or is on another grid."""
    with suppress(CspineDataError):
        truth = read_volume(path)
        if truth.geometry.same_place(volume.geometry):
            return truth
    return None


class _Index:
    """The tables in an output folder, by the name of the label map.

    Rows are written before their label map: after a power failure, a label map without a row would count as one of
    other runs.
    """

    def __init__(self, folder: Path, made_by: str, with_levels: bool) -> None:
        self._folder = folder
        self._made_by = made_by
        self._table = OutputTable(folder / INDEX_NAME, _COLUMNS, "label", _is_whole)
        self._levels = level_table(folder) if with_levels else None

    def known(self, volume: Path, target: Path, digest: str) -> Predicted | None:
        """Return the earlier prediction of a volume by these runs; None if there is none."""
        row = next(iter(self._table.rows(self._name(target))), None)
        if not row or row["made_by"] != self._made_by:
            return None
        if row["volume_sha256"] != digest:
            if not target.exists():
                return None
            raise RunError(f"{target}: was predicted from another {volume.name}; remove it or choose another -o")
        agreement = float(row["agreement"]) if row["agreement"] else None
        warnings = tuple(row["warnings"].split("; ")) if row["warnings"] else ()
        expected = float(row["expected_dice"]) if row["expected_dice"] else None
        return Predicted(volume, target, expected, agreement, warnings, already=True)

    def _name(self, label: Path) -> str:
        return label.relative_to(self._folder).as_posix()

    def add(self, done: Predicted, digest: str, spine: NamedSpine | None) -> None:
        """Add the row of a label map that will be written, and those of its vertebrae."""
        assert done.label  # noqa: S101
        row = {
            "volume": done.volume.name,
            "label": self._name(done.label),
            "expected_dice": "" if done.expected_dice is None else f"{done.expected_dice:.4f}",
            "agreement": "" if done.agreement is None else f"{done.agreement:.4f}",
            "warnings": "; ".join(done.warnings),
            "volume_sha256": digest,
            "made_by": self._made_by,
        }
        self._table.put(row["label"], [row])
        if self._levels and spine:
            case = self._name(_beside(done.label))
            self._levels.put(case, level_rows(case, spine))


def _is_whole(row: Mapping[str, str]) -> bool:
    try:
        float(row["expected_dice"] or 0), float(row["agreement"] or 0)
    except ValueError:
        return False
    return bool(row["made_by"])
