"""Patch discriminators of volumes (3D) and of slices (2D); the networks are MONAI's PatchGAN."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn


class Discriminators(nn.Module):
    """The 3D and the 2D PatchGAN side by side, either of which may be absent.

    Args:
        volume: have a discriminator of 3D patches.
        slices: have a discriminator of 2D slices.
        channels: channels of the first convolution.
        layers: convolutions between the first and the last.
    """

    def __init__(self, *, volume: bool = True, slices: bool = True, channels: int = 32, layers: int = 3) -> None:
        super().__init__()

        def patch_gan(spatial_dims: int) -> nn.Module:
            return PatchDiscriminator(
                spatial_dims=spatial_dims, channels=channels, in_channels=1, num_layers_d=layers, norm="INSTANCE"
            )

        self.volume = patch_gan(3) if volume else None
        self.slices = patch_gan(2) if slices else None

    def forward(self, volume: Tensor, slices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logit maps of volumes and of slices.

        Args:
            volume: (N, 1, D, H, W).
            slices: for each plane (slices, 1, rows, columns).

        Returns:
            The 3D discriminator's logit maps (one, or none where it is absent) and the 2D one's (one a plane, or none).
        """
        # PatchDiscriminator returns every layer's features, the logits last.
        on_volume = [] if self.volume is None else [self.volume(volume)[-1]]
        on_slices = [] if self.slices is None else [self.slices(plane)[-1] for plane in slices]
        return on_volume, on_slices
