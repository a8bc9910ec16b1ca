"""The plan of a study: its cells, each a run to train and evaluate, identified by all that decides its outcome."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cspine_data import Cohort, GivenSplit, Split
from cspine_train.errors import RunError
from cspine_train.run.folder import write_text
from cspine_train.run.patient_split import cohort_fields, split_of
from cspine_train.run.settings import AXES, RunSettings, problem_of

#: The plan of a study: JSON, see `Plan`.
PLAN_NAME = "study.json"
PLAN_VERSION = 1
#: The encoder with random weights that stands for the reference study's "random init.", which names none.
RANDOM, RANDOM_ENCODER = "random", "resnet50"
IMAGENET = "imagenet"
RANDOM_NOTE = "random is resnet50 without pretrained weights; the reference study's random names no encoder"
REFERENCE_ENCODERS = (RANDOM, "resnet50", "inceptionv4")
_QUEUE_COLUMNS = ("done", "model", "encoder", "axis", "epochs", "batch")


@dataclass(frozen=True)
class Grid:
    """The varied settings of a study, in all combinations.

    Attributes
    ----------
    models : sequence of str
        Architectures.
    encoders : sequence of str
        Encoders; ``NAME:random`` has random initial weights, and ``random`` is ``resnet50:random``.
    weights : dict
        Initial weights of the other encoders by name, ``""`` for those not named: ``imagenet``, ``none`` or a file.
    variants : sequence of str
        ``n4`` and ``raw``.
    axes : sequence of tuple of int
        The axes of each model.
    folds : int or None
        Number of folds, each a run; None is the reference split.
    splits : sequence of GivenSplit
        Folds of a split file to use instead, one run each.
    test_sites : sequence of str
        Test sites to use instead, one run each.
    seeds : int
        Number of runs of each combination, from seed 0 on.
    """

    models: Sequence[str] = ("unet", "fpn", "linknet", "pspnet")
    encoders: Sequence[str] = REFERENCE_ENCODERS
    weights: Mapping[str, str] = field(default_factory=dict)
    variants: Sequence[str] = ("n4", "raw")
    axes: Sequence[tuple[int, ...]] = ((0,), (1,), (2,))
    folds: int | None = None
    seeds: int = 1
    splits: Sequence[GivenSplit] = ()
    test_sites: Sequence[str] = ()

    def settings(self, recipe: RunSettings) -> list[RunSettings]:
        """Return the settings of all runs: the recipe with each combination."""
        started = [encoder_and_weights(encoder, self.weights) for encoder in self.encoders]
        varied = product(self.models, started, self.variants, self.axes, self._splits(), range(self.seeds))
        return [
            _checked(
                recipe,
                {"model": model, "encoder": encoder, "weights": weights, "variant": variant, "axes": axes, "seed": seed}
                | split,
            )
            for model, (encoder, weights), variant, axes, split, seed in varied
        ]

    def _splits(self) -> list[dict[str, Any]]:
        """Return the settings of each split of the patients."""
        ways = {"--folds": self.folds, "--split": self.splits, "--leave-site-out": self.test_sites}
        given = [option for option, value in ways.items() if value]
        if len(given) > 1:
            raise RunError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.test_sites:
            return [{"test_site": site} for site in self.test_sites]
        if self.splits:
            return [{"split": split} for split in self.splits]
        return [{"folds": self.folds, "fold": fold} for fold in range(self.folds or 1)]


def encoder_and_weights(encoder: str, weights: Mapping[str, str]) -> tuple[str, str]:
    """Return the name and the initial weights of an encoder of `Grid`."""
    name, _, start = (f"{RANDOM_ENCODER}:{RANDOM}" if encoder == RANDOM else encoder).partition(":")
    if start and start != RANDOM:
        raise RunError(f"encoder {encoder!r}: is neither NAME nor NAME:{RANDOM}; give files with --weights {name}=FILE")
    given = "none" if start else weights.get(name, weights.get("", IMAGENET))
    return name, given if given in ("none", IMAGENET) else str(Path(given).resolve())


def queued(path: Path, grid: Grid, recipe: RunSettings) -> tuple[list[RunSettings], int]:
    """Read a queue file of the reference study: the settings of its runs, and the number of lines marked as done.

    The columns are ``done,model,encoder,axis,epochs,batch``; variants, folds and seeds are the grid's. Raises
    `RunError` if the file cannot be read, or a line is invalid.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: cannot be read ({error}); give a CSV file") from None
    missing = [name for name in _QUEUE_COLUMNS if rows and name not in rows[0]]
    if missing or not rows:
        raise RunError(
            f"{path}: is no queue; its first line must be {','.join(_QUEUE_COLUMNS)}, followed by a line for each run"
        )
    settings: list[RunSettings] = []
    done = 0
    for number, row in enumerate(rows, start=2):
        cells = {name: (row[name] or "").strip() for name in _QUEUE_COLUMNS}
        if cells["done"].lower() not in ("no", "yes"):
            raise RunError(f"{path}: line {number}: done is {cells['done']!r}; write yes or no")
        if cells["axis"] not in AXES:
            raise RunError(f"{path}: line {number}: axis is {cells['axis']!r}; write one of {', '.join(AXES)}")
        if cells["done"].lower() == "yes":
            done += 1
            continue
        encoders = [cells["encoder"] or RANDOM]
        of_row = replace(grid, models=[cells["model"]], encoders=encoders, axes=[AXES[cells["axis"]]])
        try:
            of_line = _checked(recipe, {"epochs": cells["epochs"], "minutes": None, "batch_size": cells["batch"]})
            settings += of_row.settings(of_line)
        except RunError as error:
            raise RunError(f"{path}: line {number}: {error}") from None
    return settings, done


