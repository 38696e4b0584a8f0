"""Least-squares adversarial losses (Mao et al., 2017) on the logit maps of patch discriminators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """E[(D(x̂) − 1)²], averaged within each logit map and then over the maps; float32 scalar."""
    return torch.stack([(logits.float() - 1).square().mean() for logits in fake]).mean()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """E[(D(x) − 1)²] + E[D(x̂)²], averaged as in :func:`generator_loss`; float32 scalar."""
    on_fake = torch.stack([logits.float().square().mean() for logits in fake]).mean()
    return generator_loss(real) + on_fake
