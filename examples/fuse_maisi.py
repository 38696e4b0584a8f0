"""MONAI's `AutoencoderKlMaisi` on the fused operators: what a training step keeps for its backward pass.

    pip install -e . monai && python examples/fuse_maisi.py

prints that before `fuse`, after it, and in the mode that keeps least, in seconds on a laptop. The weights are the same
each time and, up to rounding, so are the loss and the gradients.
"""

from __future__ import annotations

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from decovae import fuse, unfuse


def step(autoencoder: torch.nn.Module, volumes: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes kept for the backward pass of one training step, and the gradient of the first weight."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in autoencoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    torch.manual_seed(0)
    autoencoder.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reconstruction, mu, sigma = autoencoder(volumes)
        kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).mean()
        loss = (reconstruction - volumes).abs().mean() + 1e-6 * kl
    bytes_kept = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    loss.backward()
    gradient = next(autoencoder.parameters()).grad
    assert gradient is not None
    return bytes_kept, gradient.clone()


def main(size: int = 24) -> dict[str, tuple[int, torch.Tensor]]:
    """What `step` says of each way to compute the same network."""
    torch.manual_seed(0)
    volumes = torch.rand(2, 1, size, size, size)
    autoencoder = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_channels=(16, 32, 64),
        attention_levels=(False, False, False),
        num_res_blocks=(1, 1, 1),
        latent_channels=4,
        norm_num_groups=16,
        num_splits=1,
        save_mem=False,
    )
    found = {"as MONAI computes it": step(autoencoder, volumes)}
    fuse(autoencoder)  # the one line; prints what it replaced and what it left
    found["fused"] = step(autoencoder, volumes)
    fuse(autoencoder, memory="tight", report=True)
    found["fused, memory='tight'"] = step(autoencoder, volumes)
    unfuse(autoencoder)
    return found


if __name__ == "__main__":
    for way, (kept, _) in main().items():
        print(f"{way}: {kept / 1e6:.1f} MB kept for backward")
