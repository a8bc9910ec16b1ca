"""Which networks there are, and how one is built: architecture, encoder, first weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cspine_train.errors import ModelError, meant
from cspine_train.transforms import Sides

REFERENCE_MODELS = ("unet", "fpn", "linknet", "pspnet")
_HUB_PATIENCE_S = 4.0


def architectures() -> tuple[str, ...]:
    """Return the names of the architectures, those of the reference study first."""
    import segmentation_models_pytorch as smp

    others = sorted(name for name in smp.MODEL_ARCHITECTURES_MAPPING if name not in REFERENCE_MODELS)
    return (*REFERENCE_MODELS, *others)


def encoders() -> tuple[str, ...]:
    """Return the names of SMP's own encoders; any timm encoder is reached as ``tu-NAME`` besides."""
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
        ``imagenet``; ``none``; ``auto``: ImageNet weights where they can be had, else random ones; or a file.
    channels : int
        Of the images: a slice, and its neighbours on both sides if the network sees them.
    classes : int
        Channels of the output, see `network_classes`.

    Returns
    -------
    network : Module
        Maps (N, C, H, W) to logits (N, classes, H, W); H and W are what `sides_of` says.
    weights_used : str
        ``imagenet``, ``none``, or the SHA-256 of the file.

    Raises
    ------
    ModelError
        If there is no such architecture or encoder, they do not go together, or the weights cannot be had.
    """
    if model not in architectures():
        raise ModelError(
            f"model {model!r}: is not known{meant(model, architectures())}; cspine-train models lists them"
        )
    import segmentation_models_pytorch as smp

    if not encoder.startswith("tu-") and encoder not in smp.encoders.get_encoder_names():
        raise ModelError(
            f"encoder {encoder!r}: is not known{meant(encoder, encoders())}; cspine-train models lists them"
        )
    if weights == "none":
        return _create(model, encoder, None, channels, classes), "none"
    if weights not in ("auto", "imagenet"):
        return _with_file(model, encoder, Path(weights), channels, classes)
    _create(model, encoder, None, channels, classes)  # a name that is not known must not look like missing weights
    _go_offline_unless_reachable()
    try:
        return _create(model, encoder, "imagenet", channels, classes), "imagenet"
    except ModelError as error:
        if weights == "imagenet":
            raise ModelError(
                f"encoder {encoder!r}: its ImageNet weights are not cached and cannot be fetched; connect to the "
                f"network, give a file with --weights FILE, or start from random ones with --weights none"
            ) from error
    warnings.warn(f"no ImageNet weights for {encoder}: starting from random ones", stacklevel=2)
    return _create(model, encoder, None, channels, classes), "none"


def sides_of(network: nn.Module) -> Sides:
    """Return what the height and width of a network's images may be: multiples of what its encoder divides them by.

    SMP's Unet takes other sizes too, and stretches its features until they fit onto each other, which shifts them by
    another part of a pixel for each size: what prediction sees would not be what training saw. PAN halves what its
    encoder gives three times more.
    """
    import segmentation_models_pytorch as smp

    stride = int(cast("Any", network).encoder.output_stride)
    return Sides(stride, 8 * stride if isinstance(network, smp.PAN) else stride)


def _create(model: str, encoder: str, weights: str | None, channels: int, classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = smp.create_model(model, encoder, encoder_weights=weights, in_channels=channels, classes=classes)
    # Architectures, encoders, timm and the hub each raise kinds of their own.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{model} with encoder {encoder!r}: cannot be built ({reason}); cspine-train models lists what there is"
        ) from None
    return cast("nn.Module", made)


def _with_file(model: str, encoder: str, path: Path, channels: int, classes: int) -> tuple[nn.Module, str]:
    network = _create(model, encoder, None, channels, classes)
    state = _read_state(path)
    target = cast("nn.Module", network.encoder).state_dict()
    wrong = []
    for name, tensor in target.items():
        found = state.get(name)
        if found is None:
            wrong.append(f"{name} is missing")
            continue
        in_colour = found.ndim == 4 and found.shape[1] == 3 and tensor.shape[1] == channels
        if in_colour and found.shape != tensor.shape:
            # Channels that are all equal then give what three equal colours gave: ImageNet's become grey.
            found = (found.sum(dim=1, keepdim=True) / channels).expand(-1, channels, -1, -1)
        if found.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(found.shape)}, not {tuple(tensor.shape)}")
        else:
            target[name] = found
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{path}: does not fit encoder {encoder!r} ({'; '.join(wrong[:3])}{more}); give weights of that encoder"
        )
    cast("nn.Module", network.encoder).load_state_dict(target)
    with path.open("rb") as file:
        return network, hashlib.file_digest(file, "sha256").hexdigest()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name, and nothing else: no file is unpickled."""
    if not path.is_file():
        raise ModelError(f"{path}: is no file; give auto, imagenet, none or a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Both readers raise whatever the damage provokes.
    except Exception:  # noqa: BLE001
        raise ModelError(f"{path}: is no file of weights alone; save a state dict or safetensors") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path}: is no state dict; save the encoder's state dict or safetensors")
    return state


def _go_offline_unless_reachable() -> None:
    """Spare the hub's long retries where there is no network; what is cached is still found."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return
    reachable = threading.Event()

    def knock() -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if not endpoint.startswith(("https://", "http://")):
            return
        request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310
        with contextlib.suppress(OSError, urllib.error.URLError, ValueError):
            urllib.request.urlopen(request, timeout=_HUB_PATIENCE_S).close()  # noqa: S310
            reachable.set()

    # A thread, because looking up a name can hang for longer than any socket's time-out.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(_HUB_PATIENCE_S)
    if not reachable.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True


def save_model(network: Any, folder: Path) -> None:
    """Save a network as safetensors beside its JSON, in the format that SMP's own `from_pretrained` reads."""
    unfinished = folder.with_name(f".{folder.name}")
    network.save_pretrained(unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (unfinished / name).replace(folder / name)
    for leftover in unfinished.iterdir():
        leftover.unlink()
    unfinished.rmdir()


def load_model(model: str, encoder: str, folder: Path, channels: int = 1, classes: int = 1) -> nn.Module:
    """Build a network and load the weights that `save_model` saved.

    Raises
    ------
    ModelError
        If the weights are missing, damaged, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    network = _create(model, encoder, None, channels, classes)
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{path}: cannot be loaded ({reason}); train the run anew") from None
    return network.eval()
