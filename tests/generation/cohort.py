"""A cohort of noise and an autoencoder, small enough to be encoded in a second, the same in every process."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decovae.data.volumes import Shape, VolumeRecord, affine_rows
from decovae.generation.encoding import encode_volumes
from decovae.generation.latents import LatentStore
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.runtime import Runtime

COUNT = 35
SHAPE: Shape = (9, 12, 10)
GRID: Shape = (8, 12, 8)
LATENT: Shape = (4, 6, 4)
TRAINING = [index for index in range(COUNT) if index % 5]
VALIDATION = [index for index in range(COUNT) if index % 5 == 0]
CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)
AFFINE = affine_rows([[2.0, 0, 0, -9], [0, 1.5, 0, 4], [0, 0, 1, 0.25], [0, 0, 0, 1]])


class NoiseVolumes:
    """Volumes of noise; `pause` is how long each takes to read."""

    def __init__(self, count: int = COUNT, *, pause: float = 0.0) -> None:
        self.pause = pause
        self.seen: list[int] = []
        self.records = [
            VolumeRecord(f"s{i:02d}", f"memory:{i}", SHAPE, 0.0, 1.0, AFFINE, {"age": str(40 + i)})
            for i in range(count)
        ]

    def read(self, index: int) -> np.ndarray:
        time.sleep(self.pause)
        self.seen.append(index)
        return np.random.default_rng(index).random(SHAPE, dtype=np.float32)


def autoencoder(seed: int = 0) -> Autoencoder:
    """An untrained autoencoder of `CONFIG`; torch's generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Autoencoder(CONFIG)
        model.start_latent(log_variance=-6.0, orthogonal=True)
    return model.eval()


def encode(out: Path, volumes: Any = None, runtime: Runtime | None = None, **changes: Any) -> LatentStore:
    """`encode_volumes` of the cohort with the autoencoder, or what `changes` puts in their place."""
    options = {
        "training": TRAINING,
        "validation": VALIDATION,
        "grid": GRID,
        "out": out,
        "runtime": runtime or Runtime(torch.device("cpu")),
        "data": "noise",
    }
    model = changes.pop("model", None) or autoencoder()
    return encode_volumes(model, NoiseVolumes() if volumes is None else volumes, **{**options, **changes})


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder, also of hidden ones."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
