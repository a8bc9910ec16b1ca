"""How a store is laid out and what its metadata says: version, names, codecs, typed records.

The only module that knows the layout. A store is a Zarr format 3 group::

    cspine.zarr/                         attributes: schema version, the current digest of each case, enrolment
      cases/<case id>/<digest>/          written once, never changed; attributes: a `CaseRecord`
        volume/0                         the image, (x, y, z), OME-Zarr 0.5
        volume/labels/segmentation/0     its label map
        axis0/image   axis0/label        slices first, (n, H, W): one slice an inner chunk, one shard an array;
                                         images normalised, in 16-bit levels
        axis1/...     axis2/...
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from cspine_data.preprocessing.normalisation import Levels, Normalisation, TissueStatistics
from cspine_data.preprocessing.steps import Preprocessing, RecordedPreprocessing, doubts
from cspine_data.sources.cases import is_case_id
from cspine_data.volumes.geometry import Geometry, Triple

#: Part of every digest: raise it whenever other bytes are written for the same source and parameters.
SCHEMA_VERSION = 7
ATTRIBUTE = "cspine"
#: Beside the record in a group's attributes: what `record_checksum` gives for it.
CHECKSUM_ATTRIBUTE = "cspine_sha256"
AXIS_NAMES = ("left-right", "anterior-posterior", "inferior-superior")
AXES_XYZ = "xyz"
VOLUME_IMAGE = "volume/0"
VOLUME_LABEL = "volume/labels/segmentation/0"
# A cube of 64 voxels: a viewer reads a region without the whole, and a whole volume is a few dozen chunks.
VOLUME_CHUNK = 64
CHECKSUM_BYTES = 4
_CRC32C_RESIDUE = 0x48674BC7
#: Where in a store its cases lie, each in a folder that bears its id.
CASES = "cases"
#: Blosc's LZ4 stores at most some 255 bytes in one: a file that is smaller than that does not hold what it claims.
LONGEST_RUN = 260
_LONGEST_AXIS = 1 << 20
DIGEST = re.compile("[0-9a-f]{32}")
NEUTRAL_ID = re.compile(r"case(\d{4}|[1-9]\d{4,})")


class Standard(BaseModel):
    """What Nyul's method matches volumes to: landmarks, and the cases that they were learnt from."""

    model_config = ConfigDict(frozen=True)

    landmarks: tuple[float, ...]
    cases: tuple[str, ...]


