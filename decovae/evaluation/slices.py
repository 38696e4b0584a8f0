"""Features of a volume's slices by several networks, kept between runs by what the volume holds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from decovae.data.cache import cache_folder
from decovae.data.volumes import Shape
from decovae.errors import InputError
from decovae.evaluation.cache_room import CacheRoom
from decovae.files import load_safetensors, save_safetensors
from decovae.metrics.slice_features import AXES, PLANES, SliceNetwork, volume_slices
from decovae.metrics.slice_weights import RADIMAGENET_ADVICE

Features = Mapping[str, Mapping[str, Tensor]]
"""By network and plane, (slices, F), float32."""


@dataclass(frozen=True)
class Slicing:
    """Networks, on one device, and which slices they see.

    Attributes:
        networks: their names differ.
        every: distance between slices.
        cache: whether to keep features of volumes that have a digest.
        room: what may still be kept.
    """

    networks: Sequence[SliceNetwork]
    every: int = 1
    cache: bool = True
    room: CacheRoom = field(default_factory=CacheRoom, compare=False)

    def per_volume(self, grid: Shape) -> dict[str, int]:
        """Slices of a volume, by plane."""
        return {plane: len(range(0, grid[AXES[plane]], self.every)) for plane in PLANES}

    def recall(self, digest: str) -> dict[str, dict[str, Tensor]]:
        """Features on the CPU that were kept for a volume, of the networks that there are some of."""
        found: dict[str, dict[str, Tensor]] = {}
        for network in self.networks if self.cache else ():
            with contextlib.suppress(InputError):
                kept, _ = load_safetensors(self._path(network, digest), advice="")
                if set(kept) == set(PLANES):
                    found[network.name] = kept
        return found

    def measure(self, volume: Tensor, *, known: Features | None = None) -> dict[str, dict[str, Tensor]]:
        """Features of a volume (1, D, H, W), clipped to [0, 1], on its device; `known` ones are not computed again."""
        known = known or {}
        found: dict[str, dict[str, Tensor]] = {}
        for network in self.networks:
            if kept := known.get(network.name):
                found[network.name] = {plane: kept[plane].to(volume.device) for plane in PLANES}
            else:
                found[network.name] = {
                    plane: network(volume_slices(volume, plane, every=self.every)) for plane in PLANES
                }
        return found

    def remember(self, digest: str, features: Features, *, known: Features) -> None:
        """Keep features that were not known, as long as there is room; a cache that cannot be written is no cache."""
        for network in self.networks if self.cache else ():
            if network.name in known:
                continue
            size = sum(tensor.nbytes for tensor in features[network.name].values())
            if self.room.take(features_folder(), size):
                with contextlib.suppress(OSError):
                    save_safetensors(features[network.name], {}, self._path(network, digest))

    def _path(self, network: SliceNetwork, digest: str) -> Path:
        key = sha256(f"{network.fingerprint} every {self.every} of {digest}".encode()).hexdigest()
        return features_folder() / key[:2] / f"{key[2:]}.safetensors"


def features_folder() -> Path:
    """Where features are kept. It need not exist."""
    return cache_folder() / "features"


def digest_of(volume: Tensor) -> str:
    """64 hexadecimal digits that name what a volume on the CPU holds, and its shape."""
    digest = sha256(f"{tuple(volume.shape)} {volume.dtype}\n".encode())
    digest.update(volume.contiguous().numpy().data)
    return digest.hexdigest()


def build_networks(
    names: Sequence[str], device: torch.device, *, radimagenet: Path | None, inception: Path | None
) -> list[SliceNetwork]:
    """Feature networks by name, on a device.

    Raises:
        InputError: weights are missing or are no such network's, or a name is unknown.
    """
    from decovae.metrics.slice_features import inception_network, radimagenet_network, random_network

    networks = []
    for name in dict.fromkeys(names):
        if name == "random":
            networks.append(random_network())
        elif name == "inception":
            networks.append(inception_network(inception))
        elif name != "radimagenet":
            raise InputError(f"--features {name}: no such network; choose random, radimagenet or inception.")
        elif radimagenet is None:
            raise InputError(f"--features radimagenet: its weights file is not given; {RADIMAGENET_ADVICE}.")
        else:
            networks.append(radimagenet_network(radimagenet))
    return [network.to(device) for network in networks]
