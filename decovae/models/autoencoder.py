"""MAISI's KL autoencoder, with a ``state_dict`` equal to MONAI's ``AutoencoderKlMaisi`` key for key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decovae.losses.latent_head import Latent, LatentHead
from decovae.models.blocks import Cascade, Downsample, ResidualBlock, Upsample, convolution, pointwise
from decovae.models.fuse import Memory, fuse
from decovae_kernels.norm_conv import TILE_BYTES

LOG_VARIANCE_RANGE = (-30.0, 10.0)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder. The defaults are MAISI's, 20.94 M parameters.

    Attributes:
        channels: feature channels of each level, finest first; each further level halves the resolution.
        residual_blocks: residual blocks a level.
        latent_channels: channels of the latent mean (c in the paper).
        groups: groups of every GroupNorm; divides every entry of ``channels``.
        eps: epsilon of every GroupNorm.
        image_channels: channels of the input and of the reconstruction.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    residual_blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    eps: float = 1e-6
    image_channels: int = 1

    @property
    def compression(self) -> int:
        """Compression factor f = D/d: 2 to the number of downsamplings."""
        return 2 ** (len(self.channels) - 1)


def _levels(config: AutoencoderConfig, widths: Sequence[int], resample: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Residual blocks of each level, ``resample`` between levels, and the last norm."""
    blocks: list[nn.Module] = []
    width_in = widths[0]
    for level, width in enumerate(widths):
        if level > 0:
            blocks.append(resample(width_in))
        for _ in range(config.residual_blocks):
            blocks.append(ResidualBlock(width_in, width, groups=config.groups, eps=config.eps))
            width_in = width
    return [*blocks, nn.GroupNorm(config.groups, widths[-1], eps=config.eps)]


def _encoder(config: AutoencoderConfig) -> Cascade:
    first, last = config.channels[0], config.channels[-1]
    return Cascade(
        [
            convolution(config.image_channels, first),
            *_levels(config, config.channels, Downsample),
            convolution(last, config.latent_channels),
        ]
    )


def _decoder(config: AutoencoderConfig) -> Cascade:
    first, last = config.channels[0], config.channels[-1]
    return Cascade(
        [
            convolution(config.latent_channels, last),
            *_levels(config, config.channels[::-1], Upsample),
            convolution(first, config.image_channels),
        ]
    )


class Autoencoder(nn.Module):
    """Convolutional VAE over (N, image_channels, D, H, W) volumes; D, H and W are multiples of ``compression``.

    ``state_dict()`` loads strictly into MONAI's ``AutoencoderKlMaisi`` without attention, and the other way round.
    `decovae.models.blocks` defines what it computes; how is up to `decovae.fuse`, which it passes itself to.

    Without gradients (``torch.no_grad()``, or nothing that needs one), a block's temporaries are at most about
    ``tile_bytes`` large, cut into slabs inside the operators: the norms still see the whole volume, so `encode` and
    `decode` return what they return untiled, without seams, and only the features themselves have to fit.

    Args:
        config: its shape.
        memory: what the blocks keep for backward, "balanced" or "tight" (see `decovae.fuse`); None computes them with
            torch's own operators.
        tile_bytes: size of temporaries from which on they are cut; 0 never cuts.

    Raises:
        ValueError: on construction, if ``groups`` does not divide every entry of ``channels``, or for an unknown
            ``memory``.
    """

    def __init__(
        self,
        config: AutoencoderConfig | None = None,
        *,
        memory: Memory | None = "balanced",
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        if not config.channels or any(width % config.groups for width in config.channels):
            raise ValueError(f"groups={config.groups} must divide every one of channels={config.channels}")
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.quant_conv_mu = pointwise(config.latent_channels, config.latent_channels)
        self.quant_conv_log_sigma = pointwise(config.latent_channels, config.latent_channels)
        self.post_quant_conv = pointwise(config.latent_channels, config.latent_channels)
        self.latent_head = LatentHead()
        if memory is not None:
            fuse(self, memory=memory, tile_bytes=tile_bytes, report=True)

    @torch.no_grad()
    def start_latent(self, *, log_variance: float, orthogonal: bool) -> None:
        """Set where training starts the posterior from.

        Args:
            log_variance: bias of log σ².
            orthogonal: draw the channel mixing behind μ from the orthogonal matrices. The usual draw can be nearly
                singular (with c = 4, one singular value in a thousand of the others), which hides a channel for long.
        """
        for parameter in self.quant_conv_log_sigma.parameters():
            if parameter.ndim == 1:
                parameter.fill_(log_variance)
        if orthogonal:
            for parameter in self.quant_conv_mu.parameters():
                if parameter.ndim > 1:
                    nn.init.orthogonal_(parameter)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Latent mean μ and log-variance log σ², each (N, c, D/f, H/f, W/f); log σ² is clamped to [−30, 10].

        Without gradients its temporaries are bounded by ``tile_bytes``, to the same result.

        Raises:
            ValueError: if ``image`` is not (N, image_channels, D, H, W) or an axis is not a multiple of f.
        """
        f = self.config.compression
        if image.ndim != 5 or image.shape[1] != self.config.image_channels:
            raise ValueError(
                f"an image batch has shape (N, {self.config.image_channels}, D, H, W), not {tuple(image.shape)}"
            )
        if any(size % f for size in image.shape[2:]):
            raise ValueError(f"image axes must be multiples of {f}, not {tuple(image.shape[2:])}: crop or pad them")
        features = self.encoder(image)
        return self.quant_conv_mu(features), self.quant_conv_log_sigma(features).clamp(*LOG_VARIANCE_RANGE)

    def decode(self, latent: Tensor) -> Tensor:
        """Reconstruction (N, image_channels, D, H, W) of a latent (N, c, D/f, H/f, W/f).

        Without gradients its temporaries are bounded by ``tile_bytes``, to the same result.
        """
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image

    def forward(
        self, image: Tensor, *, sample: bool | None = None, seed: int | None = None, first: int = 0
    ) -> tuple[Tensor, Latent]:
        """Reconstruction of a batch, and its latent: z, KL divergence and the channel moments of μ.

        Args:
            image: (N, image_channels, D, H, W).
            sample: decode z = μ + σ·ε with ε ~ N(0, I) instead of μ; None means in training mode only.
            seed: of ε; None draws one from torch's generator.
            first: number of the batch's first volume among those whose noise the seed gives, see `LatentHead`.
        """
        latent = self.latent_head(*self.encode(image), sample=sample, seed=seed, first=first)
        return self.decode(latent.z), latent
