"""What the label values of a cohort are: levels, instances or neither; and what is odd about a case's vertebrae."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result

from cspine_data import Volume
from cspine_data.volumes.cohort_labels import CohortLabels, LabelledCase, cohort_labels
from cspine_data.volumes.geometry import Triple
from cspine_data.volumes.instances import Instance, find_instances, order_problems
from cspine_data.volumes.levels import LEVEL_NAMES, SPINE, levels_text
from tests.conftest import geometry
from tests.test_relabelling import SIZE, spine, write

# Distances of neighbours, mm, from C1 to L5: they double from the neck to L5.
WHOLE_SPINE = [*range(1, 25)]
STEPS_MM = [14, 17, 17, 17, 17, 18, 19, 20, 20, 21, 21, 22, 22, 23, 24, 25, 26, 28, 31, 33, 35, 36, 36]


def column(values: Sequence[int], steps_mm: Sequence[float] | float = 20.0) -> dict[int, Triple]:
    """Return centroids from head to feet."""
    steps = [steps_mm] * len(values) if isinstance(steps_mm, float) else [*steps_mm, 0]
    heights = [-sum(steps[:n]) for n in range(len(values))]
    return {value: (0.0, 0.1 * height, float(height)) for value, height in zip(values, heights, strict=True)}


def cohort(*columns: dict[int, Triple], names: dict[int, str] | None = None) -> list[LabelledCase]:
    return [LabelledCase(f"P{number}", one, names or {}) for number, one in enumerate(columns)]


def problems(found: CohortLabels, centroids: dict[int, Triple], whole: float = 1.0) -> list[str]:
    """The problems of a case with whole vertebrae, or with fragments."""
    instances = [Instance(value, mm, 10.0, whole) for value, mm in centroids.items()]
    return found.problems(LabelledCase("P", centroids), instances)


@pytest.mark.parametrize(
    ("columns", "names", "levels", "words"),
    [
        ([column([1, 2, 3]), column([1, 2, 3, 4])], {}, (1, 2, 3, 4), ("read as", "C1 to C4", "relabel")),
        # Of no other vertebrae would the highest be 3.
        ([column([3, 4, 5]), column([2, 3, 4])], {}, (2, 3, 4, 5), ("read as", "C2 to C5")),
        ([column([20, 21, 22]), column([19, 28, 20])], {}, (19, 28, 20, 21, 22), ("read as", "T12 to L3")),
        ([column([1, 2, 3], 35.0)], {}, (1, 2, 3), ("35 mm", "neck", "relabel")),
        ([column([1, 2, 3])], {1: "C1", 2: "C2", 3: "vertebrae_C3"}, (1, 2, 3), ("C1 to C3", "names")),
        ([column([1, 2, 3, 4])], {4: "disc"}, (1, 2, 3), ("C1 to C3", "relabel")),
        ([column([3, 2, 1]), column([4, 3, 2])], {}, (), ("feet to head", "relabel")),
        ([column([1, 2, 3], 2.0), column([1, 2, 3])], {}, (), ("neither",)),
        ([column([101, 102, 103])], {}, (), ("neither",)),
        ([column([1, 2])], {}, (), ()),
        ([column([1]), column([2]), column([3])], {}, (), ("neither",)),
        ([{}], {}, (), ()),
    ],
)
def test_levels_are_told_from_other_labels(
    columns: list[dict[int, Triple]], names: dict[int, str], levels: tuple[int, ...], words: tuple[str, ...]
) -> None:
    found = cohort_labels(cohort(*columns, names=names))
    assert found.levels == levels
    assert bool(found.text) == bool(words)
    assert all(word in found.text for word in words)
    assert ("relabel" in found.text) == ("relabel" in words)


def test_values_that_swap_are_instances_and_checked_as_such() -> None:
    found = cohort_labels(cohort(column([1, 2, 3]), column([3, 2, 1]), column([2, 3, 1])))
    assert (found.levels, found.unordered) == ((), (1, 2, 3))
    assert "instances" in found.text
    assert not problems(found, column([2, 3, 1, 4]))
    (gap,) = problems(found, column([2, 3, 1, 4, 5], [20, 20, 40, 20]))
    assert "label 1" in gap
    assert "label 4" in gap


def test_a_few_cases_with_mistakes_do_not_make_levels_instances() -> None:
    good = [column([3, 4, 5, 6])] * 4
    found = cohort_labels(cohort(*good, column([3, 5, 4, 6])))
    assert (found.levels, found.contradicting) == ((3, 4, 5, 6), ("P4",))
    assert "P4" in found.text
    (problem,) = problems(found, column([3, 5, 4, 6]))
    assert "C5 is above C4" in problem
    (problem,) = problems(found, column([3, 4, 5], [20, 5]))
    assert "5 mm" in problem
    (problem,) = problems(found, column([6, 5, 4, 3]))
    assert "reverse" in problem
    # A value that only this case has.
    (problem,) = problems(found, column([3, 4, 28, 5, 6]))
    assert "T13 is above C6" in problem
    # Three of seven are no longer a few.
    assert not cohort_labels(cohort(*good, *[column([6, 5, 4, 3])] * 3)).levels


def test_a_single_value_is_a_vertebra_if_it_is_a_level_of_the_cohort() -> None:
    found = cohort_labels(cohort(column([3, 4, 5]), column([2, 3, 4])))
    assert len(problems(found, column([4]), whole=0.5)) == 1
    assert problems(found, column([1]), whole=0.5) == []


def test_a_whole_spine_has_no_odd_distances() -> None:
    found = cohort_labels(cohort(column(WHOLE_SPINE, STEPS_MM)))
    assert found.levels == tuple(WHOLE_SPINE)
    assert problems(found, column(WHOLE_SPINE, STEPS_MM)) == []
    assert problems(found, {}) == []


@pytest.mark.parametrize(
    ("values", "steps_mm", "words"),
    [
        ([20, 21, 23, 24], [35, 70, 35], ("L2 and L4", "L3", "not")),
        ([20, 21, 23, 24], [35, 34, 35], ("L2 and L4", "34 mm", "neighbours", "L3")),
        ([20, 21, 22, 23], [35, 70, 35], ("L2 and L3", "70 mm", "missing")),
        ([20, 21, 22, 23], [35, 15, 35], ("L2 and L3", "15 mm", "one vertebra")),
        ([20, 22], [70], ("L1 and L3", "L2", "not")),
    ],
)
def test_gaps_between_levels_are_named(values: list[int], steps_mm: list[float], words: tuple[str, ...]) -> None:
    found = cohort_labels(cohort(column([20, 21, 22, 23, 24], 35.0)))
    (problem,) = problems(found, column(values, steps_mm))
    assert all(word in problem for word in words)
    # T13 and L6 are rare: their absence is no gap.
    assert problems(found, column([19, 20, 21], 35.0)) == []


def test_fragments_at_the_edge_of_the_volume_are_usual() -> None:
    for at_edge in (False, True):
        cut = Instance(3, (0, 0, 0), 10.0, 0.6, at_edge)
        assert ["pieces" in problem for problem in order_problems([cut], levels=True)] == [True] * (not at_edge)


def test_instances_at_the_edge_of_the_volume_are_known() -> None:
    label = Volume(spine([1, 2, 3, 4, 5, 6, 7], start=10), geometry(SIZE))
    assert [one.value for one in find_instances(label) if one.at_edge] == [7]
    label = Volume(spine([1, 2, 3], start=0), geometry(SIZE))
    assert [one.value for one in find_instances(label) if one.at_edge] == [1]


def test_structures_larger_than_any_vertebra_are_not_checked_for_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    label = Volume(spine([1, 0, 1]), geometry(SIZE))
    assert [one.whole for one in find_instances(label)] == [0.5]
    monkeypatch.setattr("cspine_data.volumes.instances._MOST_VOXELS", 6 * 8 * 8)
    assert [one.whole for one in find_instances(label)] == [1.0]
    assert [one.whole for one in find_instances(Volume(spine([1]), geometry(SIZE)))] == [1.0]


def test_levels_are_written_in_short_with_their_gaps() -> None:
    assert levels_text([]) == ""
    assert levels_text([20]) == "L1"
    assert levels_text([20, 18, 19]) == "T11-L1"
    assert levels_text([18, 19, 28, 20, 22]) == "T11-L1 L3"
    assert levels_text(LEVEL_NAMES.keys() & set(SPINE)) == "C1-L6"


def test_scan_says_what_the_values_are_and_what_is_odd(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    write(tmp_path, "A", spine([6, 5, 4, 3, 2]))
    gap = spine([7, 6, 5, 4, 3])
    write(tmp_path, "B", gap * (gap != 5))
    told = run_data("scan", tmp_path)
    assert told.exit_code == 0
    (note,) = (line for line in told.output.splitlines() if "levels" in line)
    assert "C2 to C7" in note
    (odd,) = (line for line in told.stderr.splitlines() if "C5" in line)
    assert "B" in odd
    quick = run_data("scan", tmp_path, "--quick")
    assert "levels" not in quick.output
