"""Training of a run: from a store to a run folder, resumable."""

from __future__ import annotations

import logging
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from cspine_data import LEVEL_NAMES, Cohort, Split, open_cohort
from cspine_data.terminal import progress_bar
from cspine_data.tools import make_folder
from cspine_train.data.datamodule import CohortSlices
from cspine_train.errors import RunError
from cspine_train.models.build import build_model, sides_of
from cspine_train.models.trained import TrainedWeights, preprocessing_note, read_trained
from cspine_train.prediction.confidence import calibrated_probabilities
from cspine_train.prediction.level_calibration import calibrated_levels
from cspine_train.prediction.overlays import save_overlays
from cspine_train.prediction.postprocessing import chosen_postprocessing
from cspine_train.prediction.predictor import load_run
from cspine_train.reports.figures import draw_curves, never_fatal
from cspine_train.reports.model_card import write_card
from cspine_train.run.folder import CARD_NAME, CHECKPOINT_FOLDER, CURVES_NAME, OVERLAYS_FOLDER, RECORD_NAME, only_writer
from cspine_train.run.label_classes import (
    label_meaning,
    labels_of_run,
    network_classes,
    unknown_labels,
    unknown_labels_note,
    unnamed_note,
)
from cspine_train.run.machines import Machines
from cspine_train.run.patient_split import cohort_fields, split_of
from cspine_train.run.process_state import quieten, restored_process_state
from cspine_train.run.record import RunRecord, record_to_resume, save_record
from cspine_train.run.settings import OptimisationSettings, RunSettings
from cspine_train.training.callbacks import Curves, Keep, Plateau, TimeBudget, WeightEMA
from cspine_train.training.checkpoints import Checkpoints, DurableCheckpoints, Place, newest_checkpoint
from cspine_train.training.loggers import check_loggers, open_loggers
from cspine_train.training.optimisers import precision_of
from cspine_train.training.processes import ProcessCheck, synchronised, trainer_devices, training_errors
from cspine_train.training.progress import TrainingProgress
from cspine_train.training.segmentation_module import SliceSegmenter
from cspine_train.training.step_check import StepCheck

_log = logging.getLogger("cspine_train")
# Messages that ask for nothing that a user can do: advice on workers; resuming within an epoch, which the data module
# does; metrics that are the same on all ranks; deprecations inside Lightning.
_IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*number of training batches.*",
    ".*ended before the epoch ended and your dataloader is not resumable.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*sync_dist=True.*",
    ".*overridden `on_after_batch_transfer`.*",
    ".*isinstance.*LeafSpec.*",
)


@restored_process_state()
def train(
    store: str | Path,
    run: str | Path,
    settings: RunSettings,
    workers: int = 0,
    checkpoint_minutes: float = 15.0,
    machines: Machines | None = None,
    loggers: Sequence[str] = (),
    from_command: bool = False,
) -> RunRecord:
    """Train a model on a store's slices; the same call resumes an unfinished run, and leaves a finished one as it is.

    `docs/run-folder.md` lists the files of the run folder. The state of the process, such as warning filters, random
    generators and signal handlers, is restored at the end. On a CPU under Linux, call
    `cspine_train.training.allocator.keep_large_blocks` first: steps are up to twice as fast.

    Parameters
    ----------
    store : str or Path
        A store that `cspine-data prepare` made, or its URL.
    run : str or Path
        The run folder, new or to resume.
    settings : RunSettings
        The settings.
    workers : int
        Processes that read slices; 0 reads in the training process.
    checkpoint_minutes : float
        Time between checkpoints within an epoch; the outcome does not depend on it.
    machines : Machines, optional
        Devices to train on; one by default. Several need the command, torchrun or srun; see ``docs/distributed.md``.
    loggers : sequence of str
        ``tensorboard`` and ``mlflow``.
    from_command : bool
        Whether this process is ``cspine-train run``, which Lightning may run again in the other processes.

    Returns
    -------
    RunRecord
        Also saved in the run folder.

    Raises
    ------
    RunError
        If the run folder is in use or holds another run, the settings do not suit the cohort, the network or the
        memory, a process cannot start or has died, or a logger is unavailable.
    ModelError
        If the model cannot be built or its weights are unavailable.
    CspineDataError
        If the store cannot be used.
    KeyboardInterrupt
        At Ctrl-C; the same call resumes the run.
    """
    check_loggers(loggers)
    quieten_lightning()
    machines = machines or Machines()
    devices = trainer_devices(machines, from_command)
    with ExitStack() as lock:
        return _train(store, Path(run), settings, workers, checkpoint_minutes, devices, machines.memory, loggers, lock)


