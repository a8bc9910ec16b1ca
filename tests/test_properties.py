"""Whatever is generated comes back from files, store and export as it was; digests change with what matters only."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import BaseModel

from cspine_data import (
    BiasParameters,
    Cohort,
    Geometry,
    InputError,
    Orientation,
    Preprocessing,
    Volume,
    find_cases,
    open_cohort,
    parse_axes,
    prepare,
    read_volume,
    write_volume,
)
from cspine_data.extensions import NORMALISATIONS
from cspine_data.parallel.workers import Workers
from cspine_data.preparation.case_writer import prepare_case
from cspine_data.preparation.plan import Job, plan_jobs
from cspine_data.preparation.source_digests import digest_files
from cspine_data.preprocessing.parameters import NYUL_PERCENTILES
from cspine_data.preprocessing.tissue import tissue_threshold
from cspine_data.store import schema as schema_module
from cspine_data.store.attributes import slice_grid
from cspine_data.store.publishing import create_store, publish
from cspine_data.store.schema import case_digest, volume_digest
from cspine_data.volumes.geometry import as_rows
from tests.conftest import ball, geometry, write_case
from tests.test_geometry import grids, itk_agrees_on_orientation, itk_image
from tests.test_volumes import NRRD_TYPES, VOXELS, header

# Numbers that overflow on the way are noise in the slices, whatever the export says.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

RAW = Preprocessing(bias=None)
#: What an image is refused for that holds nothing to look at.
NOTHING_TO_SEE = (
    "is constant", "has no contrast within its tissue", "a range that no scanner has", "same voxels as its volume",
)  # fmt: skip


def planned(source: Path, store: Path, axes: str = "012", pairs: Path | None = None) -> list[Job]:
    create_store(store)
    cases = find_cases(source, pairs).cases
    jobs, problems = plan_jobs(cases, store, RAW, parse_axes(axes), digest_files(cases, store, Workers()))
    assert not problems
    return jobs


def stored(source: Path, store: Path) -> Cohort:
    """Do in this process what `prepare` does in workers: the one place here that knows its inner calls."""
    for job in planned(source, store):
        prepare_case(job, store)
        assert publish(store, [job.replacement]) == (set(), {})
    return open_cohort(store)


@dataclass(frozen=True, eq=False)
class Source:
    """An image and its label map on one grid, and the endings to write them with."""

    image: Volume
    label: Volume
    suffixes: tuple[str, str]


@st.composite
def any_grids(draw: st.DrawFn) -> Geometry:
    """Oblique, flipped and left-handed grids, along the patient in any order, and with rounded axes."""
    grid = draw(grids())
    kind = draw(st.sampled_from(("oblique", "along", "rounded")))
    if kind == "oblique":
        return grid
    if kind == "along":
        signs = np.array(draw(st.tuples(*[st.sampled_from((1.0, -1.0))] * 3)))
        directions = np.eye(3)[:, draw(st.permutations(range(3)))] * signs
    else:
        directions = grid.direction_matrix + np.array(draw(st.tuples(*[st.floats(-2e-4, 2e-4)] * 9))).reshape(3, 3)
        directions /= np.linalg.norm(directions, axis=0)
    return grid.model_copy(update={"directions": as_rows(directions)})


def numbers(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    """Every integer of a dtype; floats as far as any scanner's go, and farther."""
    if dtype.kind == "f":
        return st.floats(-(2.0**60), 2.0**60, width=8 * dtype.itemsize)
    return hnp.from_dtype(dtype)


@st.composite
def sources(draw: st.DrawFn) -> Source:
    grid = draw(any_grids())
    assume(np.prod(grid.size) > 1)
    types = st.sampled_from(NRRD_TYPES).map(np.dtype)
    image_type, label_type = draw(types), draw(types)
    image = draw(hnp.arrays(image_type, grid.size, elements=numbers(image_type), fill=st.nothing()))
    highest = 2**24 if label_type.kind == "f" else np.iinfo(label_type).max
    values = draw(st.lists(st.integers(1, highest), min_size=1, max_size=8))
    label = draw(hnp.arrays(label_type, grid.size, elements=st.sampled_from([0, *values])))
    # Something is labelled, and something is not.
    label.flat[0], label.flat[-1] = 0, values[0]
    # ITK reads an sform by its own, smaller tolerance.
    steps = grid.direction_matrix
    endings = (".nrrd", ".nii.gz") if np.allclose(steps.T @ steps, np.eye(3), atol=1e-6) else (".nrrd",)
    suffixes = draw(st.tuples(*[st.sampled_from(endings)] * 2))
    return Source(Volume(image, grid), Volume(label, grid), suffixes)


