"""Files made to break a reader: each gives a correct volume, or one line that says what is wrong. Never more."""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from cspine_data import InputError, Volume, read_volume
from cspine_data.volumes.io import content_digest
from tests.mutants import DATA_FILES, PATIENT, mutants
from tests.test_volumes import VOXELS, header, nifti_header

ROOT = Path(__file__).parents[1]
ARRAY = VOXELS.reshape((4, 5, 6), order="F")


def outcome(path: Path) -> Volume | str:
    """Read a file, and hold what comes of it against the promise."""
    try:
        with warnings.catch_warnings(action="error"):
            volume = read_volume(path)
            assert len(content_digest(path)) == 64
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        told = message.removeprefix(f"{path}: ")
        assert told.isprintable()
        assert len(told) < 300
        assert "; " in told
        assert PATIENT.decode() not in told
        return told
    grid = volume.geometry
    assert volume.array.shape == grid.size
    assert volume.array.dtype.kind in "iuf"
    assert volume.array.dtype.isnative
    assert min(grid.spacing_mm) > 0
    assert np.isfinite([*grid.spacing_mm, *grid.origin_mm, *np.ravel(grid.directions)]).all()
    assert abs(np.linalg.det(grid.direction_matrix)) > 1e-3
    return volume


_watched: list[set[str]] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watched and event in ("open", "os.system", "subprocess.Popen", "socket.connect"):
        _watched[-1].add(str(arguments[0]))


@contextmanager
def opened_files() -> Iterator[set[str]]:
    """Collect the names of files that Python opens; a hook, once set, stays for the life of the process."""
    if not hasattr(sys, "_cspine_watched"):
        sys._cspine_watched = True
        sys.addaudithook(_watch)
    _watched.append(set())
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


NRRD_FIELDS = [
    ({"sizes": "4 5"}, "claims 2 sizes"),
    ({"sizes": "4 5 6 7"}, "claims 4 sizes"),
    ({"sizes": "4 5 6" + " 1" * 900}, "claims 903 sizes"),
    ({"sizes": "4 0 6"}, "claims sizes (4, 0, 6)"),
    ({"sizes": "4 5 6.5"}, "its field 'sizes' cannot be understood"),
    ({"sizes": "4 5 nan"}, "its field 'sizes' cannot be understood"),
    ({"sizes": "4 5 6_0"}, "its field 'sizes' cannot be understood"),
    ({"sizes": "4 5 " + "9" * 5000}, "its field 'sizes' cannot be understood"),
    ({"sizes": f"4 5 {2**64 + 6}"}, "its field 'sizes' cannot be understood"),
    ({"sizes": "4294967296 4294967296 4294967296"}, "too few for the"),
    ({"sizes": "999999999999999999 " * 3}, "too few for the"),
    ({"dimension": "3.0"}, "its field 'dimension' cannot be understood"),
    ({"dimension": "9" * 5000}, "its field 'dimension' cannot be understood"),
    ({"dimension": ""}, "it lacks the field 'dimension'"),
    ({"type": "DOE^JANE"}, "has voxels of an unknown type"),
    ({"encoding": "DOE^JANE"}, "has an unknown encoding"),
    ({"kinds": "DOE^JANE domain domain"}, "has axes of kind unknown, domain, domain"),
    ({"endian": ""}, "byte order"),
    ({"endian": "DOE^JANE"}, "byte order"),
    ({"space_directions": "(1,0,0) (0,1,0) (0,0,inf)"}, "no usable space directions"),
    ({"space_directions": "(1,0,0) (0,1,0) (0,0,1e308)"}, "that no scanner gives"),
    ({"space_directions": "(1e308,1e308,0) (0,1,0) (0,0,1)"}, "that no scanner gives"),
    ({"space_directions": "(1,0,0) (0,1,0) (0,0,1e-30)"}, "that no scanner gives"),
    ({"space_directions": "(0,0,0) (0,1,0) (0,0,1)"}, "that span no volume"),
    ({"space_directions": "(1,0) (0,1) (0,0)"}, "no usable space directions"),
    ({"space_directions": "none (0,1,0) (0,0,1)"}, "no usable space directions"),
    ({"space_directions": "none none none"}, "no usable space directions"),
    ({"space_directions": "DOE^JANE"}, "its field 'space directions' cannot be understood"),
    ({"space_origin": "(nan,0,0)"}, "no usable space directions"),
    ({"space_origin": "(1e30,0,0)"}, "that no scanner gives"),
    ({"space_origin": "(0,0)"}, "no usable space directions"),
    ({"space_origin": "0,0,0"}, "its field 'space origin' cannot be understood"),
    ({"space_directions": "", "spacings": "1 0 1"}, "that span no volume"),
    ({"space_directions": "", "spacings": "1 inf 1"}, "no usable space directions"),
    ({"space_directions": "", "spacings": "1 1e9 1"}, "that no scanner gives"),
    ({"space_directions": "", "spacings": "1 1"}, "no usable space directions"),
    ({"space_directions": "", "spacings": "one one one"}, "its field 'spacings' cannot be understood"),
    ({"byte_skip": "-2"}, "has a byte skip of -2"),
    ({"byte_skip": "1e3"}, "its field 'byte skip' cannot be understood"),
    ({"byte_skip": "60000"}, "holds 0 bytes of voxels"),
    ({"line_skip": "60000"}, "holds 0 bytes of voxels"),
    ({"byteskip": "1", "byte_skip": "2"}, "gives the field 'byte skip' twice"),
    ({"encoding": "text", "byte_skip": "-1"}, "has a byte skip of -1"),
    ({"Sizes": "9 9 9"}, "gives the field 'sizes' twice"),
]


