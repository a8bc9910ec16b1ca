from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cspine_data import Volume, find_cases, prepare, read_volume, usable_image, write_volume
from cspine_data.sources import duplicates
from cspine_data.sources.duplicates import Fingerprint, fingerprint, look_alikes, name_notes
from tests.conftest import geometry


def anatomy(seed: int, size: tuple[int, int, int] = (18, 40, 37)) -> NDArray[np.float64]:
    """A smooth random volume: no two seeds look alike."""
    texture = gaussian_filter(np.random.default_rng(seed).normal(size=size), 2)
    return np.asarray(300 + 2000 * texture)


def noisy(volume: NDArray[np.float64], seed: int = 7) -> NDArray[np.float64]:
    """The same anatomy in another scan: noise, a bias field, and other units."""
    bias = np.exp(np.linspace(-0.4, 0.4, volume.shape[1]))[:, None]
    return 3 * bias * volume + np.random.default_rng(seed).normal(scale=volume.std() / 5, size=volume.shape)


def print_of(case: str, volume: NDArray[np.float64], patient: str = "", spacing: float = 1.0) -> Fingerprint:
    return Fingerprint(case, patient or case, volume.shape, (1.0, 1.0, spacing), fingerprint(volume))


def pairs(fingerprints: list[Fingerprint]) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in look_alikes(fingerprints)]


def test_a_fingerprint_is_small_and_keeps_what_another_scan_keeps() -> None:
    volume = anatomy(0, (33, 90, 75))
    levels = fingerprint(volume)
    assert levels.dtype == np.int8
    assert 1000 < levels.size <= 4096
    assert (fingerprint(2 * volume + 5) == levels).all()
    assert (fingerprint(np.full((5, 6, 7), 3)) == 0).all()


def test_two_scans_of_one_patient_are_found_and_nothing_else() -> None:
    again = noisy(anatomy(1))
    cohort = [print_of(str(seed), anatomy(seed)) for seed in range(8)]
    assert pairs(cohort) == []
    (found,) = look_alikes([*cohort, print_of("again", again)])
    assert (found.first, found.second) == ("1", "again")
    assert 0.9 < found.correlation < 1
    assert pairs([*cohort, print_of("again", again, patient="1")]) == []
    assert pairs([*cohort, print_of("again", again, spacing=1.1)]) == []
    assert pairs([*cohort, print_of("again", again[:-1])]) == []


def test_chunks_give_the_pairs_of_a_plain_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CHUNK", 3)
    cohort = [print_of(f"{seed}{scan}", noisy(anatomy(seed), scan)) for seed in (4, 2, 9, 6) for scan in (3, 5)]
    expected = {
        tuple(sorted((one.case, other.case)))
        for one, other in combinations(cohort, 2)
        if np.corrcoef(one.levels, other.levels)[0, 1] >= duplicates.LEAST_CORRELATION
    }
    assert expected == {(f"{seed}3", f"{seed}5") for seed in (2, 4, 6, 9)}
    assert sorted(pairs(cohort)) == sorted(expected)


def test_of_very_many_pairs_the_most_alike_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = [print_of(f"{seed}{scan}", noisy(anatomy(seed), scan)) for seed in (4, 2, 9, 6) for scan in (3, 5)]
    everything = pairs(cohort)
    assert len(everything) == 4
    monkeypatch.setattr(duplicates, "_MOST_PAIRS", 2)
    for chunk in (3, 8):
        monkeypatch.setattr(duplicates, "_CHUNK", chunk)
        assert pairs(cohort) == everything[:2]


def test_a_cohort_in_which_all_look_alike_gives_no_pairs() -> None:
    """As volumes that were registered to each other, or generated."""
    cohort = [print_of(str(seed), noisy(anatomy(0), seed)) for seed in range(6)]
    assert pairs(cohort) == []
    assert len(pairs(cohort[:3])) == 3


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [("P-07", "p7", True), ("sub_01", "SUB01", True), ("A B.2", "a-b_2", True), ("VB2_02", "VB2_06", False),
     ("VB2_02", "VB20_2", False), ("P0", "P", False), ("1_12", "11_2", False), ("Müller", "Mueller", False)],
)  # fmt: skip
def test_names_that_differ_in_separators_capitals_or_zeros_are_alike(first: str, second: str, alike: bool) -> None:
    notes = name_notes({"one": first, "two": second, "three": "another", "four": first})
    assert len(notes) == alike
    assert all("one and case two" in note and first in note and "--pairs" in note for note in notes)


def test_many_notes_are_counted() -> None:
    notes = name_notes({f"{style}{number}": f"{style}{number}" for number in range(100, 130) for style in ("P", "p_")})
    assert len(notes) == 21
    assert "10 more" in notes[-1]


def test_scan_and_prepare_warn_until_the_list_names_one_patient(
    tmp_path: Path, run_data: Callable[..., Result]
) -> None:
    raw = tmp_path / "raw"
    volumes = {"P-01": anatomy(1), "P-02": anatomy(2), "p1": anatomy(3), "X": noisy(anatomy(2))}
    for name, volume in volumes.items():
        write_volume(raw / f"{name}.nrrd", Volume(volume.astype(np.float32), geometry((18, 40, 37))))
    scanned = run_data("scan", raw, "--write-pairs", tmp_path / "list.csv")
    warned = [line for line in scanned.output.splitlines() if "look like one patient" in line]
    assert scanned.exit_code == 0
    assert ["P-01 and case p1" in warned[0], "P-02 and case X" in warned[1]] == [True, True]
    assert len(warned) == 2
    assert run_data("scan", raw, "--quick").output.count("look like one patient") == 1

    summary = prepare(raw, tmp_path / "s.zarr", n4=False)
    assert [note for note in summary.source_notes if "look like" in note] == [line[6:] for line in warned]
    assert not any("voxels" in note for note in prepare(raw, tmp_path / "s.zarr", n4=False).source_notes)

    table = (tmp_path / "list.csv").read_text()
    table = table.replace(",X,", ",P-02,").replace(",p1,,", ",P-01,,")
    (tmp_path / "list.csv").write_text(table)
    corrected = run_data("prepare", "--pairs", tmp_path / "list.csv", "--store", tmp_path / "t.zarr", "--no-n4")
    assert corrected.exit_code == 0
    assert "look like one patient" not in corrected.output


@pytest.mark.realdata
@pytest.mark.parametrize("cohort", ["spine14", "spine_t1"])
def test_real_patients_are_told_apart(cohort: str, realdata: Path) -> None:
    images = {case.id: usable_image(read_volume(case.volume)) for case in find_cases(realdata / cohort).cases}
    cases = [Fingerprint.of(case, case, image) for case, image in images.items()]
    assert pairs(cases) == []
    first, image = next(iter(images.items()))
    again = Volume(noisy(image.array.astype(np.float64)), image.geometry)
    assert pairs([*cases, Fingerprint.of("again", "again", again)]) == [(first, "again")]