@contextmanager
def prepared(source: Source) -> Iterator[tuple[Cohort, Path, Path]]:
    """Write a source's files, prepare them, and give the store's cohort and both files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            Path(folder, "raw", f"A{end}{suffix}") for end, suffix in zip(("", "-label"), source.suffixes, strict=True)
        ]
        write_volume(paths[0], source.image)
        write_volume(paths[1], source.label)
        try:
            cohort = stored(paths[0].parent, Path(folder, "s.zarr"))
        except InputError as refusal:
            assume(not refusal.problem.endswith(NOTHING_TO_SEE))
            raise
        yield cohort, *paths


@given(sources(), st.sampled_from((".nrrd", ".nii.gz")))
def test_what_is_exported_is_what_was_given(source: Source, ending: str) -> None:
    ending = ending if ".nii.gz" in source.suffixes else ".nrrd"
    with prepared(source) as (cohort, *paths):
        for label, given_volume, path in zip((False, True), (source.image, source.label), paths, strict=True):
            exported = cohort.export("A", label=label)
            assert exported.geometry == read_volume(paths[0]).geometry
            write_volume(path.with_name(f"again{ending}"), exported)
            for found in (exported, read_volume(path.with_name(f"again{ending}"))):
                assert found.array.dtype == given_volume.array.dtype
                np.testing.assert_array_equal(found.array, given_volume.array)
                assert found.geometry.same_grid(given_volume.geometry, 1e-2)


@given(sources())
def test_slices_along_every_axis_are_the_anatomical_arrays(source: Source) -> None:
    turn = Orientation.of(source.image.geometry).to_anatomical
    with prepared(source) as (cohort, *_):
        record = cohort.record("A")
        levels = record.levels.encode(record.normalisation.apply(turn(source.image.array)))
        for axis in range(3):
            slices = cohort.slices(axis=axis, labels="stored")
            images, labels = zip(*slices, strict=True)
            np.testing.assert_array_equal(np.concatenate(images), np.moveaxis(record.levels.decode(levels), axis, 0))
            label = np.moveaxis(turn(source.label.array), axis, 0)
            np.testing.assert_array_equal(np.concatenate(labels), label)
            assert slices.labelled_voxels.tolist() == [np.count_nonzero(one) for one in label]
            masks = [mask for _, mask in cohort.slices(axis=axis)]
            np.testing.assert_array_equal(np.concatenate(masks), label != 0)


@given(sources())
def test_the_stored_volume_is_what_simpleitk_makes_of_the_same_file(source: Source) -> None:
    assume(itk_agrees_on_orientation(source.image.geometry))
    with prepared(source) as (cohort, image, label):
        record = cohort.record("A")
        turned = sitk.DICOMOrient(sitk.ReadImage(str(image)), "LPS")
        found = cohort.prepared("A").corrected.image_xyz
        np.testing.assert_array_equal(found, sitk.GetArrayFromImage(turned).transpose())
        # ITK rounds the origins of two NIfTI files each in its way; the label map lies on the image's grid.
        labels = itk_image(read_volume(label).array, record.geometry)
        turned_label = sitk.GetArrayFromImage(sitk.DICOMOrient(labels, "LPS")).transpose()
        np.testing.assert_array_equal(cohort.label_xyz("A"), turned_label)
        assert record.size_xyz == turned.GetSize()
        grid = slice_grid(record)
        np.testing.assert_allclose(grid["spacing_xyz_mm"], turned.GetSpacing(), rtol=1e-9)
        np.testing.assert_allclose(grid["origin_xyz_mm"], turned.GetOrigin(), atol=1e-6)
        np.testing.assert_allclose(np.ravel(grid["directions_xyz"]), turned.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("axis", range(3))
def test_equal_cosines_are_ordered_as_itk_does(axis: int) -> None:
    """Grids at 45 degrees, where two axes lie equally near."""
    half = np.sqrt(0.5)
    for signs in itertools.product((-1, 1), repeat=3):
        for order in itertools.permutations(range(3)):
            turn = np.eye(3)
            others = [a for a in range(3) if a != axis]
            turn[np.ix_(others, others)] = ((half, -half), (half, half))
            grid = geometry((3, 4, 5), directions=tuple(map(tuple, (turn * signs)[:, order])))
            image = itk_image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), grid)
            turned = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS")).transpose()
            found = Orientation.of(grid).to_anatomical(sitk.GetArrayFromImage(image).transpose())
            np.testing.assert_array_equal(found, turned)


def values_of(model: type[BaseModel], name: str, like: Any = None) -> st.SearchStrategy[Any]:
    """Values of a parameter by its own annotation, so that a new one is drawn without a word here."""
    if name == "standard":
        ascending = st.lists(st.integers(0, 99), min_size=11, max_size=11, unique=True).map(sorted)
        assert len(NYUL_PERCENTILES) == 11
        return st.none() | ascending.map(lambda values: tuple(map(float, values)))
    if name == "spacing_mm":
        return st.none() | st.tuples(*[st.floats(0.1, 9)] * 3)
    if name == "normalisation":
        return st.sampled_from(NORMALISATIONS.names())
    if name == "bias":
        return st.none() | parameters_of(BiasParameters, like)
    field = model.model_fields[name]
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return st.from_type(kind)


@st.composite
def parameters_of(draw: st.DrawFn, model: type[BaseModel], like: BaseModel | None = None) -> Any:
    """Parameters, all of them drawn; or like others but for some that are drawn anew."""
    names = list(model.model_fields)
    anew = draw(st.sets(st.sampled_from(names), max_size=2)) if like else names
    values = {
        name: draw(values_of(model, name, getattr(like, name, None))) if name in anew else getattr(like, name)
        for name in names
    }
    if model is Preprocessing and values["normalisation"] != "nyul":
        values["standard"] = None
    # Zero has two signs in floats: equal, and written in two ways.
    return model(**{name: value + 0.0 if isinstance(value, float) else value for name, value in values.items()})


@st.composite
def inputs(draw: st.DrawFn, like: Any = None) -> Any:
    """What a stored case is made of: all drawn, or like another's but for one or two parts."""
    shas = st.sampled_from(("a" * 64, "b" * 64))
    axes = st.lists(st.sampled_from("012"), min_size=1, max_size=6).map("".join).map(parse_axes)
    parts = (shas, st.none() | shas, parameters_of(Preprocessing, like and like[2]), axes)
    anew = draw(st.sets(st.integers(0, 3), max_size=2)) if like else range(4)
    return tuple(draw(part) if number in anew else like[number] for number, part in enumerate(parts))