class RootRecord(BaseModel):
    """The attributes of a store's root.

    Attributes
    ----------
    schema_version : int
        Version of the layout.
    axes : tuple of str
        What the three array axes are.
    cases : dict
        ``cases[case id][variant]`` is the digest that is current. A case exists from the moment it is named here.
    notes : tuple of str
        What the cohort is, where it stands in for something else (synthetic, another region): said beside figures.
    enrolled : tuple of tuple of str
        The labelled cases in the batches in which they came; splits are made from it, so that they stay when cases
        are added.
    standards : dict
        What Nyul's method matches volumes to, by `standard_key`: learnt once, so that added cases match it too.
    voxels : dict
        For each digest that `cases` names, the `voxels_sha256` of its record: one patient is one case.
    neutral_ids : bool
        Whether its cases are called by numbers that only a key outside the store can undo.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    axes: tuple[str, ...] = AXIS_NAMES
    cases: dict[str, dict[str, str]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    enrolled: tuple[tuple[str, ...], ...] = ()
    standards: dict[str, Standard] = Field(default_factory=dict)
    voxels: dict[str, str] = Field(default_factory=dict)
    neutral_ids: bool = False

    @field_validator("cases")
    @classmethod
    def _names_fit(cls, cases: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        """Let no store that came from somebody else lead out of its own folder."""
        for case, variants in cases.items():
            if not is_case_id(case) or not all(map(DIGEST.fullmatch, variants.values())):
                raise ValueError(f"{case!r} is no case id with digests")
        return cases


class CaseRecord(BaseModel):
    """Everything that is known of one variant of one case; no name, date, comment or path of its source.

    Attributes
    ----------
    case, variant, digest : str
        What this is a record of.
    volume_digest : str
        Of the image's bytes and the way its field was corrected: equal where the corrected volume can be used again.
    image_sha256, label_sha256 : str
        Of the source files; the label's is None where there is none.
    voxels_sha256 : str
        Of the volume itself, in anatomical order: equal where another file holds the same voxels.
    preprocessing : Preprocessing
        What was done.
    geometry : Geometry
        The grid of the source file, to write results back into it.
    assumed_orientation : bool
        True where the source did not say how it lies in the patient.
    image_dtype, label_dtype : str
        Of the source files.
    size_xyz, spacing_xyz_mm : tuple
        The grid of the volume in anatomical order.
    sliced_size_xyz, sliced_spacing_xyz_mm : tuple
        The grid that the slices lie on: another one where the preprocessing resamples.
    normalisation : Normalisation
        What brings the intensities of `volume/0` to those of the slices.
    levels : Levels
        What the 16-bit numbers of the slices stand for.
    air_level, tissue_threshold, log_bias_deviation, noise_ratio, noise_share : float
        See `CorrectedVolume`; version 0.1.0 kept nothing of the noise.
    tissue : TissueStatistics or None
        What the normalisation was computed from; None in a store of version 0.1.0.
    tissue_fraction, tissue_percentiles : float, tuple of float
        See `PreparedVolume`; an older cspine kept no percentiles.
    axes : tuple of int
        The axes along which slices are stored.
    label_voxels : dict
        How many voxels each label value has in the volume, zero and what is ignored left out.
    labelled_voxels : dict
        ``labelled_voxels[axis][i]``: how many labelled voxels slice ``i`` has, for all three axes.
    files : dict
        SHA-256 of every file of the case but the one that holds this record, by path within the case.
    notes : tuple of str
        What a user should know about the source files; see `Volume`.
    ignore_label : int or None
        The value of voxels of the label map that do not count, where one was given.
    ignored_voxels : int
        How many voxels have it.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    case: str
    variant: str
    digest: str
    volume_digest: str
    image_sha256: str
    label_sha256: str | None
    voxels_sha256: str
    preprocessing: RecordedPreprocessing
    geometry: Geometry
    assumed_orientation: bool
    image_dtype: str
    label_dtype: str | None
    size_xyz: tuple[int, int, int]
    spacing_xyz_mm: Triple
    sliced_size_xyz: tuple[int, int, int]
    sliced_spacing_xyz_mm: Triple
    normalisation: Normalisation
    levels: Levels
    air_level: float
    tissue_threshold: float
    tissue_fraction: float
    tissue_percentiles: tuple[float, ...]
    log_bias_deviation: float
    noise_ratio: float = 0.0
    noise_share: float = 0.0
    tissue: TissueStatistics | None = None
    axes: tuple[int, ...]
    label_voxels: dict[int, int]
    labelled_voxels: dict[int, tuple[int, ...]]
    files: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ignore_label: int | None = None
    ignored_voxels: int = 0

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_there(self, handler: Callable[[CaseRecord], dict[str, Any]]) -> dict[str, Any]:
        # A case that has none of these keeps the bytes that it had before there were any.
        content = handler(self)
        absent = {"notes": (), "ignore_label": None, "ignored_voxels": 0}
        return {name: value for name, value in content.items() if absent.get(name, ...) != getattr(self, name)}

    @model_validator(mode="after")
    def _is_consistent(self) -> CaseRecord:
        """Let no record that came from somebody else have arrays made, or read, that are not there."""
        sizes = (*self.size_xyz, *self.sliced_size_xyz)
        if not all(0 < size <= _LONGEST_AXIS for size in sizes) or not set(self.axes) <= {0, 1, 2}:
            raise ValueError("its sizes or axes cannot be")
        counted = {axis: len(counts) for axis, counts in self.labelled_voxels.items()}
        if counted != (dict(enumerate(self.sliced_size_xyz)) if self.labelled else {}):
            raise ValueError("its labelled voxels are of other slices")
        return self

    @property
    def labelled(self) -> bool:
        """Whether there is a label map."""
        return self.label_sha256 is not None

    @property
    def labels(self) -> tuple[int, ...]:
        """The label values that count, sorted; empty where the label map labels nothing, or there is none."""
        return tuple(sorted(self.label_voxels))

    @property
    def ignored_values(self) -> tuple[int, ...]:
        """The label value of ignored voxels; empty if there are none."""
        return (self.ignore_label,) if self.ignore_label is not None and self.ignored_voxels else ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes on the source files and the `doubts` about the bias field."""
        return (*self.notes, *doubts(self.log_bias_deviation, self.tissue_fraction, self.noise_share))

    def labelled_extent_mm(self, axis: int) -> float:
        """Return how far the labelled voxels reach along an axis; 0 where there are none."""
        if not self.labelled:
            return 0.0
        labelled = [position for position, voxels in enumerate(self.labelled_voxels[axis]) if voxels]
        return (labelled[-1] - labelled[0] + 1) * self.sliced_spacing_xyz_mm[axis] if labelled else 0.0


#: What arrays hold; anything else in their metadata is not this layout.
DTYPES = {
    name: np.dtype(name)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
}


def slice_array(axis: int, kind: str) -> str:
    """Return the path, within a case, of the slices of an axis; `kind` is ``image`` or ``label``."""
    return f"axis{axis}/{kind}"


def case_path(case: str, digest: str) -> str:
    """Return the path of one digest of a case within the store."""
    return f"{CASES}/{case}/{digest}"


def volume_digest(image_sha256: str, preprocessing: Preprocessing) -> str:
    """Digest what a corrected volume depends on: the image's bytes, the bias field's parameters, the schema."""
    return _digest([SCHEMA_VERSION, preprocessing.revision, image_sha256, _bias(preprocessing)])


def standard_key(preprocessing: Preprocessing) -> str:
    """Digest what the landmarks of a cohort depend on: how its volumes' fields are corrected."""
    return _digest([SCHEMA_VERSION, preprocessing.revision, _bias(preprocessing)])


