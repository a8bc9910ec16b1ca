"""The dataset report: faults that were planted come first, and the page works in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray

from cspine_data import (
    InputError,
    Orientation,
    Volume,
    find_cases,
    open_cohort,
    prepare,
    read_volume,
    report_store,
    write_volume,
)
from cspine_data.phantom.anatomy import make_case
from cspine_data.preprocessing import steps
from cspine_data.preprocessing.bias_field import BiasEstimate, correct, field_at, field_factors, uncorrect
from cspine_data.report.case_summary import CaseSummary, examine_source_case
from cspine_data.report.dataset import report_source
from cspine_data.report.findings import Finding, find_outliers
from cspine_data.report.label_fit import label_fit, similarity
from cspine_data.store.identities import Identity
from cspine_data.store.records import read_log_bias_xyz, read_volume_xyz
from cspine_data.volumes.label_options import DEFAULT_LABELS
from tests.browser import CHROMIUM, browser
from tests.conftest import QUICK_N4, geometry, not_installed
from tests.test_tables import CONTRAST

HOSTILE = "<b>bold</b>"
SPACING = (3.0, 2.0, 2.0)
FAULTS = ("flipped", "displaced", "units", "other label", "twin", "twin of", "diverged")
Case = tuple[NDArray[Any], NDArray[Any], tuple[float, float, float]]


def phantoms(count: int, spacing_mm: tuple[float, float, float] | None) -> list[Case]:
    found = (make_case(11, number, spacing_mm) for number in range(count))
    return [(case.image_xyz, case.label_xyz, case.spacing_mm) for case in found]


def write(folder: Path, name: str, case: Case) -> None:
    image, label, spacing = case
    grid = geometry(image.shape, spacing)
    write_volume(folder / f"{name}.nrrd", Volume(np.ascontiguousarray(image), grid))
    write_volume(folder / f"{name}-label.nrrd", Volume(np.ascontiguousarray(label), grid))


def plant(folder: Path, cases: list[Case], axis: int = 1) -> dict[str, str]:
    """Write a cohort with all faults but the diverged N4; return the name of the case with each fault."""
    rng = np.random.default_rng(5)
    names = [f"P{number:02d}" for number in range(len(cases))]
    at = dict(zip(FAULTS, rng.permutation(len(cases)).tolist(), strict=False))
    for number, (image, label, spacing) in enumerate(cases):
        if number == at["flipped"]:
            image, label = np.flip(image, axis), np.flip(label, axis)
        elif number == at["displaced"]:
            label = np.roll(label, round(6 / spacing[1]), 1)
        elif number == at["units"]:
            first, second, third = (10 * mm for mm in spacing)
            spacing = (first, second, third)
        elif number == at["other label"]:
            other = cases[(number + 1) % len(cases)][1]
            label = np.zeros_like(label)
            both = tuple(slice(min(sizes)) for sizes in zip(label.shape, other.shape, strict=True))
            label[both] = other[both]
        elif number == at["twin"]:
            image, label, spacing = cases[at["twin of"]]
            image = np.clip(image + rng.normal(0, image.std() / 20, image.shape), 0, None).astype(image.dtype)
        write(folder, names[number], (image, label, spacing))
    return {fault: names[number] for fault, number in at.items()}


def diverging(volume: Volume) -> Callable[..., BiasEstimate]:
    """An estimate of the bias field that is far off for one volume."""
    estimate = steps.estimate_bias
    its_xyz = Orientation.of(volume.geometry).to_anatomical(volume.array)

    def estimated(image_xyz: NDArray[Any], *arguments: Any) -> BiasEstimate:
        found = estimate(image_xyz, *arguments)
        if not np.array_equal(image_xyz, its_xyz):
            return found
        wave = np.sin(np.linspace(0, 9, image_xyz.shape[2], dtype=np.float32)) + np.zeros_like(found.log_bias_xyz)
        log_bias = found.log_bias_xyz + wave
        return replace(found, log_bias_xyz=log_bias, corrected_xyz=correct(image_xyz, log_bias, found.air_level))

    return estimated


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examine cases one after the other: starting Dask's workers takes seconds."""

    def side_by_side(work: Callable[[Any], Any], tasks: list[Any], *_: Any) -> Iterator[list[tuple[Any, Any]]]:
        for task in tasks:
            yield [(task, work(task))]

    monkeypatch.setattr("cspine_data.report.dataset.side_by_side", side_by_side)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve phantoms with large voxels."""
    folder = tmp_path_factory.mktemp("cohort")
    for number, case in enumerate(phantoms(12, SPACING)):
        write(folder, f"P{number:02d}", case)
    return folder


def summaries(folder: Path) -> list[CaseSummary]:
    cases = find_cases(folder).cases
    return [examine_source_case(case, DEFAULT_LABELS).summary for case in cases]


def suspects(page: Path) -> list[str]:
    """The cases of the first table of a page, in its order."""
    table = page.read_text(encoding="utf-8").split("Look at these first")[1].split("</table>")[0]
    return re.findall(r'<tr><td>(?:<a href="#case-\d+">)?([^<]*)', table)


@pytest.mark.parametrize("axis", [1, 2])
def test_planted_faults_are_among_the_first_ten(
    axis: int, tmp_path: Path, long_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--long`, of 60 phantoms with voxels as scanners have; else of 16 with large ones."""
    at = plant(tmp_path, phantoms(60, None) if long_run else phantoms(16, SPACING), axis)
    found = report_source(find_cases(tmp_path), tmp_path / "source.html")
    assert found.problems == ()
    in_source = {case for fault, case in at.items() if fault != "diverged"}
    first = suspects(tmp_path / "source.html")[:10]
    assert in_source <= set(first)

    estimate = diverging(read_volume(tmp_path / f"{at['diverged']}.nrrd"))
    monkeypatch.setattr("cspine_data.preprocessing.steps.estimate_bias", estimate)
    assert not prepare(tmp_path, tmp_path / "s.zarr", preprocessing=QUICK_N4, axes="0").failed
    assert report_store(tmp_path / "s.zarr", tmp_path / "store.html").suspects <= 10
    assert in_source | {at["diverged"]} <= set(suspects(tmp_path / "store.html"))


