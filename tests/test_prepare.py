"""From files to a store through the real thing: Dask worker processes, killed processes, full disks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import Result

from cspine_data import (
    BiasParameters,
    InputError,
    PrepareOptions,
    Preprocessing,
    Volume,
    bias_parameters,
    open_cohort,
    parse_axes,
    prepare,
    read_volume,
    verify,
    write_volume,
)
from cspine_data.cli.commands import main as data_main
from cspine_data.cli.options import preprocessing_of
from cspine_data.preparation.case_writer import prepare_case
from cspine_data.preparation.plan import Job
from cspine_data.sources.cases import Case
from cspine_data.store.publishing import Refused, Replacement, create_store, publish
from cspine_data.store.records import read_root
from tests.conftest import QUICK_N4, ball, contents, in_one_line, write_case
from tests.processes import preparing


def test_the_second_run_does_nothing_and_says_so(store: Path, run_data) -> None:
    before = contents(store)
    done: Result = run_data("prepare", store.parent / "raw", "--store", store, "--no-n4")
    assert done.exit_code == 0
    assert "0 done, 2 reused, 0 failed" in done.output
    assert "nothing to do" in done.output
    assert contents(store) == before


def test_the_same_inputs_make_the_same_bytes(store: Path, tmp_path: Path, in_workers: None) -> None:
    again = tmp_path / "again.zarr"
    prepare(store.parent / "raw", again, n4=False, workers=1)
    assert contents(again) == contents(store)


def test_bad_cases_are_named_and_the_others_done(tmp_path: Path, run_data, in_workers: None) -> None:
    raw = tmp_path / "raw"
    write_case(raw, "good")
    image, label = ball()
    array = image.array.astype(np.float32)
    array[0, 0, 0] = np.nan
    write_volume(raw / "nan.nrrd", Volume(array, image.geometry))
    write_volume(raw / "constant.nrrd", Volume(np.full_like(image.array, 4), image.geometry))
    write_volume(raw / "grid.nrrd", image)
    write_volume(
        raw / "grid-label.nrrd", Volume(label.array[1:], label.geometry.model_copy(update={"size": (15, 20, 24)}))
    )
    write_case(raw, "cut", label=False).write_bytes((raw / "good.nrrd").read_bytes()[:1500])
    (raw / "empty.nrrd").touch()
    write_volume(raw / "twice.nrrd", image)
    write_volume(raw / "twice.nii", image)
    store = tmp_path / "s.zarr"
    done = run_data("prepare", raw, "--store", store, "--no-n4")
    assert done.exit_code == 1
    assert "1 done, 0 reused, 6 failed" in done.output
    lines = {line.split(":")[1].strip().rsplit("/", 1)[-1] for line in done.output.splitlines() if "failed: " in line}
    assert {"nan.nrrd", "constant.nrrd", "grid-label.nrrd", "cut.nrrd", "empty.nrrd"} <= lines
    assert "same case 'twice'" in done.output
    assert "Traceback" not in done.output
    assert open_cohort(store).cases == ("good",)
    assert verify(store) == []
    assert {path.name for path in (store / "cases").iterdir()} <= {"good", "zarr.json"}
    scanned = run_data("scan", raw)
    assert scanned.exit_code == 1
    assert "1 case can be prepared, 0 without a label map; 6 problems" in scanned.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "nowhere"), "nowhere: is no folder"),
        (("prepare", "empty"), "holds no volume"),
        (("prepare", "raw", "--axes", "03"), "'03': are not known"),
        (
            ("prepare", "raw", "--n4-resolution", "0"),
            "N4 parameter resolution_mm 0.0",
        ),
        (
            ("prepare", "raw", "--no-n4", "--n4-spacing", "40"),
            "contradicts the other --n4",
        ),
        (("prepare", "raw", "--no-n4", "--n4-preset", "fast"), "Error: --no-n4: contradicts"),
        (("prepare", "raw", "--spacing", "fine"), "'fine': is not known"),
        (("prepare", "raw", "--workers", "0"), "0: are too few"),
        (
            ("prepare", "raw", "--scheduler", "tcp://127.0.0.1:9"),
            "tcp://127.0.0.1:9: cannot be reached",
        ),
        (("scan", "nowhere"), "nowhere: is no folder"),
        (("info", "nowhere"), "nowhere: is no cspine"),
        (("verify", "nowhere"), "nowhere: is no cspine"),
        (("export", "s.zarr", "Z", "-o", "x.nrrd"), "holds no case 'Z'"),
        (("export", "s.zarr", "A", "-o", "x.png"), "name for a volume"),
        (("phantom", "raw"), "holds other volumes (A.nrrd)"),
        (("phantom", "new", "--cases", "0"), "cases 0: is out"),
        (("phantom", "new", "--seed", "-1"), "seed -1: is negative"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments, message, store: Path, run_data, monkeypatch: pytest.MonkeyPatch, in_workers: None
) -> None:
    monkeypatch.chdir(store.parent)
    Path("empty").mkdir()
    done = run_data(*arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_only_what_a_change_touches_is_computed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new label map or axis does not correct the volume again."""
    raw = store.parent / "raw"
    prepare(raw, store, preprocessing=QUICK_N4, axes="0")
    before = open_cohort(store).record("A", "n4")
    _, label = ball()
    write_volume(raw / "AS-label.nrrd", Volume(np.where(label.array == 3, 5, label.array), label.geometry))
    summary = prepare(raw, store, preprocessing=QUICK_N4, axes="1")
    assert summary.done == ("A", "B")
    after = open_cohort(store).record("A", "n4")
    assert after.axes == (0, 1)
    assert set(after.label_voxels) == {1, 5}
    assert after.digest != before.digest
    assert after.volume_digest == before.volume_digest
    assert after.normalisation == before.normalisation
    assert prepare(raw, store, preprocessing=QUICK_N4, axes="0").done == ()
    other = Preprocessing(bias=BiasParameters(resolution_mm=12, iterations=(6, 5)))
    assert prepare(raw, store, preprocessing=other, axes="0").done == ("A", "B")
    assert open_cohort(store).record("A", "n4").volume_digest != before.volume_digest
    assert open_cohort(store).record("A", "raw").axes == (0, 1, 2)
    assert verify(store) == []


