"""A run folder of anybody: no network request, and no read outside itself, whatever its record names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from cspine_data import Preprocessing
from cspine_train import CspineTrainError, ModelError, RunError, RunSettings, evaluate, load_run
from cspine_train.models.build import build_model, save_model
from cspine_train.models.trained import read_trained
from cspine_train.run.record import RunRecord, save_record

#: Where Python and its packages are read from.
INSTALLED = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc/", "/sys/", "/dev/")


class Watch:
    """Records what this process opens and whom it calls, as Python's audit hooks report it."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.called: list[str] = []
        self.on = False
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
            self.opened.append(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            self.called.append(f"{event} {arguments[1:]}")
            raise ConnectionRefusedError(event)

    def outside(self, *folders: Path) -> list[str]:
        """Return what was opened that is neither in these folders nor an installed package."""
        inside = (*INSTALLED, *map(str, folders))
        return [path for path in self.opened if not path.startswith(inside)]


HEARD = Watch()


@pytest.fixture
def watch() -> Iterator[Watch]:
    HEARD.opened.clear()
    HEARD.called.clear()
    HEARD.on = True
    yield HEARD
    HEARD.on = False


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that was never trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = RunSettings(encoder="tu-test_resnet", weights="none", context=0)
    save_model(build_model(settings.model, settings.encoder)[0], folder / "model")
    record = RunRecord(
        store=str(tmp_path / "s.zarr"), settings=settings, weights_used="none", size_hw=(32, 32), versions={},
        preprocessing=Preprocessing(bias=None), train=("A",), validation=("B",), test=("C",), finished=True,
        digests=dict.fromkeys("ABC", "0" * 32), kept_epoch=0, kept_dice=0.5,
    )  # fmt: skip
    save_record(folder, record)
    return folder


def change(run: Path, name: str, value: object) -> None:
    """Change a field of a record, or of its settings, to what somebody wants a reader to meet."""
    record = json.loads((run / "run.json").read_text())
    (record if name in record else record["settings"])[name] = value
    (run / "run.json").write_text(json.dumps(record))


def test_an_honest_run_reads_nothing_but_itself(run: Path, watch: Watch) -> None:
    load_run(run)
    assert watch.outside(run) == []
    assert watch.called == []
    # The test can fail.
    assert str(run / "run.json") in watch.opened


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", "tu-hf-hub:x/y"),
        ("encoder", "tu-hf_hub:x/y"),
        ("encoder", "tu-HF-HUB:x/y"),
        ("encoder", "tu-local-dir:/etc"),
        ("encoder", "tu-/etc/resnet18"),
        ("encoder", "tu-resnet18.hf-hub:x/y"),
        ("encoder", "tu-resnet18/../../etc"),
        ("encoder", "tu-https://127.0.0.1:9/x"),
        ("encoder", "hf-hub:x/y"),
        ("encoder", "timm-hf-hub:x/y"),
        ("encoder", "/etc/passwd"),
        ("encoder", ""),
        ("encoder", "tu-"),
        ("model", "/etc/passwd"),
        ("model", "hf-hub:x/y"),
        ("model", "__class__"),
        ("loss", "/etc/passwd"),
        ("axes", [7]),
        ("axes", []),
        ("schedule", "hf-hub:x/y"),
        ("augment", "/etc/passwd"),
    ],
)
def test_a_name_that_this_version_cannot_build_is_refused(name: str, value: object, run: Path, watch: Watch) -> None:
    change(run, name, value)
    with pytest.raises(CspineTrainError) as told:
        load_run(run)
    assert str(told.value).startswith(f"{run / 'run.json'}: ")
    assert name in str(told.value)
    assert "\n" not in str(told.value)
    assert watch.outside(run) == []
    assert watch.called == []


def test_a_weights_file_of_a_record_is_not_read(run: Path, watch: Watch) -> None:
    """What the encoder started from is history."""
    change(run, "weights", "/etc/passwd")
    change(run, "weights_used", "https://127.0.0.1:9/x")
    load_run(run)
    assert watch.outside(run) == []
    assert watch.called == []


def test_a_run_to_start_from_reads_nothing_but_itself(run: Path, watch: Watch) -> None:
    """What that run started from is history, too."""
    change(run, "from_run", "/etc")
    change(run, "voxels_sha256", dict.fromkeys("ABC", "0"))
    change(run, "weights", "auto")
    watch.opened.clear()
    trained = read_trained(run)
    assert trained.record.settings.from_run == "/etc"
    assert str(run / "model" / "model.safetensors") in watch.opened
    assert watch.outside(run) == []
    assert watch.called == []


@pytest.mark.parametrize(
    "store", ["http://127.0.0.1:9/s.zarr", "s3://bucket/s.zarr", "file:///etc", "simplecache::http://x"]
)
def test_a_store_at_a_url_is_read_only_where_the_user_names_it(
    store: str, run: Path, watch: Watch, run_train: Callable[..., Result]
) -> None:
    change(run, "store", store)
    with pytest.raises(RunError, match="--store"):
        evaluate(run)
    told = run_train("evaluate", run)
    assert told.exit_code == 1
    assert store in told.stderr
    assert watch.called == []
    assert watch.outside(run) == []


def test_a_pipe_in_a_run_folder_is_refused(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()
    os.mkfifo(run / "model" / "model.safetensors")
    with pytest.raises(RunError, match="file nor a folder"):
        load_run(run)


def test_a_folder_that_a_record_names_is_not_read(run: Path, tmp_path: Path, watch: Watch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 10}))
    change(run, "encoder", f"tu-local-dir:{other}")
    watch.opened.clear()
    with pytest.raises(ModelError, match="encoder 'tu-local-dir:.*is not known"):
        load_run(run)
    assert watch.outside(run) == []


def test_names_of_a_record_do_nothing_to_a_terminal(run: Path, run_train: Callable[..., Result]) -> None:
    change(run, "encoder", "tu-\x1b[31m\nred")
    told = run_train("predict", run, "--run", run, "-o", run / "x.nrrd")
    assert told.exit_code == 1
    assert "encoder tu-?[31m?red started from" in told.stderr
    assert told.stderr.count("\n") == 2
