"""What the blocks are measured against: torch's own operators, MONAI's MAISI networks, Liger-Kernel's GroupNorm.

Every implementation is a module from features to features, or for the training step from images to a loss. Those of
one block have the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.blocks import ResidualBlock, Upsample
from decovae.models.fuse import Memory, fuse
from decovae_kernels import group_norm
from decovae_kernels.upsample_conv import upsample_conv

EPS = 1e-6
KL_WEIGHT = 1e-7
ACTIVATION_MEMORY_BUDGET = 0.3


class NormAct(nn.GroupNorm):
    """GroupNorm and SiLU as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class UpsampleConv(Upsample):
    """Upsampling and convolution as one operator, computed in a given way."""

    def __init__(self, channels: int, method: str) -> None:
        super().__init__(channels)
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.conv.conv.conv
        return upsample_conv(x, conv.weight, conv.bias, method=self.method)


class Checkpointed(nn.Module):
    """A block that keeps its input, and runs again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return y


class Budgeted(nn.Module):
    """A module compiled to keep this share of what its compiled form would keep for backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_MEMORY_BUDGET):
            y: Tensor = self.module(x)
        return y


class FusedStep(nn.Module):
    """The loss of one image batch, by this project's autoencoder as it is used."""

    def __init__(self, network: Autoencoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        reconstruction, latent = self.network(image)
        return F.l1_loss(reconstruction.float(), image) + KL_WEIGHT * latent.kl


class PlainStep(nn.Module):
    """The same with the sampling and the KL divergence written out in torch."""

    def __init__(self, network: Autoencoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        mu, log_variance = self.network.encode(image)
        sigma = (0.5 * log_variance).exp()
        reconstruction = self.network.decode(mu + sigma * torch.randn_like(sigma))
        return _objective(reconstruction, image, mu, sigma)


class MonaiStep(nn.Module):
    """The same by MONAI's autoencoder."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        reconstruction, mu, sigma = self.network(image)
        return _objective(reconstruction, image, mu, sigma)


def _objective(reconstruction: Tensor, image: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    mu, variance = mu.float(), sigma.float().square()
    kl = 0.5 * (mu.square() + variance - variance.log() - 1).mean()
    return F.l1_loss(reconstruction.float(), image) + KL_WEIGHT * kl


class Decoding(nn.Module):
    """A network's decoder, from a latent."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor) -> Tensor:
        decode: Callable[[Tensor], Tensor] = self.network.decode  # type: ignore[assignment]
        return decode(latent)


def norm_act(name: str, channels: int, groups: int) -> nn.Module:
    """GroupNorm and SiLU: "ours", "plain", "monai" or "liger".

    Raises:
        ImportError: "liger" where Liger-Kernel is not installed.
    """
    if name == "ours":
        return NormAct(groups, channels, eps=EPS)
    if name == "plain":
        return nn.Sequential(nn.GroupNorm(groups, channels, eps=EPS), nn.SiLU())
    if name == "liger":
        from liger_kernel.transformers.group_norm import LigerGroupNorm

        return nn.Sequential(LigerGroupNorm(channels, groups, eps=EPS), nn.SiLU())
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiGroupNorm3D

    return nn.Sequential(MaisiGroupNorm3D(groups, channels, eps=EPS, save_mem=False), nn.SiLU())


def residual_block(name: str, channels: int, groups: int) -> nn.Module:
    """A residual block: "balanced", "tight", "plain" or "monai"."""
    if name == "monai":
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock

        return MaisiResBlock(3, channels, groups, EPS, channels, num_splits=1, dim_split=0, save_mem=False)
    block = ResidualBlock(channels, channels, groups=groups, eps=EPS)
    return block if name == "plain" else _fused(block, name)


def upsampling(name: str, channels: int) -> nn.Module:
    """Upsampling and convolution: "auto", "factorised", "direct", "plain" or "monai"."""
    if name == "monai":
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiUpsample

        return MaisiUpsample(3, channels, False, num_splits=1, dim_split=0, print_info=False, save_mem=False)
    return Upsample(channels) if name == "plain" else UpsampleConv(channels, name)


def training_step(name: str, config: AutoencoderConfig) -> nn.Module:
    """Image to loss: "ours-balanced", "ours-tight", "plain…", "monai…", "monai-float16…", or "monai-checkpointed…" by
    its own means.
    """
    kind, _, mode = name.partition("-")
    if kind == "monai":
        return MonaiStep(monai_autoencoder(config, checkpointed="checkpointed" in mode, float16="float16" in mode))
    if kind == "plain":
        return PlainStep(Autoencoder(config, memory=None))
    return FusedStep(_fused(Autoencoder(config, memory=None), mode))


def decoding(name: str, config: AutoencoderConfig) -> nn.Module:
    """Latent to image: "ours", "plain…", "monai…" or "monai-float16…"."""
    if name.startswith("monai"):
        return Decoding(monai_autoencoder(config, float16="float16" in name))
    return Decoding(Autoencoder(config, memory="balanced" if name == "ours" else None))


def _fused(module: Any, memory: str) -> Any:
    mode: Memory = "tight" if memory == "tight" else "balanced"
    return fuse(module, memory=mode, report=True)[0]


def monai_autoencoder(config: AutoencoderConfig, *, checkpointed: bool = False, float16: bool = False) -> nn.Module:
    """MONAI's autoencoder of the same shape, whole volumes at once.

    Args:
        config: the shape.
        checkpointed: use its checkpointing.
        float16: norms write float16, as in the configurations that come with MAISI. Runs under float16 autocast only:
            without it convolutions refuse what norms write, and in bfloat16 the norms fail.
    """
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    levels = len(config.channels)
    return AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        num_res_blocks=[config.residual_blocks] * levels,
        num_channels=config.channels,
        attention_levels=[False] * levels,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        norm_eps=config.eps,
        use_checkpointing=checkpointed,
        norm_float16=float16,
        num_splits=1,
        save_mem=False,  # emptying CUDA's cache after every layer would be most of its time
    )
