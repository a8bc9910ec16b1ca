"""Layout of a store: schema version, paths, codecs, typed records.

Only this module knows the layout. A store is a Zarr format 3 group::

    cspine.zarr/                         attributes: schema version, the current digest of each case, enrolment
      cases/<case id>/<digest>/          written once, never changed; attributes: a `CaseRecord`
        volume/0                         the image, (x, y, z), OME-Zarr 0.5
        volume/labels/segmentation/0     its label map
        bias_field/0                     logarithm of the estimated bias field, (x, y, z), voxels of about 8 mm
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
from typing import Annotated, Any

import google_crc32c
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from cspine_data.preprocessing.normalisation import Levels, Normalisation, TissueStatistics
from cspine_data.preprocessing.parameters import Preprocessing, RecordedPreprocessing
from cspine_data.preprocessing.steps import doubts
from cspine_data.sources.cases import LONGEST_NAME, is_case_id
from cspine_data.store.identities import Identity
from cspine_data.volumes.geometry import Geometry, Triple
from cspine_data.volumes.label_options import label_values_text

#: Part of every digest: raise it when the bytes for the same source and parameters change.
SCHEMA_VERSION = 8
ATTRIBUTE = "cspine"
#: The attribute beside the record with its `record_checksum`.
CHECKSUM_ATTRIBUTE = "cspine_sha256"
AXIS_NAMES = ("left-right", "anterior-posterior", "inferior-superior")
AXES_XYZ = "xyz"
VOLUME_IMAGE = "volume/0"
VOLUME_LABEL = "volume/labels/segmentation/0"
BIAS_FIELD = "bias_field/0"
# A cube of 64 voxels: a viewer can read a region, and a volume has a few dozen chunks.
VOLUME_CHUNK = 64
CHECKSUM_BYTES = 4
_CRC32C_RESIDUE = 0x48674BC7
#: The folder of the cases, each in a folder named by its id.
CASES = "cases"
#: Highest compression ratio of Blosc's LZ4 (about 255): a smaller file cannot hold the array that it claims.
LONGEST_RUN = 260
_LONGEST_AXIS = 1 << 20
DIGEST = re.compile("[0-9a-f]{32}")
NEUTRAL_ID = re.compile(r"case(\d{4}|[1-9]\d{4,})")


class Standard(BaseModel):
    """The standard of Nyul's method: histogram landmarks, and the cases that they were computed from."""

    model_config = ConfigDict(frozen=True)

    landmarks: tuple[float, ...]
    cases: tuple[str, ...]


