"""Learning rates and weight averages against their formulas; a run with all options is interrupted and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cspine_train import RunError, RunSettings, train
from cspine_train.run.folder import MONITOR
from cspine_train.training.callbacks import Plateau, WeightEMA
from cspine_train.training.optimisers import cosine_share, optimisation, precision_of
from cspine_train.training.processes import training_errors
from cspine_train.training.segmentation_module import SliceSegmenter
from tests.conftest import Stopped
from tests.test_checkpoints import ALWAYS, SMALL, history, same, weights

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_a_cosine_rises_quickly_and_falls_to_nothing() -> None:
    rates = [cosine_share(step, 100) for step in range(101)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(first > second for first, second in pairwise(rates[5:]))
    assert rates[5 + 95 // 2] == pytest.approx(0.5, abs=0.01)
    assert rates[100] == 0
    assert cosine_share(0, 1) == 1


class Scripted(lightning.LightningModule):
    """One step an epoch, with validation scores that are known beforehand."""

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.scores = scores
        #: The learning rate of each epoch.
        self.rates: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log(MONITOR, self.scores[self.current_epoch], on_step=False, on_epoch=True)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.9)


def fit(scores: Sequence[float], folder: Path, epochs: int, checkpoint: Path | None = None) -> list[float]:
    """Train on the plateau schedule; return the learning rate of each epoch. The last epoch leaves a checkpoint."""
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[Plateau()], accelerator="cpu", logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Scripted(scores)
    trainer.fit(module, DataLoader(torch.ones(1, 1)), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.rates


FULL, THIRD, NINTH = 0.9, 0.3, 0.1


@pytest.mark.parametrize(
    ("scores", "rates"),
    [
        # Five epochs without a higher score, then a third of the rate; two more, then the end.
        ([0.5] * 20, [FULL] * 6 + [THIRD] * 2),
        ([0.1, 0.5, *[0.4] * 20], [FULL] * 7 + [THIRD] * 2),
        # The first epoch at the lower rate improves: both counts start again.
        ([0.5] * 6 + [0.6] * 14, [FULL] * 6 + [THIRD] * 6 + [NINTH] * 2),
        # The smallest gain counts, for the rate as for the end: no threshold, whatever the level of the score.
        ([0.9 + 1e-6 * epoch for epoch in range(12)], [FULL] * 12),
        ([1e-6 * epoch for epoch in range(12)], [FULL] * 12),
        # A gain in the fifth epoch is in time.
        ([0.5] * 5 + [0.500001] * 15, [FULL] * 11 + [THIRD] * 2),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_rate_falls_after_five_epochs_without_gain_and_training_stops_after_seven(
    scores: list[float], rates: list[float], tmp_path: Path
) -> None:
    assert fit(scores, tmp_path, len(scores)) == pytest.approx(rates)


@pytest.mark.parametrize("stopped", [3, 5, 6, 7, 8])
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_within_its_patience_lowers_and_stops_where_it_would_have(
    stopped: int, tmp_path: Path
) -> None:
    scores = [0.5] * 20
    before = fit(scores, tmp_path, stopped)
    after = fit(scores, tmp_path, 20, tmp_path / "last.ckpt")
    assert before + after == pytest.approx([FULL] * 6 + [THIRD] * 2)


class Counted(lightning.LightningModule):
    """Sets its weights, and the statistics of batch normalisation, to known values, one a step."""

    VALUES = (2.0, 5.0, 3.0, 4.0)

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.BatchNorm1d(1)
        #: The weight and the running mean that validation sees, an epoch each.
        self.validated: list[tuple[float, float]] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return (self.network.weight * 0).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        """After the callbacks: the average holds the values of the step before."""
        self.fill()

    def on_train_start(self) -> None:
        self.fill()

    def fill(self) -> None:
        value = self.VALUES[min(self.global_step, len(self.VALUES) - 1)]
        for tensor in (self.network.weight, self.network.running_mean):
            tensor.data.fill_(value)

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.validated.append((self.network.weight.item(), self.network.running_mean.item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_validation_sees_the_average_of_weights_and_statistics(tmp_path: Path) -> None:
    average, module, steps = WeightEMA(0.9), Counted(), len(Counted.VALUES)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[average], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.ones(steps, 1)), DataLoader(torch.ones(1, 1)))
    expected = Counted.VALUES[0]
    for step, value in enumerate(Counted.VALUES[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert module.validated == [pytest.approx((expected, expected))]
    assert average.network.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("schedule", ["plateau", "onecycle", "cosine"])
def test_gradients_are_within_reach_where_they_are_to_be_shortened(schedule: str, clip_norm: float | None) -> None:
    made = optimisation(nn.Linear(1, 1), RunSettings(schedule=schedule, clip_norm=clip_norm, learning_rate=0.5), 10)
    optimizer = made if schedule == "plateau" else made["optimizer"]
    assert optimizer.defaults["fused"] is (clip_norm is None)


def test_a_run_of_all_options_goes_on_within_an_epoch_to_the_same_weights(
    phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped where pixels are coarse, and again where they are not: an average of weights is in checkpoints too."""
    options = {"schedule": "cosine", "average": 0.9, "clip_norm": 1e-3, "coarse_share": 0.5, "learning_rate": 3e-3}
    settings = RunSettings(**{**SMALL, **options, "size_hw": (96, 64), "epochs": 2, "batch_size": 16})
    seen: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}
    stop: list[int] = []
    step = SliceSegmenter.training_step

    def watched(self: SliceSegmenter, batch: Any, number: int) -> torch.Tensor:
        if stop and self.global_step == stop[0]:
            stop.pop(0)
            raise Stopped
        found = tuple(batch.images.shape[2:]), batch.images.sum()
        assert torch.equal(seen.setdefault(self.global_step, found)[1], found[1])
        return step(self, batch, number)

    monkeypatch.setattr(SliceSegmenter, "training_step", watched)
    train(phantom_store, tmp_path / "whole", settings)
    sizes = [seen[number][0] for number in sorted(seen)]
    half = len(sizes) // 2
    assert len(set(sizes[:half])) == len(set(sizes[half:])) == 1
    assert sizes[0] < sizes[-1]
    stop[:] = [2, len(sizes) - 2]
    for _ in range(2):
        with pytest.raises(Stopped):
            train(phantom_store, tmp_path / "stopped", settings, checkpoint_minutes=ALWAYS)
    train(phantom_store, tmp_path / "stopped", settings)
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert history(tmp_path / "stopped")[-1][2:] == history(tmp_path / "whole")[-1][2:]


def test_steps_are_made_for_each_size_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order sizes come: a run that goes on begins with another one."""
    made: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    network = nn.Conv2d(1, 1, 3)
    segmenter = SliceSegmenter(network, RunSettings(compile=True), ["A"])
    for size in (8, 9, 10, 8):
        images = torch.rand(2, 1, size, size)
        assert torch.equal(segmenter._forward(images), network(images))
    assert len(made) == 3


def test_steps_that_cannot_be_compiled_are_told_in_one_line(tmp_path: Path) -> None:
    from torch._dynamo.exc import TorchDynamoException

    trainer = SimpleNamespace(world_size=1)
    told = r"--compile here \(.*No working"
    with pytest.raises(RunError, match=told), training_errors(trainer, tmp_path):
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO")


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("auto", "flags : avx2 avx512_bf16", "bf16-mixed"),
        ("auto", "flags : avx2", "32-true"),
        ("32", "flags : avx512_bf16", "32-true"),
        ("bf16", "", "bf16-mixed"),
    ],
)
def test_automatic_precision_is_that_of_the_processor(
    name: str, flags: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("cspine_train.training.optimisers._cpu_information", lambda: flags)
    assert precision_of(name) == expected
