from __future__ import annotations

import bz2
import gzip
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cspine_data import InputError, Volume, read_volume, write_volume
from cspine_data.volumes.io import content_digest, label_name, volume_stem
from tests.conftest import ball, geometry
from tests.test_geometry import grids

NRRD_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    grid = draw(grids())
    dtype = np.dtype(draw(st.sampled_from(NRRD_TYPES)))
    array = draw(hnp.arrays(dtype, grid.size, elements=hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False)))
    return Volume(array, grid)


@pytest.mark.parametrize("suffix", [".nrrd", ".nii", ".nii.gz", ".mha"])
@given(volume=volumes())
def test_what_is_written_is_read_back(volume: Volume, suffix: str, tmp_path: Path) -> None:
    if "nii" in suffix and np.linalg.det(volume.geometry.direction_matrix) < 0:
        # NIfTI's quaternion cannot hold a left-handed frame, its matrix can; ITK writes both.
        suffix = ".nrrd"
    path = tmp_path / f"volume{suffix}"
    write_volume(path, volume)
    found = read_volume(path)
    assert found.array.dtype == volume.array.dtype
    np.testing.assert_array_equal(found.array, volume.array)
    assert found.geometry.same_grid(volume.geometry, 1e-2)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.unlink()


def header(**fields: str) -> bytes:
    given = {
        "type": "short", "dimension": "3", "sizes": "4 5 6", "encoding": "raw", "endian": "little",
        "space": "left-posterior-superior", "space directions": "(1,0,0) (0,1,0) (0,0,1)", "space origin": "(0,0,0)",
    }  # fmt: skip
    given.update({name.replace("_", " "): value for name, value in fields.items()})
    lines = [f"{name}: {value}" for name, value in given.items() if value]
    return ("NRRD0004\n" + "\n".join(lines) + "\n\n").encode()


VOXELS = np.arange(120, dtype="<i2")


def flipped(content: bytes, spot: int) -> bytes:
    return content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :]