@pytest.mark.parametrize(("fields", "message"), NRRD_FIELDS)
def test_a_nrrd_field_that_cannot_be_meant_is_refused(fields: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.nrrd").write_bytes(header(content=PATIENT.decode(), **fields) + VOXELS.tobytes())
    assert message in str(outcome(tmp_path / "x.nrrd"))


def test_what_looks_like_a_field_and_is_a_key_is_not_taken_for_one(tmp_path: Path) -> None:
    lines = b"\nsizes:=9 9 9\ndata file:=/etc/passwd\n# sizes: 1 1 1\nJane Doe: born long ago\n\xff\xfe: \xff\n"
    (tmp_path / "x.nrrd").write_bytes(header().replace(b"\n", lines, 1) + VOXELS.tobytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nrrd").array, ARRAY)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("short", b"9" * 900 + b" " + b"1 " * 119, "numbers of type int16"),
        ("short", b"9" * 70_000 + b" " + b"1 " * 119, "numbers of type int16"),
        ("uchar", b"300 " + b"1 " * 119, "numbers of type uint8"),
        ("uchar", b"-1 " + b"1 " * 119, "numbers of type uint8"),
        ("short", b"1.5 " + b"1 " * 119, "numbers of type int16"),
        ("short", b"1_0 " + b"1 " * 119, "numbers of type int16"),
        ("short", b"\0" * 500, "numbers of type int16"),
        ("float", PATIENT + b" " + b"1 " * 119, "numbers of type float32"),
        ("short", b"1 " * 120 + b"7", "holds 121 voxels"),
        ("short", b" " * 1000, "holds 0 voxels"),
        ("short", b"1 " * 100, "few for the 239"),
    ],
)
def test_text_that_is_not_the_voxels_is_refused(kind: str, text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.nrrd").write_bytes(header(type=kind, encoding="text", endian="") + text)
    assert message in str(outcome(tmp_path / "x.nrrd"))


def test_text_is_read_whole_where_a_number_lies_across_two_pieces(tmp_path: Path) -> None:
    values = np.arange(60_000, dtype="<i4") * 7919
    text = " ".join(map(str, values)).encode()
    (tmp_path / "x.nrrd").write_bytes(
        header(type="int", sizes="100 60 10", encoding="text", byte_skip="3") + b"12 " + text
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nrrd").array.ravel(order="F"), values)


def hazards(folder: Path) -> Path:
    """Make a folder with everything in it that a data file must not be, and a secret outside."""
    inner = folder / "given"
    (inner / "sub").mkdir(parents=True)
    (folder / "secret.raw").write_bytes(VOXELS.tobytes())
    (inner / "sub" / "x.raw").write_bytes(VOXELS.tobytes())
    (inner / "link.raw").symlink_to(folder / "secret.raw")
    (inner / "loop.raw").symlink_to(inner / "loop.raw")
    (inner / "zero.raw").symlink_to("/dev/zero")
    (inner / "folder.raw").symlink_to(inner / "sub")
    os.mkfifo(inner / "fifo.raw")
    return inner


@pytest.mark.parametrize("name", DATA_FILES, ids=range(len(DATA_FILES)))
def test_a_data_file_is_a_file_beside_its_header_or_none(name: str, tmp_path: Path) -> None:
    path = hazards(tmp_path) / "x.nhdr"
    path.write_bytes(header().replace(b"\n\n", f"\ndata file: {name}\n\n".encode()))
    told = outcome(path)
    assert isinstance(told, str)
    assert "data file" in told or "several files" in told or "no field" in told


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".nii", ".nii.gz"])
def test_what_is_no_file_is_not_opened(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for path in tmp_path.iterdir():
        with opened_files() as opened:
            assert outcome(path) == "is no file; check the path"
            with pytest.raises(InputError, match="is no file"):
                content_digest(path)
        assert not opened


@pytest.mark.parametrize("name", ["LISTED.raw", "50%.raw", "./x.raw", "J\u00f6rg.raw"])
def test_a_data_file_may_have_any_name_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(VOXELS.tobytes())
    (tmp_path / "x.nhdr").write_bytes(header().replace(b"\n\n", f"\ndata file: {name}\n\n".encode()))
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nhdr").array, ARRAY)


NIFTI_FIELDS = [
    ({"sizeof_hdr": 540}, "is NIfTI-2"),
    ({"sizeof_hdr": 0}, "it does not start as one"),
    ({"magic": b"ni1"}, "keeps its voxels in another file"),
    ({"magic": b""}, "NIfTI's magic number"),
    ({"magic": b"n+2"}, "NIfTI's magic number"),
    ({"dim": (0, 4, 5, 6, 1, 1, 1, 1)}, "claims 0 dimensions"),
    ({"dim": (-3, 4, 5, 6, 1, 1, 1, 1)}, "claims -3 dimensions"),
    ({"dim": (32767, 4, 5, 6, 1, 1, 1, 1)}, "claims 32767 dimensions"),
    ({"dim": (2, 20, 6, 1, 1, 1, 1, 1)}, "is 2-D"),
    ({"dim": (4, 4, 5, 6, 2, 1, 1, 1)}, "is 4-D"),
    ({"dim": (5, 4, 5, 6, 1, 3, 1, 1)}, "is 5-D"),
    ({"dim": (3, 4, 0, 6, 1, 1, 1, 1)}, "claims sizes (4, 0, 6)"),
    ({"dim": (3, 4, -5, 6, 1, 1, 1, 1)}, "claims sizes (4, -5, 6)"),
    ({"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1)}, "too few for the"),
    ({"datatype": 0}, "has voxels of NIfTI's type 0"),
    ({"datatype": -1}, "has voxels of NIfTI's type -1"),
    ({"datatype": 128, "bitpix": 24}, "has voxels of NIfTI's type 128"),
    ({"datatype": 32, "bitpix": 64}, "has voxels of NIfTI's type 32"),
    ({"bitpix": 0}, "type 4 in 0 bits"),
    ({"bitpix": -16}, "type 4 in -16 bits"),
    ({"bitpix": 32}, "type 4 in 32 bits"),
    ({"vox_offset": 0}, "start at byte 0"),
    ({"vox_offset": 348}, "start at byte 348"),
    ({"vox_offset": -352}, "start at byte -352"),
    ({"vox_offset": 352.5}, "start at byte 352.5"),
    ({"vox_offset": np.nan}, "start at byte nan"),
    ({"vox_offset": np.inf}, "start at byte inf"),
    ({"vox_offset": 3e38}, "start at byte 3e+38"),
    ({"vox_offset": 353}, "too few for the 593"),
    ({"vox_offset": 1 << 26}, "too few for the"),
    ({"scl_slope": np.inf}, "is scaled by inf"),
    ({"scl_slope": -np.inf}, "is scaled by -inf"),
    ({"scl_slope": 2, "scl_inter": np.nan}, "is scaled by 2 and nan"),
    ({"pixdim": (1, 0, 2, 3, 1, 1, 1, 1)}, "no positive number"),
    ({"pixdim": (1, -1, 2, 3, 1, 1, 1, 1)}, "no positive number"),
    ({"pixdim": (1, np.nan, 2, 3, 1, 1, 1, 1)}, "no positive number"),
    ({"pixdim": (1, np.inf, 2, 3, 1, 1, 1, 1)}, "no positive number"),
    ({"pixdim": (1, 1e30, 2, 3, 1, 1, 1, 1), "sform_code": 0}, "no scanner gives"),
    ({"pixdim": (1, 1, 2, 4, 1, 1, 1, 1)}, "gives two spacings, 1 x 2 x 3 and 1 x 2 x 4 mm"),
    ({"srow": np.full((3, 4), np.nan)}, "not at right angles"),
    ({"srow": np.full((3, 4), 3e38)}, "not at right angles"),
    ({"srow": np.zeros((3, 4))}, "not at right angles"),
    ({"srow": ((1, 0.5, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0))}, "not at right angles"),
    ({"srow": ((1, 0, 0, np.nan), (0, 2, 0, 0), (0, 0, 3, 0))}, "no usable space directions"),
    ({"srow": ((1, 0, 0, 1e30), (0, 2, 0, 0), (0, 0, 3, 0))}, "no scanner gives"),
    ({"sform_code": 0, "qform_code": 1, "quatern": (np.nan, 0, 0)}, "a qform that is no rotation"),
    ({"sform_code": 0, "qform_code": 1, "quatern": (3e38, 3e38, 0)}, "a qform that is no rotation"),
    ({"sform_code": 0, "qform_code": 1, "quatern": (1, 1, 1)}, "a qform that is no rotation"),
    ({"sform_code": 0, "qform_code": 1, "qoffset": (np.inf, 0, 0)}, "no usable space directions"),
]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("fields", "message"), NIFTI_FIELDS)
def test_a_nifti_field_that_cannot_be_meant_is_refused(fields, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    content = nifti_header(descrip=PATIENT, intent_name=PATIENT, **fields).tobytes() + VOXELS.tobytes()
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    if suffix == ".nii.gz" and "too few" in message:
        # What a compressed file holds is known only when it has been read.
        message = "holds "
    assert message in str(outcome(path))


@pytest.mark.parametrize("spot", [*range(76, 108, 4), 108, 112, 116, *range(256, 328, 4), 352])
@pytest.mark.parametrize("code", [0, 1])
def test_a_signalling_nan_is_refused_without_a_warning(spot: int, code: int, tmp_path: Path) -> None:
    # Found by the fuzz: such a NaN in the sform made NumPy warn, on a user's terminal.
    content = bytearray(nifti_header(qform_code=code, sform_code=1 - code, datatype=16, bitpix=32).tobytes())
    content += VOXELS.astype("<f4").tobytes()
    content[spot : spot + 4] = b"\1\0\xa0\x7f"
    (tmp_path / "x.nii").write_bytes(content)
    outcome(tmp_path / "x.nii")


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "text"])
def test_a_nrrd_file_that_holds_more_than_its_sizes_say_is_not_read_shifted(encoding: str, tmp_path: Path) -> None:
    more = bytes(352) + VOXELS.tobytes()
    packed = {
        "raw": more, "gzip": gzip.compress(more), "bzip2": bz2.compress(more), "text": b"1 " * 121,
    }[encoding]  # fmt: skip
    (tmp_path / "x.nrrd").write_bytes(header(encoding=encoding) + packed)
    told = str(outcome(tmp_path / "x.nrrd"))
    assert "more than the 240" in told or "holds 121 voxels" in told


@pytest.mark.parametrize("padding", [0, 1, 1000])
def test_a_compressed_file_that_goes_on_is_still_held_against_its_checksum(padding: int, tmp_path: Path) -> None:
    packed = gzip.compress(nifti_header().tobytes() + VOXELS.tobytes() + bytes(padding))
    (tmp_path / "x.nii.gz").write_bytes(packed)
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii.gz").array, ARRAY)
    (tmp_path / "x.nii.gz").write_bytes(packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:])
    assert "damaged" in str(outcome(tmp_path / "x.nii.gz"))


