"""The picture of named vertebrae: all of them, in their colours, with names that can be read."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cspine_data import LEVEL_NAMES, level_colour
from cspine_train.levels.naming import FoundLevel, NamedSpine
from cspine_train.levels.picture import _apart, draw_levels, level_slices
from cspine_train.prediction import overlays
from cspine_train.prediction.overlays import BEST, MEDIAN, WORST, LevelGallery
from cspine_train.prediction.stored_volumes import Segmented

# From head to feet; x goes from side to side, as in scoliosis.
C3_TO_C6 = {3: (4, 30, 56), 4: (16, 28, 42), 5: (28, 28, 28), 6: (16, 30, 14)}
SIZE, SPACING_MM = (34, 60, 70), (1.5, 1.0, 1.2)

EMPTY = np.zeros((2, 2, 2), np.uint8)


def boxes(centres: dict[int, tuple[int, int, int]]) -> NDArray[np.uint8]:
    levels = np.zeros(SIZE, np.uint8)
    for value, (x, y, z) in centres.items():
        levels[x - 2 : x + 3, y - 8 : y + 9, z - 4 : z + 5] = value
    return levels


def slices(*levels: NDArray[np.uint8], image: NDArray[np.float32] | None = None):
    return level_slices(np.zeros(SIZE, np.float32) if image is None else image, levels, SPACING_MM, (0, 1))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[float, ...]]]:
    """The texts that are drawn, and their boxes."""
    texts: list[tuple[str, tuple[float, ...]]] = []
    draw = ImageDraw.ImageDraw.text

    def note(self: ImageDraw.ImageDraw, at, text, fill=None, font=None, anchor=None, **options) -> None:
        texts.append((text, self.textbbox(at, text, font, anchor)))
        draw(self, at, text, fill, font, anchor, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


def names_in(written: list[tuple[str, tuple[float, ...]]]) -> list[tuple[str, tuple[float, ...]]]:
    return [(text, box) for text, box in written if text.rstrip("?") in LEVEL_NAMES.values()]


def test_the_slice_runs_through_every_vertebra_of_a_scoliotic_spine() -> None:
    levels = boxes(C3_TO_C6)
    (shown,) = slices(levels)
    assert set(np.unique(shown.label_hw)) == {0, 3, 4, 5, 6}
    # No flat slice has all four.
    assert all(len(np.unique(levels[x])) < 5 for x in range(SIZE[0]))
    for value, (row, column) in shown.centres_hw.items():
        assert shown.label_hw[round(row), round(column)] == value
    assert shown.spacing_mm == (SPACING_MM[2], SPACING_MM[1])


def test_intensities_follow_the_spine_and_head_and_front_are_up_and_left() -> None:
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in SIZE), indexing="ij")
    levels = boxes(C3_TO_C6)
    for image, of in ((x, 0), (y, 1), (z, 2)):
        (shown,) = level_slices(image, [levels], SPACING_MM, (0, 255))
        found = {
            value: int(shown.grey_hw[round(row), round(column)]) for value, (row, column) in shown.centres_hw.items()
        }
        assert found == {value: centre[of] for value, centre in C3_TO_C6.items()}
    assert (np.diff(slices(levels, image=z / 255)[0].grey_hw.astype(int), axis=0) <= 0).all()
    assert (np.diff(slices(levels, image=y / 255)[0].grey_hw.astype(int), axis=1) >= 0).all()


def test_slices_of_several_maps_show_the_same_part(tmp_path: Path) -> None:
    found, true = slices(boxes({3: C3_TO_C6[3]}), boxes({6: C3_TO_C6[6]}))
    assert found.grey_hw.shape == true.grey_hw.shape
    draw_levels(tmp_path / "x.png", (found, true), ("predicted", "true"))


def test_vertebrae_have_their_colours_and_the_aspect_ratio_is_that_of_the_patient(tmp_path: Path) -> None:
    (shown,) = slices(boxes(C3_TO_C6))
    draw_levels(tmp_path / "x.png", [shown])
    picture = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    rows, columns = shown.grey_hw.shape
    height, width = picture.shape[0] - 16, picture.shape[1] - 16
    assert height / width == pytest.approx(rows * SPACING_MM[2] / (columns * SPACING_MM[1]), rel=0.01)
    for value, (row, column) in shown.centres_hw.items():
        at = 8 + int((row + 0.5) * height / rows), 8 + int((column + 0.5) * width / columns)
        # Half the colour, on black.
        assert np.abs(picture[at] - np.array(level_colour(value)) / 2).max() <= 1


def test_each_name_is_in_front_of_its_vertebra_and_only_uncertain_ones_are_asked(tmp_path: Path, written) -> None:
    (shown,) = slices(boxes(C3_TO_C6))
    draw_levels(tmp_path / "x.png", [shown], uncertain=(5,))
    assert [name for name, _ in names_in(written)] == ["C3", "C4", "C5?", "C6"]
    scale = Image.open(tmp_path / "x.png").height - 16
    for (_, (_, top, right, bottom)), value in zip(names_in(written), C3_TO_C6, strict=True):
        row, column = shown.centres_hw[value]
        assert top < (row + 0.5) * scale / shown.grey_hw.shape[0] < bottom
        assert right < (column - 8) * SPACING_MM[1] * scale / (shown.grey_hw.shape[0] * SPACING_MM[2]) + 1


def test_names_do_not_overlap_where_vertebrae_nearly_do(tmp_path: Path, written) -> None:
    crowded = np.zeros(SIZE, np.uint8)
    for number in range(24):
        crowded[10:20, 20:30, 60 - number] = number + 1
    draw_levels(tmp_path / "x.png", slices(crowded))
    boxes_of_names = [box for _, box in names_in(written)]
    assert len(boxes_of_names) == 24
    for (_, _, _, bottom), (_, top, _, _) in pairwise(boxes_of_names):
        assert bottom <= top
    height = Image.open(tmp_path / "x.png").height - 16
    assert boxes_of_names[0][1] >= 0
    assert boxes_of_names[-1][3] <= height


def test_names_stay_beside_their_vertebrae_in_a_whole_spine(tmp_path: Path, written) -> None:
    """Of 24 vertebrae, from 15 mm in the neck to 34 mm; the other map has none."""
    spine, top = np.zeros((20, 40, 400), np.uint8), 380.0
    for value in range(1, 25):
        pitch = max(10, 6 + 0.7 * value)
        spine[5:15, 20:35, int(top - 0.8 * pitch) : int(top)] = value
        top -= pitch
    shown, other = level_slices(np.zeros(spine.shape), [spine, 0 * spine], (1.5, 1.5, 1.5), (0, 1))
    draw_levels(tmp_path / "x.png", (shown, other), ("", ""))
    picture = Image.open(tmp_path / "x.png")
    # The other panel is as large.
    height, rows = picture.height - 16, shown.grey_hw.shape[0]
    assert height - 24 <= 1200
    assert (picture.width - 24) / 2 == pytest.approx(height * shown.grey_hw.shape[1] / rows, rel=0.02)
    for (row, _), (_, (_, above, _, below)) in zip(shown.centres_hw.values(), names_in(written), strict=True):
        assert (above + below) / 2 == pytest.approx((row + 0.5) * height / rows, abs=8)


def test_places_move_no_more_than_they_must() -> None:
    assert _apart([10, 40, 90], 20, 100) == [10, 40, 90]
    assert _apart([50, 50], 20, 100) == [40, 60]
    assert _apart([1, 99], 20, 100) == [10, 90]
    assert _apart([], 20, 100) == []


def test_title_headings_and_notes_do_not_overlap_and_are_wrapped_to_the_width(tmp_path: Path, written) -> None:
    (shown,) = slices(boxes(C3_TO_C6))
    note = "the levels may be one lower " * 9
    draw_levels(tmp_path / "x.png", [shown, shown], ("predicted", "true"), "CS_01", [note])
    width = Image.open(tmp_path / "x.png").width
    lines = [(text, box) for text, box in written if "lower" in text or "levels" in text]
    assert len(lines) > 1
    assert " ".join(text for text, _ in lines) == note.strip()
    assert all(box[2] <= width for _, box in lines)
    around = [box for text, box in written if text not in LEVEL_NAMES.values()]
    assert [text for text, _ in written if text in ("CS_01", "predicted", "true")] == ["CS_01", "predicted", "true"]
    for (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) in combinations(around, 2):
        assert right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top


def test_a_volume_without_vertebrae_is_shown_whole(tmp_path: Path) -> None:
    (shown,) = slices(np.zeros(SIZE, np.uint8))
    assert shown.grey_hw.shape == (SIZE[2], SIZE[1])
    draw_levels(tmp_path / "x.png", [shown])
    assert Image.open(tmp_path / "x.png").format == "PNG"


# The best, the median and the worst patient


@pytest.mark.parametrize(
    ("dice", "shown"),
    [
        ([0.8], {"best": "P0"}),
        ([0.7, 0.8], {"best": "P1", "worst": "P0"}),
        ([0.1, 0.9, 0.5, 0.6, 0.2], {"best": "P1", "median": "P2", "worst": "P0"}),
        ([i / 40 for i in range(41)], {"best": "P40", "median": "P20", "worst": "P0"}),
        # 0.000 to 0.400 in a mixed order.
        ([i * 37 % 401 / 1e3 for i in range(401)], {"best": "P65", "median": "P233", "worst": "P0"}),
    ],
)
def test_the_levels_of_the_best_the_median_and_the_worst_patient_are_drawn(
    dice: list[float], shown: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: dict[str, str] = {}
    monkeypatch.setattr(
        overlays, "draw_levels", lambda path, _, __, title, *___: titles.update({path.name: title.partition(":")[0]})
    )
    gallery = LevelGallery((BEST, MEDIAN, WORST), (3, 4))
    for number, of_patient in enumerate(dice):
        gallery.add(Segmented(f"P{number}", np.zeros((2, 2, 2)), (1, 1, 1), EMPTY, EMPTY), of_patient)
    files = list(gallery.draw(tmp_path, "test-", "all", ()))
    assert titles == {f"test-levels-{kind}.png": case for kind, case in shown.items()}
    assert {file.name for file in files} == set(titles)


def test_other_labels_than_levels_are_not_in_the_picture(tmp_path: Path, written) -> None:
    levels = boxes(C3_TO_C6)
    gallery = LevelGallery((BEST,), (3, 4))
    gallery.add(Segmented("A", np.zeros(SIZE, np.float32), SPACING_MM, levels, levels), 0.5)
    assert len(list(gallery.draw(tmp_path, "", "1 patient", ()))) == 1
    assert [name for name, _ in names_in(written)] == ["C3", "C4"] * 2


def test_uncertain_names_and_doubt_are_shown_for_the_prediction_alone(tmp_path: Path, written) -> None:
    levels = boxes(C3_TO_C6)
    found = [FoundLevel(value, LEVEL_NAMES[value], 0.89 if value == 4 else 0.9, (0, 0, 0), 1, 1) for value in C3_TO_C6]
    spine = NamedSpine(tuple(found), doubt="perhaps C5")
    gallery = LevelGallery((BEST,), C3_TO_C6)
    gallery.add(Segmented("A", np.zeros(SIZE, np.float32), SPACING_MM, levels, levels, spine=spine), 0.5)
    list(gallery.draw(tmp_path, "", "1 patient", ("synthetic",)))
    assert [name for name, _ in names_in(written)] == ["C3", "C4?", "C5", "C6", "C3", "C4", "C5", "C6"]
    assert [text for text, _ in written if text in ("perhaps C5", "synthetic")] == ["perhaps C5", "synthetic"]