def case_digest(
    of_volume: str,
    label_sha256: str | None,
    preprocessing: Preprocessing,
    axes: tuple[int, ...],
    ignore_label: int | None = None,
) -> str:
    """Digest what a stored case depends on: its corrected volume, label map, preprocessing, axes, ignored value."""
    content = [of_volume, label_sha256, preprocessing.model_dump(mode="json"), list(axes)]
    return _digest(content if ignore_label is None else [*content, {"ignore_label": ignore_label}])


def record_checksum(record: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, of a record as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _bias(preprocessing: Preprocessing) -> dict[str, Any] | None:
    return preprocessing.bias.model_dump(mode="json") if preprocessing.bias else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def slice_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inner chunks of an array of slices: one slice each."""
    return (1, *shape[1:])


def volume_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inner chunks of a whole volume: cubes."""
    return tuple(min(VOLUME_CHUNK, size) for size in shape)


def codecs(chunks: tuple[int, ...], itemsize: int) -> list[dict[str, Any]]:
    """Return the codecs of an inner chunk: Blosc's LZ4 for size and speed, CRC32C to notice damage.

    A slice is one block of plain LZ4: read most and in any order, it is decoded in less than half the time that
    bit-shuffling takes, at one twentieth more bytes, and one block never wakes Blosc's threads. Volumes are read rarely
    and whole, so that bytes matter more.
    """
    blosc = {"typesize": itemsize, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    if chunks[0] == 1:
        blosc |= {"shuffle": "noshuffle", "blocksize": math.prod(chunks) * itemsize}
    return [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]


def chunk_checksum(content: bytes) -> bytes:
    """Return what stands behind an inner chunk, or a shard's index: its CRC32C, little-endian."""
    checksum: int = google_crc32c.value(content)
    return checksum.to_bytes(CHECKSUM_BYTES, "little")


def fits_checksum(content: bytes) -> bool:
    """Tell whether bytes that end with their own CRC32C are what was written.

    The CRC of anything with its CRC behind it is one number (its residue), so that nothing is copied to be compared.
    """
    return bool(google_crc32c.value(content) == _CRC32C_RESIDUE)


def chunk_grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many inner chunks there are along each axis of an array's only shard."""
    return tuple(math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True))


def group_bytes(attributes: dict[str, Any]) -> bytes:
    """Return what the metadata file of a group holds."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def array_metadata(
    shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], axes: str, attributes: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata of an array that is one shard of inner chunks, its index at the end.

    Parameters
    ----------
    shape, dtype, chunks
        Of the array; `chunks` of the inner ones.
    axes : str
        A letter an axis, of ``xyz``.
    attributes : dict
        What else a reader should know.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = {
        "chunk_shape": list(chunks),
        "codecs": [little, *codecs(chunks, np.dtype(dtype).itemsize)],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    shard = [n * chunk for n, chunk in zip(chunk_grid(shape, chunks), chunks, strict=True)]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "dimension_names": list(axes),
        "attributes": attributes,
    }


def is_own_layout(metadata: dict[str, Any], chunks: tuple[int, ...]) -> bool:
    """Tell whether an array's metadata are of the layout that `array_metadata` describes, with such inner chunks."""
    own = array_metadata(tuple(metadata["shape"]), metadata["data_type"], chunks, "", {})

    def decided_by(metadata: dict[str, Any]) -> Any:
        (sharding,) = metadata["codecs"]
        inner = {"index_location": "end"} | sharding["configuration"]
        names = [[codec["name"] for codec in inner[chain]] for chain in ("codecs", "index_codecs")]
        endian = inner["codecs"][0].get("configuration", {"endian": "little"})
        told = [metadata[key] for key in ("chunk_grid", "chunk_key_encoding", "fill_value")]
        return sharding["name"], inner["chunk_shape"], inner["index_location"], names, endian, told

    return len(metadata["codecs"]) == 1 and bool(decided_by(metadata) == decided_by(own))