def test_how_n4_was_told_to_estimate_is_recorded(tmp_path: Path, run_data, in_workers: None) -> None:
    write_case(tmp_path / "raw", "A")
    told = ("--n4-preset", "fast", "--n4-resolution", "12", "--n4-spacing", "70", "--n4-iterations", "5,4")
    store = tmp_path / "s.zarr"
    assert run_data("prepare", tmp_path / "raw", "--store", store, *told, "--axes", "0").exit_code == 0
    of_ours = open_cohort(store).record("A", "n4").preprocessing.bias
    assert of_ours == bias_parameters("fast", resolution_mm=12, spline_mm=70, iterations=(5, 4))
    told = ("--n4-preset", "fast", "--n4-resolution", "12", "--n4-iterations", "5,4")
    done = run_data("prepare", tmp_path / "raw", "--store", store, *told, "--axes", "0", "--n4-engine", "itk")
    assert "1 done, 0 reused" in done.output
    assert open_cohort(store).record("A", "n4").preprocessing.bias.engine == "itk"


def test_spacing_and_normalisation_are_recorded_and_correct_nothing_again(store: Path, run_data) -> None:
    raw = store.parent / "raw"
    before = open_cohort(store).record("A")
    told = ("prepare", raw, "--store", store, "--no-n4", "--spacing", "0.75,1,2", "--normalisation", "percentile")
    pairs = raw / "only_a.csv"
    pairs.write_text("case,volume,label\nA,A.nrrd,AS-label.nrrd\n")
    done = run_data(*told, "--pairs", pairs)
    assert "1 done, 0 reused" in done.output
    assert "1 of them replace cases with other parameters; now: no N4, percentile, 0.75 x 1 x 2 mm" in done.output
    told_of = run_data("info", store).output
    assert "raw: 1 cases prepared with no N4, percentile, 0.75 x 1 x 2 mm" in told_of
    assert "N4, zscore, native voxels" in told_of
    cohort = open_cohort(store)
    after = cohort.record("A")
    folder = store / "cases" / "A" / after.digest
    grid = json.loads((folder / "axis1" / "zarr.json").read_text())["attributes"]
    centre = np.array(grid["origin_xyz_mm"]) + np.array(grid["spacing_xyz_mm"]) * (np.array((32, 20, 12)) - 1) / 2
    np.testing.assert_allclose(
        centre, np.array((-10.0, 4.0, 2.5)) + np.array((1.5, 1, 1)) * (np.array((16, 20, 24)) - 1) / 2
    )
    assert after.preprocessing == Preprocessing(bias=None, normalisation="percentile", spacing_mm=(0.75, 1, 2))
    assert after.volume_digest == before.volume_digest
    assert after.digest != before.digest
    assert (after.size_xyz, after.sliced_size_xyz) == ((16, 20, 24), (32, 20, 12))
    image, label = cohort.slices(axis=0, cases=["A"], labels="stored")[16]
    assert image.shape == label.shape == (1, 20, 12)
    assert set(np.unique(label)) == {0, 1, 3}
    whole = cohort.prepared("A")
    np.testing.assert_array_equal(whole.normalised_xyz()[16], image[0])
    tissue = whole.corrected.image_xyz > whole.corrected.tissue_threshold
    normalised = after.normalisation.apply(whole.corrected.image_xyz)
    np.testing.assert_allclose(np.percentile(normalised[tissue], (1, 99)), (0, 1), atol=1e-4)
    counts = [int((cohort.slices(axis=1, cases=["A"])[n][1]).sum()) for n in range(20)]
    assert list(after.labelled_voxels[1]) == counts
    assert "raw: 1 cases prepared with no N4, percentile, 0.75 x 1 x 2 mm" in run_data("info", store).output
    np.testing.assert_array_equal(cohort.export("A").array, ball(seed=0)[0].array)
    assert "nothing to do" in run_data(*told, "--pairs", pairs).output
    back = run_data("prepare", raw, "--store", store, "--no-n4")
    assert "1 done, 1 reused, 0 failed" in back.output
    assert "0.0 MB written" in back.output
    assert verify(store) == []


