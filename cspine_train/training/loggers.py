"""Where else than in its folder a run is logged: TensorBoard, MLflow."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from cspine_data.tools import make_folder
from cspine_train.errors import RunError, meant
from cspine_train.run.folder import MLFLOW_FOLDER, MONITOR, TENSORBOARD_FOLDER, write_text
from cspine_train.run.process_state import quieten
from cspine_train.run.record import RunRecord

LOGGERS = ("tensorboard", "mlflow")
_SERVER = "MLFLOW_TRACKING_URI"
_RUN_ID = "run-id.txt"


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that are not known or whose packages are missing.

    Raises
    ------
    RunError
        If one is.
    """
    for name in names:
        if name not in LOGGERS:
            raise RunError(f"logger {name!r}: is not known{meant(name, LOGGERS)}; choose {' or '.join(LOGGERS)}")
        needed = [name]
        if name == "mlflow" and not os.environ.get(_SERVER):
            needed += ["sqlalchemy", "alembic"]
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            raise RunError(
                f"logger {name}: needs {' and '.join(missing)}, not installed here; pip install 'cspine[loggers]'"
            )


@dataclass(frozen=True)
class _Log:
    name: str
    logger: Any
    #: The first epoch that it does not hold yet.
    first_epoch: int


class Logged(Callback):
    """Logs a run's rows, an epoch each, as `metrics.csv` has them; the step is the epoch, from 0.

    A run that goes on goes on in the same log. A logger that fails is left out from then on: a server that is gone ends
    no training.

    Parameters
    ----------
    names : sequence of str
        Of `LOGGERS`.
    run : Path
        The run folder. TensorBoard's files lie in it, and MLflow's unless ``MLFLOW_TRACKING_URI`` names a server.
    record : RunRecord
        What the run is.
    rows : sequence of dict
        The rows so far; grows as the run goes on.
    epochs : int
        Epochs that are complete as the run begins, or goes on.

    Raises
    ------
    RunError
        If a logger cannot begin.
    """

    def __init__(
        self, names: Sequence[str], run: Path, record: RunRecord, rows: Sequence[dict[str, float]], epochs: int
    ) -> None:
        self._rows = rows
        self._logs: list[_Log] = []
        for name in dict.fromkeys(names):
            try:
                self._logs.append((_tensorboard if name == "tensorboard" else _mlflow)(run, record, epochs))
            except RunError:
                raise
            # Each raises kinds of its own, and those of what it talks to.
            except Exception as error:
                raise RunError(f"logger {name}: cannot begin ({_reason(error)}); mend that or leave it out") from error

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the epoch's row."""
        epoch = int(self._rows[-1]["epoch"])
        row = {name: value for name, value in self._rows[-1].items() if name != "epoch"}
        for log in [log for log in self._logs if epoch >= log.first_epoch]:
            self._try(log, lambda log=log: _log_row(log.logger, row, epoch))

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End the logs."""
        self._end("success")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """End the logs of a run that did not end by itself."""
        self._end("failed")

    def _end(self, status: str) -> None:
        for log in list(self._logs):
            self._try(log, lambda log=log: log.logger.finalize(status))

    def _try(self, log: _Log, do: Any) -> None:
        try:
            do()
        # As above.
        except Exception as error:  # noqa: BLE001
            self._logs.remove(log)
            warnings.warn(f"logger {log.name} failed ({_reason(error)}); training goes on without it", stacklevel=2)


def _log_row(logger: Any, row: Mapping[str, float], epoch: int) -> None:
    logger.log_metrics(row, step=epoch)
    logger.save()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _tensorboard(run: Path, record: RunRecord, epochs: int) -> _Log:
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    # Epochs that a killed run logged and that come again are dropped by those who read.
    logger = TensorBoardLogger(run, TENSORBOARD_FOLDER, version="", purge_step=epochs)
    if not epochs:
        # Indented, Markdown takes it as it is.
        told = "".join(f"    {line}\n" for line in record.settings.model_dump_json(indent=1).splitlines())
        logger.experiment.add_text("settings", told)
    return _Log("tensorboard", logger, epochs)


def _mlflow(run: Path, record: RunRecord, epochs: int) -> _Log:
    # Nothing is sent anywhere but where the user said.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from lightning.pytorch.loggers import MLFlowLogger

    quieten(mlflow.__name__, "alembic")
    folder = (run / MLFLOW_FOLDER).resolve()
    server = os.environ.get(_SERVER)
    if not server and "?" in str(folder):
        raise RunError(
            f"logger mlflow: its database cannot lie in {folder}, as a ? ends its address; choose another -o"
        )
    make_folder(folder)
    known = folder / _RUN_ID
    run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
    logger = MLFlowLogger(
        experiment_name="cspine",
        run_name=run.resolve().name,
        # Its folders of files are in maintenance since MLflow 3.13, and refused.
        tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}",
        artifact_location=None if server else (folder / "artifacts").as_uri(),
        tags={f"note{number}": note for number, note in enumerate(record.caveats(), start=1)},
        run_id=run_id,
    )
    try:
        client, current = logger.experiment, str(logger.run_id)
    except mlflow.MlflowException as error:
        if run_id is None:
            raise
        raise RunError(
            f"logger mlflow: its run {run_id} is not to be had ({_reason(error)}); name the server where it is, or "
            f"delete {known} to begin a new one"
        ) from error
    if run_id is None:
        write_text(known, current)
        logger.log_hyperparams(record.settings.model_dump())
        return _Log("mlflow", logger, 0)
    client.update_run(current, status="RUNNING")
    steps = [metric.step for metric in client.get_metric_history(current, MONITOR)]
    return _Log("mlflow", logger, max(steps, default=-1) + 1)
