"""Weights of a trained run, for another run to start from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cspine_data import Preprocessing, Split
from cspine_data.tools import some_of
from cspine_train.errors import ModelError, RunError, reason_of
from cspine_train.models.pretrained import State
from cspine_train.run.folder import MODEL_FOLDER
from cspine_train.run.origin import MOST_SEEN, Origin, SeenCase, start_of
from cspine_train.run.record import RunRecord, load_record
from cspine_train.run.settings import ModelSettings

_HEAD = "segmentation_head."


@dataclass(frozen=True, eq=False)
class TrainedWeights:
    """The weights of a trained run.

    Attributes
    ----------
    run : Path
        The run folder.
    record : RunRecord
        Its record.
    state : dict
        Its tensors by name.
    sha256 : str
        Digest of the file that holds them.
    """

    run: Path
    record: RunRecord
    state: State
    sha256: str

    def check(self, settings: ModelSettings, split: Split, voxels_sha256: Mapping[str, str]) -> None:
        """Refuse, with a `RunError`, another network, and validation and test cases that the weights have seen."""
        own = self.record.settings
        differing = [name for name in ("model", "encoder", "context") if getattr(own, name) != getattr(settings, name)]
        if differing:
            theirs, here = (", ".join(f"{name} {getattr(one, name)}" for name in differing) for one in (own, settings))
            options = " and ".join(f"--{name}" for name in differing)
            raise RunError(
                f"{self.run}: has {theirs}, and this run {here}; leave out {options} and recipes that set them, or "
                "start without --from"
            )
        if spoiled := self._origin(new_head=False).seen_cases(split, voxels_sha256):
            raise RunError(
                f"{self.run}: its weights have seen {some_of(spoiled)}, which this run validates or tests on, so that "
                "scores would be too high; give the same split as there, move these cases to training with --split, or "
                "start from another run"
            )

    def give(self, network: nn.Module, label_values: Sequence[int]) -> Origin:
        """Load the weights into a network with these labels, and return its origin.

        The head keeps its initial weights if the labels differ. Raises `ModelError` if the weights do not fit; its
        `details` list the tensors.
        """
        origin = self._origin(new_head=tuple(label_values) != self.record.label_values)
        state = dict(self.state)
        if origin.new_head:
            initial = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(_HEAD)}
            state = {name: tensor for name, tensor in state.items() if not name.startswith(_HEAD)} | initial
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            # The first line names the class.
            details = [line.strip() for line in str(error).splitlines()[1:]]
            raise ModelError(f"{self.run}: holds weights of another network; train it again", details) from None
        return origin

    def _origin(self, new_head: bool) -> Origin:
        record = self.record
        seen = dict(record.origin.seen) if record.origin else {}
        cases = dict.fromkeys(record.validation, False)
        cases |= {case: True for case in record.train if record.settings.weight_of(case) > 0}
        for case, trained in cases.items():
            digest = record.voxels_sha256[case]
            if trained or digest not in seen:
                seen[digest] = SeenCase(case=case, patient=record.patient(case), trained=trained)
        if len(seen) > MOST_SEEN:
            problem = f"{self.run}: it and the runs before it have seen more than {MOST_SEEN} cases"
            raise RunError(f"{problem}; start from an earlier run")
        return Origin(name=self.run.resolve().name, start=start_of(record.start), new_head=new_head, seen=seen)


def read_trained(run: Path) -> TrainedWeights:
    """Read the weights of a run; nothing is unpickled, and nothing outside the run folder is read.

    Raises
    ------
    RunError
        If the folder is no run, holds a link to the outside, or an earlier version of cspine has trained it.
    ModelError
        If its weights are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    record = load_record(run)
    if not {*record.train, *record.validation} <= record.voxels_sha256.keys():
        raise RunError(f"{run}: does not record which volumes it has seen, as earlier versions did not; train it again")
    path = run / MODEL_FOLDER / "model.safetensors"
    try:
        # Read once: if the run is still being trained, another file may be there a moment later.
        content = path.read_bytes()
        state = load(content)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded ({reason_of(error)}); train the run to its end") from None
    return TrainedWeights(run, record, state, hashlib.sha256(content).hexdigest())


def preprocessing_note(trained: TrainedWeights, preprocessing: Preprocessing) -> str:
    """Return a note if the volumes of a store were prepared in another way than those of the run; else nothing."""
    before = trained.record.preprocessing
    if before == preprocessing:
        return ""
    return (
        f"{trained.run}: was trained on volumes prepared with {before.description}, and these are prepared with "
        f"{preprocessing.description}; weights transfer best to volumes prepared alike"
    )
