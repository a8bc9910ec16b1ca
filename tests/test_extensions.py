"""Losses, augmentations and architectures of a plug-in package, and what its absence does."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from pydantic import ValidationError

from cspine_train import RunError, RunSettings, load_run, train
from cspine_train.data.augmentation import Augmentation, Stream, sample_seeds
from cspine_train.errors import ModelError
from cspine_train.extensions import ARCHITECTURES, AUGMENTATIONS, BUILT_IN, LOSSES, load, names
from cspine_train.models.build import architectures, build_model, load_model, save_model
from cspine_train.run.record import load_record
from cspine_train.training.losses import SegmentationLoss

pytestmark = pytest.mark.usefixtures("without_pictures")

PLUG_IN = """
import functools
import segmentation_models_pytorch as smp

def squared_error(logits, shares, counted):
    return ((logits.sigmoid() - shares) ** 2).mean()

def offset(images, masks, stream):
    return images + stream.normal(1).view(-1, 1, 1, 1), masks

unet_scse = functools.partial(smp.Unet, decoder_attention_type="scse")
"""
ENTRY_POINTS = """
[cspine.losses]
squared_error = cspine_plug_in:squared_error
dice = cspine_plug_in:squared_error
../up = cspine_plug_in:squared_error
broken = cspine_plug_in_that_is_missing:loss

[cspine.augmentations]
offset = cspine_plug_in:offset

[cspine.architectures]
unet-scse = cspine_plug_in:unet_scse
"""
CHOICES = {"model": "unet-scse", "loss": "squared_error", "augment": "light+offset"}
SMALL = {"encoder": "tu-test_resnet", "weights": "none", "pixel_mm": 12.0, "precision": "32", "epochs": 1}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Install the plug-in as pip would: a module, and its metadata beside it."""

    def installed() -> None:
        site = tmp_path / "site-packages"
        metadata = site / "cspine_plug_in-1.0.dist-info"
        metadata.mkdir(parents=True)
        (site / "cspine_plug_in.py").write_text(PLUG_IN)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cspine-plug-in\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
        monkeypatch.syspath_prepend(site)

    monkeypatch.delitem(sys.modules, "cspine_plug_in", raising=False)
    return installed


@pytest.mark.parametrize("group", BUILT_IN)
def test_what_the_project_has_is_there_without_a_plug_in(group: str) -> None:
    assert names(group)[: len(BUILT_IN[group])] == tuple(BUILT_IN[group])
    assert all(load(group, name) is not None for name in BUILT_IN[group])


def test_a_plug_in_adds_names_and_replaces_none(install: Callable[[], None]) -> None:
    assert "squared_error" not in names(LOSSES)
    with pytest.raises(RunError, match=r"cspine\.losses: 'squared_error' is unknown"):
        load(LOSSES, "squared_error")
    install()
    assert set(names(LOSSES)) - set(BUILT_IN[LOSSES]) == {"squared_error", "broken"}
    assert load(LOSSES, "dice").__module__ == "cspine_train.training.losses"
    with pytest.raises(RunError, match=r"plug-in 'broken' of cspine\.losses: cannot be imported .*missing"):
        load(LOSSES, "broken")


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", "squared_error"), ("augment", "light+offset"), ("augment", "offset"), ("augment", "offset+light")],
)
def test_settings_accept_the_names_of_installed_plug_ins_only(
    field: str, value: str, install: Callable[[], None]
) -> None:
    with pytest.raises(ValidationError, match="is unknown.*install its plug-in"):
        RunSettings(**{field: value})
    install()
    assert getattr(RunSettings(**{field: value}), field) == value
    for other in ("", "nothing", f"{value}+", f"{value}+nothing", "os:system"):
        with pytest.raises(ValidationError, match="is unknown"):
            RunSettings(**{field: other})


def test_a_plug_ins_loss_is_computed_in_float32_without_ignored_pixels(install: Callable[[], None]) -> None:
    install()
    logits, shares = torch.zeros(1, 1, 2, 2).bfloat16(), torch.ones(1, 2, 2, 2)
    shares[:, 1, 0] = 0
    # Of four pixels two count; the other two are background beyond doubt, and right.
    assert SegmentationLoss("squared_error")(logits, shares).item() == pytest.approx(2 * 0.25 / 4)


def test_a_plug_ins_change_comes_last_and_leaves_the_others_as_they_were(install: Callable[[], None]) -> None:
    install()
    images, seeds = torch.rand(4, 1, 32, 32), sample_seeds(0, 0, 4)
    arguments = images, images.clone(), torch.zeros(4, dtype=torch.int64), seeds
    light, light_masks = Augmentation("light")(*arguments)
    changed, masks = Augmentation("light+offset")(*arguments)
    expected = Stream(seeds, "offset", images.device).normal(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(changed, light + expected)
    assert torch.equal(masks, light_masks)
    alone, _ = Augmentation("offset")(*arguments)
    torch.testing.assert_close(alone, images + expected)
    with pytest.raises(RunError, match="more than one level"):
        Augmentation("light+strong")


def test_an_alias_is_built_saved_and_loaded(
    install: Callable[[], None], tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    import segmentation_models_pytorch as smp

    with pytest.raises(ModelError, match="'unet-scse'"):
        build_model("unet-scse", "resnet18")
    install()
    assert "unet-scse" in architectures()
    assert "unet-scse" in run_train("models").stdout
    network, _ = build_model("unet-scse", "resnet18")
    plain, _ = build_model("unet", "resnet18")
    assert any("attention" in name for name in network.state_dict().keys() - plain.state_dict().keys())
    save_model(network, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["decoder_attention_type"] == "scse"
    images = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        expected = network.eval()(images)
        assert torch.equal(load_model("unet-scse", "resnet18", tmp_path / "model")(images), expected)
        assert torch.equal(smp.from_pretrained(str(tmp_path / "model")).eval()(images), expected)


def test_a_run_with_a_plug_in_needs_it_to_be_read(
    install: Callable[[], None], phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(sys, "path", list(sys.path))
        install()
        assert train(phantom_store, tmp_path / "run", RunSettings(**CHOICES, **SMALL)).finished
        assert isinstance(load(ARCHITECTURES, "unet-scse"), functools.partial)
        assert load_run(tmp_path / "run").record.settings.model == "unet-scse"
        site = sys.path[0]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != site])
    assert "offset" not in names(AUGMENTATIONS)
    with pytest.raises(RunError, match=r"settings\.loss: .*'squared_error' is unknown"):
        load_record(tmp_path / "run")


def test_a_misspelt_name_is_refused_with_the_nearest(phantom_store: Path, run_train: Callable[..., Result]) -> None:
    for option, name, nearest in (("--loss", "dice_bec", "dice_bce"), ("--augment", "ligth", "light")):
        result = run_train("run", "--store", phantom_store, option, name)
        assert result.exit_code == 2
        assert option in result.stderr
        assert f"did you mean {nearest}?" in result.stderr
