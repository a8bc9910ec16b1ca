"""The check of a network's steps before training, compared with real steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from click.testing import Result
from torch import nn

from cspine_data import open_cohort
from cspine_train import Machines, RunError, RunSettings
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sizes import ImageSizes
from cspine_train.data.transforms import coarser
from cspine_train.errors import ModelError
from cspine_train.models.build import architectures, build_model, encoders, sides_of
from cspine_train.planning.run_plan import plan_run
from cspine_train.training.losses import SegmentationLoss
from cspine_train.training.step_check import LiveBytes, StepCheck, training_bytes, validation_bytes

ONE_VALUE = "Expected more than 1 value per channel"
SETTINGS = RunSettings(model="pspnet", encoder="resnet18", batch_size=4, context=0)


SIZES = ImageSizes((64, 64), None, None, (64, 64))
HUGE = (10**10, 10**10)
SMALL = ("--model", "unet", "--encoder", "tu-test_resnet", "--weights", "none", "--axis", "2", "--precision", "32")
SMALL += ("--context", "0", "--crop-margin-mm", "whole")
WHOLE: dict[str, Any] = {"context": 0, "crop_margin_mm": None}


def needed(network: nn.Module, settings: RunSettings, sizes: ImageSizes, slices: int) -> float:
    data: Any = SimpleNamespace(sizes=sizes, smallest_batch=slices)
    nothing: Any = None
    return StepCheck(network, nothing, nothing).needed_bytes(settings, data)


def try_step(network: nn.Module, shape: tuple[int, int, int, int], *, training: bool) -> tuple[str, int]:
    """Take the step on the device meta: why it fails, and its peak memory in bytes."""
    meta = copy.deepcopy(network).to("meta").train(training)
    try:
        return "", training_bytes(meta, shape, "dice_bce", 1) if training else validation_bytes(meta, shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        return " ".join(str(error).split())[:200], 0


def really(network: nn.Module, shape: tuple[int, int, int, int], training: bool) -> tuple[str, int]:
    """Take the step itself: why it fails, and its peak memory in bytes."""
    loss = SegmentationLoss("dice_bce")
    try:
        with LiveBytes(network) as live, torch.set_grad_enabled(training):
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter) if training else None
            logits = network.train(training)(torch.zeros(shape))
            if training:
                value = loss(logits, torch.zeros(shape[0], 1, *shape[2:]))
                del logits
                network.zero_grad()
                value.backward()
    except (RuntimeError, ValueError, AssertionError) as error:
        return " ".join(str(error).split())[:200], 0
    return "", live.peak


@pytest.mark.parametrize(
    ("model", "encoder", "shape", "training", "failure"),
    [
        ("unet", "tu-mobilenetv3_small_100", (2, 3, 64, 32), True, ""),
        ("fpn", "tu-mobilenetv3_small_100", (2, 1, 32, 32), True, ""),
        ("linknet", "tu-test_convnext", (1, 1, 64, 64), True, ""),
        ("segformer", "tu-test_vit", (2, 1, 64, 64), True, "cannot be built"),
        ("dpt", "tu-test_vit", (1, 1, 64, 96), True, ""),
        ("unet", "tu-mobilenetv3_small_100", (1, 1, 32, 32), True, ONE_VALUE),
        ("unet", "tu-mobilenetv3_small_100", (1, 1, 32, 32), False, ""),
        ("pspnet", "tu-mobilenetv3_small_100", (1, 1, 96, 96), True, ""),
        ("pspnet", "tu-mobilenetv3_small_100", (1, 1, 8, 8), True, ONE_VALUE),
        ("upernet", "tu-mobilenetv3_small_100", (1, 1, 96, 96), True, ONE_VALUE),
        ("pspnet", "mit_b0", (2, 1, 8, 8), True, "Kernel size can't be greater than actual input size"),
        ("unet", "tu-test_maxvit", (2, 1, 64, 64), True, "must be divisible by window"),
    ],
)
def test_a_step_on_meta_fails_where_the_network_would_and_takes_as_much_memory(
    model: str, encoder: str, shape: tuple[int, int, int, int], training: bool, failure: str
) -> None:
    if failure == "cannot be built":
        with pytest.raises(ModelError, match=r"cannot be built \(.*\)"):
            build_model(model, encoder)
        return
    network, _ = build_model(model, encoder, channels=shape[1])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn = torch.get_rng_state()
    meta_failure, meta_bytes = try_step(network, shape, training=training)
    # The network, its gradients and all that is drawn at random are as they were.
    assert torch.equal(drawn, torch.get_rng_state())
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    told, needed = really(network, shape, training)
    assert meta_failure == told
    assert failure in told
    assert bool(failure) == bool(told)
    # Kernels for a CPU save a little of their own.
    assert needed * 0.9 <= meta_bytes <= needed * 1.1


@pytest.mark.parametrize(("batch", "what"), [(1, "--batch-size 2 or more"), (4, "a larger --empty-share")])
def test_one_slice_at_a_time_is_refused_where_nothing_is_left_to_average_over(batch: int, what: str) -> None:
    network, _ = build_model("upernet", "tu-mobilenetv3_small_100")
    settings = SETTINGS.model_copy(update={"model": "upernet", "batch_size": batch})
    message = (
        r"^upernet with encoder 'resnet18': cannot train on one slice of 64,64 at a time .*batch normalisation.*; "
        rf"choose {what}$"
    )
    with pytest.raises(RunError, match=message):
        needed(network, settings, SIZES, 1)
    needed(network, settings, SIZES, 2)


class OneSize(nn.Module):
    """Takes images of one size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != 48:
            raise AssertionError("Input width doesn't match model (48).")
        return images * nn.Parameter(torch.ones(1))


