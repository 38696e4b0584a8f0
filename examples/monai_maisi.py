"""MONAI's `AutoencoderKlMaisi` on volumes: a `LatentHead` samples, takes the KL and hands its moments to the VAD loss.

    pip install -e . monai && python examples/monai_maisi.py

trains on smooth random volumes twice, without the loss (weight 0) and with it, in seconds on a laptop. Lines that end
in `DeCo-VAE` are the added ones; what stands after `before:` is what an ordinary training script had in their place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from decovae import LatentHead, analyze_latents, vad_loss  # DeCo-VAE


def main(steps: int = 100, weight: float = 1.0) -> tuple[torch.Tensor, float]:
    """Train for some steps; the latent mean of all volumes, (N, C, *spatial), and the mean absolute error."""
    torch.manual_seed(0)
    volumes = F.interpolate(torch.rand(32, 1, 4, 4, 4), scale_factor=3, mode="trilinear")
    autoencoder = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_channels=(4, 8),
        attention_levels=(False, False),
        num_res_blocks=(1, 1),
        latent_channels=4,
        norm_num_groups=4,
        num_splits=1,
        save_mem=False,
    )
    head = LatentHead()  # DeCo-VAE
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=8e-3)

    for _ in range(steps):
        batch = volumes[torch.randperm(len(volumes))[:8]]
        mu, sigma = autoencoder.encode(batch)
        # before: z = autoencoder.sampling(mu, sigma)
        # before: kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).mean()
        z, kl, moments = head(mu, 2 * sigma.log())  # DeCo-VAE
        loss = F.l1_loss(autoencoder.decode(z), batch) + 5e-4 * kl
        loss = loss + weight * vad_loss(moments)  # DeCo-VAE
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