def test_nyul_learns_from_the_cohort_once_and_keeps_to_it(tmp_path: Path, run_data) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in "ABC":
        write_case(raw, name)
    told = ("prepare", raw, "--store", store, "--no-n4", "--axes", "0", "--normalisation", "nyul")
    done = run_data(*told).output
    assert "3 done" in done
    assert "histogram of 3 cases" in done
    standards = {record.preprocessing.standard for record in open_cohort(store).records()}
    (standard,) = standards
    assert standard is not None
    assert len(standard) == 11
    assert (standard[0], standard[-1]) == (0, 1)
    own = []
    for name in "ABC":
        prepared = open_cohort(store).prepared(name)
        inside = prepared.normalised_xyz()[prepared.corrected.image_xyz > prepared.corrected.tissue_threshold]
        np.testing.assert_allclose(np.percentile(inside, (1, 50, 99)), (0, standard[5], 1), atol=0.01)
        own.append(prepared.corrected.tissue.landmarks)
    np.testing.assert_allclose(standard, np.mean(own, axis=0), atol=1e-5)
    assert "nothing to do" in run_data(*told).output
    write_case(raw, "D")
    assert "1 done, 3 reused" in run_data(*told).output
    assert {record.preprocessing.standard for record in open_cohort(store).records()} == standards
    # Another way in between, another grid, another case: the standard is the store's.
    write_case(raw, "E")
    run_data(*told[:-1], "zscore")
    assert "5 done" in run_data(*told, "--spacing", "2").output
    assert {record.preprocessing.standard for record in open_cohort(store).records()} == standards