def test_every_size_that_a_run_comes_to_is_tried(phantom_store: Path) -> None:
    cohort, settings = open_cohort(phantom_store), RunSettings(pixel_mm=2.0, coarse_share=0.5, crop_margin_mm=10)
    data = CohortSlices(cohort, cohort.split(variant="n4"), settings)
    assert data.smallest_batch == settings.batch_size
    fine, coarse = data.sizes.trained_hw
    assert fine == data.sizes.crop_hw
    batch = torch.zeros(1, 1, *fine)
    # The coarse image holds the whole fine one.
    shown = coarser(batch + 1, batch + 1, coarse)[1]
    assert shown.sum() == pytest.approx(round(fine[0] / 1.5) * round(fine[1] / 1.5))
    few = settings.model_copy(update={"batch_size": 10**6, "coarse_share": 0.0})
    data = CohortSlices(cohort, cohort.split(variant="n4"), few)
    assert len(data.sizes.trained_hw) == 1
    assert 50 < data.smallest_batch < 1000


class Asks(nn.Module):
    """Asks its images for a number, which the shadow's do not have; draws one too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(images) * float(images.sum().item()) + torch.rand(1)


def test_a_network_of_one_size_is_refused_for_others_in_training_and_validation() -> None:
    message = (
        r"cannot {} slices of {} \(Input width doesn't match model \(48\)\.\); choose another --size, --encoder or"
    )
    with pytest.raises(RunError, match=message.format("train on", "64,64")):
        needed(OneSize(), SETTINGS, SIZES, 2)
    with pytest.raises(RunError, match=message.format("predict", "48,64")):
        needed(OneSize(), SETTINGS, ImageSizes((48, 64), (48, 48), None, (48, 64)), 2)


def test_a_network_that_asks_for_numbers_is_not_refused_and_stays_as_it_is() -> None:
    network, drawn = Asks(), torch.get_rng_state()
    needed(network, SETTINGS, SIZES, 2)
    assert torch.equal(drawn, torch.get_rng_state())
    assert int(network.norm.num_batches_tracked) == 0


def test_memory_of_a_run_grows_with_its_steps() -> None:
    network, _ = build_model("unet", "resnet18")
    settings = SETTINGS.model_copy(update={"model": "unet", "precision": "32"})
    two, four, eight = (needed(network, settings, SIZES, slices) for slices in (2, 4, 8))
    weights = sum(parameter.nbytes for parameter in network.parameters())
    # The process, the optimiser's two copies of the weights, and the gradients.
    assert two > psutil.Process().memory_info().rss + 3 * weights
    assert four < eight
    crops = ImageSizes(SIZES.slice_hw, (32, 32), None, SIZES.validation_hw)
    assert needed(network, settings, crops, 8) < eight
    half, average = settings.model_copy(update={"precision": "bf16"}), settings.model_copy(update={"average": 0.9})
    assert needed(network, half, SIZES, 8) < eight
    assert needed(network, average, SIZES, 8) == pytest.approx(eight + weights, rel=0.01)
    # More than 2^63 elements are counted without PyTorch.
    assert needed(network, settings, ImageSizes(HUGE, None, None, HUGE), 8) > 1e20


def test_a_loss_that_needs_numbers_does_not_stop_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits.mean() * float(logits.sum().item())

    network, _ = build_model("unet", "tu-test_resnet")
    usual = needed(network, SETTINGS, SIZES, 2)
    monkeypatch.setattr("cspine_train.training.step_check.LOSSES", SimpleNamespace(load=lambda _: asks))
    assert needed(network, SETTINGS, SIZES, 2) == pytest.approx(usual, rel=0.1)


def limit_between(store: Path, settings: RunSettings, share: float) -> int:
    """Return a memory limit that lies between the process's own memory and what a run needs."""
    cohort = open_cohort(store)
    network, _ = build_model(settings.model, settings.encoder)
    check = StepCheck(network, cohort, cohort.split(variant="n4"))
    needed_bytes, least = check.needed_bytes(settings, check.data_of(settings)), needed(network, settings, SIZES, 1)
    return int(least + share * (needed_bytes - least))