@pytest.mark.parametrize(
    ("fields", "payload"),
    [
        ({}, VOXELS.tobytes()),
        ({"endian": "big"}, VOXELS.astype(">i2").tobytes()),
        ({"encoding": "gzip"}, gzip.compress(VOXELS.tobytes())),
        ({"encoding": "bzip2"}, bz2.compress(VOXELS.tobytes())),
        ({"encoding": "ascii", "endian": ""}, " ".join(map(str, VOXELS)).encode()),
        ({"byte_skip": "-1"}, b"a header of another format" + VOXELS.tobytes()),
        ({"byte_skip": "7"}, b"7 bytes" + VOXELS.tobytes()),
        ({"encoding": "gzip", "byte_skip": "-1"}, gzip.compress(b"another header" + VOXELS.tobytes())),
        ({"encoding": "gzip", "line_skip": "2"}, b"one\ntwo\n" + gzip.compress(VOXELS.tobytes())),
    ],
)
def test_every_encoding_is_read(fields: dict[str, str], payload: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(header(**fields) + payload)
    np.testing.assert_array_equal(read_volume(path).array, VOXELS.reshape((4, 5, 6), order="F"))


@pytest.mark.parametrize(
    ("space", "directions", "code"),
    [
        ("right-anterior-superior", "(1,0,0) (0,1,0) (0,0,1)", "RAS"),
        ("LAS", "(1,0,0) (0,1,0) (0,0,1)", "LAS"),
        ("left-posterior-superior", "(0,0,-2) (0,1,0) (-1,0,0)", "IPR"),
    ],
)
def test_named_spaces_are_turned_to_lps(space: str, directions: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(header(space=space, space_directions=directions) + VOXELS.tobytes())
    volume = read_volume(path)
    assert volume.geometry.orientation_code == code
    assert not volume.assumed_orientation


def test_a_file_that_does_not_say_how_it_lies_is_taken_as_lps_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(header(space="", space_directions="", space_origin="", spacings="1 2 3") + VOXELS.tobytes())
    volume = read_volume(path)
    assert volume.assumed_orientation
    assert volume.geometry.spacing_mm == (1, 2, 3)
    assert volume.geometry.orientation_code == "LPS"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a volume at all", "readable NRRD file"),
        (b"NRRD0009\n\n", "readable NRRD file"),
        (header(dimension="2", sizes="4 5", space_directions="", space="") + VOXELS.tobytes(), "is 2-D"),
        (header(sizes="4 5 -6") + VOXELS.tobytes(), "sizes (4, 5, -6)"),
        (header(kinds="vector domain domain") + VOXELS.tobytes(), "kind vector, domain, domain"),
        (header(type="block") + VOXELS.tobytes(), "voxels of type 'block'"),
        (header(encoding="zrl") + VOXELS.tobytes(), "has the encoding 'zrl'"),
        (header(byte_skip="-5") + VOXELS.tobytes(), "byte skip of -5"),
        (header(byte_skip="9999999999") + VOXELS.tobytes(), "byte skip of 9999999999"),
        (header(line_skip="9999999999") + VOXELS.tobytes(), "line skip of 9999999999"),
        (header(line_skip="-1") + VOXELS.tobytes(), "line skip of -1"),
        (header(encoding="gzip") + gzip.compress(VOXELS.tobytes())[:-4], "cannot be decompressed"),
        (header(encoding="gzip") + flipped(gzip.compress(VOXELS.tobytes(), 0), 30), "the file is damaged"),
        (header(space_directions="(1,0,0) (1,0,0) (0,0,1)") + VOXELS.tobytes(), "that span no volume"),
        (header(space_directions="(nan,0,0) (0,1,0) (0,0,1)") + VOXELS.tobytes(), "no usable space directions"),
        (header() + VOXELS.tobytes()[:-1], "240 its header claims"),
        (header(encoding="gzip") + gzip.compress(VOXELS.tobytes())[:-20], "cannot be decompressed"),
        (header(encoding="gzip") + gzip.compress(VOXELS.tobytes()[:-2]), "238 bytes of voxels"),
        (header(encoding="gzip", byte_skip="-1") + gzip.compress(bytes(200_000)), "65536 bytes before"),
        (header(encoding="ascii") + b"1 2 3 " * 60, "header claims 120"),
        (header(encoding="ascii") + b"a lot of words " * 60, "that are no numbers"),
        (header(sizes="99999 99999 99999", encoding="gzip") + gzip.compress(b"x"), "few for the 1999940000599998"),
        (b"NRRD0004\ncontent: " + b"x" * 2_000_000, "longer than a megabyte"),
    ],
)
def test_bad_nrrd_files_are_named_with_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.nrrd"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../secret.raw", "/etc/hostname", "link.raw", "no-such.raw", "LIST", "slice%03d.raw 1 9 1"]
)
def test_a_detached_header_never_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(VOXELS.tobytes())
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    (folder / "x.nhdr").write_bytes(header(data_file=name))
    with pytest.raises(InputError, match="outside its own folder|missing|several files"):
        read_volume(folder / "x.nhdr")


