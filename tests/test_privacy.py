"""What stands in a header's free fields stays in the source: no store, no export, no line on a terminal has it."""

from __future__ import annotations

import getpass
import gzip
import io
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cspine_data import Volume, open_cohort, read_volume, write_volume
from tests.conftest import ball, write_case
from tests.test_volumes import VOXELS, header

NAME = re.compile(rb"jane.?doe|1961.?03.?04|mrn.?4711", re.IGNORECASE)
USER = "userjanedoe"
#: Every name that was put into a file.
given_names: list[str] = []


def named(longest: int = 200) -> str:
    """Return a patient's name that no other field has, and what else stands there of her."""
    given_names.append(f"JaneDoe{len(given_names):02d}")
    return f"{given_names[-1]} 1961-03-04 mrn-4711"[:longest]


def unpacked(path: Path) -> Iterator[bytes]:
    """Give a file's bytes, and what they hold where they are compressed."""
    content = path.read_bytes()
    yield content
    parts = [content] if path.name.endswith(".gz") else content.split(b"\n\n", 1)[1:]
    yield from (gzip.decompress(part) for part in parts if part.startswith(b"\x1f\x8b"))
    metadata = json.loads(content) if path.name == "zarr.json" else {}
    if metadata.get("node_type") == "array":
        yield zarr.open_array(str(path.parent), mode="r")[...].tobytes()


