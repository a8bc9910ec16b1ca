from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cspine_train.errors import ModelError
from cspine_train.extensions import ARCHITECTURES
from cspine_train.models.build import (
    architectures,
    build_model,
    encoders,
    load_model,
    save_model,
    sides_of,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed network: nothing answers at the hub's address."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("encoder", "channels"),
    [("resnet50", 1), ("inceptionv4", 3), ("tu-mobilenetv3_small_100", 1), ("tu-mobilenetv3_small_100", 3)],
)
@pytest.mark.parametrize("model", ARCHITECTURES.built_in)
def test_every_combination_learns_and_is_saved_and_loaded(
    model: str, encoder: str, channels: int, tmp_path: Path, long_run: bool
) -> None:
    network, used = build_model(model, encoder, channels=channels)
    assert used == "none"
    first, last = next(network.encoder.parameters()), list(network.parameters())[-1]
    before = first.clone(), last.clone()
    images = torch.rand(2, channels, 32, 64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images), torch.ones(2, 1, 32, 64))
    loss.backward()
    torch.optim.SGD(network.parameters(), 1e-3).step()
    assert not any(torch.equal(*pair) for pair in zip(before, (first, last), strict=True))
    # A large network takes its second to be saved and loaded.
    if long_run or encoder.startswith("tu-") or (model, channels) in (("unet", 1), ("pspnet", 3)):
        save_model(network, tmp_path / "model")
        with torch.inference_mode():
            found = load_model(model, encoder, tmp_path / "model", channels)(images)
            assert torch.isfinite(found).all()
            assert torch.equal(found, network.eval()(images))


def test_a_transformer_of_one_size_takes_any_and_is_loaded_by_smp_too(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    network, _ = build_model("dpt", "tu-test_vit")
    save_model(network, tmp_path)
    assert sides_of(network) == (32, 32)
    images = torch.rand(1, 1, 64, 192)
    with torch.inference_mode():
        expected = network.eval()(images)
        assert expected.shape == (1, 1, 64, 192)
        assert torch.equal(load_model("dpt", "tu-test_vit", tmp_path)(images), expected)
        assert torch.equal(smp.from_pretrained(str(tmp_path)).eval()(images), expected)


def test_the_reference_studys_encoders_are_there() -> None:
    assert {"resnet50", "inceptionv4"} <= set(encoders())
    assert architectures()[:4] == tuple(ARCHITECTURES.built_in)


@pytest.mark.parametrize(
    ("model", "encoder"), [("unet3000", "resnet18"), ("unet", "resnet18000"), ("unet", "tu-nothing")]
)
def test_unknown_names_are_told(model: str, encoder: str) -> None:
    with pytest.raises(ModelError, match="cspine-train models lists"):
        build_model(model, encoder, "auto")


def test_imagenet_weights_without_a_network_fail_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match="'resnet18': its ImageNet weights"):
        build_model("unet", "resnet18", "imagenet")
    assert time.monotonic() - started < 15


def test_auto_falls_back_to_random_weights_and_says_so() -> None:
    with pytest.warns(UserWarning, match="resnet18: starting from random"):
        _, used = build_model("unet", "resnet18", "auto")
    assert used == "none"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_local_file_of_colour_weights_fits_grey_slices(suffix: str, tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    source = smp.Unet("resnet18", encoder_weights=None, in_channels=3).encoder
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    network, used = build_model("unet", "resnet18", str(path))
    assert len(used) == 64
    grey = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        expected = source.eval()(grey.expand(-1, 3, -1, -1))[-1]
        found = network.encoder.eval()(grey)[-1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_weights_that_fit_are_taken_as_they_are(tmp_path: Path) -> None:
    source, _ = build_model("unet", "resnet18", "none", 3)
    save_file(source.encoder.state_dict(), tmp_path / "w.safetensors")
    network, _ = build_model("unet", "resnet18", str(tmp_path / "w.safetensors"), 3)
    assert torch.equal(network.encoder.conv1.weight, source.encoder.conv1.weight)


def test_misspelt_names_are_told_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="'fnp': is not known"):
        build_model("fnp", "resnet18")
    with pytest.raises(ModelError, match=r"\(did you mean inceptionv4\?\)"):
        build_model("fpn", "inceptonv4")
    with pytest.raises(ModelError, match=r"\(did you mean tu-resnet18\?\)"):
        build_model("fpn", "tu-resnett18")


def test_weights_of_another_encoder_are_refused_by_name(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    save_file(smp.Unet("resnet34", encoder_weights=None).encoder.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="fit encoder 'resnet50'"):
        build_model("unet", "resnet50", str(tmp_path / "w.safetensors"))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("/tmp/cspine-was-fooled"),))  # noqa: S108


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_no_file_of_weights_is_unpickled(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match="file of weights alone"):
        build_model("unet", "resnet18", str(tmp_path / name))
    assert not Path("/tmp/cspine-was-fooled").exists()  # noqa: S108
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="is no state dict"):
        build_model("unet", "resnet18", str(tmp_path / "list.pt"))
    with pytest.raises(ModelError, match="is no file"):
        build_model("unet", "resnet18", str(tmp_path / "missing.pt"))


def test_saved_models_load_here_and_in_smp(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    network, _ = build_model("fpn", "resnet18")
    save_model(network, tmp_path / "model")
    save_model(network, tmp_path / "model")
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["config.json", "model.safetensors"]
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        expected = network.eval()(image)
        assert torch.equal(load_model("fpn", "resnet18", tmp_path / "model")(image), expected)
        assert torch.equal(smp.from_pretrained(str(tmp_path / "model")).eval()(image), expected)


@pytest.mark.parametrize("damage", ["pickle", "cut", "missing", "other"])
def test_a_tampered_model_is_refused(damage: str, tmp_path: Path) -> None:
    network, _ = build_model("fpn", "resnet18")
    save_model(network, tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "missing":
        path.unlink()
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="cannot be loaded .*"):
        load_model("fpn", "resnet18", tmp_path)
