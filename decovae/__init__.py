"""DeCo-VAE: variational autoencoders for 3D brain MRI with decorrelated latent channels.

Names are imported when first used, so that taking a loss does not load what the training pipeline needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decovae.losses.decorrelation import (
        CovarianceLoss,
        SIDLoss,
        VADLoss,
        VarianceLoss,
        covariance_loss,
        sid_loss,
        vad_loss,
        variance_loss,
    )
    from decovae.losses.latent_head import LatentHead
    from decovae.losses.moments import channel_moments, channel_statistics
    from decovae.metrics.latents import analyze_latents
    from decovae.models.fuse import FuseReport, fuse, unfuse
    from decovae.models.weights import load_autoencoder

__version__ = "0.1.0"

__all__ = [
    "CovarianceLoss",
    "FuseReport",
    "LatentHead",
    "SIDLoss",
    "VADLoss",
    "VarianceLoss",
    "__version__",
    "analyze_latents",
    "channel_moments",
    "channel_statistics",
    "covariance_loss",
    "fuse",
    "load_autoencoder",
    "sid_loss",
    "unfuse",
    "vad_loss",
    "variance_loss",
]

_HOME = {
    "CovarianceLoss": "decovae.losses.decorrelation",
    "FuseReport": "decovae.models.fuse",
    "LatentHead": "decovae.losses.latent_head",
    "SIDLoss": "decovae.losses.decorrelation",
    "VADLoss": "decovae.losses.decorrelation",
    "VarianceLoss": "decovae.losses.decorrelation",
    "analyze_latents": "decovae.metrics.latents",
    "channel_moments": "decovae.losses.moments",
    "channel_statistics": "decovae.losses.moments",
    "covariance_loss": "decovae.losses.decorrelation",
    "fuse": "decovae.models.fuse",
    "load_autoencoder": "decovae.models.weights",
    "sid_loss": "decovae.losses.decorrelation",
    "unfuse": "decovae.models.fuse",
    "vad_loss": "decovae.losses.decorrelation",
    "variance_loss": "decovae.losses.decorrelation",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