def _train(
    store: str | Path,
    run: Path,
    settings: RunSettings,
    workers: int,
    checkpoint_minutes: float,
    devices: dict[str, Any],
    memory: int | None,
    loggers: Sequence[str],
    lock: ExitStack,
) -> RunRecord:
    """Train; rank 0 holds the run's lock until `lock` is closed."""
    trainer = _trainer(run, settings, checkpoint_minutes, devices)
    first = trainer.is_global_zero
    cohort = open_cohort(store)
    split = split_of(cohort, settings)
    fields = cohort_fields(cohort, split, settings.variant)
    earlier = record_to_resume(run, settings, fields["digests"], first)
    if first and earlier is not None and not earlier.finished:
        lock.enter_context(only_writer(run))
        # Another process may have finished it before this one held the lock.
        earlier = record_to_resume(run, settings, fields["digests"], first)
    if earlier is not None and earlier.finished:
        _log.info("nothing to do: %s is finished", run)
        return earlier
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    place, checkpoint = (newest_checkpoint(run / CHECKPOINT_FOLDER) if earlier else None) or (Place(), None)
    # A checkpoint holds the weights already.
    trained = None if checkpoint else starting_weights(settings, split, fields)
    initial_weights = "none" if checkpoint or trained else settings.weights
    module, data, made = _built(trainer, cohort, split, settings, initial_weights, workers, memory, trained)
    record = RunRecord(settings=settings, **fields, **made, deterministic=bool(devices["deterministic"]))
    if earlier and checkpoint:
        kept = ("weights_used", "origin", "kept_epoch", "kept_dice", "threshold")
        record = record.model_copy(update={name: getattr(earlier, name) for name in kept})
        _log.info("going on after %s, of %s", place, settings.length)
    if first:
        _begin(run, record, earlier, lock)
    data.first_epoch, data.batches_done = place.epochs, place.batches
    keeper = _add_callbacks(trainer, run, record, loggers, place, module.budget)
    _fit(trainer, run, module, data, checkpoint)
    record = record.model_copy(update={"finished": True, **keeper.kept})
    if first:
        record = record.model_copy(update=_chosen_on_validation(run, record, cohort))
        # The record comes last, so that a finished run is complete.
        _write_reports(run, record, cohort)
        save_record(run, record)
    return record