class RootRecord(BaseModel):
    """The attributes of a store's root."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    """Schema version."""
    axes: tuple[str, ...] = AXIS_NAMES
    """Anatomical names of the array axes."""
    cases: dict[str, dict[str, str]] = Field(default_factory=dict)
    """``cases[case id][variant]`` is the current digest. A case exists when it is listed here."""
    notes: tuple[str, ...] = ()
    """Description of stand-in data (synthetic, another region), shown beside figures."""
    enrolled: tuple[tuple[str, ...], ...] = ()
    """The labelled cases in batches, in the order in which they were added. Splits are computed from the batches, so
    that added cases do not change them."""
    standards: dict[str, Standard] = Field(default_factory=dict)
    """The standards of Nyul's method by `standard_key`, computed once, so that added cases use the same."""
    voxels: dict[str, str] = Field(default_factory=dict)
    """The `voxels_sha256` of each listed digest, to detect copies of a volume."""
    neutral_ids: bool = False
    """Whether the case ids are neutral numbers, with a key outside the store."""
    identities: dict[str, Identity] = Field(default_factory=dict)
    """The identity of each case, except of those that are their patient's only one, without a site or sequence."""

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: Callable[[RootRecord], dict[str, Any]]) -> dict[str, Any]:
        # Stores without identities keep their bytes.
        content = handler(self)
        return {name: value for name, value in content.items() if name != "identities" or value}

    def identity(self, case: str) -> Identity:
        """Return the identity of a case."""
        return self.identities.get(case) or Identity(patient=case)

    @field_validator("cases")
    @classmethod
    def _names_fit(cls, cases: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        """Check that no path of an untrusted store leads out of its folder."""
        for case, variants in cases.items():
            if not is_case_id(case) or not all(map(DIGEST.fullmatch, variants.values())):
                raise ValueError(f"{case!r} is no valid case id with digests")
        return cases


class CaseRecord(BaseModel):
    """Record of one variant of one case; without names, dates, comments or paths of its source."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    case: str
    variant: str
    digest: str
    """Identify the stored case."""
    volume_digest: str
    """Digest of the image file and the bias parameters: equal if the corrected volume can be reused."""
    image_sha256: str
    label_sha256: str | None
    """Digests of the source files; None for a missing label map."""
    voxels_sha256: str
    """Digest of the voxels in anatomical order: equal for the same voxels in another file."""
    preprocessing: RecordedPreprocessing
    """The parameters."""
    geometry: Geometry
    """Grid of the source file, to which results are written back."""
    assumed_orientation: bool
    """True if the source does not define its orientation."""
    image_dtype: str
    label_dtype: str | None
    """Data types of the source files."""
    size_xyz: tuple[int, int, int]
    spacing_xyz_mm: Triple
    """Grid of the volume in anatomical order."""
    sliced_size_xyz: tuple[int, int, int]
    sliced_spacing_xyz_mm: Triple
    """Grid of the slices, which differs if they are resampled."""
    normalisation: Normalisation
    """Maps the intensities of `volume/0` to those of the slices."""
    levels: Levels
    """Scale of the 16-bit integers of the slices."""
    air_level: float
    tissue_threshold: float
    tissue_fraction: float
    tissue_percentiles: tuple[float, ...]
    """See `PreparedVolume`."""
    log_bias_deviation: float
    noise_ratio: float = 0.0
    noise_share: float = 0.0
    """See `CorrectedVolume`; revision 1 has no noise statistics."""
    tissue: TissueStatistics | None = None
    """Statistics for the normalisation; None in revision 1."""
    axes: tuple[int, ...]
    """The axes with stored slices."""
    label_voxels: dict[int, int]
    """Number of voxels of each label value, without background and ignored voxels."""
    labelled_voxels: dict[int, tuple[int, ...]]
    """``labelled_voxels[axis][i]`` is the number of labelled voxels in slice ``i``, for all three axes."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file of the case except this record's, by path within the case."""
    notes: tuple[str, ...] = ()
    """Notes on the source files; see `Volume`."""
    ignore_label: int | None = None
    """The label value of voxels to ignore."""
    ignored_voxels: int = 0
    """Number of ignored voxels."""
    label_values: tuple[int | str, ...] | None = None
    """The label values or segments that were chosen; None for all."""
    segments: dict[int, Annotated[str, Field(max_length=LONGEST_NAME)]] = Field(default_factory=dict)
    """The names of label values, from 3D Slicer's segments."""
    overlaps: tuple[tuple[int, int], ...] = ()
    """Label values of segments that had common voxels; these have the second value."""
    label_centroids_mm: dict[int, Triple] = Field(default_factory=dict)
    """Centroid of each label value, world coordinates (LPS); empty before schema version 8."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: Callable[[CaseRecord], dict[str, Any]]) -> dict[str, Any]:
        # Records without these fields keep their bytes.
        content = handler(self)
        absent: dict[str, Any] = {"notes": (), "ignore_label": None, "ignored_voxels": 0}
        absent |= {"label_values": None, "segments": {}, "overlaps": (), "label_centroids_mm": {}}
        return {name: value for name, value in content.items() if absent.get(name, ...) != getattr(self, name)}

    @model_validator(mode="after")
    def _is_consistent(self) -> CaseRecord:
        """Check sizes, so that an untrusted record causes no absurd allocation."""
        sizes = (*self.size_xyz, *self.sliced_size_xyz)
        if not all(0 < size <= _LONGEST_AXIS for size in sizes) or not set(self.axes) <= {0, 1, 2}:
            raise ValueError("its sizes or axes are invalid")
        counted = {axis: len(counts) for axis, counts in self.labelled_voxels.items()}
        if counted != (dict(enumerate(self.sliced_size_xyz)) if self.labelled else {}):
            raise ValueError("its labelled voxels do not fit its slices")
        return self

    @property
    def labelled(self) -> bool:
        """Whether the case has a label map."""
        return self.label_sha256 is not None

    @property
    def labels(self) -> tuple[int, ...]:
        """The label values, sorted, without background and ignored voxels; empty without a label map."""
        return tuple(sorted(self.label_voxels))

    @property
    def ignored_values(self) -> tuple[int, ...]:
        """The label value of ignored voxels; empty if there are none."""
        return (self.ignore_label,) if self.ignore_label is not None and self.ignored_voxels else ()

    @property
    def chosen_labels(self) -> str:
        """The chosen label values or segments as text, such as ``1-25,101``; empty for all."""
        return label_values_text(self.label_values or ())

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes on the source files and the `doubts` about the bias field."""
        return (*self.notes, *doubts(self.log_bias_deviation, self.tissue_fraction, self.noise_share))

    def labelled_extent_mm(self, axis: int) -> float:
        """Return the extent of the labelled voxels along an axis; 0 if there are none."""
        if not self.labelled:
            return 0.0
        labelled = [position for position, voxels in enumerate(self.labelled_voxels[axis]) if voxels]
        return (labelled[-1] - labelled[0] + 1) * self.sliced_spacing_xyz_mm[axis] if labelled else 0.0


#: Data types of arrays.
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
    """Return the digest of a corrected volume: image file, bias parameters, schema version."""
    return _digest([SCHEMA_VERSION, preprocessing.revision, image_sha256, _bias(preprocessing)])


def standard_key(preprocessing: Preprocessing) -> str:
    """Return the digest of a cohort's standard: bias parameters, schema version."""
    return _digest([SCHEMA_VERSION, preprocessing.revision, _bias(preprocessing)])


def case_digest(
    of_volume: str,
    label_sha256: str | None,
    preprocessing: Preprocessing,
    axes: tuple[int, ...],
    label_parameters: dict[str, Any] | None = None,
) -> str:
    """Return the digest of a stored case: corrected volume, label map and how it was read, parameters, axes."""
    content = [of_volume, label_sha256, preprocessing.model_dump(mode="json"), list(axes)]
    return _digest([*content, label_parameters] if label_parameters else content)


def record_checksum(record: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, of a record as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _bias(preprocessing: Preprocessing) -> dict[str, Any] | None:
    return preprocessing.bias.model_dump(mode="json") if preprocessing.bias else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def slice_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inner chunk shape of an array of slices: one slice."""
    return (1, *shape[1:])


def volume_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inner chunk shape of a volume: a cube."""
    return tuple(min(VOLUME_CHUNK, size) for size in shape)


def codecs(chunks: tuple[int, ...], itemsize: int) -> list[dict[str, Any]]:
    """Return the codecs of an inner chunk: Blosc's LZ4, and CRC32C to detect damage.

    A slice is one block of plain LZ4. It is decoded in less than half the time of bit-shuffled data, takes 5 % more
    bytes, and does not start Blosc's threads. Volumes are read rarely and as a whole, so that their size matters more.
    """
    blosc = {"typesize": itemsize, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    if chunks[0] == 1:
        blosc |= {"shuffle": "noshuffle", "blocksize": math.prod(chunks) * itemsize}
    return [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]


def chunk_checksum(content: bytes) -> bytes:
    """Return the CRC32C, little-endian, that follows an inner chunk or a shard's index."""
    checksum: int = google_crc32c.value(content)
    return checksum.to_bytes(CHECKSUM_BYTES, "little")


def fits_checksum(content: bytes) -> bool:
    """Return whether bytes match the CRC32C at their end.

    The CRC of data followed by its own CRC is a constant (the residue), so that no copy is needed.
    """
    return bool(google_crc32c.value(content) == _CRC32C_RESIDUE)


def chunk_grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of inner chunks along each axis of an array's only shard."""
    return tuple(math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True))


def group_bytes(attributes: dict[str, Any]) -> bytes:
    """Return the content of a group's metadata file."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def array_metadata(
    shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], axes: str, attributes: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata of an array with one shard and its index at the end; `axes` has one letter per axis."""
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
    """Return whether an array has the layout of `array_metadata` with these inner chunks."""
    own = array_metadata(tuple(metadata["shape"]), metadata["data_type"], chunks, "", {})

    def layout(metadata: dict[str, Any]) -> Any:
        (sharding,) = metadata["codecs"]
        inner = {"index_location": "end"} | sharding["configuration"]
        names = [[codec["name"] for codec in inner[chain]] for chain in ("codecs", "index_codecs")]
        endian = inner["codecs"][0].get("configuration", {"endian": "little"})
        outer = [metadata[key] for key in ("chunk_grid", "chunk_key_encoding", "fill_value")]
        return sharding["name"], inner["chunk_shape"], inner["index_location"], names, endian, outer

    return len(metadata["codecs"]) == 1 and bool(layout(metadata) == layout(own))