def test_a_cohort_without_contrast_is_told_so_by_nyul_too(tmp_path: Path, run_data, in_workers: None) -> None:
    image, _ = ball()
    write_volume(tmp_path / "raw" / "A.nrrd", Volume(np.where(image.array > 100, 400, image.array), image.geometry))
    done = run_data("prepare", tmp_path / "raw", "--store", tmp_path / "s.zarr", "--no-n4", "--normalisation", "nyul")
    assert done.exit_code == 1
    assert "contrast within its tissue" in done.stderr


def test_a_reused_corrected_volume_is_the_computed_one(store: Path, tmp_path: Path) -> None:
    raw = store.parent / "raw"
    in_two_steps, at_once = tmp_path / "two.zarr", tmp_path / "one.zarr"
    prepare(raw, in_two_steps, preprocessing=QUICK_N4, axes="0")
    prepare(raw, in_two_steps, preprocessing=QUICK_N4, axes="12")
    prepare(raw, at_once, preprocessing=QUICK_N4, axes="012")
    shutil.rmtree(in_two_steps.parent / "unused", ignore_errors=True)
    ours, theirs = contents(at_once), contents(in_two_steps)
    assert ours.items() <= theirs.items()


def test_a_changed_volume_is_prepared_anew_and_a_removed_one_stays(store: Path) -> None:
    raw = store.parent / "raw"
    write_case(raw, "A", seed=7)
    (raw / "B.nrrd").unlink()
    (raw / "BS-label.nrrd").unlink()
    before = open_cohort(store).record("A").digest
    assert prepare(raw, store, n4=False).done == ("A",)
    assert open_cohort(store).record("A").digest != before
    assert open_cohort(store).cases == ("A", "B")


def test_one_patient_under_two_names_is_refused(tmp_path: Path, run_data) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for name in "BCD":
        write_case(raw, name)
    shutil.copy(raw / "C.nrrd", raw / "A.nrrd")
    scanned = run_data("scan", raw)
    assert scanned.exit_code == 1
    assert "holds the same volume" in scanned.stderr
    done = run_data("prepare", raw, "--store", store, "--no-n4")
    assert done.exit_code == 1
    assert "case 'A', and one" in done.stderr
    assert open_cohort(store).cases == ("A", "B", "D")


def test_one_patient_in_two_formats_is_refused(store: Path) -> None:
    raw = store.parent / "raw"
    write_volume(raw / "Z.nii.gz", read_volume(raw / "A.nrrd"))
    (problem,) = prepare(raw, store, n4=False).failed
    told = "Z.nii.gz: holds the same volume as case 'A', and one patient must not be two cases; keep one of them"
    assert problem.message.endswith(told)
    assert open_cohort(store).cases == ("A", "B")
    assert verify(store) == []


def test_one_patient_under_two_names_in_two_runs_at_once_is_refused_once(tmp_path: Path) -> None:
    runs = []
    for name in "AB":
        write_case(tmp_path / name, name, seed=3)
        runs.append(preparing(tmp_path / name, tmp_path / "s.zarr", "--no-n4"))
    told = [run.communicate(timeout=60)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1]
    assert sum("must not be two" in text or "what the store holds" in text for text in told) == 1
    assert len(open_cohort(tmp_path / "s.zarr").cases) == 1


def test_cases_that_exchange_their_files_do_so_in_both_variants(store: Path) -> None:
    raw = store.parent / "raw"
    prepare(raw, store, preprocessing=QUICK_N4)
    before = {case: open_cohort(store).export(case, "raw").array for case in "AB"}
    (raw / "A.nrrd").rename(raw / "between")
    (raw / "B.nrrd").rename(raw / "A.nrrd")
    (raw / "between").rename(raw / "B.nrrd")
    for preprocessing in (Preprocessing(bias=None), QUICK_N4):
        summary = prepare(raw, store, preprocessing=preprocessing)
        assert (summary.done, summary.failed) == (("A", "B"), ())
    for case, other in ("AB", "BA"):
        np.testing.assert_array_equal(open_cohort(store).export(case, "raw").array, before[other])


