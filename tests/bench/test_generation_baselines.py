"""From noise to a volume, both ways end at the same volume from the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.generation_baselines import Chain, Precision, volume
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.flow_unet import FlowUNetConfig

FLOW = FlowUNetConfig(channels=(8, 16), attention=(False, True), residual_blocks=1, head_channels=8, groups=4)
AUTOENCODER = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)
LATENT = (4, 4, 8, 4)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_volumes_are_the_same(precision: Precision, tolerance: float) -> None:
    torch.manual_seed(0)
    others = ["monai-eager", "monai-channels-last-eager", *(["monai-float16-eager"] if precision == "bf16" else [])]
    chain = Chain(FLOW, AUTOENCODER, LATENT, steps=3, precision=precision, device=torch.device("cpu"))
    ours, *peers = (volume(name, chain) for name in ("ours", *others))
    made: Any = ours
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    noise = torch.randn(1, *LATENT, generator=generator)
    image = ours(noise)
    assert image.shape == (1, 8, 16, 8)
    assert image.dtype == torch.float32
    assert image.numel() == chain.voxels
    for peer in peers:
        theirs: Any = peer
        theirs.flow.network.load_state_dict(made.flow.state_dict())
        theirs.autoencoder.load_state_dict(made.autoencoder.state_dict())
        assert (theirs(noise) - image).norm() <= tolerance * image.norm()
    kernels = [weight for weight in theirs.flow.parameters() if weight.ndim == 5 and weight.shape[2:] == (3, 3, 3)]
    last = "channels-last" in others[-1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) == last for weight in kernels)
