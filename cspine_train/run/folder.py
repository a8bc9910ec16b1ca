"""Names of the files of a run folder, its lock, and reading and writing of tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cspine_data.tools import atomic_write, exclusive_lock, remove_unfinished
from cspine_train.errors import RunError

#: Settings and data of the run: JSON, see `RunRecord`.
RECORD_NAME = "run.json"
#: The kept weights: safetensors and JSON, which SMP's `from_pretrained` reads.
MODEL_FOLDER = "model"
#: Lock file of a run or study folder.
LOCK_NAME = ".lock"
#: Metrics, a row for each epoch.
METRICS_NAME = "metrics.csv"
#: Its column of the validation Dice.
MONITOR = "valid_dice"
#: Its column of the threshold of the probability.
THRESHOLD = "threshold"
#: Plot of loss, validation Dice and learning rate by epoch.
CURVES_NAME = "curves.png"
#: Pictures of the validation slices with the best and the worst Dice.
OVERLAYS_FOLDER = "overlays"
#: Model card: Markdown with the metadata block of the Hugging Face hub.
CARD_NAME = "MODEL_CARD.md"
#: Report of the evaluations: one self-contained page.
REPORT_NAME = "report.html"
#: Checkpoints, which only resuming needs.
CHECKPOINT_FOLDER = "checkpoints"
#: Scores per patient, files for each evaluation.
EVALUATION_FOLDER = "evaluation"
# Folders that only the holder of the run's lock writes to.
_WRITTEN_FOLDERS = (MODEL_FOLDER, CHECKPOINT_FOLDER, EVALUATION_FOLDER, OVERLAYS_FOLDER)
#: Log of TensorBoard, if requested.
TENSORBOARD_FOLDER = "tensorboard"
#: MLflow's database, unless a server is named, and the id of this run.
MLFLOW_FOLDER = "mlruns"


def write_text(path: Path, text: str) -> None:
    """Write a text file, see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_rows(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """Read the rows of a CSV table, with a function that converts each column; empty if there is no file.

    Raises `RunError` if a column is missing or a value cannot be converted.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: kind(row[name]) for name, kind in columns.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise RunError(f"{path}: is damaged ({error}); restore it, or make it again") from None


def is_in_use(folder: Path) -> bool:
    """Return whether a folder holds more than hidden files, which a killed process may leave."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


@contextmanager
def only_writer(folder: Path, others: str = "is being trained or evaluated", patience_s: float = 0) -> Iterator[None]:
    """Hold the lock of a run or study folder, which exists, and remove unfinished files of killed processes.

    Raises a `RunError` if another process holds the lock; `others` says in it what that process does. See
    `exclusive_lock` for `patience_s`.
    """
    with only_one(folder / LOCK_NAME, f"{folder}: {others} by another process", patience_s):
        for written in (folder, *(folder / name for name in _WRITTEN_FOLDERS)):
            remove_unfinished(written)
        yield


def only_one(lock: Path, problem: str, patience_s: float = 0) -> AbstractContextManager[Any]:
    """Take a lock, see `exclusive_lock`; if another process holds it, raise a `RunError` with `problem`."""
    try:
        return exclusive_lock(lock, patience_s)
    except TimeoutError:
        raise RunError(f"{problem}; wait until it has ended, or choose another folder") from None


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table atomically; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