def digest_of(image: str, label: str | None, preprocessing: Preprocessing, axes: tuple[int, ...]) -> str:
    return case_digest(volume_digest(image, preprocessing), label, preprocessing, axes)


@given(st.data())
def test_two_digests_are_equal_exactly_where_the_inputs_are(data: st.DataObject) -> None:
    one = data.draw(inputs())
    other = data.draw(inputs(like=one))
    assert (digest_of(*one) == digest_of(*other)) == (one == other)
    corrected_alike = (one[0], one[2].bias, one[2].revision) == (other[0], other[2].bias, other[2].revision)
    assert (volume_digest(one[0], one[2]) == volume_digest(other[0], other[2])) == corrected_alike


PARAMETERS = [(model, name) for model in (Preprocessing, BiasParameters) for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), PARAMETERS, ids=[f"{model.__name__}.{name}" for model, name in PARAMETERS])
@given(data=st.data())
def test_every_parameter_changes_the_digest(model: type[BaseModel], name: str, data: st.DataObject) -> None:
    before = Preprocessing(normalisation="nyul") if name == "standard" else Preprocessing()
    now = getattr(before if model is Preprocessing else before.bias, name)
    changed = {name: data.draw(values_of(model, name).filter(lambda value: value != now))}
    if model is BiasParameters:
        changed = {"bias": BiasParameters(**{**dict(before.bias or ()), **changed})}
    after = Preprocessing(**{**dict(before), **changed})
    assert digest_of("a", "b", after, (0,)) != digest_of("a", "b", before, (0,))
    of_volume = model is BiasParameters or name in ("bias", "revision")
    assert (volume_digest("a", after) != volume_digest("a", before)) == of_volume