def _checked(recipe: RunSettings, update: Mapping[str, Any]) -> RunSettings:
    try:
        return RunSettings(**recipe.model_dump() | dict(update))
    except ValidationError as error:
        raise RunError(f"{problem_of(error)}; correct it") from None


def sites_of(cohort: Cohort) -> list[str]:
    """Return the sites of a store's labelled cases, sorted; a `RunError` if there are fewer than two."""
    labelled = {case for variant in cohort.variants for case in cohort.split(variant=variant).part_of}
    sites = sorted({site for case in labelled if (site := cohort.sites[case]) is not None})
    if len(sites) < 2:
        remedy = "name the sites in the column site of --pairs, and prepare again"
        raise RunError(f"{cohort.path}: has fewer than two sites ({', '.join(sites) or 'none'}); {remedy}")
    return sites


class Cell(BaseModel):
    """A run of a study. Its name, that of its folder, has a digest of settings, patients' data and weights file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    settings: RunSettings


class Plan(BaseModel):
    """All cells of a study, and their store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_version: int = PLAN_VERSION
    store: str
    cells: tuple[Cell, ...]


def plan_study(cohort: Cohort, settings: Iterable[RunSettings]) -> Plan:
    """Make a plan of runs; equal runs are one cell.

    Raises
    ------
    RunError
        If there is no run, there are too few patients, they were prepared with different parameters, the variants have
        different patients, or a weights file cannot be read.
    CspineDataError
        If the store lacks a variant, an axis or a fold.
    """
    fields: dict[tuple[str, Hashable], Any] = {}
    files: dict[str, str] = {}
    cells: dict[str, Cell] = {}
    for one in settings:
        key = one.variant, (one.folds, one.fold, one.test_site, one.split)
        if key not in fields:
            split = split_of(cohort, one)
            fields[key] = split, cohort_fields(cohort, split, one.variant)["digests"]
        if one.weights not in files:
            files[one.weights] = _digest_of_file(Path(one.weights)) if _starts_from_file(one) else ""
        split, digests = fields[key]
        cohort.slices(one.axes, cases=split.train, variant=one.variant)
        # The split depends on when cases were added to the store.
        parts = [[[case, digests[case]] for case in part] for part in (split.train, split.validation, split.test)]
        what = [without_weights_path(one).model_dump(mode="json", exclude_defaults=True), files[one.weights], parts]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        name = f"{_run_name(one)}-{digest[:12]}"
        cells[name] = Cell(name=name, settings=one)
    if not cells:
        raise RunError("nothing to run: give at least one of each of --models, --encoders, --variants and --axes")
    _check_same_patients(cohort, {key: split for key, (split, _) in fields.items()})
    return Plan(store=cohort.location, cells=tuple(cells.values()))


def _check_same_patients(cohort: Cohort, splits: Mapping[tuple[str, Hashable], Split]) -> None:
    """Refuse variants that have different patients."""
    of_fold: dict[Hashable, tuple[str, Split]] = {}
    for (variant, fold), split in splits.items():
        first, other = of_fold.setdefault(fold, (variant, split))
        if other != split:
            raise RunError(
                f"{cohort.path}: holds other labelled cases as {variant} than as {first}; run cspine-data prepare over "
                "the same folder for both, or study one of the --variants"
            )


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); check the path of the weights") from None


def _starts_from_file(settings: RunSettings) -> bool:
    return settings.weights not in ("none", IMAGENET)


def without_weights_path(settings: RunSettings) -> RunSettings:
    """Return settings with only the name of a weights file; the digest of a cell identifies its content."""
    name = Path(settings.weights).name
    return settings.model_copy(update={"weights": name}) if _starts_from_file(settings) else settings


def weights_name(settings: RunSettings) -> str:
    """Return the initial weights in a word: ``random``, ``imagenet``, or the name of a file."""
    if not _starts_from_file(settings):
        return RANDOM if settings.weights == "none" else IMAGENET
    name = Path(settings.weights).name
    return f"file {name}" if name in (RANDOM, IMAGENET) else name


def _run_name(one: RunSettings) -> str:
    return _as_folder(one.run_name(weights_name(one)))


def _as_folder(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".")


def save_plan(study: Path, plan: Plan) -> None:
    """Write a study's plan atomically."""
    write_text(study / PLAN_NAME, plan.model_dump_json(indent=1))


def load_plan(study: Path) -> Plan:
    """Read a study's plan; a `RunError` if the folder is no study, or the plan is damaged or of a newer cspine."""
    try:
        content = (study / PLAN_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RunError(f"{study}: is no study; make one with cspine-train study -o {study}") from None
    try:
        if int(json.loads(content)["plan_version"]) > PLAN_VERSION:
            raise RunError(f"{study}: was written by a newer cspine; install that")
        plan = Plan.model_validate_json(content)
        # Names are folders, and must not lead to other places.
        damaged = next((cell.name for cell in plan.cells if not cell.name or _as_folder(cell.name) != cell.name), None)
    except (ValidationError, ValueError, KeyError, TypeError):
        damaged = "its content"
    if damaged is not None:
        raise RunError(f"{study / PLAN_NAME}: is damaged ({damaged}); run the study command again")
    return plan
