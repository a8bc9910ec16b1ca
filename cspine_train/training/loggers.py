"""Loggers of a run beside its own folder: TensorBoard and MLflow."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

from cspine_data.tools import make_folder, meant
from cspine_train.errors import RunError, reason_of
from cspine_train.run.folder import MLFLOW_FOLDER, MONITOR, TENSORBOARD_FOLDER, write_text
from cspine_train.run.process_state import quieten
from cspine_train.run.record import RunRecord

_SERVER = "MLFLOW_TRACKING_URI"
_RUN_ID = "run-id.txt"


class RunLogger(Logger):
    """A logger that disables itself with a warning when it fails: a server that is gone does not end training.

    Mix it in before one of Lightning's loggers. A resumed run continues the same log, and logs no epoch twice.
    """

    #: The first epoch that the log does not hold yet.
    first_epoch = 0
    _failed = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log an epoch's metrics; the step is the epoch, from 0."""
        if step is None or step >= self.first_epoch:
            self._attempt(super().log_metrics, metrics, step)  # type: ignore[safe-super]

    def save(self) -> None:
        """Flush the log."""
        self._attempt(super().save)

    def finalize(self, status: str = "success") -> None:
        """Close the log."""
        self._attempt(super().finalize, status)

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            action(*arguments)
        # Each library raises errors of its own, and those of what it connects to.
        except Exception as error:  # noqa: BLE001
            self._failed = True
            name = next(name for name, kind in LOGGERS.items() if isinstance(self, kind))
            warnings.warn(f"logger {name} failed ({reason_of(error)}); training continues without it", stacklevel=3)


class RunTensorBoard(RunLogger, TensorBoardLogger):
    """TensorBoard's files, in the run folder."""

    def __init__(self, run: Path, record: RunRecord, epochs: int) -> None:
        # A reader drops the epochs that an interrupted run logged and that are trained again.
        super().__init__(run, TENSORBOARD_FOLDER, version="", purge_step=epochs)
        self.first_epoch = epochs
        self.hparams = record.settings.model_dump(mode="json")
        if not epochs:
            # Markdown shows indented lines as they are.
            lines = record.settings.model_dump_json(indent=1).splitlines()
            self.experiment.add_text("settings", "".join(f"    {line}\n" for line in lines))


class RunMLflow(RunLogger, MLFlowLogger):
    """One MLflow run, in a database in the run folder or on the server that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, run: Path, record: RunRecord, epochs: int) -> None:
        # MLflow sends usage data by default.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        quieten("mlflow", "alembic")
        folder, server = (run / MLFLOW_FOLDER).resolve(), os.environ.get(_SERVER)
        if not server and "?" in str(folder):
            raise RunError(f"logger mlflow: {folder} contains a ?, which ends a database address; choose another -o")
        make_folder(folder)
        known = folder / _RUN_ID
        run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
        super().__init__(
            experiment_name="cspine",
            run_name=run.resolve().name,
            # MLflow 3.13 and later refuse folders of files.
            tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}",
            artifact_location=None if server else (folder / "artifacts").as_uri(),
            tags={f"note{number}": note for number, note in enumerate(record.caveats(), start=1)},
            run_id=run_id,
        )
        if run_id is None:
            write_text(known, str(self.run_id))
            # A server may be anybody's: it gets no names of cases.
            logged = record.settings.model_dump(exclude={"split", "case_weights"})
            self.log_hyperparams(logged | {"split_name": record.settings.split_name})
        else:
            self._resume(run_id, known)

    def _resume(self, run_id: str, known: Path) -> None:
        from mlflow import MlflowException

        try:
            client = self.experiment
        except MlflowException as error:
            raise RunError(
                f"logger mlflow: run {run_id} is unavailable ({reason_of(error)}); name the server that has it, or "
                f"delete {known} to start a new one"
            ) from error
        client.update_run(run_id, status="RUNNING")
        steps = [metric.step for metric in client.get_metric_history(run_id, MONITOR)]
        self.first_epoch = max(steps, default=-1) + 1


LOGGERS: dict[str, type[RunTensorBoard | RunMLflow]] = {"tensorboard": RunTensorBoard, "mlflow": RunMLflow}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse, with a `RunError`, loggers that are unknown or whose packages are missing."""
    for name in names:
        if name not in LOGGERS:
            raise RunError(f"logger {name!r}: unknown{meant(name, LOGGERS)}; choose {' or '.join(LOGGERS)}")
        local = name == "mlflow" and not os.environ.get(_SERVER)
        needed = [name, "sqlalchemy", "alembic"] if local else [name]
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            raise RunError(f"logger {name}: needs {' and '.join(missing)}; pip install 'cspine[loggers]'")


def open_loggers(names: Sequence[str], run: Path, record: RunRecord, epochs: int) -> list[Logger]:
    """Open the loggers of a run, or continue them after some complete epochs.

    Raises `RunError` if a logger cannot be opened.
    """
    opened: list[Logger] = []
    for name in dict.fromkeys(names):
        try:
            opened.append(LOGGERS[name](run, record, epochs))
        except RunError:
            raise
        except Exception as error:
            raise RunError(f"logger {name}: cannot start ({reason_of(error)}); correct that or omit it") from error
    return opened
