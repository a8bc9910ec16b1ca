"""The comparison with peers: what each is given, how its masks are scored, and that a stopped comparison goes on."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cspine_data import open_cohort, read_volume

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Peers that copy the label maps of test cases, or the half of each, or one on another grid.
PERFECT = """
import shutil
from peers.task import given_task
with given_task() as task:
    with task.timed("train_s"), task.timed("predict_s"):
        for case in task.cases("test"):
            assert case not in task.cases("train")
            shutil.copy(task.label(case), task.mask(case))
    task.reads(task.data)
"""
HALF = PERFECT.replace(
    "shutil.copy(task.label(case), task.mask(case))",
    """
            from dataclasses import replace
            from cspine_data import read_volume, write_volume
            label = read_volume(task.label(case))
            array = label.array.copy()
            array[: array.shape[0] // 2] = 0
            write_volume(task.mask(case), replace(label, array=array))
""",
)
MOVED = HALF.replace("array=array", "geometry=label.geometry.model_copy(update={'origin_mm': (0.0, 0.0, 99.0)})")
SCRIPTS = {"__init__": "", "perfect": PERFECT, "half": HALF, "moved": MOVED, "broken": "raise SystemExit(3)"}


@pytest.fixture
def against_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("against_peers")
    peers = tmp_path / "benchmarks" / "peers"
    peers.mkdir(parents=True)
    for name, text in SCRIPTS.items():
        (peers / f"{name}.py").write_text(text)
    shutil.copy(BENCHMARKS / "peers" / "task.py", peers)
    monkeypatch.setattr(module, "HERE", tmp_path / "benchmarks")
    return module


def compare(module: ModuleType, monkeypatch: pytest.MonkeyPatch, store: Path, work: Path, *options: str) -> list[dict]:
    command = ["against_peers.py", str(store), "--work", str(work), "--minutes", "1", "--folds", "0,1", *options]
    monkeypatch.setattr(sys, "argv", command)
    try:
        module.main()
    finally:
        with (work / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
    return rows


def test_peers_are_scored_alike_and_only_once(
    against_peers: ModuleType, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kinds = {name: against_peers.Peer(name, ()) for name in ("perfect", "half")}
    monkeypatch.setattr(against_peers, "PEERS", kinds)
    work = tmp_path / "work"
    rows = compare(against_peers, monkeypatch, phantom_store, work)
    cohort = open_cohort(phantom_store)
    tested = [case for fold in (0, 1) for case in cohort.split(folds=4, fold=fold, variant="n4").test]
    for name in kinds:
        assert [row["case"] for row in rows if row["peer"] == name] == tested
    assert {float(row["dice"]) for row in rows if row["peer"] == "perfect"} == {1.0}
    assert {float(row["hausdorff95_mm"]) for row in rows if row["peer"] == "perfect"} == {0.0}
    assert all(0.3 < float(row["dice"]) < 0.9 for row in rows if row["peer"] == "half")
    assert all(float(row["memory_mb"]) > 5 and float(row["disk_mb"]) > 0 for row in rows)
    assert "2 patients" in capsys.readouterr().out
    for path in (work / "data" / "labelsTr").iterdir():
        assert set(np.unique(read_volume(path).array)) == {0, 1}
    assert json.loads((work / "data" / "dataset.json").read_text())["labels"] == {"background": 0, "vertebra": 1}

    # Nothing is left to do, so that no peer is started.
    monkeypatch.setattr(against_peers, "HERE", tmp_path / "nowhere")
    assert compare(against_peers, monkeypatch, phantom_store, work) == rows
    with pytest.raises(SystemExit, match="other options"):
        compare(against_peers, monkeypatch, phantom_store, work, "--spacing-mm", "3")
    with pytest.raises(SystemExit, match="0 to 3"):
        compare(against_peers, monkeypatch, phantom_store, work, "--folds", "4")


def test_a_peer_that_fails_does_not_stop_the_others(
    against_peers: ModuleType, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    peer = against_peers.Peer
    kinds = {name: peer(name, ()) for name in ("broken", "moved", "perfect")}
    monkeypatch.setattr(against_peers, "PEERS", kinds | {"absent": peer("perfect", (), "no_such_library")})
    with pytest.raises(SystemExit, match=r"broken, fold 0(?s:.*)moved, fold 0.*another grid"):
        compare(against_peers, monkeypatch, phantom_store, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        assert {row["peer"] for row in csv.DictReader(file)} == {"perfect"}
    assert "absent" in capsys.readouterr().out


def test_the_clock_and_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    task = importlib.import_module("peers.task")
    now = iter([10.0, 10.0, 40.0, 200.0])
    monkeypatch.setattr(task.time, "perf_counter", lambda: next(now))
    clock = task.Clock(1.0)
    assert [clock.share() for _ in range(3)] == [0.0, 0.5, 1.0]
