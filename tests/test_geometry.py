from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cspine_data.volumes.geometry import Geometry, Orientation, as_rows

sizes = st.tuples(*[st.integers(1, 5)] * 3)
spacings = st.tuples(*[st.floats(0.2, 8)] * 3)
angles = st.tuples(*[st.floats(-180, 180)] * 3)
origins = st.tuples(*[st.floats(-300, 300)] * 3)


@st.composite
def grids(draw: st.DrawFn) -> Geometry:
    """Any grid a scanner or a program can write: oblique, anisotropic, left-handed too."""
    directions = Rotation.from_euler("xyz", draw(angles), degrees=True).as_matrix()
    directions = directions * np.where(draw(st.tuples(*[st.booleans()] * 3)), -1, 1)
    return Geometry(
        size=draw(sizes), spacing_mm=draw(spacings), directions=as_rows(directions), origin_mm=draw(origins)
    )


def itk_image(array: np.ndarray, grid: Geometry) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
    image.SetSpacing(grid.spacing_mm)
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.direction_matrix.ravel().tolist())
    return image


def itk_agrees_on_orientation(grid: Geometry) -> bool:
    """Tell whether no cosines are nearly equal: ITK lets their last bit decide."""
    cosines = np.sort(np.abs(grid.direction_matrix).ravel())
    return bool((np.diff(cosines[cosines > 1e-3]) > 1e-5).all() or (cosines > 1 - 1e-3).sum() == 3)


@given(grids())
def test_anatomical_order_agrees_with_simpleitk(grid: Geometry) -> None:
    assume(itk_agrees_on_orientation(grid))
    array = np.arange(np.prod(grid.size)).reshape(grid.size)
    turned = sitk.DICOMOrient(itk_image(array, grid), "LPS")
    orientation = Orientation.of(grid)
    ours = orientation.geometry_xyz(grid)
    np.testing.assert_array_equal(orientation.to_anatomical(array), sitk.GetArrayFromImage(turned).transpose())
    assert ours.size == turned.GetSize()
    np.testing.assert_allclose(ours.spacing_mm, turned.GetSpacing())
    np.testing.assert_allclose(ours.origin_mm, turned.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(ours.direction_matrix.ravel(), turned.GetDirection(), atol=1e-9)


@given(grids())
def test_turning_there_and_back_changes_nothing(grid: Geometry) -> None:
    array = np.arange(np.prod(grid.size)).reshape(grid.size)
    orientation = Orientation.of(grid)
    np.testing.assert_array_equal(orientation.to_file(orientation.to_anatomical(array)), array)
    assert orientation.geometry_in_file(orientation.geometry_xyz(grid)).same_grid(grid, 1e-6)


@given(grids())
def test_a_voxel_keeps_its_place_in_the_patient(grid: Geometry) -> None:
    orientation = Orientation.of(grid)
    array = np.zeros(grid.size)
    array[tuple(n - 1 for n in grid.size)] = 1
    last = np.array(grid.size)[None] - 1
    moved = np.argwhere(orientation.to_anatomical(array))
    np.testing.assert_allclose(grid.positions_mm(last), orientation.geometry_xyz(grid).positions_mm(moved), atol=1e-6)


def test_orientation_codes_are_those_of_the_field() -> None:
    pir = ((0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
    grid = Geometry(size=(2, 3, 4), spacing_mm=(1, 1, 1), directions=pir, origin_mm=(0, 0, 0))
    assert grid.orientation_code == "PIR"


def test_same_grid_forgives_rounding_and_nothing_else() -> None:
    identity = as_rows(np.eye(3))
    grid = Geometry(size=(10, 20, 30), spacing_mm=(1, 1, 1), directions=identity, origin_mm=(0, 0, 0))
    assert grid.same_grid(grid.model_copy(update={"origin_mm": (0.01, 0, 0)}))
    assert not grid.same_grid(grid.model_copy(update={"origin_mm": (0.5, 0, 0)}))
    assert not grid.same_grid(grid.model_copy(update={"spacing_mm": (1, 1, 1.01)}))
    assert not grid.same_grid(grid.model_copy(update={"size": (10, 20, 31)}))
    tilted = as_rows(Rotation.from_euler("x", 1, degrees=True).as_matrix())
    assert not grid.same_grid(grid.model_copy(update={"directions": tilted}))


def test_a_grid_turned_by_45_degrees_has_one_orientation_however_its_directions_are_rounded() -> None:
    half = 0.5**0.5
    turned = np.array([[half, -half, 0], [half, half, 0], [0, 0, 1]])
    orientations = set()
    for entry in ((0, 0), (0, 1), (1, 0), (1, 1)):
        directions = turned.copy()
        directions[entry] = np.nextafter(directions[entry], 2 * directions[entry])
        grid = Geometry(size=(2, 3, 4), spacing_mm=(1, 1, 1), directions=as_rows(directions), origin_mm=(0, 0, 0))
        orientations.add(Orientation.of(grid))
    assert len(orientations) == 1
