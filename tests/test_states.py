"""A store driven through anything its users do, in any order, against a plain dictionary that says what it holds."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cspine_data import (
    Preprocessing,
    Volume,
    collect_garbage,
    open_cohort,
    prepare,
    remove_cases,
    repair,
    verify,
    write_volume,
)
from cspine_data.store.records import read_root
from tests.conftest import QUICK_N4, ball, do_serially

WAYS = {"raw": Preprocessing(bias=None), "n4": QUICK_N4}
CASES = st.sampled_from("ABC")
AXES = st.sampled_from(["0", "12", "012"])


@dataclass(frozen=True)
class Source:
    """One version of a case's files; each case's are its own."""

    case: str
    image: int
    label: int | None

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        image, label = ball((6, 8, 9), seed=10 * ord(self.case) + self.image)
        return image.array, None if self.label is None else (label.array * (self.label + 1)).astype(np.uint8)

    def write(self, folder: Path) -> None:
        grid = ball((6, 8, 9))[0].geometry
        image, label = self.arrays
        remove_files(folder, self.case)
        write_volume(folder / f"{self.case}.nrrd", Volume(image, grid))
        if label is not None:
            write_volume(folder / f"{self.case}-label.nrrd", Volume(label, grid))


def remove_files(folder: Path, case: str) -> None:
    for file in folder.glob(f"{case}*.nrrd"):
        file.unlink()


@dataclass(frozen=True)
class Held:
    """How the store holds a variant of a case."""

    source: Source
    axes: tuple[int, ...]


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        do_serially(self.patches)
        self.folder = Path(tempfile.mkdtemp())
        self.raw, self.store = self.folder / "raw", self.folder / "s.zarr"
        self.raw.mkdir()
        self.sources: dict[str, Source] = {}
        self.held: dict[tuple[str, str], Held] = {}

    def teardown(self) -> None:
        self.patches.undo()
        shutil.rmtree(self.folder)

    @rule(case=CASES, image=st.integers(0, 2), label=st.one_of(st.none(), st.integers(0, 2)))
    def add_or_change_a_source(self, case: str, image: int, label: int | None) -> None:
        self.sources[case] = Source(case, image, label)
        self.sources[case].write(self.raw)

    @precondition(lambda self: self.sources)
    @rule(data=st.data())
    def remove_a_source(self, data: st.DataObject) -> None:
        case = data.draw(st.sampled_from(sorted(self.sources)))
        remove_files(self.raw, case)
        del self.sources[case]

    def after_prepare(self, variant: str, axes: str) -> dict[tuple[str, str], Held]:
        after = dict(self.held)
        for case, source in self.sources.items():
            kept = self.held[case, variant].axes if (case, variant) in self.held else ()
            after[case, variant] = Held(source, tuple(sorted({*map(int, axes), *kept})))
        return after

    @precondition(lambda self: self.sources)
    @rule(variant=st.sampled_from(["raw", "n4"]), axes=AXES)
    def prepare(self, variant: str, axes: str) -> None:
        after = self.after_prepare(variant, axes)
        changed = {case for case in self.sources if self.held.get((case, variant)) != after[case, variant]}
        summary = prepare(self.raw, self.store, preprocessing=WAYS[variant], axes=axes)
        assert summary.failed == ()
        assert {*summary.done, *summary.reused} == set(self.sources)
        assert set(summary.done) == changed
        self.held = after

    @precondition(lambda self: self.sources)
    @rule(
        variant=st.sampled_from(["raw", "n4"]),
        axes=AXES,
        calls=st.integers(0, 150),
        fault=st.sampled_from(["fsync", "rename", "replace"]),
    )
    def interrupt(self, variant: str, axes: str, calls: int, fault: str) -> None:
        """Stop a run at some call; each case is then as it was or as it was to be."""
        real, left = getattr(os, fault), iter(range(calls))

        def interrupted(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        after = self.after_prepare(variant, axes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, fault, interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                prepare(self.raw, self.store, preprocessing=WAYS[variant], axes=axes)
        if not (self.store / "zarr.json").exists():
            return
        cases = read_root(self.store).cases
        for case in self.sources:
            if variant not in cases.get(case, {}):
                assert (case, variant) not in self.held
                continue
            record = open_cohort(self.store).record(case, variant)
            new, old = after[case, variant], self.held.get((case, variant))
            (self.held[case, variant],) = {h for h in (new, old) if h and is_held_so(self.store, h, record)} or {None}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove_a_case(self, data: st.DataObject) -> None:
        case, variant = data.draw(st.sampled_from(sorted(self.held)))
        both = data.draw(st.booleans())
        remove_cases(self.store, [case], None if both else variant)
        for gone in ("raw", "n4") if both else (variant,):
            self.held.pop((case, gone), None)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), dice=st.randoms(use_true_random=False))
    def damage_and_repair(self, data: st.DataObject, dice: random.Random) -> None:
        case, variant = data.draw(st.sampled_from(sorted(self.held)))
        folder = self.store / "cases" / case / read_root(self.store).cases[case][variant]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        file = dice.choice(files)
        before = file.read_bytes()
        spot = dice.randrange(len(before))
        file.write_bytes(before[:spot] + bytes([before[spot] ^ dice.randrange(1, 256)]) + before[spot + 1 :])
        assert [(damage.case, damage.variant) for damage in verify(self.store)] == [(case, variant)]
        if not self.sources:
            file.write_bytes(before)
            return
        summary = repair(self.store, self.raw)
        mended = self.sources.get(case) == self.held[case, variant].source
        if mended and file.parent != folder:
            assert summary.mended == ((case, variant),)
        if not summary.mended:
            assert [problem.case for problem in summary.failed] == [case]
            file.write_bytes(before)
        assert file.read_bytes() == before

    @precondition(lambda self: (self.store / "zarr.json").exists())
    @rule()
    def collect(self) -> None:
        collect_garbage(self.store, grace_s=0, delete=True)
        cases = self.store / "cases"
        found = {(f.parent.name, f.name) for f in cases.glob("*/*") if f.is_dir()}
        assert found == {(c, d) for c, named in read_root(self.store).cases.items() for d in named.values()}

    @invariant()
    def the_store_holds_what_the_dictionary_says(self) -> None:
        if not (self.store / "zarr.json").exists():
            assert not self.held
            return
        assert verify(self.store) == []
        cohort = open_cohort(self.store)
        assert {(case, variant) for case, named in read_root(self.store).cases.items() for variant in named} == set(
            self.held
        )
        assert cohort.cases == tuple(sorted({case for case, _ in self.held}))
        for (case, variant), held in self.held.items():
            assert is_held_so(self.store, held, cohort.record(case, variant))


def is_held_so(store: Path, held: Held, record: Any) -> bool:
    image, label = held.source.arrays
    cohort = open_cohort(store)
    labelled = label is not None
    if (record.axes, record.labelled) != (held.axes, labelled):
        return False
    if labelled and not np.array_equal(cohort.export(record.case, record.variant, label=True).array, label):
        return False
    if record.variant == "raw":
        return np.array_equal(cohort.export(record.case, "raw").array, image)
    # What N4 made of it is compared by the slices of a store of its own in tests/test_prepare.py; here by its source.
    return record.image_sha256 == image_sha256(held.source)


def image_sha256(source: Source) -> str:
    from cspine_data.volumes.io import content_digest

    with tempfile.TemporaryDirectory() as folder:
        source.write(Path(folder))
        return content_digest(Path(folder) / f"{source.case}.nrrd")


@pytest.mark.timeout(3600)
def test_a_store_is_what_a_dictionary_says(long_run: bool) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=400 if long_run else 20, stateful_step_count=40 if long_run else 20, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