def test_time_folder_naming_and_the_order_of_axes_do_not_matter(tmp_path: Path) -> None:
    raw, elsewhere = tmp_path / "raw", tmp_path / "another" / "place"
    write_case(raw, "A")
    (job,) = planned(raw, tmp_path / "s.zarr")
    elsewhere.mkdir(parents=True)
    shutil.copy(raw / "A.nrrd", elsewhere / "scan.nrrd")
    shutil.copy(raw / "AS-label.nrrd", elsewhere / "drawn.nrrd")
    os.utime(elsewhere / "scan.nrrd", (1, 1))
    pairs = tmp_path / "another" / "pairs.csv"
    pairs.write_text("case,volume,label\nB,place/scan.nrrd,place/drawn.nrrd\n")
    (other,) = planned(elsewhere, tmp_path / "s.zarr", "221002", pairs)
    assert (other.case.id, other.digest, other.axes) == ("B", job.digest, job.axes)


def test_the_number_of_workers_does_not_matter(ball_cohort: Path, tmp_path: Path) -> None:
    prepare(ball_cohort / "raw", tmp_path / "s.zarr", n4=False, workers=1)
    digests = [[job.digest for job in planned(ball_cohort / "raw", tmp_path / "none.zarr")]]
    for store in (ball_cohort / "s.zarr", tmp_path / "s.zarr"):
        digests.append([record.digest for record in open_cohort(store).records()])
    assert digests[0] == digests[1] == digests[2]


@pytest.fixture(scope="module")
def detached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a case whose voxels lie beside its header, and a label map."""
    folder = tmp_path_factory.mktemp("detached")
    (folder / "A.raw").write_bytes(VOXELS.tobytes())
    (folder / "A.nhdr").write_bytes(header(data_file="A.raw"))
    write_volume(folder / "A-label.nrrd", Volume(np.ones((4, 5, 6), np.uint8), read_volume(folder / "A.nhdr").geometry))
    return folder


@pytest.mark.parametrize("name", ["A.raw", "A.nhdr", "A-label.nrrd"])
@given(spot=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_one_flipped_bit_of_any_file_matters(name: str, detached: Path, spot: int, bit: int) -> None:
    before = (detached / name).read_bytes()
    flipped = bytearray(before)
    flipped[spot % len(before)] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "s.zarr")
        (job,) = planned(detached, store)
        try:
            (detached / name).write_bytes(flipped)
            cases = find_cases(detached).cases
            jobs, problems = plan_jobs(cases, store, RAW, (0, 1, 2), digest_files(cases, store, Workers()))
        finally:
            (detached / name).write_bytes(before)
    # A header that is broken so that it cannot be read has no digest at all.
    assert [one.digest for one in jobs] != [job.digest]
    assert len(jobs) + len(problems) == 1


def test_the_schemas_version_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "raw", "A")
    (job,) = planned(tmp_path / "raw", tmp_path / "s.zarr")
    before = (job.digest, job.volume_digest)
    monkeypatch.setattr(schema_module, "SCHEMA_VERSION", schema_module.SCHEMA_VERSION + 1)
    assert job.digest != before[0]
    assert job.volume_digest != before[1]


@pytest.mark.parametrize("factor", [1e-42, 1e36])
def test_intensities_that_no_scanner_has_are_refused_in_words(factor: float, tmp_path: Path) -> None:
    """As of floats that were read in the wrong byte order: their statistics overflow."""
    image, _ = ball()
    write_volume(tmp_path / "raw" / "A.nrrd", Volume(image.array.astype(np.float64) * factor, image.geometry))
    with pytest.raises(InputError, match="range that no scanner"):
        stored(tmp_path / "raw", tmp_path / "s.zarr")


def test_tissue_is_told_beside_one_voxel_a_million_times_as_bright() -> None:
    array = np.zeros((5, 1, 3), np.int32)
    array[4, 0, 1:] = 1, 4367311
    assert 1 < tissue_threshold(array, (3, 1, 3)) < 4367311


def test_a_range_below_single_precision_has_a_threshold() -> None:
    image = np.array([[[0.0, 2.2e-309]]])
    assert image.min() <= tissue_threshold(image, (3.0, 3.0, 3.0)) <= image.max()
