"""Export of a run's network as ONNX, with its preprocessing parameters."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cspine_data.tools import atomic_write, make_folder
from cspine_train.errors import ModelError, RunError, reason_of
from cspine_train.models.build import sides_of
from cspine_train.prediction.predictor import LoadedRun
from cspine_train.run.process_state import quieten, restored_process_state

#: Key of the file's metadata, JSON.
METADATA_KEY = "cspine"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
# Tolerance of probabilities: rounding of float32 in a network.
_TOLERANCE = 1e-4


class _Probabilities(nn.Module):
    """A network with probabilities instead of logits as output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(slices)
        return torch.sigmoid(logits) if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]


def export_onnx(loaded: LoadedRun, output: Path) -> bool:
    """Write a run's network as an ONNX file, and compare the output of onnxruntime with that of PyTorch.

    The input ``slices`` is float32 (N, C, H, W): normalised slices at the network's pixel size, with neighbours as
    channels. The output ``probabilities`` is float32 (N, K, H, W), of vertebra or of each label. The metadata hold,
    under `METADATA_KEY`, preprocessing, axes, pixel size, threshold and labels, but no patient data.

    Parameters
    ----------
    loaded : LoadedRun
        The run.
    output : Path
        File that ends in ``.onnx``; an existing file is replaced atomically.

    Returns
    -------
    bool
        Whether H and W may be any multiples of the network's stride; else they are those of a training slice.

    Raises
    ------
    RunError
        If packages are missing, or the name has another ending.
    ModelError
        If the network cannot be exported, or its output differs.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise RunError(f"ONNX needs {', '.join(missing)}; pip install 'cspine[onnx]'")
    if output.suffix.lower() != ".onnx":
        raise RunError(f"{output}: does not end in .onnx; choose another name")
    # A copy, as the caller's network stays on its device.
    network = _Probabilities(copy.deepcopy(loaded.network)).cpu().eval()
    make_folder(output.parent)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=output.parent) as folder:
        reasons = []
        for any_size in (True, False):
            file = Path(folder) / f"{'any' if any_size else 'one'}.onnx"
            try:
                _export(network, loaded, file, any_size)
                _check(network, loaded, file, any_size)
            # PyTorch's exporter and onnxruntime raise errors of many kinds.
            except Exception as error:  # noqa: BLE001
                reasons.append(reason_of(error))
            else:
                _describe(loaded, file, any_size)
                with atomic_write(output) as temporary:
                    file.replace(temporary)
                return any_size
    raise ModelError(f"{loaded.path}: cannot be written as ONNX ({reasons[-1]}); use another architecture")


def _slices(loaded: LoadedRun, count: int, any_size: bool) -> torch.Tensor:
    """Return random slices of a size that the network takes."""
    height, width = loaded.record.size_hw
    if any_size:
        stride = sides_of(loaded.network).multiple
        height, width = (stride * (2 + count) for _ in range(2))
        width += stride
    return torch.randn(
        count, loaded.record.settings.channels, height, width, generator=torch.Generator().manual_seed(0)
    )


def _export(network: nn.Module, loaded: LoadedRun, file: Path, any_size: bool) -> None:
    free = torch.export.Dim.DYNAMIC
    shapes = {0: free, 2: free, 3: free} if any_size else {0: free}
    with restored_process_state():
        warnings.simplefilter("ignore")
        quieten("torch.onnx")
        torch.onnx.export(
            network, (_slices(loaded, 2, any_size),), str(file), input_names=["slices"],
            output_names=["probabilities"], dynamic_shapes=(shapes,), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


def _check(network: nn.Module, loaded: LoadedRun, file: Path, any_size: bool) -> None:
    for count in (1, 3):
        slices = _slices(loaded, count, any_size)
        with torch.inference_mode():
            expected = network(slices).numpy()
        farthest = float(np.abs(run_onnx(file, slices.numpy()) - expected).max())
        if not farthest <= _TOLERANCE:
            raise ModelError(f"probabilities differ by {farthest:.2g}")


def run_onnx(file: Path, slices: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run an ONNX file on slices, float32 (N, C, H, W), and return its output, float32 (N, K, H, W)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"slices": slices})[0])


def _describe(loaded: LoadedRun, file: Path, any_size: bool) -> None:
    import onnx

    record, sides = loaded.record, sides_of(loaded.network)
    description: dict[str, Any] = {
        "preprocessing": record.preprocessing.model_dump(mode="json"),
        "settings": record.settings.model_dump(mode="json", exclude={"case_weights", "weights", "split", "test_site"}),
        "size_hw": record.size_hw,
        "sizes": f"multiples of {sides.multiple}, at least size_hw" if any_size else "size_hw alone",
        "margin": "slices in the middle, the rest of a slice's lowest value",
        "beyond_the_ends": "the first and the last slice stand in for neighbours that are missing",
        "threshold": record.threshold,
        "label_values": record.label_values,
        "label_meaning": record.label_meaning,
        "kept_components": record.kept_components,
        "filled_holes": record.filled_holes,
        "caveats": record.caveats(),
        "versions": record.versions,
    }
    model = onnx.load(str(file))
    # The exporter adds source paths of this machine.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(description)})
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
