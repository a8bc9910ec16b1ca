"""What lies in a run folder, by name."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cspine_data.tools import atomic_write, exclusive_lock, remove_unfinished
from cspine_train.errors import RunError

#: What was asked and what was fed: JSON, see `RunRecord`.
RECORD_NAME = "run.json"
#: The weights that the run keeps, safetensors beside a JSON: what SMP's own `from_pretrained` reads.
MODEL_FOLDER = "model"
#: The empty file that stands for the lock of a run or study folder.
LOCK_NAME = ".lock"
#: A row an epoch.
METRICS_NAME = "metrics.csv"
#: The validation Dice among its columns.
MONITOR = "valid_dice"
#: Loss, validation Dice and learning rate by epoch, as a picture.
CURVES_NAME = "curves.png"
#: Validation slices that came out best and worst, as pictures.
OVERLAYS_FOLDER = "overlays"
#: What the model is, for people: Markdown with the head that the Hugging Face hub reads.
CARD_NAME = "MODEL_CARD.md"
#: All of an evaluation on one page that needs nothing beside it.
REPORT_NAME = "report.html"
#: What a killed run goes on from; needed for nothing else.
CHECKPOINT_FOLDER = "checkpoints"
#: Scores per patient, a file for what was scored.
EVALUATION_FOLDER = "evaluation"
# Folders that only the holder of the run's lock writes to.
_WRITTEN_FOLDERS = (MODEL_FOLDER, CHECKPOINT_FOLDER, EVALUATION_FOLDER, OVERLAYS_FOLDER)
#: What TensorBoard reads, where it was asked for.
TENSORBOARD_FOLDER = "tensorboard"
#: MLflow's database where no server is named, and which of its runs this is.
MLFLOW_FOLDER = "mlruns"


def write_text(path: Path, text: str) -> None:
    """Write a text file, see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_rows(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """Return a table's rows, of each what the columns make of it; none of a file that is not there.

    Raises
    ------
    RunError
        If it lacks a column, or holds something else in one.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: kind(row[name]) for name, kind in columns.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise RunError(f"{path}: is damaged ({error}); restore it, or make it anew") from None


def is_in_use(folder: Path) -> bool:
    """Return whether a folder holds anything but hidden files, which a process leaves that is killed at its start."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


@contextmanager
def only_writer(folder: Path, others: str = "is being trained or evaluated", patience_s: float = 0) -> Iterator[None]:
    """Hold the lock of a run or study folder, and remove what killed processes left unfinished there.

    Parameters
    ----------
    folder : Path
        A folder that exists.
    others : str
        What another process that holds the lock does, for the message.
    patience_s : float
        See `exclusive_lock`.

    Raises
    ------
    RunError
        If another process holds the lock.
    """
    with only_one(folder / LOCK_NAME, f"{folder}: {others} by another process", patience_s):
        for written in (folder, *(folder / name for name in _WRITTEN_FOLDERS)):
            remove_unfinished(written)
        yield


def only_one(lock: Path, problem: str, patience_s: float = 0) -> AbstractContextManager[Any]:
    """Return a lock that is held, see `exclusive_lock`; refuse with `problem` where another process holds it.

    Raises
    ------
    RunError
        If another process holds it.
    """
    try:
        return exclusive_lock(lock, patience_s)
    except TimeoutError:
        raise RunError(f"{problem}; wait until it has ended, or choose another folder") from None


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as CSV, in one step; what a row does not know stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
