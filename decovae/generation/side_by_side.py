"""Volumes that are encoded side by side: as many as there are threads, and no more than fit into memory."""

from __future__ import annotations

import math
import os

import torch

from decovae.data.volumes import Shape
from decovae.generation.threads import fitting
from decovae.models.autoencoder import AutoencoderConfig
from decovae.runtime import Runtime
from decovae.threads import usable_cpus

COPIES = 6
"""Of the finest level's features, that the encoder holds at once for a volume: 2.9 to 5.3 of them were measured, with
64 to 16 channels; of the image itself, where a GPU encodes it: what is read, resized, and waits for its turn."""


def volumes_at_once(runtime: Runtime, config: AutoencoderConfig, grid: Shape) -> int:
    """How many volumes a process works on side by side, 1 to 8.

    On the CPU as many as torch would use threads for one, on a GPU as many as the process has CPUs to load the next;
    no more than memory has room for.
    """
    if runtime.device.type == "cpu":
        threads = torch.get_num_threads()
    else:
        threads = max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(threads, fitting(volume_bytes(config, grid, on_cpu=runtime.device.type == "cpu")))


def volume_bytes(config: AutoencoderConfig, grid: Shape, *, on_cpu: bool) -> int:
    """What a volume is taken to need of the CPU's memory: the encoder's finest features, or, for a GPU, its image.

    In float32; autocast to bfloat16 needs about half.
    """
    channels = config.channels[0] if on_cpu else config.image_channels
    return COPIES * channels * math.prod(grid) * torch.float32.itemsize
