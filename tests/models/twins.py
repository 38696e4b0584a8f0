"""Networks of MONAI that compute what this project's autoencoder computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from decovae.models.autoencoder import AutoencoderConfig


def monai_twin(config: AutoencoderConfig, **options: Any) -> nn.Module:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    levels = len(config.channels)
    return AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        num_channels=config.channels,
        num_res_blocks=(config.residual_blocks,) * levels,
        attention_levels=(False,) * levels,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        norm_eps=config.eps,
        save_mem=False,
        **{"num_splits": 1, **options},
    )


def monai_block(channels: int, out: int, groups: int, **options: Any) -> nn.Module:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock

    return MaisiResBlock(
        spatial_dims=3,
        in_channels=channels,
        norm_num_groups=groups,
        norm_eps=1e-6,
        out_channels=out,
        save_mem=False,
        **{"num_splits": 1, "dim_split": 0, **options},
    )


def perturbed(model: nn.Module) -> nn.Module:
    """Move the affine parameters of the norms away from 1 and 0, so that they count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
