"""Files and folders to predict: what is in them, where results go, and what is done already."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cspine_data import (
    CspineDataError,
    Volume,
    digest_source,
    find_cases,
    label_name,
    read_volume,
    usable_image,
    volume_stem,
    volume_suffix,
    volumes_in,
    write_volume,
)
from cspine_data.tools import atomic_write, make_folder
from cspine_train.errors import RunError
from cspine_train.prediction.predictor import LoadedRun, check_runs, predict
from cspine_train.prediction.preview import draw_overview
from cspine_train.run.folder import MODEL_FOLDER, only_one

#: What was predicted into a folder, a row a volume.
INDEX_NAME = "predictions.csv"
_LOCK_NAME = ".predictions.lock"
_COLUMNS = ("volume", "label", "expected_dice", "agreement", "warnings", "volume_sha256", "made_by")


@dataclass(frozen=True)
class Options:
    """How volumes are predicted, and what is written of each.

    Attributes
    ----------
    weights, mirror
        See `predict`.
    format : str or None
        Ending of the label maps in a folder, such as ``seg.nrrd``; None gives each that of its volume.
    probability : bool
        Write ``<volume>-probability.nrrd`` too.
    pictures : bool
        Write ``<volume>-axis0.png`` and ``.gif``, and those of the other axes, too.
    """

    weights: tuple[float, ...] | None = None
    mirror: bool = False
    format: str | None = None
    probability: bool = False
    pictures: bool = False


@dataclass(frozen=True)
class Predicted:
    """What became of one volume: `label` was written, or was there `already`; or `error` says why not."""

    volume: Path
    label: Path | None = None
    expected_dice: float | None = None
    agreement: float | None = None
    warnings: tuple[str, ...] = ()
    already: bool = False
    error: Exception | None = None


def find_volumes(sources: Sequence[Path]) -> list[Path]:
    """Return the volumes that files and folders name: a folder of volumes stands for all of them but label maps.

    A folder that holds no NRRD and no NIfTI volume is taken for a DICOM series.
    """
    found: list[Path] = []
    for source in sources:
        found += (volumes_in(source) if source.is_dir() else ()) or [source]
    return found


def predict_files(
    runs: Sequence[LoadedRun],
    volumes: Sequence[Path],
    output: Path,
    options: Options | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[Predicted]:
    """Predict files one after the other; one that fails does not stop the rest.

    `predictions.csv` beside the label maps says what was predicted from which bytes by which runs; what stands there
    and is there is not predicted again, so that a stopped command goes on when it is given again.

    Parameters
    ----------
    runs : sequence of LoadedRun
        One or more, fused.
    volumes : sequence of Path
        NRRD or NIfTI files, or folders of DICOM slices.
    output : Path
        A file for one volume; for several a folder, in which each label map has its volume's name with ``-label``.
    options : Options
        How, and what else is written.
    progress : callable, optional
        Called with (volumes done, volumes, name of the last).

    Raises
    ------
    RunError
        If the runs tell different labels apart, weights do not fit, two volumes would be written to one file, `output`
        is no name for what is predicted or is a folder of volumes, or another command predicts into it. A file that is
        there and that these runs did not write is left alone, and named as the reason.
    """
    options = options or Options()
    check_runs(runs, options.weights)
    to_file = _to_file(volumes, output)
    if to_file and options.format and not output.name.lower().endswith(f".{options.format}"):
        raise RunError(f"{output}: is not called as --format {options.format} asks; leave that out, or change the name")
    targets = [output if to_file else output / _name(volume, options) for volume in volumes]
    if len({_beside(target) for target in targets}) < len(targets):
        raise RunError(f"{output}: two of the volumes have the same name; predict them into two folders")
    homes = {volume.resolve().parent for volume in volumes if volume.is_file()}
    if not to_file and output.resolve() in homes:
        raise RunError(f"{output}: holds volumes, and what is predicted could be taken for some; choose another -o")
    truths = _truths(volumes) if options.pictures else {}
    home = output.parent if to_file else output
    make_folder(home)
    with only_one(home / _LOCK_NAME, f"{home}: another command predicts into it"):
        index = _Index(home / INDEX_NAME, made_by(runs, options))
        for number, (volume, target) in enumerate(zip(volumes, targets, strict=True), start=1):
            try:
                yield _predicted(runs, volume, target, options, index, truths.get(volume))
            # A volume can be anything, and networks and codecs have errors of their own: the others go on.
            except Exception as error:  # noqa: BLE001
                yield Predicted(volume, error=error)
            if progress:
                progress(number, len(volumes), volume.name)


def made_by(runs: Sequence[LoadedRun], options: Options) -> str:
    """Return a digest of all that decides what is predicted of a volume, and what is written of it."""
    digest = hashlib.sha256(json.dumps(vars(options), sort_keys=True).encode())
    for run in runs:
        for path in sorted((run.path / MODEL_FOLDER).iterdir()):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        record = run.record
        parts = record.settings, record.preprocessing
        kept = (record.size_hw, record.label_values, record.threshold, record.kept_components, record.filled_holes)
        digest.update(json.dumps([*(part.model_dump(mode="json") for part in parts), kept], sort_keys=True).encode())
    return digest.hexdigest()


def _to_file(volumes: Sequence[Path], output: Path) -> bool:
    if len(volumes) > 1 and (volume_suffix(output) or output.is_file()):
        raise RunError(f"{output}: cannot hold what is predicted; give a folder for several volumes")
    if len(volumes) == 1 and output.suffix and not volume_suffix(output) and not output.is_dir():
        wanted = "a name that ends in .nrrd, .nii, .nii.gz or .seg.nrrd, or a folder that exists"
        raise RunError(f"{output}: cannot hold what is predicted; give {wanted}")
    return len(volumes) == 1 and bool(volume_suffix(output))


def _name(volume: Path, options: Options) -> str:
    # The folder that somebody stands in has a name too.
    name = label_name(Path(os.path.abspath(volume)))  # noqa: PTH100
    return name if options.format is None else f"{volume_stem(Path(name))}.{options.format}"


def _beside(target: Path) -> Path:
    """Return what the names begin with of all that is written of a volume, beside its label map."""
    stem = volume_stem(target)
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
        # What a row tells of was begun by a command that was killed.
        if file.exists() and not known:
            raise RunError(f"{file}: is there already, and not of these runs; remove it or choose another -o")
    volume = usable_image(read_volume(path))
    prediction = predict(runs, volume, options.weights, options.mirror, options.probability)
    if not held.is_still(path):
        raise RunError(f"{path}: was changed while it was read; give the command again when it is whole")
    done = Predicted(path, target, prediction.expected_dice, prediction.agreement, prediction.warnings)
    index.add(done, digest)
    if prediction.probability is not None:
        write_volume(probability_file, prediction.probability)
    if options.pictures:
        draw_overview(_beside(target), volume, prediction.label, _read_truth(truth, volume) if truth else None)
    # Last: whoever finds the label map finds all.
    write_volume(target, prediction.label, runs[0].record.label_meaning)
    return done


def _truths(volumes: Sequence[Path]) -> dict[Path, Path]:
    """Return the label maps that lie beside volumes; they are for pictures only."""
    labels: dict[Path, Path] = {}
    for folder in {volume.parent for volume in volumes}:
        with suppress(CspineDataError):
            labels |= {case.volume: case.label for case in find_cases(folder).cases if case.label}
    return labels


def _read_truth(path: Path, volume: Volume) -> Volume | None:
    """Return a label map; None where it cannot be read or lies on another grid."""
    with suppress(CspineDataError):
        truth = read_volume(path)
        if truth.geometry.same_place(volume.geometry):
            return truth
    return None


class _Index:
    """What is predicted into a folder, by the label map's name; a row is written before its label map is.

    Parameters
    ----------
    path : Path
        The index.
    made_by : str
        See `made_by`.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self._path = path
        self._made_by = made_by
        self._rows: dict[str, dict[str, str]] = {}
        if not path.exists():
            return
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        # What a killed command left unfinished, or a spreadsheet has changed, is nobody's.
        self._rows = {row["label"]: row for row in rows if _is_whole(row)}
        # The next row would go on in a line that was cut short.
        if len(self._rows) < len(rows) or not text.endswith("\n"):
            self._write()

    def known(self, volume: Path, target: Path, digest: str) -> Predicted | None:
        """Return what these runs found of a volume before; None where nothing is known."""
        row = self._rows.get(target.name)
        if not row or row["made_by"] != self._made_by:
            return None
        if row["volume_sha256"] != digest:
            if not target.exists():
                return None
            raise RunError(f"{target}: was predicted from another {volume.name}; remove it or choose another -o")
        agreement = float(row["agreement"]) if row["agreement"] else None
        warnings = tuple(row["warnings"].split("; ")) if row["warnings"] else ()
        return Predicted(volume, target, float(row["expected_dice"]), agreement, warnings, already=True)

    def add(self, done: Predicted, digest: str) -> None:
        """Tell of a label map that is about to be written."""
        assert done.label  # noqa: S101
        row = {
            "volume": done.volume.name,
            "label": done.label.name,
            "expected_dice": f"{done.expected_dice:.4f}",
            "agreement": "" if done.agreement is None else f"{done.agreement:.4f}",
            "warnings": "; ".join(done.warnings),
            "volume_sha256": digest,
            "made_by": self._made_by,
        }
        again = done.label.name in self._rows
        self._rows[done.label.name] = row
        if again or not self._path.exists():
            self._write()
            return
        # A line, not the whole: there may be ten thousand.
        with self._path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.DictWriter(file, _COLUMNS).writerow(row)
            file.flush()
            # A label map that survives a power failure without its row would be nobody's.
            os.fsync(file.fileno())

    def _write(self) -> None:
        with (
            atomic_write(self._path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self._rows.values())


def _is_whole(row: Mapping[str, str | None]) -> bool:
    try:
        float(row["expected_dice"] or ""), float(row["agreement"] or 0)
    except (KeyError, ValueError):
        return False
    return all(row.get(name) is not None for name in _COLUMNS) and bool(row["label"] and row["made_by"])
