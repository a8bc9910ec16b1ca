"""What an encoder starts from: files of every form, the package, what a mismatch is told by."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from cspine_train.cli.commands import main as train_main
from cspine_train.errors import ModelError
from cspine_train.models.build import build_model
from cspine_train.models.pretrained import give_weights, load_encoder, packaged_state, read_state, weights_at_hand

LITE0 = "tu-tf_efficientnet_lite0"
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def classifier() -> State:
    """A small residual network with its classifier, as timm and torchvision name its tensors."""
    return dict(timm.create_model("test_resnet").state_dict())


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: renamed(state, "module."),
        lambda state: {"arch": "test_resnet", "state_dict": renamed(state, "module.")},
        lambda state: {"model": state, "epoch": 1},
        lambda state: {**renamed(state, "encoder."), "decoder.blocks.0.conv1.0.weight": torch.ones(3)},
        lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
        lambda state: {name: tensor.half() for name, tensor in state.items()},
    ],
    ids=["plain", "parallel", "timm", "nested", "smp", "old", "half"],
)
def test_every_form_of_a_file_fits(form: Callable[[State], dict[str, Any]], classifier: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(form(classifier), path)
    encoder = smp.encoders.get_encoder("tu-test_resnet", weights=None)
    assert len(give_weights(encoder, "tu-test_resnet", str(path), nn.Identity)) == 64
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, classifier[name.removeprefix("model.")], atol=1e-3, rtol=1e-3)


def test_the_model_of_a_run_gives_its_encoder(tmp_path: Path) -> None:
    source, _ = build_model("fpn", "tu-test_convnext", channels=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    network, _ = build_model("unet", "tu-test_convnext", str(tmp_path / "model.safetensors"), 3)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, source.encoder.state_dict()[name])


@pytest.mark.parametrize("encoder", ["tu-test_convnext", "tu-test_nfnet", "tu-densenet121"])
@pytest.mark.parametrize("model", ["unet", "pspnet"])
def test_a_classifier_of_timm_fits_its_features_of_however_many_stages(model: str, encoder: str) -> None:
    whole = timm.create_model(encoder.removeprefix("tu-")).eval()
    target = smp.encoders.get_encoder(encoder, depth=5 if model == "unet" else 3, weights=None).eval()
    load_encoder(target, encoder, whole.state_dict(), "test")
    plain = {name.replace(".", "_"): tensor for name, tensor in whole.state_dict().items()}
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, plain[name.removeprefix("model.").replace(".", "_")])


def test_the_names_of_torchvisions_densenet_are_known() -> None:
    target = smp.encoders.get_encoder("densenet121", weights=None)
    state = {
        name.replace("norm1", "norm.1")
        .replace("conv1", "conv.1")
        .replace("norm2", "norm.2")
        .replace("conv2", "conv.2"): value
        for name, value in target.state_dict().items()
        # Those checkpoints are older than this buffer.
        if "num_batches_tracked" not in name
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    load_encoder(target, "densenet121", state, "test")


def test_a_deeper_network_does_not_pass_for_a_shallower_one() -> None:
    target = smp.encoders.get_encoder("resnet18", weights=None)
    deeper = smp.encoders.get_encoder("resnet34", weights=None).state_dict()
    with pytest.raises(ModelError, match=r"Unexpected.*layer1\.2\.conv1\.weight"):
        load_encoder(target, "resnet18", deeper, "w")
    stages = timm.create_model("test_convnext", depths=(1, 2, 5, 2)).state_dict()
    target = smp.encoders.get_encoder("tu-test_convnext", weights=None)
    with pytest.raises(ModelError, match=r"Unexpected.*stages\.2\.blocks\.4\.\w+"):
        load_encoder(target, "tu-test_convnext", stages, "w")


@pytest.mark.parametrize("model", ["unet", "pspnet"])
def test_a_classifier_fits_an_encoder_of_smp(model: str, tmp_path: Path) -> None:
    whole = {**smp.encoders.get_encoder("resnet18", weights=None).state_dict(), "fc.weight": torch.ones(1000, 512)}
    save_file(whole, tmp_path / "w.safetensors")
    network, _ = build_model(model, "resnet18", str(tmp_path / "w.safetensors"), 3)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_a_mismatch_lists_the_tensors(phantom_store: Path, tmp_path: Path) -> None:
    right = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    wrong = {**right, "layer1.0.conv1.weight": torch.ones(64, 64, 1, 1), "layer4.0.bn1.bias": torch.ones(256)}
    wrong["layer1.7.conv1.weight"] = torch.ones(2, 3)
    del wrong["bn1.weight"]
    save_file(wrong, tmp_path / "w.safetensors")
    options = ("--encoder", "resnet18", "--weights", str(tmp_path / "w.safetensors"), "-o", str(tmp_path / "run"))
    result = CliRunner().invoke(train_main, ["run", "--store", str(phantom_store), *options])
    assert result.exit_code == 1
    *details, error = result.stderr.splitlines()
    for words in (("Missing", "bn1.weight"), ("layer1.0.conv1.weight", "[64, 64, 1, 1]", "[64, 64, 3, 3]"),
                  ("layer4.0.bn1.bias", "[256]", "[512]"), ("Unexpected", "layer1.7.conv1.weight")):  # fmt: skip
        assert [line for line in details if all(word in line for word in words)], words
    assert error.startswith(f"Error: {tmp_path / 'w.safetensors'}: does not fit encoder 'resnet18'")
    assert not (tmp_path / "run").exists()


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"epoch": 1}
    endless["model"] = endless
    for number, content in enumerate((endless, {}, {"state_dict": {"a": 1}}, {1: torch.ones(1)})):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(ModelError, match="is no state dict"):
            read_state(path)


def test_one_channel_gives_what_equal_colours_gave() -> None:
    colour = smp.encoders.get_encoder("tu-test_convnext", in_channels=3, weights=None).eval()
    target = smp.encoders.get_encoder("tu-test_convnext", in_channels=1, weights=None).eval()
    load_encoder(target, "tu-test_convnext", colour.state_dict(), "w")
    grey = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        expected, found = colour(grey.expand(-1, 3, -1, -1))[1:], target(grey)[1:]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [2, 5, 7])
def test_more_channels_repeat_the_colours_at_the_same_scale(channels: int) -> None:
    colour = smp.encoders.get_encoder("resnet18", in_channels=3, weights=None)
    target = smp.encoders.get_encoder("resnet18", in_channels=channels, weights=None)
    load_encoder(target, "resnet18", colour.state_dict(), "w")
    for channel in range(channels):
        expected = colour.conv1.weight[:, channel % 3] * 3 / channels
        torch.testing.assert_close(target.conv1.weight[:, channel], expected)


def test_a_download_leaves_the_random_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cspine_train.models.pretrained._is_cached", lambda *_: True)
    colour, target = (smp.encoders.get_encoder("tu-test_convnext", in_channels=2, weights=None) for _ in range(2))
    drawn = torch.get_rng_state()

    def downloaded() -> nn.Module:
        torch.rand(1)
        return colour

    assert give_weights(target, "tu-test_convnext", "imagenet", downloaded) == "imagenet"
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(target.model.stem_0.weight, colour.model.stem_0.weight)


def test_colours_that_are_folded_into_channels_become_grey_too() -> None:
    """As TResNet's first layer has them: each pixel of a block, and for each its colours."""
    colour, target = (
        smp.encoders.get_encoder("tu-tresnet_m", in_channels=channels, depth=2, weights=None).eval()
        for channels in (3, 1)
    )
    load_encoder(target, "tu-tresnet_m", colour.state_dict(), "w")
    grey = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        expected, found = colour(grey.expand(-1, 3, -1, -1))[-1], target(grey)[-1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_packaged_imagenet_weights_give_every_feature_that_timm_gives() -> None:
    network, used = build_model("unet", LITE0, "imagenet", 3)
    assert used == "imagenet"
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True)
    state = packaged_state(LITE0)
    assert state is not None
    assert len(state) == 296
    whole.load_state_dict({name: tensor for name, tensor in state.items() if name in whole.state_dict()})
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        expected, found = whole.eval()(images), network.encoder.eval()(images)[1:]
    assert len(expected) == len(found) == 5
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weights", ["auto", "imagenet"])
def test_only_the_encoder_differs_from_random_weights(weights: str) -> None:
    torch.manual_seed(1)
    random, _ = build_model("fpn", LITE0, "none")
    torch.manual_seed(1)
    network, used = build_model("fpn", LITE0, weights)
    assert used == "imagenet"
    assert torch.equal(network.encoder.model.conv_stem.weight, packaged_state(LITE0)["conv_stem.weight"].sum(1, True))
    for name, tensor in network.decoder.state_dict().items():
        assert torch.equal(tensor, random.decoder.state_dict()[name])


