"""Valid NRRD and NIfTI files, changed so that a reader may stumble: the material of the fuzz test."""

from __future__ import annotations

import bz2
import gzip
import struct

from hypothesis import strategies as st

from tests.test_volumes import VOXELS, header, nifti_header

# Stands in every free-text field; no message may hold it.
PATIENT = b"DOE^JANE"

DATA_FILES = [
    "../secret.raw", "/etc/hostname", "/dev/zero", "/proc/self/environ", "link.raw", "loop.raw", "zero.raw",
    "folder.raw", "fifo.raw", "sub/x.raw", "sub", ".", "..", "", "a\0b", "x" * 1999, "x/" * 900, "LIST", "LIST 2",
    "LIST\n" + "slice.raw\n" * 1000, "slice%03d.raw 1 999999999 1", "no-such.raw", "~/x.raw", "file:///etc/hostname",
]  # fmt: skip

# What is written in place of a field's value; half of it is valid where it belongs.
VALUES = [
    b"", b"0", b"-1", b"1", b"3", b"120", b"65536", b"99999999999", b"9" * 400, b"1e400", b"1.5", b"nan", b"inf",
    b"4 5 6", b"1 1 1", b"4 5", b"4 5 -6", b"512 512 8", b"4294967296 4294967296 4", b"1 1 1 1", b"nan nan nan",
    b"(1,0,0) (0,1,0) (0,0,1)", b"(nan,0,0) (0,1,0) (0,0,1)", b"(1,0,0) (1,0,0) (0,0,1)", b"(0,0,0)", b"(1e308,0,0)",
    b"none (0,1,0) (0,0,1)", b"()", b"(", b"raw", b"gzip", b"bzip2", b"text", b"hex", b"little", b"big", b"uchar",
    b"double", b"float", b"block", b"RAS", b"scanner-xyz", b"domain domain vector", b"x.raw", b"x.nhdr", b"1_0",
    b"\xd9\xa3", PATIENT, *(name.encode() for name in DATA_FILES if len(name) < 100),
]  # fmt: skip
FIELDS = [
    b"type", b"dimension", b"sizes", b"encoding", b"endian", b"data file", b"datafile", b"line skip", b"byte skip",
    b"byteskip", b"kinds", b"space", b"space directions", b"space origin", b"spacings", b"labels", b"measurement frame",
    b"content", b"space dimension", b"thicknesses", b"units", b"old min", b"Sizes", b"", b"\xff",
]  # fmt: skip
WHOLE = [0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 127, 256, 348, 352, 353, 512, 540, 768, 1024, 32767, -32768]
REAL = [0, -1, 1, 2.5, 1e-30, 1e30, 3e38, 352, 352.5, 353, 1e9, float("nan"), float("inf"), float("-inf")]
# Where a NIfTI header holds numbers, by their format.
SPOTS = [
    *(("i", at) for at in (0, 348)),
    *(("h", at) for at in (*range(40, 56, 2), 70, 72, 252, 254)),
    *(("f", at) for at in (*range(76, 120, 4), *range(256, 328, 4))),
    *(("B", at) for at in (123, 344, 345, 346, 347)),
]
ZEROS = {"gzip": gzip.compress(bytes(1 << 22)), "bzip2": bz2.compress(bytes(1 << 22))}

places = st.floats(0, 1, exclude_max=True)
byte_edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "repeat", "insert"]), places, places, st.binary(max_size=8)
    ),
    max_size=2,
)
line_edits = st.lists(
    st.tuples(
        st.sampled_from(["value", "value", "double", "drop", "insert", "insert", "move"]),
        places, places, st.sampled_from(VALUES),
    ),
    max_size=3,
)  # fmt: skip
number_edits = st.lists(st.tuples(st.sampled_from(SPOTS), st.sampled_from(WHOLE), st.sampled_from(REAL)), max_size=3)


def with_bytes_edited(content: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
    for kind, where, other, new in edits:
        at, end = sorted((int(where * len(content)), int(other * len(content))))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << int(8 * other))]) + content[at + 1 :]
        elif kind == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "cut":
            content = content[:end]
        elif kind == "drop":
            content = content[:at] + content[end:]
        elif kind == "repeat":
            content = content[:end] + content[at:]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
    return content


def with_lines_edited(head: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
    lines = head.rstrip(b"\n").split(b"\n")
    for kind, where, other, value in edits:
        at, to = int(where * len(lines)), int(other * len(lines))
        if kind == "value":
            lines[at] = lines[at].partition(b":")[0] + b": " + value
        elif kind == "double":
            lines.insert(to, lines[at])
        elif kind == "insert":
            lines.insert(max(1, at), FIELDS[int(other * len(FIELDS))] + b": " + value)
        elif kind == "move":
            lines[at], lines[to] = lines[to], lines[at]
        elif len(lines) > 1:
            del lines[at]
    return b"\n".join(lines) + b"\n\n"


def with_numbers_edited(content: bytes, order: str, edits: list[tuple[tuple[str, int], int, float]]) -> bytes:
    changed = bytearray(content)
    for (kind, at), whole, real in edits:
        struct.pack_into(order + kind, changed, at, real if kind == "f" else whole % 256 if kind == "B" else whole)
    return bytes(changed)


@st.composite
def nrrd_mutants(draw: st.DrawFn) -> dict[str, bytes]:
    encoding = draw(st.sampled_from(["raw", "gzip", "bzip2", "text"]))
    raw = VOXELS.tobytes()
    payload = {
        "raw": raw, "gzip": gzip.compress(raw), "bzip2": bz2.compress(raw), "text": " ".join(map(str, VOXELS)).encode(),
    }[encoding]  # fmt: skip
    if encoding in ZEROS and draw(st.booleans()):
        payload = ZEROS[encoding]
    detached = draw(st.booleans())
    head = header(content=PATIENT.decode(), encoding=encoding, data_file="x.raw" if detached else "")
    head = with_lines_edited(head, draw(line_edits))
    damage = draw(st.just([]) | byte_edits)
    if detached:
        return {
            "x.raw": with_bytes_edited(payload, draw(st.just([]) | byte_edits)),
            "x.nhdr": with_bytes_edited(head, damage),
        }
    return {"x.nrrd": with_bytes_edited(head + payload, damage)}


@st.composite
def nifti_mutants(draw: st.DrawFn) -> dict[str, bytes]:
    fields = nifti_header(descrip=PATIENT, intent_name=PATIENT, qform_code=draw(st.sampled_from([0, 1])))
    voxels, order = VOXELS, "<"
    if draw(st.booleans()):
        fields, voxels, order = fields.astype(fields.dtype.newbyteorder("S")), VOXELS.byteswap(), ">"
    content = with_numbers_edited(fields.tobytes() + voxels.tobytes(), order, draw(number_edits))
    content = with_bytes_edited(content, draw(st.just([]) | byte_edits))
    if draw(st.booleans()):
        return {"x.nii": content}
    packed = gzip.compress(content, 1) + draw(st.sampled_from([b"", ZEROS["gzip"]]))
    return {"x.nii.gz": with_bytes_edited(packed, draw(st.just([]) | byte_edits))}


#: Files by name, the one to read last.
mutants = nrrd_mutants() | nifti_mutants()
