"""The check of a network's steps before training, compared with real steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import Result
from torch import nn

from cspine_data import open_cohort
from cspine_train import RunError, RunSettings
from cspine_train.data.datamodule import CohortSlices
from cspine_train.data.sizes import ImageSizes
from cspine_train.data.transforms import coarser
from cspine_train.errors import ModelError
from cspine_train.models.build import architectures, build_model, encoders, sides_of
from cspine_train.training.step_check import check_steps, saved_bytes

ONE_VALUE = "Expected more than 1 value per channel"
SETTINGS = RunSettings(model="pspnet", encoder="resnet18", batch_size=4, context=0)


SIZES = ImageSizes((64, 64), None, None, (64, 64))
HUGE = (10**10, 10**10)


def try_step(network: nn.Module, shape: tuple[int, int, int, int], *, training: bool) -> tuple[str, int]:
    """Take the step on the device meta: why it fails, and how many bytes are saved for the backward pass."""
    meta = copy.deepcopy(network).to("meta").train(training)
    try:
        if training:
            return "", saved_bytes(meta, shape)
        meta(torch.zeros(shape, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return " ".join(str(error).split())[:200], 0
    return "", 0


def really(network: nn.Module, shape: tuple[int, int, int, int], training: bool) -> tuple[str, int]:
    """Take the step itself: why it fails, and how many bytes are saved for the backward pass."""
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network.train(training)(torch.zeros(shape)).sum().backward()
    except (RuntimeError, ValueError, AssertionError) as error:
        return " ".join(str(error).split())[:200], 0
    return "", sum(storage.nbytes() for address, storage in kept.items() if address not in own)


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
def test_a_step_on_meta_fails_where_the_network_would_and_saves_the_same_bytes(
    model: str, encoder: str, shape: tuple[int, int, int, int], training: bool, failure: str
) -> None:
    if failure == "cannot be built":
        with pytest.raises(ModelError, match=r"cannot be built \(.*\)"):
            build_model(model, encoder)
        return
    network, _ = build_model(model, encoder, channels=shape[1])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn = torch.get_rng_state()
    meta_failure, meta_saved = try_step(network, shape, training=training)
    # The network, its gradients and all that is drawn at random are as they were.
    assert torch.equal(drawn, torch.get_rng_state())
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    told, kept = really(network, shape, training)
    assert meta_failure == told
    assert failure in told
    assert bool(failure) == bool(told)
    if not told and training:
        # Kernels for a CPU save a little of their own.
        assert kept * 0.9 <= meta_saved <= kept * 1.1


@pytest.mark.parametrize(("batch", "what"), [(1, "--batch-size 2 or more"), (4, "a larger --empty-share")])
def test_one_slice_at_a_time_is_refused_where_nothing_is_left_to_average_over(batch: int, what: str) -> None:
    network, _ = build_model("upernet", "tu-mobilenetv3_small_100")
    settings = SETTINGS.model_copy(update={"model": "upernet", "batch_size": batch})
    message = (
        r"^upernet with encoder 'resnet18': cannot train on one slice of 64,64 at a time .*batch normalisation.*; "
        rf"choose {what}$"
    )
    with pytest.raises(RunError, match=message):
        check_steps(network, settings, SIZES, 1, half=False)
    check_steps(network, settings, SIZES, 2, half=False)


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
        check_steps(OneSize(), SETTINGS, SIZES, 2, half=False)
    with pytest.raises(RunError, match=message.format("predict", "48,64")):
        check_steps(OneSize(), SETTINGS, ImageSizes((48, 64), (48, 48), None, (48, 64)), 2, half=False)


def test_a_network_that_asks_for_numbers_is_not_refused_and_stays_as_it_is() -> None:
    network, drawn = Asks(), torch.get_rng_state()
    check_steps(network, SETTINGS, SIZES, 2, half=False)
    assert torch.equal(drawn, torch.get_rng_state())
    assert int(network.norm.num_batches_tracked) == 0


def test_steps_that_do_not_go_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = build_model("unet", "resnet18")
    settings = SETTINGS.model_copy(update={"model": "unet"})
    kept = try_step(network, (2, 1, 64, 64), training=True)[1] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def free(number: float) -> None:
        memory = psutil.virtual_memory()._replace(available=int(number))
        monkeypatch.setattr("cspine_train.training.step_check.psutil.virtual_memory", lambda: memory)

    free(1.1 * kept)
    check_steps(network, settings, SIZES, 2, half=False)
    free(0.9 * kept)
    check_steps(network, settings, SIZES, 2, half=True)
    message = "step on 4 slices"
    with pytest.raises(RunError, match=message):
        check_steps(network, settings, SIZES, 2, half=False)
    # More than 2^63 elements are refused before PyTorch counts them.
    with pytest.raises(RunError, match="4 slices takes"):
        check_steps(network, settings, ImageSizes(HUGE, None, None, HUGE), 2, half=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "100000,100000"), r"size 100000,100000: a step on 8 slices takes at least 1192.1 GiB"),
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