def _trainer(
    run: Path, settings: OptimisationSettings, checkpoint_minutes: float, devices: dict[str, Any]
) -> lightning.Trainer:
    plateau = [Plateau()] if settings.schedule == "plateau" else []
    callbacks = [*plateau, Checkpoints(run / CHECKPOINT_FOLDER, checkpoint_minutes)]
    trainer = lightning.Trainer(
        max_epochs=settings.epochs or -1,
        gradient_clip_val=settings.clip_norm,
        accelerator="auto",
        **devices,
        precision=precision_of(settings.precision),
        callbacks=callbacks,
        plugins=[DurableCheckpoints()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    # On a single device Lightning leaves the rank that the run before had in this process.
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    if not trainer.is_global_zero:
        # Rank 0 prints messages, and ends the others at Ctrl-C.
        quieten(_log.name)
        warnings.simplefilter("ignore")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return trainer


def starting_weights(settings: RunSettings, split: Split, fields: dict[str, Any]) -> TrainedWeights | None:
    """Return the weights that a fine-tuned run starts from; refuse those that do not suit it.

    `fields` are the `cohort_fields` of the run.
    """
    if settings.from_run is None:
        return None
    trained = read_trained(Path(settings.from_run))
    trained.check(settings, split, fields["voxels_sha256"])
    if note := preprocessing_note(trained, fields["preprocessing"]):
        warnings.warn(note, stacklevel=4)
    return trained


def _built(
    trainer: lightning.Trainer,
    cohort: Cohort,
    split: Split,
    settings: RunSettings,
    weights: str,
    workers: int,
    memory: int | None,
    trained: TrainedWeights | None,
) -> tuple[SliceSegmenter, CohortSlices, dict[str, Any]]:
    """Return the module, its data, and their fields of the record; refuse what cannot be trained."""
    labels = labels_of_run(cohort, split, settings)
    values = labels.values
    unknown = unknown_labels(cohort, split, settings, values)
    for note in (unknown_labels_note(unknown) if unknown else "", unnamed_note(cohort, split, settings)):
        if note:
            warnings.warn(note, stacklevel=3)
    network, weights_used = build_model(
        settings.model, settings.encoder, weights, settings.channels, network_classes(values)
    )
    origin = None
    if trained:
        origin, weights_used = trained.give(network, values), trained.sha256
        if origin.new_head:
            _log.info("new head: %s has other labels than this run", trained.run)
    rank, world = trainer.global_rank, trainer.world_size
    data = CohortSlices(cohort, split, settings, workers, sides_of(network), values, rank, world)
    if trainer.is_global_zero:
        StepCheck(network, cohort, split, values, trainer.num_devices, world, memory).check(settings, data)
    if world > 1 and trainer.strategy.root_device.type == "cuda":
        network = synchronised(network)
    if labels.text and trainer.is_global_zero:
        _log.info("%s", labels.text)
    missed = [len(unknown.get(case, ())) for case in split.validation]
    names = sorted({cohort.patients[case] for case in split.validation})
    patients = [names.index(cohort.patients[case]) for case in split.validation]
    count = max(1, len(values))
    budget = TimeBudget(settings.minutes, data.validation_steps) if settings.minutes else None
    module = SliceSegmenter(
        network, settings, split.validation, data.sizes, count, missed, data.ignores, patients, budget
    )
    made = {
        "weights_used": weights_used,
        "origin": origin,
        "size_hw": data.sizes.slice_hw,
        "label_values": values,
        "label_meaning": label_meaning(values, labels.names | {level: LEVEL_NAMES[level] for level in labels.levels}),
        "levels": labels.levels,
        "versions": _versions(),
        "processes": world,
    }
    return module, data, made


def _begin(run: Path, record: RunRecord, earlier: RunRecord | None, lock: ExitStack) -> None:
    """Make and lock the run folder, and save the record."""
    make_folder(run)
    lock.enter_context(only_writer(run))
    if earlier is None and (run / RECORD_NAME).exists():
        raise RunError(f"{run}: another process has begun it meanwhile; run the same command again")
    save_record(run, record)


def _add_callbacks(
    trainer: lightning.Trainer,
    run: Path,
    record: RunRecord,
    loggers: Sequence[str],
    place: Place,
    budget: TimeBudget | None,
) -> Keep:
    """Add the callbacks and loggers of a run: rank 0 alone draws, logs and shows progress."""
    settings = record.settings
    average = WeightEMA(settings.average) if settings.average else None
    keeper = Keep(run, settings.schedule, average)
    callbacks: list[Callback] = [ProcessCheck(f"{place} {record.weights_used} {record.digests}"), keeper]
    callbacks += filter(None, (average, budget))
    if trainer.is_global_zero:
        trainer.loggers = open_loggers(loggers, run, record, place.epochs)
        callbacks.append(Curves(run))
        if sys.stderr.isatty():
            callbacks.append(TrainingProgress(settings.schedule == "plateau", budget))
    # Before those that the trainer was made with, so that checkpoints are written last.
    trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
    return keeper


def _fit(
    trainer: lightning.Trainer, run: Path, module: SliceSegmenter, data: CohortSlices, checkpoint: Path | None
) -> None:
    try:
        with training_errors(trainer, run):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except SystemExit as end:
        if not trainer.is_global_zero:
            raise
        # Lightning ends the process at Ctrl-C and SIGTERM.
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise RunError(f"{run}: interrupted; run the same command again to go on") from None


def _chosen_on_validation(run: Path, record: RunRecord, cohort: Cohort) -> dict[str, Any]:
    """Return the postprocessing and the calibrations that validation chose, without a step that fails."""
    settings, chosen = record.settings, {}
    if settings.largest_components or settings.fill_holes:
        option = "--largest-components" if settings.largest_components else "--fill-holes"
        with never_fatal(f"{run}: {option}"), progress_bar("predicting validation volumes") as progress:
            chosen = chosen_postprocessing(load_run(run), cohort, progress)
    if record.levels:
        with never_fatal(f"{run}: calibration of levels"), progress_bar("calibrating levels") as progress:
            chosen |= calibrated_levels(load_run(run), cohort, progress)
    # Last, as it depends on the masks.
    record = record.model_copy(update=chosen)
    with never_fatal(f"{run}: calibration of probabilities"), progress_bar("calibrating probabilities") as progress:
        chosen |= calibrated_probabilities(replace(load_run(run), record=record), cohort, progress)
    return chosen


def _write_reports(run: Path, record: RunRecord, cohort: Cohort) -> None:
    """Write curves, overlays and the model card."""
    with never_fatal(f"{run / CURVES_NAME}"):
        draw_curves(run)
    with never_fatal(f"{run / OVERLAYS_FOLDER}"), progress_bar("drawing overlays") as progress:
        save_overlays(replace(load_run(run), record=record), cohort, progress)
    with never_fatal(f"{run / CARD_NAME}"):
        write_card(run, record)


def _versions() -> dict[str, str]:
    libraries = ("cspine", "torch", "lightning", "segmentation-models-pytorch", "timm", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def quieten_lightning() -> None:
    """Silence messages of Lightning that ask for nothing, until `restored_process_state` ends."""
    quieten("lightning.pytorch", "lightning.fabric")
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning(\.|$)")
