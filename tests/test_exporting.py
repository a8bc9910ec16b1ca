"""A run's network as ONNX: the same figures, and all that it takes to feed it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from cspine_data import Preprocessing, preprocess_volume, read_volume
from cspine_train import RunError, RunSettings
from cspine_train.cli.commands import main
from cspine_train.models.build import build_model, save_model
from cspine_train.prediction.onnx import METADATA_KEY, export_onnx, run_onnx
from cspine_train.prediction.predictor import LoadedRun, load_run
from cspine_train.run.record import RunRecord, save_record


def run_of(folder: Path, model: str, encoder: str, labels: tuple[int, ...] = ()) -> LoadedRun:
    """A run folder with an untrained network: what its weights are does not matter here."""
    torch.manual_seed(0)
    network, _ = build_model(model, encoder, "none", 3, len(labels) + 1 if labels else 1)
    save_model(network, folder / "model")
    settings = RunSettings(
        model=model, encoder=encoder, context=1, pixel_mm=2.0, labels="stored" if labels else "binary"
    )
    record = RunRecord(
        store="/home/somebody/secret.zarr", settings=settings, weights_used="none", size_hw=(96, 64),
        preprocessing=Preprocessing(bias=None), train=("Meier",), validation=(), test=(), label_values=labels,
        digests={"Meier": "0"}, versions={}, threshold=0.4,
    )  # fmt: skip
    save_record(folder, record)
    return load_run(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRun, Path]:
    """A run of two labels, and the file that the command line exported: it takes PyTorch ten seconds."""
    folder = tmp_path_factory.mktemp("onnx")
    loaded = run_of(folder / "run", "unet", "tu-test_resnet", (3, 7))
    done = CliRunner().invoke(main, ["export", str(folder / "run"), "-o", str(folder / "m.onnx")])
    assert done.exit_code == 0, done.output
    assert "any size" in done.output.splitlines()[-1]
    return loaded, folder / "m.onnx"


def test_onnxruntime_computes_the_same_and_the_file_says_how_to_feed_it(exported: tuple[LoadedRun, Path]) -> None:
    loaded, path = exported
    slices = torch.randn(5, 3, 160, 96)
    with torch.inference_mode():
        expected = loaded.network(slices).softmax(1)[:, 1:].numpy()
    np.testing.assert_allclose(run_onnx(path, slices.numpy()), expected, atol=1e-4)
    content = onnx.load(str(path))
    (told,) = [json.loads(entry.value) for entry in content.metadata_props if entry.key == METADATA_KEY]
    assert told["settings"]["context"] == 1
    assert (told["threshold"], told["label_values"], told["size_hw"]) == (0.4, [3, 7], [96, 64])
    assert told["preprocessing"]["normalisation"] == "zscore"
    assert told["sizes"] == "multiples of 32, at least size_hw"
    whole = path.read_bytes()
    assert not any(secret in whole for secret in (b"Meier", b"somebody", str(Path(__file__).parents[1]).encode()))
    assert sorted(path.name for path in path.parent.iterdir()) == ["m.onnx", "run"]


def test_a_network_that_pools_whole_slices_takes_one_size(tmp_path: Path) -> None:
    loaded = run_of(tmp_path / "run", "pspnet", "tu-test_resnet")
    assert not export_onnx(loaded, tmp_path / "m.onnx")
    slices = torch.randn(4, 3, 96, 64)
    with torch.inference_mode():
        expected = torch.sigmoid(loaded.network(slices)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", slices.numpy()), expected, atol=1e-4)


@pytest.mark.realdata
def test_real_slices_give_the_same_probabilities(realdata: Path, exported: tuple[LoadedRun, Path]) -> None:
    """All sagittal slices of a lumbar spine, through all of prediction, with onnxruntime in the network's place."""
    loaded, path = exported
    volume = read_volume(realdata / "messy" / "lumbar_pir.nii.gz")
    prepared = preprocess_volume(volume, loaded.record.preprocessing)

    class Onnx(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.device = torch.nn.Parameter(torch.zeros(1))
            self.encoder = loaded.network.encoder

        def forward(self, slices: torch.Tensor) -> torch.Tensor:
            shares = torch.from_numpy(run_onnx(path, slices.contiguous().numpy()))
            return torch.cat([1 - shares.sum(1, keepdim=True), shares], 1).log()

    expected = loaded.on_source_grid(prepared)
    np.testing.assert_allclose(replace(loaded, network=Onnx()).on_source_grid(prepared), expected, atol=1e-4)


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = run_of(tmp_path / "run", "unet", "tu-test_resnet")
    with pytest.raises(RunError, match=r"m\.pb: does not end"):
        export_onnx(loaded, tmp_path / "m.pb")
    monkeypatch.setattr("cspine_train.prediction.onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(RunError, match="^ONNX needs onnxscript"):
        export_onnx(loaded, tmp_path / "m.onnx")