def test_auto_without_weights_is_what_none_is() -> None:
    torch.manual_seed(1)
    random, _ = build_model("unet", "resnet18", "none")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="ImageNet weights for resnet18"):
        network, _ = build_model("unet", "resnet18", "auto")
    assert all(torch.equal(tensor, random.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_a_package_of_other_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = packaged_state(LITE0)
    assert state is not None
    names = list(state)
    swapped = [*names[2:4], *names[:2], *names[4:]]
    for other in ({name: state[name] for name in swapped}, {name: state[name] for name in names[1:]}):
        monkeypatch.setattr("cspine_train.models.pretrained.read_state", lambda _, other=other: other)
        with pytest.raises(ModelError, match="those of tu-tf_efficientnet_lite0"):
            packaged_state(LITE0)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert packaged_state(LITE0) is None
    assert LITE0 not in weights_at_hand(())
    with pytest.raises(ModelError, match="cannot be downloaded"):
        build_model("unet", LITE0, "imagenet")


def test_encoders_that_nobody_trained_are_told_apart_from_a_closed_network() -> None:
    message = "'{}': no ImageNet weights are published .* --weights FILE"
    for name in ("resnext101_32x16d", "tu-efficientnet_b8"):
        with pytest.raises(ModelError, match=message.format(name)):
            give_weights(nn.Identity(), name, "imagenet", nn.Identity)


def test_the_list_of_models_says_whose_weights_are_at_hand() -> None:
    result = CliRunner().invoke(train_main, ["models"])
    assert result.exit_code == 0
    assert f"ImageNet weights that need no network: {LITE0}" in result.output


MIRROR = """
import hashlib, json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Mirror(BaseHTTPRequestHandler):
    # As a mirror that serves files, and has no page at its root.
    files, asked = {}, []

    def do_GET(self):
        self.asked.append(self.path)
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"' + hashlib.sha256(content or b"").hexdigest() + '"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[1]}
os.environ.pop("HF_HUB_OFFLINE", None)

import timm
from safetensors.torch import save
from cspine_train.errors import ModelError
from cspine_train.models.build import build_model

wanted = timm.create_model("test_resnet").state_dict()
Mirror.files["/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"] = save(wanted)

def start(encoder):
    began = time.monotonic()
    try:
        network, used = build_model("linknet", encoder, "imagenet", 3)
        same = bool((network.encoder.model.conv1[0].weight == wanted["conv1.0.weight"]).all())
    except ModelError as error:
        used, same = str(error), None
    return used, same, time.monotonic() - began

found = {"not there": start("tu-mobilenetv3_small_100"), "there": start("tu-test_resnet"), "root": "/" in Mirror.asked}
server.shutdown()
server.server_close()
found |= {"cached": start("tu-test_resnet"), "neither": start("tu-test_efficientnet")}
from huggingface_hub import constants
found["offline"] = os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE
print(json.dumps(found))
"""


def test_a_mirror_is_asked_for_the_file_and_nothing_is_switched_off(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MIRROR, str(tmp_path)], capture_output=True, text=True, check=True, timeout=200
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["there"][:2] == ["imagenet", True]
    assert found["cached"][:2] == ["imagenet", True]
    for name in ("not there", "neither"):
        assert "cannot be downloaded" in found[name][0]
    # The library alone tries for half a minute where there is no server.
    assert found["neither"][2] < 15
    assert found["root"] is False
    assert found["offline"] == [None, False]