def test_a_cohort_without_faults_has_nothing_to_look_at(cohort: Path, tmp_path: Path) -> None:
    assert report_source(find_cases(cohort), tmp_path / "page.html").suspects == 0
    assert "Look at these first" not in (tmp_path / "page.html").read_text()


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["spine14", "spine_t1"])
def test_only_planted_faults_are_found_in_real_mri(name: str, realdata: Path, tmp_path: Path, long_run: bool) -> None:
    """Without `--long`, of every other voxel along each axis."""
    step = 1 if long_run else 2
    cases = []
    for case in find_cases(realdata / name).cases:
        assert case.label
        image, label = read_volume(case.volume), read_volume(case.label)
        orientation = Orientation.of(image.geometry)
        x, y, z = (step * mm for mm in orientation.geometry_xyz(image.geometry).spacing_mm)
        few = [orientation.to_anatomical(one.array)[::step, ::step, ::step] for one in (image, label)]
        cases.append((few[0], few[1], (x, y, z)))
    at = plant(tmp_path, cases)
    found = {finding.case for finding in find_outliers(summaries(tmp_path))}
    assert found == {case for fault, case in at.items() if fault != "diverged"}


def test_the_fit_tells_the_displacement_of_a_label_map() -> None:
    ((image, label, spacing),) = phantoms(1, (2.0, 2.0, 2.0))
    labelled = label > 0
    here = label_fit(image, labelled, spacing)
    assert here.here > 3
    assert here.gain < 0.5
    displaced = label_fit(image, np.roll(labelled, 4, 1), spacing)
    assert displaced.gain > 1
    assert displaced.displacement_mm == pytest.approx((0, -8, 0), abs=2.1)
    # Bright and dark vertebrae fit alike.
    assert label_fit(image.max() - image, labelled, spacing).here > 2
    flat = label_fit(np.full_like(image, 7), labelled, spacing)
    assert np.isfinite([flat.here, flat.gain]).all()


def test_surroundings_are_like_those_of_others_only_unflipped(cohort: Path) -> None:
    around = [one.label.surroundings for one in summaries(cohort) if one.label]
    others = np.mean(around[1:], axis=0)
    assert similarity(around[0], others) > 0.6
    for axis in (1, 2):
        assert similarity(np.flip(around[0], axis), others) < similarity(around[0], others) - 0.05
    assert similarity(around[0], np.zeros_like(around[0])) == 0