def leaks(folder: Path) -> dict[str, list[bytes]]:
    """Return every file below a folder that has a name in it, or in its own."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = {
        str(file): [name for part in (bytes(file.relative_to(folder)), *unpacked(file)) for name in NAME.findall(part)]
        for file in files
    }
    assert files
    return {file: names for file, names in found.items() if names}


def named_gzip(content: bytes) -> bytes:
    """Compress as the `gzip` program does: with the name of the file that it was."""
    packed = io.BytesIO()
    with gzip.GzipFile(filename=named(), mode="wb", fileobj=packed, mtime=-277000000 % 2**32) as file:
        file.write(content)
    return packed.getvalue()


def named_header(**fields: str) -> bytes:
    """Return a NRRD header with a name wherever the format lets one stand."""
    lines = header(**fields).decode().rstrip("\n").split("\n")
    lines[1:1] = [f"# {named()}", f"#{named()}"]
    three = " ".join(f'"{named()}"' for _ in range(3))
    lines += [f"{field}: {named()}" for field in ("content", "sample units", "number", "unheard of")]
    lines += [f"{field}: {three}" for field in ("labels", "units", "space units")]
    lines += [f"centerings: cell cell {named()}", "old min: 0", "oldmax: 9", "thicknesses: 1 NaN 1"]
    lines += ["measurement frame: (1,0,0) (0,1,0) (0,0,1)"]
    lines += [f"{named()}:=1", f"PatientName:={named()}", f"Segment0_Name:={named()}", f"{named()}: {named()}"]
    return ("\n".join(lines) + "\n\n").encode()


def extensions() -> bytes:
    """Return NIfTI extensions of the kinds DICOM, AFNI and comment, and one of no known kind."""
    parts = []
    for code in (2, 4, 6, 999):
        text = named().encode()
        size = -(-(len(text) + 8) // 16) * 16
        parts.append(struct.pack("<ii", size, code) + text.ljust(size - 8, b"\0"))
    return b"\1\0\0\0" + b"".join(parts)


def nifti1(folder: Path, volume: Volume) -> bytes:
    write_volume(folder / "plain.nii", volume)
    content = bytearray((folder / "plain.nii").read_bytes())
    (folder / "plain.nii").unlink()
    # data_type, db_name, descrip, aux_file, intent_name
    for place, longest in ((4, 10), (14, 18), (148, 80), (228, 24), (328, 16)):
        struct.pack_into(f"{longest}s", content, place, named(longest).encode())
    more = extensions()
    struct.pack_into("<f", content, 108, 348 + len(more))
    return bytes(content[:348]) + more + bytes(content[352:]) + named().encode()


def nifti2(volume: Volume) -> bytes:
    more = extensions()
    steps = volume.geometry.direction_matrix * np.array(volume.geometry.spacing_mm)
    rows = np.column_stack([steps, volume.geometry.origin_mm]) * np.array([[-1], [-1], [1]])
    content = struct.pack("<i8shh8q", 540, b"n+2\0\r\n\x1a\n", 4, 16, 3, *volume.array.shape, 1, 1, 1, 1)
    content += struct.pack("<3d8dq", 0, 0, 0, 1, *volume.geometry.spacing_mm, 0, 0, 0, 0, 540 + len(more))
    content += struct.pack("<6d2q80s24s", 1, 0, 0, 0, 0, 0, 0, 0, named(80).encode(), named(24).encode())
    content += struct.pack("<2i6d12d", 0, 1, *[0] * 6, *rows.ravel())
    content += struct.pack("<3i16sc15s", 0, 2, 0, named(16).encode(), b"\0", named(15).encode())
    assert len(content) == 540
    return content + more + volume.array.tobytes("F") + named().encode()


def fields_of(volume: Volume, **more: str) -> dict[str, str]:
    geometry = volume.geometry
    mm = geometry.spacing_mm
    return {
        "type": volume.array.dtype.name, "sizes": " ".join(map(str, geometry.size)),
        "space_directions": f"({mm[0]},0,0) (0,{mm[1]},0) (0,0,{mm[2]})",
        "space_origin": f"({','.join(map(str, geometry.origin_mm))})", **more,
    }  # fmt: skip


def write_sources(folder: Path) -> None:
    """Write four cases with their label maps, of every format, all full of names."""
    pairs = [ball(seed=seed) for seed in range(4)]
    payloads = [[part.array.tobytes("F") for part in pair] for pair in pairs]
    for part, ending in enumerate(("", "-label")):
        one, two, three, four = (pair[part] for pair in pairs)
        packed = named_gzip(payloads[0][part])
        (folder / f"one{ending}.nrrd").write_bytes(named_header(**fields_of(one, encoding="gzip")) + packed)
        before, data_file = f"{named()}\n".encode(), f"{named()}.raw"
        of_data = {"data_file": data_file, "byte_skip": str(len(before))}
        (folder / f"two{ending}.nhdr").write_bytes(named_header(**fields_of(two, **of_data)))
        (folder / data_file).write_bytes(before + payloads[1][part])
        (folder / f"three{ending}.nii.gz").write_bytes(named_gzip(nifti1(folder, three)))
        (folder / f"four{ending}.nii").write_bytes(nifti1(folder, four))


def said(*arguments: str | Path, code: int = 0) -> str:
    """Run the command in a process of its own, so that what libraries and workers print is heard too."""
    command = [sys.executable, "-W", "always", "-m", "cspine_data", *map(str, arguments)]
    environment = {**os.environ, "USER": USER, "LOGNAME": USER, "HOME": f"/home/{USER}"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert not NAME.findall(done.stdout + done.stderr), done.stdout + done.stderr
    assert done.returncode == code, done.stderr
    return (done.stdout + done.stderr).decode()


@dataclass(frozen=True)
class Prepared:
    raw: Path
    store: Path
    names: tuple[str, ...]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("named")
    raw, store = folder / "raw", folder / "s.zarr"
    raw.mkdir()
    given_names.clear()
    write_sources(raw)
    assert "4 done" in said("prepare", raw, "--store", store, "--no-n4")
    quick = ("--n4-resolution", "12", "--n4-iterations", "5,5", "--axes", "1")
    assert "4 done" in said("prepare", raw, "--store", store, *quick)
    return Prepared(raw, store, tuple(given_names))


def test_the_names_are_in_the_sources(prepared: Prepared) -> None:
    """Or else the other tests would prove nothing."""
    files = list(prepared.raw.iterdir())
    content = b"".join(part for file in files for part in (bytes(file), *unpacked(file)))
    assert len(prepared.names) > 100
    assert [name for name in prepared.names if name.encode() not in content] == []
    assert set(leaks(prepared.raw)) == {str(file) for file in files}


def test_no_name_reaches_the_store(prepared: Prepared) -> None:
    assert open_cohort(prepared.store).cases == ("four", "one", "three", "two")
    assert leaks(prepared.store) == {}


def test_no_name_reaches_the_terminal(prepared: Prepared) -> None:
    assert "4 cases can" in said("scan", prepared.raw)
    assert "4 cases, variants n4" in said("info", prepared.store)
    assert "sound" in said("verify", prepared.store)
    assert "nothing to do" in said("prepare", prepared.raw, "--store", prepared.store, "--no-n4")


def test_no_name_reaches_an_export(prepared: Prepared, tmp_path: Path, run_data, capfd) -> None:
    kinds = itertools.product(
        ("one", "two", "three", "four"), (("raw",), ("n4",), ("raw", "--label")), (".nrrd", ".nii.gz")
    )
    for number, (case, (variant, *label), ending) in enumerate(kinds):
        done = run_data(
            "export", prepared.store, case, "--variant", variant, *label, "-o", tmp_path / f"{number}{ending}"
        )
        assert done.exit_code == 0
        assert not NAME.findall(done.output.encode())
    assert len(list(tmp_path.iterdir())) == 24
    assert leaks(tmp_path) == {}
    assert not NAME.findall("".join(capfd.readouterr()).encode())


def values_in(content: Any) -> Iterator[Any]:
    """Give every key and every value of what JSON holds."""
    if isinstance(content, dict):
        yield from content
        content = list(content.values())
    if isinstance(content, list):
        for one in content:
            yield from values_in(one)
    else:
        yield content


DATE = re.compile(
    r"(?<![\w.])((19|20)\d\d[-/.]?[01]\d[-/.]?[0-3]\d|[0-3]?\d[-/.][01]?\d[-/.](19|20)\d\d|\d\d:\d\d)(?!\w)"
)


def test_the_stores_own_words_hold_no_path_date_user_or_host(prepared: Prepared) -> None:
    found = list(values_in([json.loads(file.read_text()) for file in prepared.store.rglob("zarr.json")]))
    texts = {value for value in found if isinstance(value, str)}
    assert {"cspine_sha256", "one", "image_sha256", "separable"} <= texts
    words = {word.lower() for text in texts for word in re.split(r"[^\w-]+", text)}
    assert not words & {USER, getpass.getuser().lower(), socket.gethostname().lower()}
    assert [text for text in texts if re.match(r"/.|~|file:|[A-Za-z]:\\", text)] == []
    assert [text for text in texts if str(prepared.raw.parent) in text or "label.n" in text] == []
    assert [text for text in texts if DATE.search(text)] == []
    now = time.time()
    ages = [
        abs(now - value / unit) for value in found if isinstance(value, (int, float)) for unit in (1, 1e3, 1e6, 1e9)
    ]
    assert min(ages) > 86_400


@pytest.mark.parametrize("text", ["/home/x", "2026-11-25", "20261125", "25.11.2026", "12:15", f"{USER}@host"])
def test_what_must_not_stand_in_a_store_would_be_seen(text: str) -> None:
    (found,) = values_in({text: []})
    assert found.startswith("/") or DATE.search(found) or USER in re.split(r"[^\w-]+", found)


def bad_headers() -> dict[str, bytes]:
    """Return NRRD files that are refused, or might be, each for a line that has a name in it."""
    voxels = VOXELS.tobytes()
    broken = [
        "dimension", "sizes", "type", "encoding", "endian", "space", "space directions", "space origin", "kinds",
        "byte skip", "line skip", "data file", "spacings", "thicknesses", "axis mins", "axis maxs", "old min",
        "old max", "measurement frame", "space dimension", "min",
    ]  # fmt: skip
    files = {f"{field.replace(' ', '')}.nrrd": named_header(**{field: named()}) + voxels for field in broken}
    files["kind3.nrrd"] = named_header(kinds=f"domain {named()} domain") + voxels
    files["outside.nrrd"] = named_header(data_file=f"../{named()}.raw")
    files["quote.nrrd"] = named_header(labels=f'"{named()}') + voxels
    lines = named_header().decode().rstrip("\n")
    files["nocolon.nrrd"] = f"{lines}\n{named()}\n\n".encode() + voxels
    twice = named()
    files["twice.nrrd"] = f"{lines}\n{twice}:=1\n{twice}:=2\n\n".encode() + voxels
    files["magic.nrrd"] = lines.replace("NRRD0004", f"NRRD0004 {named()}").encode() + b"\n\n" + voxels
    files["text.nrrd"] = named_header(encoding="ascii") + (named() + " ").encode() * 120
    files["cut.nrrd"] = named_header() + voxels[:-9]
    files["cutgzip.nrrd"] = named_header(encoding="gzip") + named_gzip(voxels)[:-9]
    files["nogzip.nrrd"] = named_header(encoding="gzip") + named().encode()
    files["empty.nrrd"] = named_header()
    return files


def bad_nifti(folder: Path) -> dict[str, bytes]:
    content = nifti1(folder, ball()[0])
    wrong = {"4d": (40, 4, *ball()[0].array.shape, 2), "colour": (70, 128), "offset": (110, 0x7F00), "below": (42, -3)}
    files = {}
    for name, (place, *values) in wrong.items():
        changed = bytearray(content)
        struct.pack_into(f"<{len(values)}h", changed, place, *values)
        files[f"{name}.nii"] = bytes(changed)
    files["head.nii"] = named().encode() + content
    files["short.nii"] = content[:-2000]
    files["half.nii.gz"] = named_gzip(content)[:-3000]
    # ITK does not read the second version of the format.
    files["two.nii"] = nifti2(ball()[0])
    return files


def test_a_refusal_tells_the_file_and_no_name(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "s.zarr"
    raw.mkdir()
    image, label = ball()
    files = {**bad_headers(), **bad_nifti(raw)}
    files["grid.nrrd"] = named_header(**fields_of(image)) + image.array.tobytes("F")
    fields = fields_of(label, space_origin="(0,0,9)")
    files["grid-label.nrrd"] = named_header(**fields) + label.array.tobytes("F")
    for name, content in files.items():
        (raw / name).write_bytes(content)
    for told in (said("scan", raw, code=1), said("prepare", raw, "--store", store, "--no-n4", code=1)):
        refused = set(re.findall(rf"{re.escape(str(raw))}/([\w.-]+): ", told))
        # Fields that nobody needs are passed over unread, whatever stands there.
        understood = {
            "endian.nrrd", "space.nrrd", "min.nrrd", "spacings.nrrd", "thicknesses.nrrd", "axismins.nrrd",
            "axismaxs.nrrd", "oldmin.nrrd", "oldmax.nrrd", "measurementframe.nrrd", "spacedimension.nrrd",
            "quote.nrrd", "twice.nrrd",
        }  # fmt: skip
        assert set(files) - refused - understood - {"grid.nrrd"} == set()
        assert "unexpectedly" not in told
        assert "Traceback" not in told
    assert leaks(store) == {}
    assert all(NAME.search(content) for content in files.values())


def test_an_anonymised_store_names_nobody(tmp_path: Path, run_data) -> None:
    raw, store, key = tmp_path / "raw", tmp_path / "s.zarr", tmp_path / "s.zarr.key.csv"
    for name in ("JaneDoe_1961-03-04", "mrn-4711"):
        write_case(raw, name)
    told = ("prepare", raw, "--store", store, "--no-n4", "--axes", "0", "--anonymise")
    done = run_data(*told)
    assert done.exit_code == 0
    assert f"the key to the case names is {key}" in done.output
    assert not NAME.findall(done.output.encode())
    assert leaks(store) == {}
    assert oct(key.stat().st_mode & 0o777) == "0o600"
    assert open_cohort(store).cases == ("case0001", "case0002")
    names = dict(line.split(",") for line in key.read_text().splitlines()[1:])
    np.testing.assert_array_equal(
        open_cohort(store).export("case0001").array, read_volume(raw / f"{names['case0001']}.nrrd").array
    )
    write_case(raw, "AnnaDoe")
    assert "1 done, 2 reused" in run_data(*told).output
    assert open_cohort(store).cases == ("case0001", "case0002", "case0003")
    shard = next((store / "cases" / "case0002").glob("*/axis0/image/c/0/0/0"))
    before = shard.read_bytes()
    shard.write_bytes(before[1:])
    assert run_data("verify", store, "--repair", raw).exit_code == 0
    assert shard.read_bytes() == before


def test_names_and_neutral_ids_do_not_mix(store: Path, tmp_path: Path, run_data) -> None:
    raw, neutral = store.parent / "raw", tmp_path / "neutral.zarr"
    told = f"Error: {store}: its cases have their files' names; choose another --store\n"
    assert run_data("prepare", raw, "--store", store, "--no-n4", "--anonymise").output == told
    assert "2 done" in run_data("prepare", raw, "--store", neutral, "--no-n4", "--anonymise").output
    key = tmp_path / "neutral.zarr.key.csv"
    told = f"Error: {key}: exists beside the store: its cases have neutral ids; give --anonymise\n"
    assert run_data("prepare", raw, "--store", neutral, "--no-n4").output == told
    (neutral / "zarr.json").rename(tmp_path / "root")
    assert run_data("prepare", raw, "--store", neutral, "--no-n4").output == told
    (tmp_path / "root").rename(neutral / "zarr.json")
    key.rename(tmp_path / "safe")
    told = f"Error: {neutral}: its cases have neutral ids; give --anonymise\n"
    assert run_data("prepare", raw, "--store", neutral, "--no-n4").output == told
    assert run_data("remove", neutral, "case0001", "case0002").exit_code == 0
    told = f"Error: {key}: is missing, and without it the cases cannot be identified; restore it there\n"
    assert run_data("prepare", raw, "--store", neutral, "--no-n4", "--anonymise").output == told
