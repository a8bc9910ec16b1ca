"""The cases of a store: records, splits, slices and volumes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cspine_data.datasets.given_splits import GivenSplit, given_split
from cspine_data.datasets.slices import Labels, SliceDataset, VolumeDataset
from cspine_data.datasets.splits import (
    PART_NAMES,
    Split,
    by_patient,
    cases_by_patient,
    check_ways,
    fold_split,
    leave_one_out,
    of_patients,
    reference_split,
    site_split,
)
from cspine_data.datasets.tables import case_table
from cspine_data.errors import InputError, NotInStoreError
from cspine_data.names import as_known
from cspine_data.preprocessing.steps import PreparedVolume, normalise_volume
from cspine_data.sources.cases import EMPTY_LABEL_MAP
from cspine_data.store.identities import Identity
from cspine_data.store.location import is_local, location
from cspine_data.store.records import read_corrected, read_label_xyz, read_root, read_volume_xyz, record_of, records
from cspine_data.store.schema import CaseRecord, RootRecord
from cspine_data.volumes.geometry import Orientation
from cspine_data.volumes.segments import Segment
from cspine_data.volumes.volume import Volume

if TYPE_CHECKING:
    from pandas import DataFrame


class Cohort:
    """The cases of a store.

    Parameters
    ----------
    path : str or Path
        The store.

    Raises
    ------
    StoreError
        If there is no store, it is damaged, or a newer cspine has written it.

    Examples
    --------
    >>> cohort = Cohort("data/cspine.zarr")  # doctest: +SKIP
    >>> train = cohort.slices(axis=0, split="train", variant="n4")  # doctest: +SKIP
    >>> image, mask = train[0]  # float32 (1, H, W), uint8 (1, H, W)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = location(path)
        self._root: RootRecord = read_root(self.path)
        # By variant: the labelled cases, and those with an empty label map.
        self._label_maps: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {}

    @property
    def location(self) -> str:
        """The store's absolute path or URL."""
        return str(self.path.resolve() if is_local(self.path) else self.path)

    @property
    def cases(self) -> tuple[str, ...]:
        """The case ids, in order."""
        return tuple(sorted(self._root.cases))

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """The variants of the cases, in order: ``n4``, ``raw``."""
        return tuple(sorted({variant for variants in self._root.cases.values() for variant in variants}))

    @property
    def notes(self) -> tuple[str, ...]:
        """Descriptions of stand-in data, to be shown beside every figure."""
        return self._root.notes

    @cached_property
    def patients(self) -> dict[str, str]:
        """The patient of each case."""
        return {case: self._root.identity(case).patient for case in self.cases}

    def identity(self, case: str) -> Identity:
        """Return the patient, site and sequence of a case."""
        return self._root.identity(case)

    @cached_property
    def sites(self) -> dict[str, str | None]:
        """The site of each case; None if unknown."""
        return {case: self._root.identity(case).site for case in self.cases}

    def table(self, variant: str | None = None) -> DataFrame:
        """Return a table of a variant, one row per case: identity, part of the split, grid, labels, bias field.

        The levels of a case are abbreviated, such as ``T11-L5``. They are empty if the label values of the cohort are
        not levels. This needs pandas.
        """
        variant = self._variant(variant)
        return case_table(self.records(variant), self._root, self.split(variant=variant).part_of)

    def record(self, case: str, variant: str | None = None) -> CaseRecord:
        """Return the record of a case: geometry, parameters, statistics, labels.

        Raises
        ------
        NotInStoreError
            If the store does not contain it.
        """
        return record_of(self.path, self._root, case, self._variant(variant))

    def records(self, variant: str | None = None) -> tuple[CaseRecord, ...]:
        """Return the records of all cases of a variant, in order."""
        return tuple(records(self.path, self._root, self._variant(variant)))

    def split(
        self,
        *,
        folds: int | None = None,
        fold: int = 0,
        leave_out: str | None = None,
        test_site: str | None = None,
        given: GivenSplit | None = None,
        variant: str | None = None,
    ) -> Split:
        """Divide the labelled cases by patient.

        Parameters
        ----------
        folds : int, optional
            Number of cross-validation folds. By default the reference split, 12 : 1 : 1 by sorted name.
        fold : int
            The fold for testing.
        leave_out : str, optional
            Test on this patient, given by its name or one of its cases, and train on all others but one.
        test_site : str, optional
            Test on this site, and train and validate on the others.
        given : GivenSplit, optional
            A split from a file, see `read_splits`. Cases that it does not list are in no part.
        variant : str, optional
            The variant; cases without labels are in no part.

        Returns
        -------
        Split
            Case ids for training, validation and testing. They do not change when cases are added.

        Raises
        ------
        InputError
            If there are too few cases, no such fold or site, contradictory arguments, or the given split puts a patient
            into two parts or names an unknown case.
        """
        check_ways(fold, folds=folds, leave_out=leave_out, test_site=test_site, given=given)
        variant = self._variant(variant)
        patient_of = {case: self._root.identity(case).patient for batch in self._batches for case in batch}
        patients = by_patient(self._batches, patient_of)
        held, _ = self._read_label_maps(variant)
        cases_of = cases_by_patient(held & patient_of.keys(), patient_of)
        if given is not None:
            return given_split(given, patients, cases_of, self.patients)
        if test_site is not None:
            return site_split(patients, cases_of, self.sites, test_site)
        if leave_out is not None:
            name = as_known(leave_out, self._root.cases)
            return of_patients(leave_one_out(patients, patient_of.get(name, name)), cases_of)
        split = reference_split(patients) if folds is None else fold_split(patients, folds, fold)
        return of_patients(split, cases_of)

    def slices(
        self,
        axis: int | Sequence[int] = 0,
        split: str | None = None,
        variant: str | None = None,
        cases: Iterable[str] | None = None,
        labels: Labels = "binary",
        only_labelled: bool = False,
        context: int = 0,
        size_hw: tuple[int, int] | None = None,
        of: Split | None = None,
    ) -> SliceDataset:
        """Return the slices along one axis or several, as a map-style dataset.

        Parameters
        ----------
        axis : int or sequence of int
            0: sagittal slices (H, W) = (y, z); 1: coronal (x, z); 2: axial (x, y).
        split : str, optional
            ``train``, ``validation`` or ``test``.
        variant : str, optional
            ``n4`` or ``raw``; optional if the store has only one.
        cases : iterable of str, optional
            Only these cases.
        labels : {"binary", "stored"} or None
            ``binary``: 1 where labelled, 255 where ignored; ``stored``: the label values; None: only images, also of
            cases without a label map.
        only_labelled : bool
            Only slices with labelled voxels.
        context : int
            Number of neighbours on each side that are added as channels, with the slice in the middle (2.5-D). Beyond
            the ends of the volume the outermost slice is repeated.
        size_hw : tuple of int, optional
            H and W of all items, with each slice in the middle, so that a plain PyTorch `DataLoader` can batch them.
            The margin of an image has its darkest value.
        of : Split, optional
            The split that `split` is a part of; by default the reference split.

        Raises
        ------
        NotInStoreError
            If the store does not contain the requested data.
        InputError
            If a split, axis or kind of label is unknown, or a slice is larger than `size_hw`.
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if context < 0:
            raise InputError(f"context={context}", "is negative", "give the number of neighbours on each side, from 0")
        chosen = self._chosen(split, variant, cases, labels, of)
        return SliceDataset(self.path, chosen, axes, labels, only_labelled, context, size_hw)

    def volumes(
        self,
        split: str | None = None,
        variant: str | None = None,
        cases: Iterable[str] | None = None,
        labels: Labels = "binary",
        of: Split | None = None,
    ) -> VolumeDataset:
        """Return whole volumes as a map-style dataset; the parameters are those of `slices`."""
        return VolumeDataset(self.path, tuple(self._chosen(split, variant, cases, labels, of)), labels)

    def prepared(self, case: str, variant: str | None = None) -> PreparedVolume:
        """Return a case as its slices contain it, with the mapping back to its grid.

        Raises
        ------
        NotInStoreError
            If the store does not contain it.
        DamagedStoreError
            If it is damaged.
        """
        record = self.record(case, variant)
        return normalise_volume(read_corrected(self.path, record), record.preprocessing, record.normalisation)

    def label_xyz(self, case: str, variant: str | None = None) -> NDArray[Any]:
        """Return the label map of a case on its own grid, (x, y, z), as it was prepared.

        Raises
        ------
        NotInStoreError
            If the store does not contain it, or it has none.
        DamagedStoreError
            If it is damaged.
        """
        return read_label_xyz(self.path, self.record(case, variant))

    def export(self, case: str, variant: str | None = None, *, label: bool = False) -> Volume:
        """Return a case as a volume on the grid of its source file.

        Parameters
        ----------
        case : str
            The case id.
        variant : str, optional
            ``raw``: the values of the source; ``n4``: the corrected values, float32, in the source's units. Intensities
            above air (`CaseRecord.air_level`) are divided by the field, the others are unchanged.
        label : bool
            Return the label map as it was prepared, in the dtype of the source; it is the same in all variants.

        Raises
        ------
        NotInStoreError
            If the store does not contain it, or it has no label map.
        DamagedStoreError
            If it is damaged.
        """
        if label and variant is None:
            variant = next(iter(self._root.cases.get(as_known(case, self._root.cases), {})), None)
        record = self.record(case, variant)
        array_xyz = read_label_xyz(self.path, record) if label else read_volume_xyz(self.path, record)
        array = np.ascontiguousarray(Orientation.of(record.geometry).to_file(array_xyz))
        if not label:
            return Volume(array, record.geometry)
        segments = tuple(Segment(name, value) for value, name in record.segments.items())
        return Volume(array.astype(record.label_dtype), record.geometry, segments=segments)

    @property
    def _batches(self) -> tuple[tuple[str, ...], ...]:
        """The labelled cases by batch; those of an unfinished run come last."""
        enrolled = {case for batch in self._root.enrolled for case in batch}
        late = tuple(case for case in self.cases if case not in enrolled and self._is_labelled(case))
        return (*self._root.enrolled, late) if late else self._root.enrolled

    def _is_labelled(self, case: str) -> bool:
        return bool(record_of(self.path, self._root, case, next(iter(self._root.cases[case]))).labels)

    def empty_label_maps(self, variant: str | None = None) -> tuple[str, ...]:
        """Return the cases with an empty label map; they are in no part of a split."""
        return self._read_label_maps(self._variant(variant))[1]

    def _read_label_maps(self, variant: str) -> tuple[frozenset[str], tuple[str, ...]]:
        if variant not in self._label_maps:
            labelled: list[str] = []
            empty: list[str] = []
            for record in records(self.path, self._root, variant):
                if record.labels:
                    labelled.append(record.case)
                elif EMPTY_LABEL_MAP in record.warnings:
                    empty.append(record.case)
            self._label_maps[variant] = frozenset(labelled), tuple(empty)
        return self._label_maps[variant]

    def _variant(self, variant: str | None) -> str:
        known = ", ".join(self.variants) or "none: prepare some"
        if variant is None and len(self.variants) != 1:
            raise NotInStoreError(f"{self.path}: say which variant; the store holds {known}")
        variant = variant or self.variants[0]
        if variant not in self.variants:
            remedy = {"n4": "; run cspine-data prepare --n4", "raw": "; run cspine-data prepare --no-n4"}.get(variant)
            raise NotInStoreError(f"{self.path}: holds no variant {variant!r}; the store holds {known}{remedy or ''}")
        return variant

    def _chosen(
        self, split: str | None, variant: str | None, cases: Iterable[str] | None, labels: Labels, of: Split | None
    ) -> Iterator[CaseRecord]:
        """Iterate over the selected records, one by one, since those of a large cohort take much memory."""
        if labels not in ("binary", "stored", None):
            raise InputError(f"labels={labels!r}", "is not known", "choose 'binary', 'stored' or None")
        variant = self._variant(variant)
        wanted: tuple[str, ...] | None = None
        if isinstance(cases, str):
            raise InputError(f"cases={cases!r}", "is a text", f"give a list: [{cases!r}]")
        if cases is not None:
            wanted = tuple(as_known(case, self._root.cases) for case in cases)
            unknown = [case for case in wanted if case not in self._root.cases]
            if unknown:
                self.record(unknown[0], variant)
        if split is not None:
            part = (of or self.split(variant=variant)).cases(PART_NAMES.get(split, split))
            wanted = part if wanted is None else tuple(case for case in wanted if case in part)
        if wanted is None:
            yield from (
                record for record in records(self.path, self._root, variant) if labels is None or record.labelled
            )
            return
        for case in wanted:
            record = self.record(case, variant)
            if labels is not None and not record.labelled:
                raise InputError(f"case {case!r}", "has no label map", "ask for labels=None to read its image alone")
            yield record


def open_cohort(path: str | Path) -> Cohort:
    """Open a store.

    Parameters
    ----------
    path : str or Path
        The store, or its URL if ``cspine[remote]`` is installed: ``https://...``, or another scheme of fsspec, such as
        ``s3://...`` with ``s3fs``. URLs are read by zarr-python, a slice in milliseconds; a web server must answer
        range requests.

    Returns
    -------
    Cohort
        Its cases, slices and volumes.

    Raises
    ------
    StoreError
        If there is no store, it is damaged, or a newer cspine has written it.
    """
    return Cohort(path)
