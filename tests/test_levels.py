"""Predicted vertebrae are split, and named as one sequence: each level once, in order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cspine_data import LEVEL_NAMES, SPINE, Geometry, InputError
from cspine_train import RunError
from cspine_train.levels.instances import vertebra_instances
from cspine_train.levels.naming import Evidence, name_vertebrae
from cspine_train.levels.sequence import find_sequence, gaps_of, sequence_name

LUMBAR = (20, 21, 22, 23, 24)


def grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> Geometry:
    directions = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    return Geometry(size=shape, spacing_mm=spacing_mm, directions=directions, origin_mm=(10.0, 20.0, 30.0))


def spine(
    bodies: int, shape: tuple[int, int, int] = (50, 40, 160), tilt: float = 0.1, spacing_mm: float = 1
) -> NDArray[np.uint8]:
    """Return bodies that touch their neighbours over a third of their width, 1 for the highest."""
    x, y, z = np.meshgrid(*(np.arange(n) * spacing_mm for n in shape), indexing="ij")
    label = np.zeros(shape, np.uint8)
    for number in range(bodies):
        middle = shape[2] * spacing_mm - 20 - 24 * number
        height = z - middle - tilt * (y - 20)
        across = ((x - 24) / 18) ** 2 + ((y - 20) / 14) ** 2
        body = (across < 1) & (np.abs(height) <= 10)
        bridge = (across < 0.1) & (height < 0) & (height > -24) & (number < bodies - 1)
        label[bridge & (label == 0)] = number + 1
        label[body] = number + 1
    return label


@pytest.mark.parametrize("spacing_mm", [1, 0.5])
def test_touching_bodies_are_split_from_head_to_feet(spacing_mm: float) -> None:
    shape = tuple(int(n / spacing_mm) for n in (50, 40, 160))
    truth = spine(6, shape, spacing_mm=spacing_mm)  # type: ignore[arg-type]
    found = vertebra_instances(truth != 0, (spacing_mm,) * 3)
    assert found.dtype == np.uint8
    assert found.max() == 6
    core = (truth != 0) & (found != truth)
    # Bridges belong to either side.
    assert core.sum() < 0.03 * (truth != 0).sum()


def test_fragments_are_dropped_and_the_sides_of_a_vertebra_joined() -> None:
    mask = spine(4) != 0
    mask[2:6, 2:6, 80:84] = True
    # The lowest has two sides, as C1 has: without a middle.
    mask[20:29, :, :80] = False
    found = vertebra_instances(mask, (1, 1, 1))
    assert found.max() == 4
    assert not found[2:6, 2:6, 80:84].any()
    lowest = found == 4
    assert lowest[:20].any()
    assert lowest[29:].any()


def test_small_cervical_and_large_lumbar_bodies_are_found_in_one_volume() -> None:
    truth = np.zeros((60, 60, 640), np.uint8)
    top, sizes = 635, np.linspace(5, 15, 24)
    for number, half in enumerate(sizes, start=1):
        x, y = (slice(round(30 - 1.6 * half), round(30 + 1.6 * half)) for _ in range(2))
        truth[x, y, round(top - 2 * half) : int(top)] = number
        top -= 2 * half + 3
        truth[28:32, 28:32, round(top) : round(top) + 3] = number
    found = vertebra_instances(truth != 0, (1, 1, 1))
    assert found.max() == 24
    assert ((found == truth) | (truth == 0)).mean() > 0.999


def test_parts_that_look_like_one_level_are_joined() -> None:
    """As a body and its process, which hangs lower."""
    truth = spine(4, (50, 80, 160))
    for top in (130, 106, 82, 58):
        truth[12:36, 50:74, top - 10 : top + 6] = truth[24, 20, top + 8]
    parts = vertebra_instances(truth != 0, (1, 1, 1))
    levels = [(truth == level).astype(np.float32) for level in (1, 2, 3, 4)]
    joined = vertebra_instances(truth != 0, (1, 1, 1), levels)
    assert parts.max() > joined.max() == 4
    assert (joined == truth).mean() > 0.99


def test_two_vertebrae_that_look_like_one_level_stay_apart() -> None:
    truth = spine(4)
    likely = np.array([0, 1, 2, 2, 4])[truth]
    levels = [(likely == level).astype(np.float32) for level in (1, 2, 4)]
    assert vertebra_instances(truth != 0, (1, 1, 1), levels).max() == 4


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 1, 1)])
def test_masks_without_or_full_of_vertebra(shape: tuple[int, int, int]) -> None:
    assert not vertebra_instances(np.zeros(shape, bool), (1, 1, 1)).any()
    assert (vertebra_instances(np.ones(shape, bool), (1, 1, 1)) == 1).all()


def test_noise_is_no_spine() -> None:
    """In seconds: each of its thousands of parts was cut, and joined with the others."""
    noise = np.random.default_rng(0).random((100, 100, 100))
    assert vertebra_instances(noise < 0.1, (1, 1, 1)).max() > 25
    with pytest.raises(RunError, match="25 vertebrae"):
        vertebra_instances(noise < 0.6, (1, 1, 1))


def test_speckles_far_from_the_spine_are_dropped() -> None:
    """They are many enough to be compared with each other, or to be taken for noise."""
    truth = spine(4, (50, 40, 400))
    cubes, points = (truth != 0).copy(), (truth != 0).copy()
    for z in (20, 40, 60, 80, 100):
        cubes[20:25, 20:25, z : z + 5] = True
    points[2:48:4, 2:38:4, 10:110:8] = True
    for mask in (cubes, points):
        found = vertebra_instances(mask, (1, 1, 1))
        assert found.max() == 4
        assert not found[:, :, :200].any()


def test_instances_at_one_height_are_numbered() -> None:
    mask = np.zeros((40, 10, 10), bool)
    for x in (2, 12, 22, 32):
        mask[x : x + 6, 2:8, 2:8] = True
    assert vertebra_instances(mask, (1, 1, 1)).max() == 2


def evidence_of(rows: list[list[float]]) -> NDArray[np.float64]:
    return np.array(rows) / np.sum(rows, axis=1, keepdims=True)


def test_the_sequence_is_decided_by_all_vertebrae_at_once() -> None:
    # One vertebra looks like L2 and like L3, and two look like L4.
    rows = [[9, 1, 0, 0, 0], [0, 5, 5, 0, 0], [0, 0, 2, 8, 0], [0, 0, 0, 8, 2], [0, 0, 0, 1, 9]]
    sequence = find_sequence(evidence_of(rows), LUMBAR, [35] * 4)
    assert sequence.levels == LUMBAR
    assert min(sequence.probabilities) > 0.99
    assert sequence.second != sequence.levels


def test_a_vertebra_that_the_network_never_saw_is_named_by_its_place() -> None:
    known = (18, 19, *LUMBAR)
    rows = np.vstack([[0.6, 0.3, 0.1, 0, 0, 0, 0], np.eye(7)])
    sequence = find_sequence(rows, known, [35] * 7)
    assert [LEVEL_NAMES[level] for level in sequence.levels] == ["T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5"]


def test_variants_need_evidence() -> None:
    six = np.eye(7)
    assert find_sequence(six, (19, *LUMBAR, 25), [35] * 6).levels == (19, *LUMBAR, 25)
    unsure = np.full((7, len(SPINE)), 1 / len(SPINE))
    assert not {25, 28} & set(find_sequence(unsure, SPINE, [35] * 6).levels)


def test_a_level_is_left_out_only_where_there_is_a_gap() -> None:
    rows = np.eye(5)[[0, 1, 3, 4]]
    assert find_sequence(rows, LUMBAR, [35, 70, 35]).levels == (20, 21, 23, 24)
    assert find_sequence(rows, LUMBAR, [35, 36, 35]).levels in {(20, 21, 22, 23), (21, 22, 23, 24)}


def test_the_second_sequence_of_one_that_leaves_out_t12_is_another_one() -> None:
    """Whether T12 was missed or does not exist, the levels are the same."""
    rows = evidence_of([[9, 1, 0, 0], [0, 9, 1, 0], [0, 0, 9, 1], [0, 0, 1, 9]])
    sequence = find_sequence(rows, (17, 18, 20, 21), [35, 70, 35])
    assert sequence.levels == (17, 18, 20, 21)
    assert sequence.second != sequence.levels


def test_distances_grow_from_neck_to_loin_without_gaps() -> None:
    distances = np.linspace(15, 37, 23).tolist()
    assert not any(gaps_of(distances))
    distances[11] *= 2
    assert np.flatnonzero(gaps_of(distances)).tolist() == [11]


def test_equal_evidence_for_two_sequences_is_a_doubt() -> None:
    rows = evidence_of([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]])
    sequence = find_sequence(rows, LUMBAR, [35] * 3)
    assert {sequence.levels, sequence.second} == {LUMBAR[:4], LUMBAR[1:]}
    assert sequence.probability == pytest.approx(sequence.second_probability)
    assert find_sequence(rows, LUMBAR, [35] * 3, lowest=24).levels == LUMBAR[1:]
    assert find_sequence(rows, LUMBAR, [35] * 3, highest=20).levels == LUMBAR[:4]


def test_names_of_sequences_show_variants() -> None:
    assert sequence_name((18, 19, 20)) == "T11-L1"
    assert sequence_name((5,)) == "C5"
    assert sequence_name((19, 28, 20)) == "T12-L1 with T13"
    assert sequence_name((18, 20, 21)) == "T11-L2 without T12"
    assert sequence_name((24, 25)) == "L5-L6"


def test_temperature_makes_names_less_certain() -> None:
    rows = evidence_of([[4, 1, 0, 0, 0], [0, 4, 1, 0, 0]])
    sharp, soft = (find_sequence(rows, LUMBAR, [35], temperature) for temperature in (1.0, 5.0))
    assert sharp.levels == soft.levels == (20, 21)
    assert sharp.probability > soft.probability > soft.second_probability


def test_more_vertebrae_than_a_spine_has() -> None:
    with pytest.raises(RunError, match="30"):
        find_sequence(np.full((30, 5), 0.2), LUMBAR, [35] * 29)
    with pytest.raises(RunError, match="C2"):
        find_sequence(np.full((3, 5), 0.2), LUMBAR, [35] * 2, lowest=2)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_any_evidence_gives_consecutive_levels(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    known = tuple(sorted(rng.choice(range(1, 26), 5, replace=False).tolist()))
    sequence = find_sequence(rng.dirichlet(np.full(5, 0.3), count), known, [30.0] * (count - 1))
    assert len(sequence.levels) == count
    variants = {(19, 28), (28, 20), (18, 20), (24, 25), (25, 26), (24, 26)}
    assert all(after == before + 1 or (before, after) in variants for before, after in pairwise(sequence.levels))
    assert all(sequence.probability <= one + 1e-9 and one < 1 + 1e-9 for one in sequence.probabilities)
    assert sequence.second_probability <= sequence.probability


def test_named_vertebrae_are_measured_in_mm() -> None:
    truth = np.zeros((20, 20, 60), np.uint8)
    for number, top in enumerate((58, 38, 18)):
        truth[2:18, 4:16, top - 12 : top] = number + 1
    level_map, named = name_vertebrae(truth != 0, grid(truth.shape, (2, 1, 1.5)), lowest="L5")
    assert set(np.unique(level_map)) == {0, 22, 23, 24}
    assert [one.name for one in named.levels] == ["L3", "L4", "L5"]
    highest = named.levels[0]
    assert highest.value == 22
    assert highest.probability == 1
    assert highest.centroid_mm == pytest.approx((10 + 2 * 9.5, 20 + 9.5, 30 + 1.5 * 51.5))
    assert highest.volume_ml == pytest.approx(16 * 12 * 12 * 3 / 1000)
    # Twelve voxels of 1.5 mm.
    assert highest.height_mm == pytest.approx(18, abs=2)
    assert named.doubt == ""


def test_names_from_the_probabilities_of_levels() -> None:
    truth = spine(5)
    # Half of each body looks like the next level.
    half = np.arange(truth.shape[0])[:, None, None] < 20
    probabilities = [
        np.where(truth == n + 1, np.where(half, 0.3, 0.9), 0) + np.where(truth == n, np.where(half, 0.6, 0.05), 0)
        for n in range(5)
    ]
    evidence = Evidence([one.astype(np.float32) for one in probabilities], LUMBAR)
    level_map, named = name_vertebrae(truth != 0, grid(truth.shape), evidence)
    assert [one.name for one in named.levels] == ["L1", "L2", "L3", "L4", "L5"]
    assert (level_map == np.where(truth, truth + 19, 0)).mean() > 0.99
    _, fused = name_vertebrae(
        truth != 0, grid(truth.shape), Evidence([2 * one for one in evidence.probabilities], LUMBAR)
    )
    assert fused == named


def test_a_given_level_that_the_image_contradicts_is_a_doubt() -> None:
    truth = spine(4)
    evidence = Evidence([(truth == n).astype(np.float32) for n in (1, 2, 3, 4, 5)], LUMBAR)
    level_map, named = name_vertebrae(truth != 0, grid(truth.shape), evidence, lowest="L5")
    assert level_map.max() == 24
    assert "L1-L4" in named.doubt
    _, named = name_vertebrae(truth != 0, grid(truth.shape), evidence, lowest="L4")
    assert named.doubt == ""


def test_doubts_name_both_sequences_and_gaps() -> None:
    truth = spine(4)
    flat = Evidence([np.full(truth.shape, 0.2, np.float32)] * 5, LUMBAR)
    _, named = name_vertebrae(truth != 0, grid(truth.shape), flat)
    assert "uncertain" in named.doubt
    assert " or " in named.doubt
    _, gap = name_vertebrae((truth != 0) & (truth != 2), grid(truth.shape), lowest="L5")
    assert gap.doubt == ""
    higher = spine(6)
    _, gap = name_vertebrae((higher != 0) & (higher != 2), grid(higher.shape), lowest="L5")
    assert "missing" in gap.doubt
    _, nothing = name_vertebrae(np.zeros((4, 4, 4), bool), grid((4, 4, 4)), lowest="L5")
    assert nothing.levels == ()
    assert "no vertebra" in nothing.doubt


def test_names_that_do_not_fit_are_refused() -> None:
    truth = spine(5)
    for lowest, highest in ((None, "T99"), ("C3", None), ("L5", "L1")):
        with pytest.raises(InputError):
            name_vertebrae(truth != 0, grid(truth.shape), lowest=lowest, highest=highest)
