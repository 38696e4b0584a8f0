"""MONAI's `AutoencoderKL` on volumes, with the VAD loss on the latent mean that it returns.

    pip install -e . monai && python examples/monai_autoencoderkl.py

trains on smooth random volumes twice, without the loss (weight 0) and with it, in seconds on a laptop. Take the lines
that end in `DeCo-VAE` away and an ordinary training script remains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL

from decovae import VADLoss, analyze_latents  # DeCo-VAE


def main(steps: int = 100, weight: float = 1.0) -> tuple[torch.Tensor, float]:
    """Train for some steps; the latent mean of all volumes, (N, C, *spatial), and the mean absolute error."""
    torch.manual_seed(0)
    volumes = F.interpolate(torch.rand(32, 1, 4, 4, 4), scale_factor=3, mode="trilinear")
    autoencoder = AutoencoderKL(
        spatial_dims=3,
        channels=(4, 8),
        attention_levels=(False, False),
        num_res_blocks=1,
        latent_channels=4,
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    decorrelate = VADLoss()  # DeCo-VAE
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=8e-3)

    for _ in range(steps):
        batch = volumes[torch.randperm(len(volumes))[:8]]
        reconstruction, mu, sigma = autoencoder(batch)
        kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).mean()
        loss = F.l1_loss(reconstruction, batch) + 5e-4 * kl
        loss = loss + weight * decorrelate(mu)  # DeCo-VAE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        mu, _ = autoencoder.encode(volumes)
        return mu, F.l1_loss(autoencoder.decode(mu), volumes).item()


if __name__ == "__main__":
    for weight in (0.0, 1.0):
        mu, error = main(weight=weight)
        print(f"weight {weight:g}: mean absolute error {error:.3f}")
        print(f"  effective rank {analyze_latents(mu).effective_rank:.2f} of {mu.shape[1]}")  # DeCo-VAE