def test_an_exchange_waits_for_the_half_that_was_overtaken(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = store.parent / "raw"
    for name in ("{}.nrrd", "{}S-label.nrrd"):
        (raw / name.format("A")).rename(raw / "between")
        (raw / name.format("B")).rename(raw / name.format("A"))
        (raw / "between").rename(raw / name.format("B"))
    rounds = iter(range(9))

    def publish_late(path: Path, made: list[Replacement]) -> Refused:
        made = list(made)
        if next(rounds) == 1:
            return Refused({"B"}, publish(path, [one for one in made if one.case == "A"]).duplicates)
        return publish(path, made)

    monkeypatch.setattr("cspine_data.preparation.jobs.publish", publish_late)
    assert prepare(raw, store, n4=False).done == ("A", "B")
    assert verify(store) == []


def test_workers_that_write_elsewhere_are_told_of(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster whose nodes have disks of their own under the same path."""
    elsewhere = tmp_path / "elsewhere.zarr"
    create_store(elsewhere)

    def run_jobs(work: Any, jobs: Any, *_: Any) -> Any:
        for job in jobs:
            yield [(job, work(job, str(elsewhere)))]

    monkeypatch.setattr("cspine_data.preparation.jobs.run_jobs", run_jobs)
    write_case(store.parent / "raw", "C")
    (problem,) = prepare(store.parent / "raw", store, n4=False).failed
    assert "do all workers see" in problem.message
    assert open_cohort(store).cases == ("A", "B")


def test_a_chain_of_renamed_files_puts_no_patient_into_two_cases(store: Path) -> None:
    raw = store.parent / "raw"
    for old, new in (("B", "C"), ("A", "B")):
        for name in ("{}.nrrd", "{}S-label.nrrd"):
            (raw / name.format(old)).rename(raw / name.format(new))
    summary = prepare(raw, store, n4=False)
    assert summary.done == ()
    assert {problem.case for problem in summary.failed} == {"B", "C"}
    assert open_cohort(store).cases == ("A", "B")


def test_a_stored_case_under_a_new_name_is_refused_until_it_has_its_own_again(store: Path) -> None:
    raw = store.parent / "raw"
    for name in ("{}.nrrd", "{}S-label.nrrd"):
        (raw / name.format("B")).rename(raw / name.format("Z"))
    (problem,) = prepare(raw, store, n4=False).failed
    told = "Z.nrrd: is what the store holds as case 'B'; give it that name again, or make a new store"
    assert problem.message.endswith(told)
    assert open_cohort(store).cases == ("A", "B")


def test_added_cases_leave_splits_alone(store: Path) -> None:
    raw = store.parent / "raw"
    for number, name in enumerate(("AA", "C")):
        write_case(raw, name, 10 + number)
    prepare(raw, store, n4=False)
    assert read_root(store).enrolled == (("A", "B"), ("AA", "C"))
    split = open_cohort(store).split()
    assert split.train == ("A", "AA")
    assert (split.validation, split.test) == (("C",), ("B",))


def test_a_note_follows_the_data(tmp_path: Path, run_data) -> None:
    write_case(tmp_path / "raw", "A")
    (tmp_path / "raw" / "COHORT.txt").write_text("made up\n")
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False)
    assert open_cohort(tmp_path / "s.zarr").notes == ("made up",)
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, note="and more")
    assert "note: made up" in run_data("info", tmp_path / "s.zarr").output
    assert open_cohort(tmp_path / "s.zarr").notes == ("and more", "made up")


@pytest.fixture
def slow_cohort(tmp_path: Path) -> Path:
    for number in range(4):
        write_case(tmp_path / "raw", f"case{number}", number)
    return tmp_path / "raw"


def test_two_runs_side_by_side_say_nothing_of_each_other(slow_cohort: Path, tmp_path: Path) -> None:
    stores = [tmp_path / "one.zarr", tmp_path / "two.zarr"]
    runs = [preparing(slow_cohort, store, "--no-n4", in_workers=True, errors_apart=True) for store in stores]
    assert [run.communicate()[1] for run in runs] == ["", ""]
    assert [run.returncode for run in runs] == [0, 0]
    assert contents(stores[0]) == contents(stores[1])


def test_an_interrupted_run_says_that_it_can_go_on(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal's job; only the first one speaks."""
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for number in range(16):
        write_case(raw, f"case{number:02d}")
    process = preparing(raw, store, "--no-n4", "--workers", "1", in_workers=True, errors_apart=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((store / "zarr.json").exists() and read_root(store).cases):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert in_one_line(told, store, "interrupted")
    assert process.returncode == 1
    done = open_cohort(store).cases
    assert 0 < len(done) < 16
    assert set(done) <= set(prepare(raw, store, n4=False).reused)
    assert len(open_cohort(store).cases) == 16


def stopped_clock(patches: pytest.MonkeyPatch) -> list[float]:
    """Stop the clock by which cases are published; return its seconds, to be changed."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    patches.setattr("cspine_data.preparation.jobs.time", clock)
    return now


def test_cases_are_published_together_and_not_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication takes time in proportion to the store's cases, so one for each would be quadratic."""
    for number in range(12):
        write_case(tmp_path / "raw", f"case{number:02d}", label=False)
    published: list[int] = []

    def watched(path: Path, made: list[Replacement]) -> Refused:
        published.append(len(made))
        return publish(path, made)

    monkeypatch.setattr("cspine_data.preparation.jobs.publish", watched)
    stopped_clock(monkeypatch)
    told: list[tuple[int, int, str]] = []
    summary = prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, progress=lambda *one: told.append(one))
    # The first at once, so that a wrong place shows at once.
    assert published == [1, 11]
    assert len(summary.done) == 12
    assert [done for done, *_ in told] == list(range(1, 13))


def test_what_has_ended_is_published_while_others_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now, seen = tmp_path / "s.zarr", stopped_clock(monkeypatch), []

    def run_jobs(work: Any, jobs: list[Job], *_: Any) -> Iterator[list[Any]]:
        for seconds, ended in ((0.0, jobs[:1]), (0.5, jobs[1:2]), (0.5, []), (1.5, []), (0.1, jobs[2:])):
            now[0] += seconds
            yield [(job, work(job, str(store))) for job in ended]
            seen.append(len(read_root(store).cases))

    monkeypatch.setattr("cspine_data.preparation.jobs.run_jobs", run_jobs)
    for name in "ABC":
        write_case(tmp_path / "raw", name)
    prepare(tmp_path / "raw", store, n4=False)
    assert seen == [1, 1, 1, 2, 2]
    assert len(read_root(store).cases) == 3


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_has_ended_is_published_however_a_run_ends(
    ending: type[BaseException] | BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_clock(monkeypatch)
    store = tmp_path / "s.zarr"

    def run_jobs(work: Any, jobs: list[Job], *_: Any) -> Iterator[list[Any]]:
        for job in jobs[:3]:
            yield [(job, work(job, str(store)))]
        raise ending

    monkeypatch.setattr("cspine_data.preparation.jobs.run_jobs", run_jobs)
    for name in "ABCD":
        write_case(tmp_path / "raw", name)
    with pytest.raises(ending if isinstance(ending, type) else type(ending)):
        prepare(tmp_path / "raw", store, n4=False)
    assert open_cohort(store).cases == ("A", "B", "C")


def test_a_killed_run_loses_no_case_that_was_written(tmp_path: Path) -> None:
    """Those that were not published yet are published by the next run, from the files that are there."""
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    for number in range(16):
        write_case(raw, f"case{number:02d}")

    def written() -> dict[Path, int]:
        return {record: record.stat().st_mtime_ns for record in store.glob("cases/case*/[0-9a-f]*/zarr.json")}

    process = preparing(raw, store, "--no-n4")
    deadline = time.monotonic() + 60
    while len(written()) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = written()
    assert len(read_root(store).cases) < len(before)
    assert prepare(raw, store, n4=False).failed == ()
    assert before.items() <= written().items()
    assert len(open_cohort(store).cases) == 16


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_case(tmp_path, "A", label=False)
    job = Job(Case("A", path), "0" * 64, None, Preprocessing(bias=None), (0,))
    with pytest.raises(InputError, match="while it was read"):
        prepare_case(job, tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"n4": False, "preprocessing": Preprocessing()}, "n4=False: contradicts preprocessing"),
        ({"n4": True, "preprocessing": Preprocessing(bias=None)}, "n4=True: contradicts preprocessing"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:9"}, "exclude each other"),
        ({"axis": "0"}, "axis: is not known"),
        ({"rehash": "often"}, "rehash 'often': is out"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    arguments: dict[str, Any], told: str, tmp_path: Path, in_workers: None
) -> None:
    write_case(tmp_path / "raw", "A")
    with pytest.raises(InputError, match=told):
        prepare(tmp_path / "raw", tmp_path / "s.zarr", **arguments)
    assert not (tmp_path / "s.zarr").exists()


def test_what_n4_and_preprocessing_both_say_is_done(tmp_path: Path) -> None:
    write_case(tmp_path / "raw", "A")
    for n4 in (False, None):
        prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=n4, preprocessing=Preprocessing(bias=None))
        assert open_cohort(tmp_path / "s.zarr").variants == ("raw",)


def test_axes() -> None:
    assert parse_axes("20") == (0, 2)
    assert parse_axes([1, 1]) == (1,)
    for wrong in ("", "3", "0-2", [4]):
        with pytest.raises(InputError, match="0, 1 and 2"):
            parse_axes(wrong)


def test_a_running_scheduler_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_workers: None) -> None:
    from distributed import LocalCluster

    write_case(tmp_path / "raw", "A")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("its workers hash the files"))
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        summary = prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, scheduler=cluster.scheduler_address)
    assert summary.done == ("A",)


