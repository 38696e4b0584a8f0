"""A VAE on images in plain torch, with the VAD loss on the latent mean (N, C, H, W).

    pip install -e . && python examples/vae_2d.py

trains on smooth random images twice, without the loss (weight 0) and with it, in seconds on a laptop. Take the lines
that end in `DeCo-VAE` away and an ordinary training script remains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from decovae import VADLoss, analyze_latents  # DeCo-VAE


def main(steps: int = 200, weight: float = 1.0) -> tuple[torch.Tensor, float]:
    """Train for some steps; the latent mean of all images, (N, C, H, W), and the mean absolute error."""
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(64, 1, 4, 4), scale_factor=8, mode="bilinear")
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 8, 1),
    )
    decoder = nn.Sequential(
        nn.ConvTranspose2d(4, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 1, 1),
    )
    decorrelate = VADLoss()  # DeCo-VAE
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=4e-3)

    for _ in range(steps):
        batch = images[torch.randperm(len(images))[:16]]
        mu, log_variance = encoder(batch).chunk(2, dim=1)
        z = mu + (0.5 * log_variance).exp() * torch.randn_like(mu)
        kl = 0.5 * (mu.square() + log_variance.exp() - log_variance - 1).mean()
        loss = F.l1_loss(decoder(z), batch) + 5e-4 * kl
        loss = loss + weight * decorrelate(mu)  # DeCo-VAE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        mu, _ = encoder(images).chunk(2, dim=1)
        return mu, F.l1_loss(decoder(mu), images).item()


if __name__ == "__main__":
    for weight in (0.0, 1.0):
        mu, error = main(weight=weight)
        print(f"weight {weight:g}: mean absolute error {error:.3f}")
        print(f"  effective rank {analyze_latents(mu).effective_rank:.2f} of {mu.shape[1]}")  # DeCo-VAE