def test_a_detached_header_reads_the_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(VOXELS.tobytes())
    (tmp_path / "x.nhdr").write_bytes(header(data_file="x.raw"))
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nhdr").array, VOXELS.reshape((4, 5, 6), order="F"))
    before = content_digest(tmp_path / "x.nhdr")
    (tmp_path / "x.raw").write_bytes(VOXELS[::-1].tobytes())
    assert content_digest(tmp_path / "x.nhdr") != before


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".nii", lambda b: b[:-100], "too few for the"),
        (".nii", lambda b: b"", "is empty"),
        (".nii", lambda b: b"junk" * 200, "readable NIfTI file"),
        (".nii.gz", lambda b: b[: len(b) // 2], "cannot be decompressed"),
        (
            ".nii.gz",
            lambda b: gzip.compress(gzip.decompress(b)[:1000]),
            "header claims 15360",
        ),
    ],
)
def test_bad_nifti_files_are_named_with_what_is_wrong(suffix, damage, message, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_volume(path, ball()[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


def test_nifti_that_is_not_3d_is_refused(tmp_path: Path) -> None:
    import SimpleITK as sitk

    for array, message in ((np.zeros((3, 4, 5, 6), np.int16), "is 4-D"), (np.zeros((5, 6), np.int16), "is 2-D")):
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "x.nii"))
        with pytest.raises(InputError, match=message):
            read_volume(tmp_path / "x.nii")


def test_a_header_that_claims_terabytes_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    write_volume(path, ball()[0])
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="54000000000352 its header"):
        read_volume(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file"):
        read_volume(tmp_path / "x.nrrd")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(InputError, match="volume by its name"):
        read_volume(tmp_path / "x.txt")
    with pytest.raises(InputError, match=r"end it with \.nrrd, \.nii, \.nii\.gz, \.mha or \.seg\.nrrd"):
        write_volume(tmp_path / "x.mhd", ball()[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_volume(tmp_path / "file" / "x.nrrd", ball()[0])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.nrrd"
    write_volume(path, ball()[0])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cspine_data.volumes.formats.nrrd.write", full)
    with pytest.raises(OSError, match="No space"):
        write_volume(path, ball(seed=1)[0])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.nrrd"]


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".nii.gz"])
def test_a_written_file_has_the_modes_of_any_new_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask belongs to the whole process: while one thread changes it, others create files with the wrong mode."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patches:
            patches.setattr(os, "umask", lambda mask: pytest.fail(f"the umask of all threads is set to {mask:o}"))
            write_volume(tmp_path / f"x{suffix}", ball()[1])
        assert (tmp_path / f"x{suffix}").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_written_files_hold_geometry_and_voxels_only(tmp_path: Path) -> None:
    write_volume(tmp_path / "x.nrrd", ball()[0])
    head = (tmp_path / "x.nrrd").read_bytes().split(b"\n\n")[0].decode()
    # No comment either: pynrrd's holds the date, by which equal volumes would differ.
    fields = {line.split(":")[0] for line in head.splitlines()[1:]}
    assert fields == {
        "type", "dimension", "space", "sizes", "space directions", "kinds", "endian", "encoding", "space origin"
    }  # fmt: skip


def test_names() -> None:
    assert volume_stem(Path("a/VB2_02.nii.gz")) == "VB2_02"
    assert volume_stem(Path("x.seg.nrrd")) == "x"
    assert label_name(Path("a/b.nii.gz")) == "b-label.nii.gz"
    assert label_name(Path("a/b.nhdr")) == "b-label.nrrd"
    assert label_name(Path("a/b.mha")) == "b-label.mha"
    assert label_name(Path("a/b.mhd")) == "b-label.nrrd"
    assert geometry((1, 1, 1)).orientation_code == "LPS"


def nifti_header(**fields: object) -> np.ndarray:
    """A NIfTI-1 header of 4 x 5 x 6 voxels; its layout is written here again, apart from the reader's."""
    layout = {
        "sizeof_hdr": (0, "<i4"), "dim": (40, "(8,)<i2"), "datatype": (70, "<i2"), "bitpix": (72, "<i2"),
        "pixdim": (76, "(8,)<f4"), "vox_offset": (108, "<f4"), "scl_slope": (112, "<f4"), "scl_inter": (116, "<f4"),
        "xyzt_units": (123, "u1"), "descrip": (148, "S80"), "qform_code": (252, "<i2"), "sform_code": (254, "<i2"),
        "quatern": (256, "(3,)<f4"), "qoffset": (268, "(3,)<f4"), "srow": (280, "(3,4)<f4"),
        "intent_name": (328, "S16"), "magic": (344, "S4"), "extension": (348, "S4"),
    }  # fmt: skip
    names, (offsets, formats) = list(layout), zip(*layout.values(), strict=True)
    header = np.zeros((), {"names": names, "offsets": offsets, "formats": formats, "itemsize": 352})
    given = {
        "sizeof_hdr": 348, "dim": (3, 4, 5, 6, 1, 1, 1, 1), "datatype": 4, "bitpix": 16, "magic": b"n+1",
        "pixdim": (1, 1, 2, 3, 1, 1, 1, 1), "vox_offset": 352, "xyzt_units": 2,
        "sform_code": 1, "srow": np.eye(3, 4) * ((1,), (2,), (3,)),
    }  # fmt: skip
    for name, value in (given | fields).items():
        header[name] = value
    return header


@given(
    grid=grids(),
    codes=st.tuples(st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 1, 2, 4])),
    quaternion=st.tuples(*[st.integers(-57, 57).map(lambda n: n / 100)] * 3),
    turned=st.booleans(),
    units=st.sampled_from([0, 1, 2, 3, 10]),
)
def test_a_nifti_header_means_what_itk_makes_of_it(grid, codes, quaternion, turned, units, tmp_path: Path) -> None:
    import SimpleITK as sitk

    path = tmp_path / "x.nii"
    unit = {1: 1e3, 3: 1e-3}.get(units, 1)
    spacing, origin = np.array(grid.spacing_mm) / unit, np.array(grid.origin_mm) / unit
    fields = {
        "qform_code": codes[0], "sform_code": codes[1], "quatern": quaternion, "qoffset": origin,
        # Rounded: of subnormal numbers ITK makes NaN, and takes the sform where it would take the qform.
        "srow": np.round(np.column_stack([grid.direction_matrix * spacing, origin]), 9),
        "pixdim": (-1 if turned else 1, *spacing, 0, 0, 0, 0), "xyzt_units": units,
    }  # fmt: skip
    path.write_bytes(nifti_header(**fields).tobytes() + VOXELS.tobytes())
    image, volume = sitk.ReadImage(str(path)), read_volume(path)
    np.testing.assert_array_equal(volume.geometry.spacing_mm, image.GetSpacing())
    np.testing.assert_allclose(volume.geometry.origin_mm, image.GetOrigin(), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(np.ravel(volume.geometry.directions), image.GetDirection(), atol=2e-4)
    np.testing.assert_array_equal(volume.array.transpose(), sitk.GetArrayFromImage(image))
    assert volume.assumed_orientation == (codes == (0, 0))


@pytest.mark.parametrize("code", [2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("scaling", [(0, 0), (1, 0), (2.5, -3), (np.nan, 0), (1, 7)])
def test_nifti_voxels_are_those_that_itk_reads(code, swapped, scaling, tmp_path: Path) -> None:
    import SimpleITK as sitk

    kinds = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
    kind = np.dtype(kinds[code])
    voxels = np.random.default_rng(code).integers(0, 256, 120 * kind.itemsize, dtype=np.uint8).view(kind)
    if kind.kind == "f":
        voxels = np.random.default_rng(code).normal(0, 1e3, 120).astype(kind)
    fields = nifti_header(datatype=code, bitpix=kind.itemsize * 8, scl_slope=scaling[0], scl_inter=scaling[1])
    if swapped:
        fields, voxels = fields.astype(fields.dtype.newbyteorder("S")), voxels.astype(kind.newbyteorder("S"))
    (tmp_path / "x.nii").write_bytes(fields.tobytes() + voxels.tobytes())
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.nii"))).transpose()
    found = read_volume(tmp_path / "x.nii").array
    assert found.dtype == expected.dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, expected)


def test_segments_are_named_and_coloured_as_slicer_reads_them(tmp_path: Path) -> None:
    """Read by slicerio; and by ourselves, as the label map that it was."""
    import slicerio

    _, label = ball()
    path = tmp_path / "ball.seg.nrrd"
    write_volume(path, label, {1: "C1 \natlas:=x", 4: "not there"})
    segmentation = slicerio.read_segmentation(str(path))
    told = {segment["labelValue"]: segment["name"] for segment in segmentation["segments"]}
    assert told == {1: "C1 atlas:=x", 3: "label 3", 4: "not there"}
    assert len({tuple(segment["color"]) for segment in segmentation["segments"]}) == 3
    np.testing.assert_array_equal(segmentation["voxels"], label.array)
    core, _ = slicerio.extract_segments(segmentation, [("C1 atlas:=x", 7)])["voxels"], None
    np.testing.assert_array_equal(core == 7, label.array == 1)
    again = read_volume(path)
    np.testing.assert_array_equal(again.array, label.array)
    assert again.geometry.same_grid(label.geometry, 1e-6)


def test_as_many_segments_as_a_spine_has_and_names_of_any_language(tmp_path: Path) -> None:
    import slicerio

    image, _ = ball()
    array = (np.arange(image.array.size) % 25).reshape(image.array.shape).astype(np.uint8)
    names = {value: f"Wirbelk\u00f6rper {value}" for value in range(1, 25)} | {24: "\u690e\u9aa8"}
    write_volume(tmp_path / "x.seg.nrrd", Volume(array, image.geometry), names)
    segments = slicerio.read_segmentation(str(tmp_path / "x.seg.nrrd"))["segments"]
    told = {segment["labelValue"]: segment["name"] for segment in segments}
    assert told == {value: f"Wirbelkorper {value}" for value in range(1, 24)} | {24: "label 24"}
    np.testing.assert_array_equal(read_volume(tmp_path / "x.seg.nrrd").array, array)


def test_segments_are_made_of_label_maps_alone(tmp_path: Path) -> None:
    image, _ = ball()
    with pytest.raises(InputError, match="would have segments, but"):
        write_volume(tmp_path / "x.seg.nrrd", Volume(image.array.astype(np.float32), image.geometry))
    assert not list(tmp_path.iterdir())


# Where a volume lies, in every format


def leaning(degrees: float) -> np.ndarray:
    """Axes in columns, the second a little off its right angle with the first."""
    axes = np.eye(3)
    axes[:, 1] = np.sin(np.radians(degrees)), np.cos(np.radians(degrees)), 0
    return axes


def write_nrrd_of(path: Path, axes: np.ndarray) -> None:
    vectors = " ".join("(" + ",".join(f"{number:.9f}" for number in axes[:, a]) + ")" for a in range(3))
    path.write_bytes(header(space_directions=vectors) + VOXELS.tobytes())


def write_nifti_of(path: Path, axes: np.ndarray) -> None:
    path.write_bytes(
        nifti_header(pixdim=(1,) * 8, srow=np.column_stack([axes, np.zeros(3)])).tobytes() + VOXELS.tobytes()
    )


@pytest.mark.parametrize(("write", "suffix"), [(write_nrrd_of, ".nrrd"), (write_nifti_of, ".nii")])
def test_axes_off_their_right_angles_are_refused_in_every_format(write, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    for degrees in (10, 0.1):
        write(path, leaning(degrees))
        with pytest.raises(InputError, match="at right angles.*"):
            read_volume(path)
    write(path, leaning(0.03))
    assert read_volume(path).geometry.spacing_mm == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("suffix", [".nrrd", ".nii", ".nii.gz"])
def test_what_would_be_refused_when_read_is_not_written(suffix: str, tmp_path: Path) -> None:
    grid = geometry((4, 5, 6), directions=tuple(map(tuple, leaning(10))))
    path = tmp_path / f"x{suffix}"
    with pytest.raises(InputError, match="not at right angles"):
        write_volume(path, Volume(VOXELS.reshape(4, 5, 6), grid))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nrrd", ".nii", ".nii.gz"])
@given(grid=grids(), degrees=st.floats(-0.03, 0.03))
def test_every_grid_that_is_read_is_written_as_it_lies(grid, degrees: float, suffix: str, tmp_path: Path) -> None:
    directions = grid.direction_matrix @ leaning(degrees)
    grid = grid.model_copy(update={"directions": tuple(map(tuple, directions.tolist()))})
    path = tmp_path / f"volume{suffix}"
    write_volume(path, Volume(np.zeros(grid.size, np.uint8), grid))
    assert read_volume(path).geometry.same_grid(grid, 1e-3)


def test_what_a_header_cannot_keep_is_not_written(tmp_path: Path) -> None:
    # Single precision is a millimetre there.
    far = geometry((4, 5, 6), origin=(9_000_000.3, 0, 0))
    with pytest.raises(InputError, match="cannot represent the position.*"):
        write_volume(tmp_path / "x.nii", Volume(VOXELS.reshape(4, 5, 6), far))
    assert not list(tmp_path.iterdir())
    write_volume(tmp_path / "x.nrrd", Volume(VOXELS.reshape(4, 5, 6), far))
    with pytest.raises(InputError, match="hold voxels of bool"):
        write_volume(tmp_path / "x.nii", Volume(np.zeros((4, 5, 6), bool), geometry((4, 5, 6))))


@given(grid=grids(), kind=st.sampled_from(NRRD_TYPES))
def test_itk_reads_the_nifti_that_is_written(grid, kind: str, tmp_path: Path) -> None:
    import SimpleITK as sitk

    array = (np.arange(np.prod(grid.size)) % 120).reshape(grid.size).astype(kind)
    write_volume(tmp_path / "x.nii.gz", Volume(array, grid))
    image = sitk.ReadImage(str(tmp_path / "x.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array.transpose())
    np.testing.assert_allclose(image.GetSpacing(), grid.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), grid.origin_mm, atol=1e-4)
    np.testing.assert_allclose(image.GetDirection(), np.ravel(grid.directions), atol=1e-5)


@pytest.mark.parametrize("unit", [1, 3])
def test_units_that_a_nifti_header_gives_are_taken_or_named(unit: int, tmp_path: Path) -> None:
    in_mm = {1: 1e3, 3: 1e-3}[unit]
    path = tmp_path / "x.nii"
    forms = {"pixdim": (1, 1 / in_mm, 2 / in_mm, 3 / in_mm, 1, 1, 1, 1), "xyzt_units": unit}
    srow = np.eye(3, 4) * ((1,), (2,), (3,)) / in_mm
    path.write_bytes(nifti_header(**forms, srow=srow).tobytes() + VOXELS.tobytes())
    assert read_volume(path).geometry.spacing_mm == pytest.approx((1, 2, 3))
    # Millimetres that are called something else.
    path.write_bytes(nifti_header(xyzt_units=unit).tobytes() + VOXELS.tobytes())
    with pytest.raises(
        InputError, match=rf"that no scanner gives.*xyzt_units says {'micro' if unit == 3 else ''}metres"
    ):
        read_volume(path)


@pytest.mark.parametrize(("unit", "in_mm"), [("mm", 1), ("cm", 10), ("m", 1e3), ("um", 1e-3), ("\u00b5m", 1e-3)])
def test_units_that_a_nrrd_header_gives_are_taken(unit: str, in_mm: float, tmp_path: Path) -> None:
    path, units = tmp_path / "x.nrrd", " ".join(f'"{unit}"' for _ in range(3))
    vectors = " ".join(
        f"({a / in_mm!r},{b / in_mm!r},{c / in_mm!r})" for a, b, c in ((0.5, 0, 0), (0, 2, 0), (0, 0, 3))
    )
    fields = {"space_directions": vectors, "space_units": units, "space_origin": f"({7 / in_mm!r},0,0)"}
    path.write_bytes(header(**fields) + VOXELS.tobytes())
    grid = read_volume(path).geometry
    assert grid.spacing_mm == pytest.approx((0.5, 2, 3))
    assert grid.origin_mm == pytest.approx((7, 0, 0))
    spacings = " ".join(repr(mm / in_mm) for mm in (0.5, 2, 3))
    fields = {"space_directions": "", "space_origin": "", "spacings": spacings, "units": units}
    path.write_bytes(header(**fields) + VOXELS.tobytes())
    assert read_volume(path).geometry.spacing_mm == pytest.approx((0.5, 2, 3))


def test_units_of_a_nrrd_header_that_cannot_be_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(header(space_units='"um" "um" "um"') + VOXELS.tobytes())
    with pytest.raises(InputError, match=r"0\.001 x .*\(space units\)"):
        read_volume(path)
    path.write_bytes(header(space_units='"furlong" "furlong" "furlong"') + VOXELS.tobytes())
    volume = read_volume(path)
    assert volume.geometry.spacing_mm == (1, 1, 1)
    assert "taken for millimetres" in volume.notes[0]
    assert "furlong" not in volume.notes[0]


@pytest.mark.parametrize("mm", [0.019, 101.0])
def test_a_spacing_that_no_scanner_gives_is_refused(mm: float, tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    path.write_bytes(header(space_directions=f"(1,0,0) (0,1,0) (0,0,{mm})") + VOXELS.tobytes())
    with pytest.raises(InputError, match="that no scanner gives"):
        read_volume(path)


def two_places(path: Path, codes: tuple[int, int] = (1, 2), **fields: object) -> Path:
    """Write a volume of 4 x 5 x 6 voxels whose sform lies 5 mm from its qform."""
    given = {
        "qform_code": codes[0], "sform_code": codes[1], "qoffset": (10, 20, 30),
        "srow": np.column_stack([np.diag((1.0, 2.0, 3.0)), (13, 24, 30)]),
    } | fields  # fmt: skip
    content = nifti_header(**given).tobytes() + VOXELS.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def forms_of(path: Path) -> dict[str, list[object]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = np.frombuffer(content[:352], nifti_header().dtype)[0]
    names = ("qform_code", "sform_code", "quatern", "qoffset", "srow")
    return {name: found[name].tolist() for name in names} | {"qfac": [found["pixdim"][0] < 0]}


@pytest.mark.parametrize("codes", [(1, 2), (1, 1), (2, 4), (0, 2), (3, 0), (0, 0), (1, 0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_both_forms_and_their_codes_are_kept(codes: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    source = two_places(tmp_path / f"x{suffix}", codes, quatern=(0, 0, 0.5) if codes[1] == 0 else (0, 0, 0))
    volume = read_volume(source)
    write_volume(tmp_path / f"again{suffix}", Volume(volume.array, volume.geometry))
    assert forms_of(tmp_path / f"again{suffix}") == forms_of(source)
    assert read_volume(tmp_path / f"again{suffix}").geometry == volume.geometry
    apart = min(codes) > 0
    assert len(volume.notes) == apart
    if apart:
        assert "5.0 mm" in volume.notes[0]
        assert f"sform (code {codes[1]})" in volume.notes[0] or f"qform (code {codes[0]})" in volume.notes[0]


def test_forms_of_another_volume_are_not_kept(tmp_path: Path) -> None:
    volume = read_volume(two_places(tmp_path / "x.nii"))
    half = volume.geometry.model_copy(update={"size": (2, 5, 6), "origin_mm": (5.0, 6.0, 7.0)})
    write_volume(tmp_path / "half.nii", Volume(volume.array[:2], half))
    found = read_volume(tmp_path / "half.nii")
    assert found.geometry.same_grid(half)
    assert found.notes == ()
    assert forms_of(tmp_path / "half.nii")["sform_code"] == 1


def test_forms_that_agree_are_no_reason_for_a_note(tmp_path: Path) -> None:
    path = two_places(tmp_path / "x.nii", (1, 1), qoffset=(13, 24, 30.2))
    volume = read_volume(path)
    assert volume.notes == ()
    assert volume.geometry.nifti is None


def test_an_sform_with_shear_beside_a_qform_is_kept_and_told(tmp_path: Path) -> None:
    srow = np.column_stack([leaning(10) * (1.0, 2.0, 3.0), (10, 20, 30)])
    path = two_places(tmp_path / "x.nii", (1, 4), srow=srow)
    volume = read_volume(path)
    assert volume.geometry.orientation_code == "RAS"
    assert "sform (code 4)" in volume.notes[0]
    write_volume(tmp_path / "again.nii", volume)
    assert forms_of(tmp_path / "again.nii") == forms_of(path)


def test_forms_that_are_mirror_images_or_of_other_voxels_are_told(tmp_path: Path) -> None:
    mirrored = np.column_stack([np.diag((-1.0, 2.0, 3.0)), (13, 24, 30)])
    (note,) = read_volume(two_places(tmp_path / "x.nii", (1, 2), srow=mirrored)).notes
    assert "right may be exchanged" in note
    larger = np.column_stack([np.diag((2.0, 4.0, 6.0)), (10, 20, 30)])
    (note,) = read_volume(two_places(tmp_path / "x.nii", (1, 2), srow=larger)).notes
    assert "1 x 2 x 3 and 2 x 4 x 6 mm" in note


def test_a_file_whose_name_does_not_say_how_it_is_compressed_is_to_be_renamed(tmp_path: Path) -> None:
    content = nifti_header().tobytes() + VOXELS.tobytes()
    (tmp_path / "plain.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match="is not compressed"):
        read_volume(tmp_path / "plain.nii.gz")
    (tmp_path / "packed.nii").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="is compressed"):
        read_volume(tmp_path / "packed.nii")
    (tmp_path / "page.nii.gz").write_bytes(b"<html>")
    with pytest.raises(InputError, match="not a gzip file"):
        read_volume(tmp_path / "page.nii.gz")


def test_a_form_whose_axes_lie_in_a_plane_is_no_place(tmp_path: Path) -> None:
    srow = np.array([[2.0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 2, 0]])
    volume = read_volume(two_places(tmp_path / "x.nii", (1, 2), srow=srow))
    assert len(volume.geometry.places()) == 2


def test_an_unused_form_of_numbers_that_are_none_is_told(tmp_path: Path) -> None:
    volume = read_volume(two_places(tmp_path / "x.nii", (1, 2), srow=np.full((3, 4), np.nan)))
    assert "sform (code 2) holds" in volume.notes[0]
    write_volume(tmp_path / "again.nii", volume)
    assert read_volume(tmp_path / "again.nii").geometry.same_grid(volume.geometry)


@pytest.mark.parametrize("by", ["qform", "sform"])
@pytest.mark.parametrize("suffix", ["-label.nii", ".seg.nrrd"])
def test_a_label_map_may_lie_where_either_form_says(by: str, suffix: str, tmp_path: Path) -> None:
    from cspine_data.sources.cases import Case, load_case

    path = two_places(tmp_path / "x.nii")
    place = {"qform": (-10.0, -20.0, 30.0), "sform": (-13.0, -24.0, 30.0)}[by]
    grid = geometry((4, 5, 6), (1, 2, 3), ((-1, 0, 0), (0, -1, 0), (0, 0, 1)), place)
    array = (VOXELS % 5 == 1).reshape(4, 5, 6).astype(np.uint8)
    if suffix == ".seg.nrrd":
        # Cropped, as Slicer does.
        array[0] = array[-1] = 0
        inner = grid.model_copy(update={"size": (2, 5, 6), "origin_mm": (place[0] - 1, *place[1:])})
        write_volume(tmp_path / f"x{suffix}", Volume(array[1:-1], inner))
    else:
        write_volume(tmp_path / f"x{suffix}", Volume(array, grid))
    loaded = load_case(Case("x", path, tmp_path / f"x{suffix}"))
    np.testing.assert_array_equal(loaded.label.array, array)
    assert loaded.label.geometry == loaded.image.geometry
    told = [note for note in loaded.notes if note.startswith("label map:")]
    assert len(told) == (by == "sform" and suffix == "-label.nii")


def test_a_store_keeps_both_forms(tmp_path: Path, run_data) -> None:
    from cspine_data import open_cohort

    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    raw.mkdir()
    source = two_places(raw / "A.nii.gz")
    write_volume(raw / "A-label.nii.gz", Volume((VOXELS % 2).reshape(4, 5, 6), read_volume(source).geometry))
    done = run_data("prepare", raw, "--store", store, "--no-n4")
    assert done.stderr.count("5.0 mm") == 1
    assert run_data("scan", raw).stderr.count("5.0 mm") == 1
    assert open_cohort(store).record("A").geometry == read_volume(source).geometry
    for option in ([], ["--label"]):
        run_data("export", store, "A", *option, "-o", tmp_path / "out.nii")
        assert forms_of(tmp_path / "out.nii") == forms_of(source)
        (tmp_path / "out.nii").unlink()
