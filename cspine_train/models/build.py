"""Networks: names, construction, saving and loading."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cspine_data.tools import atomic_write, make_folder, meant
from cspine_train.data.sizes import Sides
from cspine_train.errors import ModelError, RunError, reason_of
from cspine_train.extensions import ARCHITECTURES
from cspine_train.models.pretrained import give_weights

_TIMM_NAME = re.compile(r"tu-[\w.-]+")


def architectures() -> tuple[str, ...]:
    """Return the names of architectures: the project's, those of plug-ins, then SMP's others."""
    import segmentation_models_pytorch as smp

    registered = ARCHITECTURES.names()
    return (*registered, *sorted(name for name in smp.MODEL_ARCHITECTURES_MAPPING if name not in registered))


def encoders() -> tuple[str, ...]:
    """Return the names of SMP's own encoders; ``tu-NAME``, any encoder of timm, is not listed."""
    import segmentation_models_pytorch as smp

    return tuple(sorted(name for name in smp.encoders.get_encoder_names() if not name.startswith("timm-")))


def build_model(
    model: str, encoder: str, weights: str = "none", channels: int = 1, classes: int = 1
) -> tuple[nn.Module, str]:
    """Build a network.

    Parameters
    ----------
    model, encoder : str
        Names of architecture and encoder.
    weights : str
        ``imagenet``; ``none``: random; ``auto``: ImageNet weights if available, else random; or a file.
    channels : int
        Input channels: a slice and its neighbours.
    classes : int
        Output channels, see `network_classes`.

    Returns
    -------
    network : Module
        Maps (N, C, H, W) to logits (N, classes, H, W); `sides_of` returns which H and W it takes.
    weights_used : str
        ``imagenet``, ``none``, or the SHA-256 of the file.

    Raises
    ------
    ModelError
        If architecture or encoder is unknown, they are incompatible, or the weights are unavailable or do not fit
        (`ModelError.details` then lists the tensors).
    """
    network = _create(model, encoder, None, channels, classes)

    def pretrained() -> nn.Module:
        return cast("nn.Module", _create(model, encoder, "imagenet", channels, classes).encoder)

    return network, give_weights(cast("nn.Module", network.encoder), encoder, weights, pretrained)


def check_names(model: str, encoder: str) -> None:
    """Refuse, with a `ModelError`, architectures and encoders that SMP, timm and plug-ins lack; needs no network."""
    if model not in architectures():
        raise ModelError(
            f"model {model!r}: is not known{meant(model, architectures())}; cspine-train models lists them"
        )
    import segmentation_models_pytorch as smp

    if encoder.startswith("tu-"):
        import timm

        # timm also takes hf-hub:NAME and local-dir:PATH, which would access a server or a folder.
        known = _TIMM_NAME.fullmatch(encoder) and timm.is_model(encoder[3:])
        others = () if known else tuple(f"tu-{name}" for name in timm.list_models())
    else:
        others = () if encoder in smp.encoders.get_encoder_names() else encoders()
    if others:
        raise ModelError(f"encoder {encoder!r}: is not known{meant(encoder, others)}; cspine-train models lists them")


def sides_of(network: nn.Module) -> Sides:
    """Return which image sizes a network takes: multiples of its encoder's output stride.

    SMP's Unet takes other sizes, too, and stretches features to match, which shifts them by a part of a pixel that
    depends on the size: prediction and training would differ. PAN halves its encoder's output three more times; DPT
    resamples it to strides of 4 to 32.
    """
    import segmentation_models_pytorch as smp

    stride = int(cast("Any", network).encoder.output_stride)
    if isinstance(network, smp.DPT):
        stride = math.lcm(stride, 32)
    return Sides(stride, 8 * stride if isinstance(network, smp.PAN) else stride)


def _create(model: str, encoder: str, weights: str | None, channels: int, classes: int) -> nn.Module:
    # Names may come from a run folder of unknown origin.
    check_names(model, encoder)
    options: dict[str, Any] = {"encoder_name": encoder, "encoder_weights": weights}
    options |= {"in_channels": channels, "classes": classes}
    reason = ""
    for of_any_size in ({"dynamic_img_size": True}, {}) if _of_one_size(encoder) else ({},):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _architecture(model)(**options, **of_any_size)
        except RunError:
            raise
        # Architectures, encoders, timm and the hub raise errors of many kinds.
        except Exception as error:  # noqa: BLE001
            reason = reason_of(error)
    raise ModelError(
        f"{model} with encoder {encoder!r}: cannot be built ({reason}); choose another --encoder or --model, "
        "cspine-train models lists them"
    )


def _architecture(model: str) -> Callable[..., nn.Module]:
    import segmentation_models_pytorch as smp

    registered = model in ARCHITECTURES.names()
    found = ARCHITECTURES.load(model) if registered else smp.MODEL_ARCHITECTURES_MAPPING[model]
    return cast("Callable[..., nn.Module]", found)


def _of_one_size(encoder: str) -> bool:
    """Return whether a timm network takes images of one size by default."""
    import timm

    known = timm.get_pretrained_cfg(encoder.removeprefix("tu-")) if encoder.startswith("tu-") else None
    return known is not None and bool(known.fixed_input_size)


def save_model(network: Any, folder: Path) -> None:
    """Save a network as safetensors and JSON, the format of SMP's `from_pretrained`, durably (see `atomic_write`)."""
    make_folder(folder)
    names = ("config.json", "model.safetensors")
    with ExitStack() as files:
        config, weights = (files.enter_context(atomic_write(folder / name)) for name in names)
        saved = weights.with_suffix("")
        files.callback(shutil.rmtree, saved, ignore_errors=True)
        network.save_pretrained(saved)
        # safetensors makes the file readable by its owner only.
        shutil.copymode(config, saved / names[1])
        for name, temporary in zip(names, (config, weights), strict=True):
            (saved / name).replace(temporary)


def load_model(model: str, encoder: str, folder: Path, channels: int = 1, classes: int = 1) -> nn.Module:
    """Build a network and load the weights that `save_model` saved.

    Raises `ModelError` if the weights are missing, damaged, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    # The random initial weights, replaced below, must not advance the caller's random generator.
    with torch.random.fork_rng(devices=[]):
        network = _create(model, encoder, None, channels, classes)
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be loaded ({reason_of(error)}); train the run again") from None
    return network.eval()
