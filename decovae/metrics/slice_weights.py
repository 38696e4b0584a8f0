"""Published classifiers without their heads, loaded strictly from the weights files that are really about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decovae.errors import InputError
from decovae.files import load_safetensors, load_tensors

RADIMAGENET_ADVICE = (
    "download RadImageNet's ResNet-50 for PyTorch, ResNet50.pt from the models that "
    "https://github.com/BMEII-AI/RadImageNet links to, or RadImageNet-ResNet50_notop.pth, which "
    "https://github.com/Warvito/radimagenet-models does, and name it with --radimagenet FILE"
)
INCEPTION_ADVICE = (
    "download https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth and name it with --inception FILE, "
    "or leave inception out of --features"
)

KERAS_EPSILON = 1.001e-5
"""Of the norms in Keras's ResNet-50; PyTorch's have 1e-5."""

_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""What the children of a ResNet-50 in an nn.Sequential are called outside of it."""

_HEADS = frozenset({"fc", "classifier", "AuxLogits"})


def radimagenet_trunk(path: Path) -> tuple[nn.Module, str]:
    """ResNet-50 without its head, (N, 3, H, W) to (N, 2048), and which one of two it is, for people.

    Names may stand behind any prefix (`module.`, `backbone.`), the head may be there or not. Told apart by its biased
    convolutions, the conversion from Keras is another architecture than PyTorch's: a stage's first block takes every
    second pixel in its first convolution, not in its second, and the norms have another epsilon.

    Raises:
        InputError: the file is missing or holds anything else.
    """
    from torchvision.models import resnet50

    state = _state_dict(path, RADIMAGENET_ADVICE)
    names = _without_prefix(state, "layer1.0.conv1.weight")
    if not names:  # the official release: nn.Sequential(*children), whose fifth is layer1
        numbered = _without_prefix(state, "4.0.conv1.weight")
        names = {_renumbered(name): tensor for name, tensor in numbered.items()}
    with torch.device("meta"):
        network = resnet50(weights=None)
    network.fc = nn.Identity()
    keras = "conv1.bias" in names
    if keras:
        _make_keras(network)
    _load(network, names, path, "ResNet-50", RADIMAGENET_ADVICE)
    origin = "converted from Keras" if keras else "as PyTorch has it"
    title = f"RadImageNet's ResNet-50 without its head, {origin}"
    if any(key.endswith("fc.weight") and len(tensor) == 1000 for key, tensor in state.items()):
        title += " (weights with a head for 1,000 classes, as ImageNet's have; RadImageNet has 165)"
    return network, title


def inception_trunk(path: Path | None) -> nn.Module:
    """torchvision's Inception v3 without its heads, (N, 3, 299, 299) in [−1, 1] to (N, 2048).

    Args:
        path: a file of torchvision's weights, or None for torchvision's download.

    Raises:
        InputError: the weights cannot be downloaded, or the file is missing or holds anything else.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3

    if path is None:
        weights = Inception_V3_Weights.IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"Inception's weights cannot be had ({weights.url}: {error}); {INCEPTION_ADVICE}."
            ) from error
        path = Path(weights.url)
    else:
        state = _state_dict(path, INCEPTION_ADVICE)
    with torch.device("meta"):
        network = inception_v3(weights=None, aux_logits=False, init_weights=False)
    network.fc = nn.Identity()
    _load(network, _without_prefix(state, "Conv2d_1a_3x3.conv.weight"), path, "Inception v3", INCEPTION_ADVICE)
    return network


def _state_dict(path: Path, advice: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; {advice}.")
    content: Any
    if path.suffix == ".safetensors":
        content, _ = load_safetensors(path, advice=advice)
    else:
        content = load_tensors(path, advice=advice)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {type(content).__name__}, not a state_dict; {advice}.")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(state: Mapping[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """The tensors that share the prefix of `anchor`, by the rest of their names, without heads; none without it."""
    prefixes = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]
    if not prefixes:
        return {}
    names = {key.removeprefix(prefixes[0]): tensor for key, tensor in state.items() if key.startswith(prefixes[0])}
    return {name: tensor for name, tensor in names.items() if name.partition(".")[0] not in _HEADS}


def _renumbered(name: str) -> str:
    child, _, rest = name.partition(".")
    return f"{_NUMBERED.get(child, child)}.{rest}"


def _make_keras(network: nn.Module) -> None:
    """Biases, epsilons and strides of keras.applications' ResNet-50, on PyTorch's on the meta device."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.empty(module.out_channels, device="meta"))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = KERAS_EPSILON
        elif name.endswith(".0") and name.startswith("layer") and name.count(".") == 1:
            first, second = module.get_submodule("conv1"), module.get_submodule("conv2")
            assert isinstance(first, nn.Conv2d)
            assert isinstance(second, nn.Conv2d)
            first.stride, second.stride = second.stride, first.stride


def _load(network: nn.Module, names: Mapping[str, Tensor], path: Path, what: str, advice: str) -> None:
    """Replace the meta tensors of `network` with those of a file: all of them, and nothing left over."""
    wanted = network.state_dict()
    # How many batches a norm has seen changes nothing here, and files from before PyTorch 0.4.1 do not have it.
    counts = {name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")}
    given = counts | {name: tensor.float() for name, tensor in names.items() if name not in counts}
    wrong = [f"no {name}" for name in wanted if name not in given]
    wrong += [f"{name} is none of its tensors" for name in given if name not in wanted]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if wrong:
        raise InputError(f"{path}: not the weights of {what} ({wrong[0]}); {advice}.")
    network.load_state_dict(given, strict=True, assign=True)