@pytest.mark.parametrize("size", [0, 8, -1, 2**31 - 1, -(2**31)])
def test_a_nifti_extension_is_passed_over_whatever_length_it_claims(size: int, tmp_path: Path) -> None:
    content = bytearray(nifti_header(vox_offset=400, extension=b"\1").tobytes())
    content += struct.pack("<ii", size, 6) + PATIENT.ljust(40) + VOXELS.tobytes()
    (tmp_path / "x.nii").write_bytes(content)
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii").array, ARRAY)


def test_a_pair_of_header_and_image_never_has_its_image_opened(tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(VOXELS.tobytes())
    (tmp_path / "x.nii").write_bytes(nifti_header(magic=b"ni1", vox_offset=0).tobytes()[:348])
    with opened_files() as opened:
        assert "in another file" in str(outcome(tmp_path / "x.nii"))
    assert opened == {str(tmp_path / "x.nii")}


def whole_files() -> dict[str, bytes]:
    """Valid files of every kind, by name; a data file stands beside its header."""
    raw, text = VOXELS.tobytes(), " ".join(map(str, VOXELS)).encode()
    nifti = nifti_header(descrip=PATIENT).tobytes() + raw
    content = PATIENT.decode()
    return {
        "raw.nrrd": header(content=content) + raw,
        "gzip.nrrd": header(content=content, encoding="gzip") + gzip.compress(raw),
        "bzip2.nrrd": header(content=content, encoding="bzip2") + bz2.compress(raw),
        "text.nrrd": header(content=content, encoding="text") + text,
        "plain.nii": nifti,
        "packed.nii.gz": gzip.compress(nifti),
    }


@pytest.mark.parametrize("name", whole_files())
def test_a_file_cut_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    content, path = whole_files()[name], tmp_path / name
    path.write_bytes(content)
    np.testing.assert_array_equal(read_volume(path).array, ARRAY)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        told = outcome(path)
        # The last number of a text may lose a digit and be one still.
        assert isinstance(told, str) or (name == "text.nrrd" and end >= len(content) - 2), end


def zeros_gz(mebibytes: int) -> bytes:
    """A thousandth of what it becomes."""
    return gzip.compress(bytes(1 << 26)) * (mebibytes // 64)


BIG = 20_000_000
BOMBS: dict[str, Callable[[], bytes]] = {
    "payload.nrrd": lambda: header(encoding="gzip") + zeros_gz(2048),
    "payload-bz2.nrrd": lambda: header(encoding="bzip2") + bz2.compress(bytes(1 << 26)) * 32,
    "from-end.nrrd": lambda: header(encoding="gzip", byte_skip="-1") + zeros_gz(2048),
    "after-lines.nrrd": lambda: header(encoding="gzip", line_skip="2") + b"1\n2\n" + zeros_gz(2048),
    "claimed.nrrd": lambda: header(type="uchar", sizes="2048 1024 1024", encoding="gzip") + zeros_gz(2048),
    "claimed-bz2.nrrd": lambda: (
        header(type="uchar", sizes="2048 1024 1024", encoding="bzip2") + bz2.compress(bytes(1 << 26)) * 32
    ),
    "claims-much-holds-little.nrrd": lambda: header(sizes="500 1000 1000", encoding="gzip") + gzip.compress(b"x"),
    "payload.nii.gz": lambda: gzip.compress(nifti_header().tobytes()) + zeros_gz(2048),
    "offset.nii.gz": lambda: gzip.compress(nifti_header(vox_offset=1 << 26).tobytes()) + zeros_gz(64),
    "claimed.nii.gz": lambda: (
        gzip.compress(nifti_header(dim=(3, 2000, 1000, 500, 1, 1, 1, 1)).tobytes()) + zeros_gz(64)
    ),
    "small.nii.gz": lambda: gzip.compress(nifti_header(dim=(3, 700, 700, 700, 1, 1, 1, 1)).tobytes()),
    "members.nii.gz": lambda: gzip.compress(b"") * 100_000,
    "name.nii.gz": lambda: b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"x" * BIG,
    "zeros.nii.gz": lambda: bytes(BIG),
    "numbers.nrrd": lambda: header(type="uchar", sizes="250 200 100", encoding="text") + b"1 " * 5_000_000,
    "number.nrrd": lambda: header(sizes="100 100 100", encoding="text") + b"9" * BIG,
    "spaces.nrrd": lambda: header(encoding="text") + b" " * BIG,
    "line.nrrd": lambda: header(content="x" * BIG),
    "magic.nrrd": lambda: b"NRRD0004" + b" " * BIG,
    "lines.nrrd": lambda: b"NRRD0004\n" + b"#\n" * (BIG // 2),
    "fields.nrrd": lambda: b"NRRD0004\n" + b"".join(b"f%d: 1\n" % n for n in range(100_000)),
    "vectors.nrrd": lambda: header(space_directions="(1,0,0) " * 100_000) + VOXELS.tobytes(),
    "labels.nrrd": lambda: header(labels='"' * 900_000) + VOXELS.tobytes(),
    "hole.nrrd": lambda: header(sizes="4096 4096 1024"),
    "hole-after.nrrd": lambda: header() + VOXELS.tobytes(),
    "hole-after.nii.gz": lambda: gzip.compress(nifti_header().tobytes() + VOXELS.tobytes()),
    "scaled.nii.gz": lambda: (
        gzip.compress(nifti_header(dim=(3, 5000, 1000, 1, 1, 1, 1, 1), datatype=2, bitpix=8, scl_slope=2).tobytes())
        + gzip.compress(bytes(5_000_000))
    ),
    "skipped-line.nrrd": lambda: header(line_skip="1") + b"x" * BIG,
    "skipped-lines.nrrd": lambda: header(line_skip="65536") + b"\n" * BIG,
}


HOLES = [name for name in BOMBS if name.startswith("hole")]


def peak_mebibytes() -> int:
    """Return the most memory this process held; not by `getrusage`, which hands a child its parent's figure."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) >> 10


def measure(folder: Path) -> None:
    """Read each file of a folder; print how much memory all took at most, and of each the time and what it opened."""
    warm_up(folder)
    before, found = peak_mebibytes(), {}
    for path in sorted(folder.iterdir()):
        start = time.monotonic()
        with opened_files() as opened:
            told = outcome(path)
        found[path.name] = (str(told), sorted(opened), time.monotonic() - start, peak_mebibytes() - before)
    print(json.dumps(found))


def warm_up(folder: Path) -> None:
    """Read a file of each kind, so that what Python imports for it is not taken for what a file takes."""
    for name, content in whole_files().items():
        (folder / name).write_bytes(content)
        with opened_files():
            outcome(folder / name)
        (folder / name).unlink()


def child(call: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Call a function of this module in another process, which a file may kill without killing the tests."""
    code = f"from pathlib import Path; from tests.test_hostile_files import *; {call}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_what_a_header_claims_or_a_bomb_becomes_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    for name, content in BOMBS.items():
        (tmp_path / name).write_bytes(content())
    # A file with a hole is as long as it says, and holds nothing.
    for name in HOLES:
        os.truncate(tmp_path / name, 1 << 40)
    done = child(f"measure(Path({str(tmp_path)!r}))", timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == len(BOMBS)
    for name, (_, opened, seconds, grown) in found.items():
        assert set(opened) <= {str(tmp_path / name)}
        assert seconds < 5, name
        # The most is rightly read: 5 million bytes that are scaled to single precision, a piece at a time.
        assert grown < 60, name
    read = {name for name, (told, *_) in found.items() if told.startswith("Volume")}
    assert read == {"offset.nii.gz", "numbers.nrrd", "labels.nrrd", "scaled.nii.gz"}


# A mutant may rightly claim the 4 MiB that a payload of zeros becomes; a piece of it is decompressed with it.
MOST_MEBIBYTES = 48


def fuzz(folder: Path, seconds: float) -> None:
    """Read mutants of valid files until the time is up; stop at the first that breaks the promise, which stays."""
    inner = hazards(folder)
    warm_up(inner)
    outcomes, end, most = Counter[str](), time.monotonic() + seconds, 0

    @given(files=mutants)
    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def one(files: dict[str, bytes]) -> None:
        # Else a header of this mutant may name a data file of the last one.
        for path in inner.glob("x.*"):
            path.unlink()
        for name, content in files.items():
            (inner / name).write_bytes(content)
        # The peak is begun anew for each file: what is drawn and counted here grows from hour to hour.
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_mebibytes()
        # A reader that hangs is killed by the alarm, and the file found where it is.
        signal.alarm(20)
        with opened_files() as opened:
            told = outcome(inner / list(files)[-1])
        signal.alarm(0)
        assert opened <= {str(inner / name) for name in files}
        nonlocal most
        most = max(most, peak_mebibytes() - before)
        assert most < MOST_MEBIBYTES
        outcomes["read" if isinstance(told, Volume) else re.sub(r"-?[0-9][0-9.e+]*", "N", told).partition(";")[0]] += 1

    while time.monotonic() < end:
        one()
    print(json.dumps({"tried": outcomes.total(), "grown_mebibytes": most, "outcomes": outcomes.most_common()}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.nrrd", b"NRRD0004\ntype: short\ndimension: " + 900 * b"9" + b"\nsizes: 4 5 6\nencoding: raw\n\n"),
        (
            "x.nrrd",
            b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 6\nencoding: raw\nbyteskip: " + 900 * b"9" + b"\n\n",
        ),
        ("x.mha", b"ObjectType = Image\nNDims = " + 900 * b"9" + b"\nDimSize = 4 5 6\nElementDataFile = LOCAL\n"),
    ],
)
def test_a_message_repeats_no_endless_number_of_a_header(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_volume(tmp_path / name)
    assert 900 * "9" not in str(refused.value)


@pytest.mark.timeout(0)
def test_no_mutant_of_a_valid_file_breaks_a_reader(long_run: bool, tmp_path: Path) -> None:
    seconds = float(os.environ.get("CSPINE_FUZZ_SECONDS", "3600")) if long_run else 4.0
    done = child(f"fuzz(Path({str(tmp_path)!r}), {seconds})", timeout=seconds + 300)
    left = {str(path): base64.b64encode(path.read_bytes()) for path in (tmp_path / "given").glob("x.*")}
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}\nThe file, in base64: {left}"
    print(done.stdout)
    assert json.loads(done.stdout)["tried"] > 100
