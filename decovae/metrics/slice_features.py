"""Features of 2D slices, for distances between sets of volumes: RadImageNet's network, ImageNet's, or a random one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from decovae.metrics.exact import exact_arithmetic
from decovae.metrics.slice_weights import inception_trunk, radimagenet_trunk

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}
"""The axis of a volume (D, H, W) in RAS order that a plane's slices follow one another on."""

PLANES = tuple(AXES)
"""Planes in the order of the paper's tables."""

PREPROCESSING = 2
"""Raise it when a network's features change though its weights do not: it is part of every fingerprint."""

BATCH = 64
"""Slices that a network sees at once: for 128×256 slices 0.3 GB of memory, 0.5 with ResNet-50, 0.9 with Inception."""


@dataclass(frozen=True)
class NetworkKind:
    """What a network is, for who reads its distances.

    Attributes:
        name: "random", "radimagenet" or "inception".
        title: what it is, for people.
        proxy: whether its distances stand in for the paper's and are comparable with no published figure.
        features: number of features F.
    """

    name: str
    title: str
    proxy: bool
    features: int


class SliceNetwork(nn.Module):
    """A frozen network from slices to features; always in evaluation mode.

    Args:
        kind: what it is; its fields are this module's `name`, `title`, `proxy` and `features`.
        trunk: from prepared images (N, 3, H, W), float32, to (N, F), or (N, F, h, w), which is averaged over h and w.
        prepare: from slices (N, 3, H, W) in [0, 1], three times the same channel, to what the trunk was trained on.
    """

    def __init__(self, kind: NetworkKind, trunk: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kind = kind
        self.trunk = trunk.float().requires_grad_(False)
        self.prepare = prepare
        self.eval()
        self.fingerprint = _fingerprint(kind.name, trunk)
        """32 hexadecimal digits: equal for equal weights and preprocessing, wherever the weights came from."""

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def title(self) -> str:
        return self.kind.title

    @property
    def proxy(self) -> bool:
        return self.kind.proxy

    @property
    def features(self) -> int:
        return self.kind.features

    def train(self, mode: bool = True) -> SliceNetwork:
        """Stay in evaluation mode: the features are frozen."""
        return super().train(False)

    def forward(self, slices: Tensor) -> Tensor:
        """Features (N, F), float32, of slices (N, 1, H, W) in [0, 1], any float dtype, on the network's device.

        Computed in float32 without TF32, under autocast too, and outside autograd.

        Raises:
            TypeError: the slices are not floating-point.
            ValueError: the slices are not (N, 1, H, W), or there is none.
        """
        if not slices.is_floating_point():
            raise TypeError(f"slices must be floating-point, not {slices.dtype}")
        if slices.ndim != 4 or slices.shape[1] != 1 or len(slices) == 0:
            raise ValueError(f"slices must be (N, 1, H, W), not {tuple(slices.shape)}")
        with exact_arithmetic(slices.device):
            return torch.cat([self._features(batch.float()) for batch in slices.split(BATCH)])

    def _features(self, slices: Tensor) -> Tensor:
        features: Tensor = self.trunk(self.prepare(slices.expand(-1, 3, -1, -1)))
        return features.mean((2, 3)) if features.ndim == 4 else features


def random_network() -> SliceNetwork:
    """The first layers of SqueezeNet 1.1 with random weights from a fixed seed, averaged over a slice; 128 features.

    No download, and fewer features than 20 volumes have slices, so that covariances have full rank.
    """
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = squeezenet1_1(weights=None).features[:5]
    title = "first layers of SqueezeNet with random weights: a proxy, comparable only with itself"
    return SliceNetwork(NetworkKind("random", title, proxy=True, features=128), trunk, _unchanged)


def radimagenet_network(path: Path) -> SliceNetwork:
    """RadImageNet's ResNet-50 without its head, the mean of its last maps over a slice; 2048 features.

    Channels in BGR order with 0.406, 0.456 and 0.485 subtracted; slices are not resized. The file may hold the
    official release or its conversion from Keras, two architectures that are told apart by their names; see
    :func:`decovae.metrics.slice_weights.radimagenet_trunk`.

    Raises:
        InputError: the file is missing or holds anything else.
    """
    trunk, title = radimagenet_trunk(path)
    return SliceNetwork(NetworkKind("radimagenet", title, proxy=False, features=2048), trunk, _bgr_means_subtracted)


def inception_network(path: Path | None = None) -> SliceNetwork:
    """torchvision's Inception v3 of ImageNet, its pooled features, slices resized to 299×299; 2048 features.

    Not the network behind published FIDs, which is another training of Inception from TensorFlow.

    Args:
        path: torchvision's weights file; without it torchvision's download, which it keeps in its own cache.

    Raises:
        InputError: the weights cannot be downloaded, or the file is missing or holds anything else.
    """
    title = "torchvision's Inception v3 of ImageNet: not the TensorFlow network of published FIDs"
    kind = NetworkKind("inception", title, proxy=True, features=2048)
    return SliceNetwork(kind, inception_trunk(path), _to_299_between_minus_one_and_one)


def volume_slices(volume: Tensor, plane: str, *, every: int = 1, central: float = 1.0) -> Tensor:
    """Slices of a volume in one plane, (n, 1, rows, columns), n at least 1; a view where the volume allows it.

    Args:
        volume: (1, D, H, W) or (D, H, W) in RAS order.
        plane: one of `PLANES`.
        every: distance between slices.
        central: share of the axis, around its middle, that slices are taken from, in (0, 1].

    Raises:
        ValueError: the volume has another shape, or an argument is out of its range.
    """
    if volume.ndim == 4 and len(volume) == 1:
        volume = volume[0]
    if volume.ndim != 3:
        raise ValueError(f"volume must be (1, D, H, W) or (D, H, W), not {tuple(volume.shape)}")
    if plane not in AXES:
        raise ValueError(f"plane must be one of {', '.join(PLANES)}, not {plane!r}")
    if every < 1 or not 0 < central <= 1:
        raise ValueError(f"every must be at least 1 and central in (0, 1], not {every} and {central}")
    size = volume.shape[AXES[plane]]
    first = min(int((1 - central) / 2 * size), (size - 1) // 2)
    last = max(int((1 + central) / 2 * size), first + 1)
    return volume.movedim(AXES[plane], 0)[first:last:every, None]


def _fingerprint(name: str, trunk: nn.Module) -> str:
    digest = hashlib.sha256(f"{name} {PREPROCESSING}\n".encode())
    for key, tensor in sorted(trunk.state_dict().items()):
        if not key.endswith("num_batches_tracked"):  # a count that nothing depends on, and that older files lack
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _unchanged(images: Tensor) -> Tensor:
    return images


def _bgr_means_subtracted(images: Tensor) -> Tensor:
    return images - images.new_tensor([0.406, 0.456, 0.485]).view(3, 1, 1)


def _to_299_between_minus_one_and_one(images: Tensor) -> Tensor:
    resized = nn.functional.interpolate(images, size=(299, 299), mode="bilinear", antialias=True)
    return 2 * resized - 1
