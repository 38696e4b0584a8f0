"""CogVideoX's 3D video VAE from diffusers: a `LatentHead` samples, takes the KL and hands its moments to the VAD loss.

    pip install -e . diffusers && python examples/diffusers_video_vae.py

trains on smooth random clips twice, without the loss (weight 0) and with it, in seconds on a laptop. Lines that end in
`DeCo-VAE` are the added ones; what stands after `before:` is what an ordinary training script had in their place. Every
diffusers VAE whose `latent_dist` has a mean and a log variance takes the same lines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from decovae import LatentHead, analyze_latents, vad_loss  # DeCo-VAE


def main(steps: int = 100, weight: float = 1.0) -> tuple[torch.Tensor, float]:
    """Train for some steps; the latent mean of all clips, (N, C, T, H, W), and the mean absolute error."""
    torch.manual_seed(0)
    clips = F.interpolate(torch.rand(32, 1, 2, 3, 3), size=(5, 12, 12), mode="trilinear")
    vae = AutoencoderKLCogVideoX(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("CogVideoXDownBlock3D", "CogVideoXDownBlock3D"),
        up_block_types=("CogVideoXUpBlock3D", "CogVideoXUpBlock3D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    )
    head = LatentHead()  # DeCo-VAE
    optimizer = torch.optim.Adam(vae.parameters(), lr=8e-3)

    for _ in range(steps):
        batch = clips[torch.randperm(len(clips))[:4]]
        posterior = vae.encode(batch).latent_dist
        # before: z = posterior.sample()
        # before: kl = 0.5 * (posterior.mean.square() + posterior.var - posterior.logvar - 1).mean()
        z, kl, moments = head(posterior.mean, posterior.logvar)  # DeCo-VAE
        loss = F.l1_loss(vae.decode(z).sample, batch) + 5e-4 * kl
        loss = loss + weight * vad_loss(moments)  # DeCo-VAE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        mu = vae.encode(clips).latent_dist.mean
        return mu, F.l1_loss(vae.decode(mu).sample, clips).item()


if __name__ == "__main__":
    for weight in (0.0, 1.0):
        mu, error = main(weight=weight)
        print(f"weight {weight:g}: mean absolute error {error:.3f}")
        print(f"  effective rank {analyze_latents(mu).effective_rank:.2f} of {mu.shape[1]}")  # DeCo-VAE
