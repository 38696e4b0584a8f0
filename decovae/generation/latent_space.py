"""The space a flow lives in: whose latents, of which shape, and how they are standardised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from decovae.data.frame import Frame
from decovae.data.volumes import Shape


@dataclass(frozen=True)
class LatentSpace:
    """What has to be known of latents to train on them, and to make volumes of new ones.

    Attributes:
        encoder: the encoder's fingerprint (`decovae.models.weights.encoder_fingerprint`).
        channels: channels C of a latent.
        shape: voxels `(d, h, w)` of a latent.
        grid: voxels `(D, H, W)` of the images that were encoded.
        frame: of the source volumes, where a sample is put back to; the commonest of the training split if they differ.
        mean: of μ over all channels and voxels of the training split.
        std: standard deviation of μ over the same; above 0.
        noise: root mean square of σ over the same.
        data: a sentence on what the volumes were.

    Raises:
        ValueError: on construction, if `mean` or `noise` is not finite, or `std` not finite or not above 0.
    """

    encoder: str
    channels: int
    shape: Shape
    grid: Shape
    frame: Frame
    mean: float
    std: float
    noise: float
    data: str

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.mean, self.std, self.noise))) or self.std <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}, noise {self.noise}: not finite, or std not above 0")

    def standardize(self, latent: Tensor) -> Tensor:
        """`(latent − mean) / std`, of any shape and the dtype of `latent`."""
        return (latent - self.mean) / self.std

    def restore(self, standardized: Tensor) -> Tensor:
        """`standardized · std + mean`, the inverse of `standardize`."""
        return standardized * self.std + self.mean

    def as_dict(self) -> dict[str, Any]:
        """The space in JSON's types; numbers come back exactly."""
        return {
            **asdict(self),
            "shape": list(self.shape),
            "grid": list(self.grid),
            "frame": self.frame.as_dict(),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> LatentSpace:
        """The space that `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: `entry` is no such thing.
        """
        d, h, w = (int(size) for size in entry["shape"])
        depth, height, width = (int(size) for size in entry["grid"])
        return cls(
            encoder=str(entry["encoder"]),
            channels=int(entry["channels"]),
            shape=(d, h, w),
            grid=(depth, height, width),
            frame=Frame.from_dict(entry["frame"]),
            mean=float(entry["mean"]),
            std=float(entry["std"]),
            noise=float(entry["noise"]),
            data=str(entry["data"]),
        )
