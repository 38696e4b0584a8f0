"""Perceptual distance between volumes: LPIPS (Zhang et al., 2018) with SqueezeNet on 2D slices of three planes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decovae.errors import InputError
from decovae.files import load_tensors

PRETRAINED = "pretrained"
RANDOM = "random"
NONE = "none"
CHOICES = (
    "choose --loss.perceptual-network random (frozen random features, no download), none, "
    "or the path of a squeezenet1_1 weights file"
)


class PerceptualLoss(nn.Module):
    """LPIPS on paired slices, frozen: gradients reach the images, never the features.

    Args:
        network: ``"pretrained"`` (ImageNet SqueezeNet from torchvision with LPIPS's published linear heads),
            the path of a file (torchvision's ``squeezenet1_1`` or a whole LPIPS ``state_dict``), or ``"random"``:
            frozen random features from a fixed seed, equal weights in place of the published heads. Their distance is
            no LPIPS, and nothing reports it as such.
        load: False leaves random values where ``network`` names weights, for who asks only what it would cost.

    Raises:
        InputError: if the weights cannot be downloaded or read.
    """

    def __init__(self, network: str = PRETRAINED, *, load: bool = True) -> None:
        super().__init__()
        from lpips import LPIPS

        self.calibrated = network != RANDOM
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # lpips calls torchvision by its older spelling
            torch.manual_seed(0)
            self.network = LPIPS(net="squeeze", lpips=self.calibrated, pretrained=load, pnet_rand=True, verbose=False)
        if self.calibrated and load:
            source, state = _weights(network)
            _load(self.network, state, source)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in evaluation mode: the features are frozen."""
        return super().train(False)

    def forward(self, planes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Sum over planes of the mean distance between paired slices.

        Args:
            planes: for each plane a pair of (slices, 1, rows, columns), intensities in [0, 1]; :func:`random_slices`
                makes them.

        Returns:
            Scalar; the sum, not the mean, over planes, which is what the reference's weight of 0.3 multiplies.
        """
        return torch.stack([self.network(first, second, normalize=True).mean() for first, second in planes]).sum()


def _weights(network: str) -> tuple[str, Mapping[str, Tensor]]:
    if network == PRETRAINED:
        from torchvision.models import SqueezeNet1_1_Weights

        weights = SqueezeNet1_1_Weights.IMAGENET1K_V1
        try:
            return weights.url, weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"Pretrained perceptual weights cannot be had ({weights.url}: {error}); {CHOICES}."
            ) from error
    path = Path(network)
    if not path.is_file():
        raise InputError(f"{network}: no such perceptual weights file; {CHOICES}.")
    state = load_tensors(path, advice=CHOICES)
    if not isinstance(state, Mapping):
        raise InputError(f"{network}: holds {type(state).__name__}, not a state_dict; {CHOICES}.")
    return network, state


def _load(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a whole LPIPS ``state_dict``, or a torchvision SqueezeNet behind the published heads."""
    if "lin0.model.1.weight" in state:
        wanted = {key: state[key] for key in network.state_dict() if key in state}
    else:
        # LPIPS cuts torchvision's `features` into slices and keeps each layer's number: net.slice2.3.* is features.3.*
        wanted = {
            key: state[source_key]
            for key in network.state_dict()
            if key.startswith("net.slice") and (source_key := "features." + key.split(".", 2)[2]) in state
        }
    trunk = {key for key in network.state_dict() if key.startswith("net.slice")}
    if missing := sorted(trunk - wanted.keys()):
        raise InputError(f"{source}: not the weights of squeezenet1_1 or LPIPS (no {missing[0]}); {CHOICES}.")
    try:
        network.load_state_dict(wanted, strict=False)
    except RuntimeError as error:
        raise InputError(f"{source}: weights of other shapes than squeezenet1_1's; {CHOICES}.") from error