def test_the_commands_fit_together(store: Path, tmp_path: Path, run_data, in_workers: None) -> None:
    info = run_data("info", store)
    assert "A     raw      16 x 20 x 24" in info.output
    assert run_data("verify", store).output == f"{store}: sound\n"
    exported = run_data("export", store, "A", "--label", "-o", tmp_path / "a.nii.gz")
    assert exported.exit_code == 0
    shard = next((store / "cases" / "B").glob("*/axis1/label/c/0/0/0"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    damaged = run_data("verify", store)
    assert damaged.exit_code == 1
    assert "damaged: B (raw): axis1/label/c/0/0/0" in damaged.output
    assert f"repair it with cspine-data verify {store} --repair SOURCE" in damaged.output
    mended = run_data("verify", store, "--repair", store.parent / "raw")
    assert mended.exit_code == 0
    assert mended.stdout == f"{store}: sound; 1 damaged files were repaired\n"
    assert run_data("verify", store).output == f"{store}: sound\n"


def test_a_damaged_volume_is_not_reused_for_other_axes(store: Path) -> None:
    shard = next((store / "cases" / "A").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-9])
    _, label = ball()
    write_volume(store.parent / "raw" / "AS-label.nrrd", Volume(label.array * 2, label.geometry))
    assert prepare(store.parent / "raw", store, n4=False).done == ("A",)
    assert verify(store) == []


def test_every_option_of_prepare_is_a_field_with_its_help_and_default() -> None:
    command = data_main.commands["prepare"].complete
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    defaults = command.make_context("prepare", []).params
    fields = PrepareOptions.model_fields.keys() - {"preprocessing", "n4"}
    assert PrepareOptions(**{name: defaults[name] for name in fields}) == PrepareOptions()
    others = {name: value for name, value in defaults.items() if name not in {*fields, "source", "store"}}
    assert preprocessing_of(**others) == Preprocessing()


def test_help_starts_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; from cspine_data.cli.commands import main; "
        "import contextlib\nwith contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = 'numpy', 'pydantic', 'dask', 'SimpleITK', 'zarr', 'torch'\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "prepare" in done.stdout
