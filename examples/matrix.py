"""A plain matrix of embeddings (N, C), one row a sample, with the SID loss.

    pip install -e . && python examples/matrix.py

trains a linear encoder and decoder on features that share few factors twice, without the loss (weight 0) and with it,
in seconds on a laptop. Take the lines that end in `DeCo-VAE` away and an ordinary training script remains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from decovae import analyze_latents, sid_loss  # DeCo-VAE


def main(steps: int = 300, weight: float = 10.0) -> tuple[torch.Tensor, float]:
    """Train for some steps; the embeddings of all samples, (N, C), and the mean squared error."""
    torch.manual_seed(0)
    factors = torch.randn(1024, 4) * torch.tensor([3.0, 1.0, 1.0, 1.0])
    features = factors @ torch.randn(4, 32) / 4
    encoder = nn.Linear(32, 4)
    decoder = nn.Linear(4, 32)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)

    for _ in range(steps):
        batch = features[torch.randperm(len(features))[:128]]
        embedding = encoder(batch)
        loss = F.mse_loss(decoder(embedding), batch)
        loss = loss + weight * sid_loss(embedding)  # DeCo-VAE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        embedding = encoder(features)
        return embedding, F.mse_loss(decoder(embedding), features).item()


if __name__ == "__main__":
    for weight in (0.0, 10.0):
        embedding, error = main(weight=weight)
        print(f"weight {weight:g}: mean squared error {error:.3f}")
        print(f"  effective rank {analyze_latents(embedding).effective_rank:.2f} of {embedding.shape[1]}")  # DeCo-VAE
