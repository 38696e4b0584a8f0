"""The losses are usable without what the training pipeline needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import decovae

HEAVY = ("monai", "nibabel", "lpips", "matplotlib")

PROGRAM = f"""
import sys
import decovae
assert "torch" not in sys.modules, "importing decovae loads torch"
import torch
mu = torch.randn(2, 4, 3, 3, 3)
decovae.VADLoss()(mu), decovae.sid_loss(mu), decovae.analyze_latents(mu), decovae.channel_statistics(mu)
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
assert "decovae_kernels.moments_triton" not in sys.modules, "CPU tensors need no Triton"
"""


def test_losses_load_neither_pipeline_nor_kernels() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names_exist() -> None:
    for name in decovae.__all__:
        assert getattr(decovae, name) is not None
    assert set(decovae.__all__) <= set(dir(decovae))


def test_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="sid_los'"):
        decovae.sid_los  # noqa: B018