def test_volumes_of_one_voxel_along_an_axis_are_examined(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(300, 60, (1, 40, 44)).clip(0).astype(np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[:, 10:20, 12:30] = 1
    write(tmp_path, "flat", (image, label, SPACING))
    assert len(summaries(tmp_path)) == 1


def test_a_store_keeps_the_field_and_the_volume_before_correction_follows_from_it(
    cohort: Path, tmp_path: Path, phantom_store: Path
) -> None:
    store = tmp_path / "s.zarr"
    prepare(cohort, store, preprocessing=QUICK_N4, axes="0", include=("P00",))
    opened = open_cohort(store)

    def before() -> NDArray[np.float32]:
        record = open_cohort(store).record("P00")
        field = read_log_bias_xyz(opened.path, record)
        assert field is not None
        assert field.std() > 0.05
        indices = tuple(np.arange(n) for n in record.size_xyz)
        factors = field_factors(record.size_xyz, record.spacing_xyz_mm)
        log_bias = field_at(field, factors, indices)
        corrected = read_volume_xyz(opened.path, record)
        return uncorrect(corrected, log_bias, record.air_level, record.noise_ratio)

    image = read_volume(cohort / "P00.nrrd")
    image_xyz = Orientation.of(image.geometry).to_anatomical(image.array)
    np.testing.assert_allclose(before(), image_xyz, atol=0.02 * image_xyz.max())
    # Another axis reuses the corrected volume, and keeps its field.
    first = before()
    prepare(cohort, store, preprocessing=QUICK_N4, axes="2", include=("P00",))
    np.testing.assert_array_equal(before(), first)
    raw = open_cohort(phantom_store)
    assert read_log_bias_xyz(raw.path, raw.record(raw.cases[0], "raw")) is None


def test_uncorrect_undoes_correct() -> None:
    rng = np.random.default_rng(1)
    image = rng.uniform(0, 900, (5, 6, 7)).astype(np.float32)
    log_bias = rng.normal(0, 0.6, image.shape).astype(np.float32)
    for air, noise in ((0.0, 0.0), (30.0, 0.4)):
        back = uncorrect(correct(image, log_bias, air, noise), log_bias, air, noise)
        np.testing.assert_allclose(back, image, rtol=1e-4, atol=1e-3)


def test_the_commands_write_pages_and_report_what_cannot_be_used(
    cohort: Path, tmp_path: Path, run_data: Callable[..., Result]
) -> None:
    for file in cohort.glob("P0[0-3]*"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "raw" / "P02.nrrd").write_bytes(b"NRRD0004\nbroken")
    (tmp_path / "raw" / "P09.nrrd").write_bytes((tmp_path / "raw" / "P01.nrrd").read_bytes())
    page = tmp_path / "page.html"
    told = run_data("scan", tmp_path / "raw", "--report", page)
    assert told.exit_code == 1
    assert told.output.count("problem: ") == 2
    assert f"wrote {page}: 2 cases to look at" in told.output
    assert suspects(page) == ["P02", "P09"]
    prepare(tmp_path / "raw", tmp_path / "s.zarr", n4=False, axes="0")
    told = run_data("report", tmp_path / "s.zarr", "-o", page)
    assert (told.exit_code, "0 cases to look at" in told.output) == (0, True)
    assert page.read_text().count('class="case filtered"') == 3

    shard = next((tmp_path / "s.zarr" / "cases" / "P01").glob("*/volume/0/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
    told = run_data("report", tmp_path / "s.zarr", "-o", page)
    assert told.exit_code == 1
    assert "P01" in suspects(page)
    before = page.read_bytes()
    refused = run_data("report", tmp_path / "s.zarr", "--variant", "n4", "-o", page)
    assert (refused.exit_code, page.read_bytes()) == (1, before)
    next((tmp_path / "s.zarr" / "cases" / "P03").glob("*/zarr.json")).write_text("{")
    told = run_data("report", tmp_path / "s.zarr", "-o", page)
    assert told.exit_code == 1
    assert suspects(page) == ["P01", "P03"]
    for arguments in (
        ("scan", tmp_path / "raw", "--report", tmp_path / "page.txt"),
        ("report", tmp_path / "none.zarr"),
    ):
        assert run_data(*arguments, *(("-o", page) if arguments[0] == "report" else ())).exit_code != 0
    refused = run_data("scan", tmp_path / "raw", "--quick", "--report", page)
    assert "--quick" in refused.output
    assert not (tmp_path / "page.txt").exists()


def test_commands_on_the_page_select_the_same_cases_and_are_quoted(
    cohort: Path, tmp_path: Path, run_data: Callable[..., Result]
) -> None:
    raw = tmp_path / "my data; rm"
    raw.mkdir()
    for name in ("P00", "P01"):
        write_volume(raw / f"{name}.nrrd", read_volume(cohort / f"{name}.nrrd"))
        label = read_volume(cohort / f"{name}-label.nrrd")
        write_volume(raw / f"{name}-label.nrrd", replace(label, array=np.roll(label.array, 4, 1)))
    run_data("scan", raw, "--layout", "flat", "--exclude", "x*", "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<code>--exclude P00</code>" in text
    # Two of one patient need a list of the same cases.
    write_volume(
        raw / "P02.nrrd", replace(read_volume(cohort / "P00.nrrd"), array=read_volume(cohort / "P00.nrrd").array + 1)
    )
    run_data("scan", raw, "--layout", "flat", "--exclude", "x*", "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"cspine-data scan &#39;{raw}&#39; --layout flat --exclude &#39;x*&#39; --write-pairs pairs.csv" in text


@pytest.fixture(scope="module")
def hostile_page(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of cases whose patient and site have markup in their names."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [f"{case.id},{case.volume},{case.label},{HOSTILE}{case.id},{HOSTILE}" for case in find_cases(cohort).cases]
    (folder / "pairs.csv").write_text("\n".join(["case,volume,label,patient,site", *rows]))
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(
            "cspine_data.report.dataset.side_by_side", lambda work, tasks, *_: [[(t, work(t)) for t in tasks]]
        )
        report_source(find_cases(folder, folder / "pairs.csv"), folder / "page.html")
    return folder / "page.html"


def test_the_page_needs_nothing_beside_it_and_shows_markup_as_text(hostile_page: Path) -> None:
    text = hostile_page.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert re.search("default-src 'none'", text)
    assert not re.search(r"(src|href)=\"(?!data:image/webp;base64,|#case-)", text)


def test_in_a_browser_the_page_is_read_sorted_and_filtered_by_keyboard(hostile_page: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        not_installed("chromium")
    with browser(tmp_path / "profile") as seen:
        for width, scheme in product((400, 1600), ("light", "dark")):
            seen.open(hostile_page, width, scheme)
            assert seen.value("document.documentElement.scrollWidth") <= width
            assert seen.value(CONTRAST) >= 4.5
            assert seen.value(f"document.body.textContent.includes({json.dumps(HOSTILE)})")
        pictures = "Array.from(document.images)"
        seen.value(f"{pictures}.forEach(one => {{ one.loading = 'eager'; }})")
        assert seen.value(f"Promise.all({pictures}.map(one => one.decode())).then(() => 1)", wait=True) == 1
        table = "document.querySelector('[aria-label=\"all cases\"] table')"
        rows = f"Array.from({table}.tBodies[0].rows)"
        focus = f"document.activeElement.closest('th') && {table}.contains(document.activeElement)"
        seen.press("Tab", 9)
        assert seen.value("document.activeElement.id") == "filter"
        while not seen.value(focus):
            seen.press("Tab", 9)
        seen.press("Enter", 13, "\r")
        first = seen.value(f"{rows}[0].cells[0].textContent")
        seen.press("Enter", 13, "\r")
        assert {first, seen.value(f"{rows}[0].cells[0].textContent")} == {"P00", "P11"}
        # The case's name leads to its pictures.
        while seen.value("document.activeElement.tagName") != "A":
            seen.press("Tab", 9)
        seen.press("Enter", 13, "\r")
        assert seen.value("document.querySelector(':target figure, figure:target').dataset.caption").startswith("P")
        seen.open(hostile_page, 400, "dark")
        seen.press("Tab", 9)
        seen.type("p03")
        shown = "Array.from(document.querySelectorAll('figure.case')).filter(one => !one.hidden).length"
        assert seen.value(shown) == 1
        assert seen.errors == []


@pytest.mark.parametrize("few", [1, 7])
def test_few_cases_are_not_compared_with_each_other(few: int, cohort: Path) -> None:
    some = summaries(cohort)[:few]
    some[0] = replace(some[0], intensity=1e6)
    assert find_outliers(some) == ()


def test_cases_are_compared_within_their_sequence(cohort: Path) -> None:
    some = summaries(cohort)
    some[3] = replace(some[3], intensity=2e6)
    assert find_outliers(some)
    halves = [
        replace(one, identity=Identity(patient=one.case, sequence="T1" if n % 2 else "T2"))
        for n, one in enumerate(some)
    ]
    assert find_outliers(halves) == ()


def test_an_outlier_names_its_value_and_the_median(cohort: Path) -> None:
    some = summaries(cohort)
    some[3] = replace(some[3], intensity=2e6, doubts=("is odd",))
    found = find_outliers(some)
    assert [finding.case for finding in found] == ["P03", "P03"]
    outlier = next(finding for finding in found if finding.kind == "case")
    assert isinstance(outlier, Finding)
    assert "2,000,000" in outlier.problem


def test_vertebrae_out_of_order_are_found_before_and_after_preparation(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    for number, (image, label, spacing) in enumerate(phantoms(5, SPACING)):
        exchanged = np.array([0, 1, 2, 4, 3, 5, 6, 7], np.uint8)[label] if number == 2 else label
        write(folder, f"P{number:02d}", (image, exchanged, spacing))
    prepare(folder, tmp_path / "s.zarr", n4=False, axes="0")
    pages = [tmp_path / "source.html", tmp_path / "store.html"]
    report_source(find_cases(folder), pages[0])
    report_store(tmp_path / "s.zarr", pages[1])
    for page in pages:
        assert suspects(page) == ["P02"]
        text = page.read_text(encoding="utf-8")
        assert "C4 is above C3" in text
        assert re.search("note.*levels C1 to C7", text)
        assert "<td>C1-C7</td>" in text


def test_a_page_of_another_suffix_is_refused_before_any_work(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.html"):
        report_source(find_cases(cohort), tmp_path / "page")
