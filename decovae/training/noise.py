"""Noise of training samples: functions of the run's seed, a stream, and each sample's position, of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from decovae.data import streams
from decovae.training.stage import Batch
from decovae_kernels import latent_head


def positions_of(batch: Batch, size: int) -> list[int]:
    """Positions of a batch's samples, consecutive; those of a batch that names none count from 0.

    They are read on the CPU, where the loader left them: nothing waits for a device.
    """
    return batch["position"].tolist() if "position" in batch else list(range(size))


def normal_noise(like: Tensor, *, seed: int, stream: int, first: int) -> Tensor:
    """Standard normals, float32, of the shape and on the device of a batch whose first sample's position is ``first``.

    The latent head's own, which are the same for every layout and kind of device, and any division into batches.
    """
    zero = torch.zeros(like.shape, device=like.device)
    key = torch.full((1,), streams.stream_seed(seed, stream), device=like.device)
    noise, _, _ = latent_head(zero, zero, key, first=first)
    return noise


def uniforms(count: int, *, seed: int, stream: int, positions: Sequence[int], device: torch.device) -> Tensor:
    """``count`` numbers from [0, 1) for each position, (positions, count) float64, drawn on the CPU."""
    drawn = torch.tensor(np.stack([streams.generator(seed, stream, position).random(count) for position in positions]))
    # From pinned memory: nothing waits for the copy.
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)