def test_a_run_beyond_the_limit_gets_settings_that_fit_and_work(
    run_train: Callable[..., Result], phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cspine_train.planning.run_plan._timed", lambda *_: (1.0, 1.0))
    run = tmp_path / "run"
    large = ("--pixel-mm", "1", "--batch-size", "64", "--epochs", "1")
    settings = RunSettings(
        model="unet", encoder="tu-test_resnet", axes=(2,), pixel_mm=1.0, batch_size=64, precision="32", **WHOLE
    )
    limit = limit_between(phantom_store, settings, 0.6)
    asked = ("run", "--store", phantom_store, *SMALL, *large, "--memory", f"{limit}B", "-o", run)
    refused, planned = run_train(*asked), run_train(*asked, "--plan")
    assert refused.exit_code == planned.exit_code == 1
    assert planned.stderr.count("\n") == 1
    assert "GiB are allowed" in planned.stdout
    for told in (refused.stderr, planned.stderr):
        batch, pixel = re.findall(r"choose (--batch-size \d+), or (--pixel-mm [\d.]+)$", told.strip())[0]
        assert 1 < int(batch.split()[1]) < 64
        assert 1 < float(pixel.split()[1]) < 20
        for proposal in (batch, pixel):
            fits = run_train(*asked, *proposal.split(), "--plan")
            assert fits.exit_code == 0, fits.output
    assert not run.exists()


def test_a_plan_names_steps_sizes_memory_and_time_and_makes_no_folder(
    run_train: Callable[..., Result], phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = (*SMALL, "--pixel-mm", "12", "--epochs", "3", "--coarse-share", "0.5", "--average", "0.9")
    planned = run_train("run", "--store", phantom_store, *small, "--plan")
    assert planned.exit_code == 0, planned.output
    steps, batch, height, width = map(int, re.findall(r"\d+", planned.stdout.splitlines()[0]))
    assert batch == 8
    assert (height % 32, width % 32) == (0, 0)
    assert "GiB are free" in planned.stdout
    assert "s per step" in planned.stdout
    assert "3 epochs: about 1 min" in planned.stdout
    assert list(tmp_path.iterdir()) == []
    settings = RunSettings(model="unet", encoder="tu-test_resnet", weights="none", axes=(2,), pixel_mm=12.0, **WHOLE)
    plan = plan_run(phantom_store, settings, Machines(memory="1TB"))
    assert plan.time
    assert (plan.steps, plan.time.steps, plan.batch, plan.size_hw) == (steps, steps, batch, (height, width))
    assert plan.time.seconds(settings) == 20 * (steps * plan.time.step_s + plan.time.validation_s) > 0
    assert plan.time.seconds(RunSettings(minutes=3)) == 180
    assert (plan.allowed_bytes, plan.refusal) == (1e12, None)


@pytest.mark.parametrize("size", ["8GX", "much", "-1GB", ""])
def test_a_memory_limit_that_is_no_size_is_refused(size: str, run_train: Callable[..., Result]) -> None:
    refused = run_train("run", "--memory", size)
    assert refused.exit_code == 2
    assert f"--memory: {size!r} is not a size such as 8GB" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "100000,100000"), r"size 100000,100000: training on 8 slices at a time takes about \d+\.\d GiB"),
        (("--batch-size", "1"), r"upernet with encoder 'tu-mobilenetv3_small_100': cannot train on one slice of \d+"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_there_is_a_run(
    options: tuple[str, str], message: str, run_train: Callable[..., Result], phantom_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    small = ("--model", "upernet", "--encoder", "tu-mobilenetv3_small_100", "--weights", "none", "--pixel-mm", "3")
    result = run_train("run", "--store", phantom_store, *small, *options, "-o", run)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
    assert not run.exists()


def test_combinations_can_or_are_refused_with_a_reason(long_run: bool) -> None:
    """Try every architecture with every encoder of SMP's own; where time is short build a few, and try fewer."""
    chosen = encoders() if long_run else ("vgg11", "mit_b0")
    refused = set()
    for encoder in chosen:
        for model in architectures():
            try:
                with torch.device("meta"):
                    network, _ = build_model(model, encoder)
            except ModelError as error:
                if "item() cannot be called" not in str(error):
                    refused.add((model, encoder))
                    continue
                network, _ = build_model(model, encoder)
            if not long_run and model not in ("fpn", "pspnet", "pan", "segformer"):
                continue
            multiple, least = sides_of(network)
            # 32 is as small as slices get; two of them are enough for any.
            side = max(least, 32)
            assert try_step(network, (2, 1, side, side + multiple), training=True)[0] == "", (model, encoder)
            assert try_step(network, (1, 1, side + multiple, side), training=False)[0] == "", (model, encoder)
            alone, _ = try_step(network, (1, 1, side, side), training=True)
            assert not alone or alone.startswith(ONE_VALUE), (model, encoder)
    dilated = {"deeplabv3", "deeplabv3plus", "pan"}
    without = tuple(name for name in chosen if name.startswith(("densenet", "inception", "vgg", "xception")))
    transformers = tuple(name for name in chosen if name.startswith("mit_"))
    assert refused == {
        *(("dpt", encoder) for encoder in chosen),
        *((model, encoder) for model in dilated for encoder in without),
        *((model, encoder) for model in ("linknet", "unetplusplus") for encoder in transformers),
    }
