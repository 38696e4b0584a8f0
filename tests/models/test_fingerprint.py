"""The encoder's fingerprint tells encoders apart, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.fuse import unfuse
from decovae.models.weights import encoder_fingerprint, load_autoencoder, save_autoencoder

CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)


@pytest.fixture
def model() -> Autoencoder:
    return Autoencoder(CONFIG).eval()


def test_layout_fusing_and_the_file_do_not_show(model: Autoencoder, tmp_path: Path) -> None:
    fingerprint = encoder_fingerprint(model)
    assert len(fingerprint) == 32
    assert int(fingerprint, 16)
    save_autoencoder(model.state_dict(), CONFIG, tmp_path / "autoencoder.safetensors")
    assert encoder_fingerprint(load_autoencoder(tmp_path)) == fingerprint
    unfuse(model)
    assert encoder_fingerprint(model) == fingerprint
    assert encoder_fingerprint(model.to(memory_format=torch.channels_last_3d)) == fingerprint
    assert encoder_fingerprint(model.train().requires_grad_(False)) == fingerprint


@pytest.mark.parametrize("part", ["decoder", "post_quant_conv"])
def test_the_decoder_does_not_show(model: Autoencoder, part: str) -> None:
    fingerprint = encoder_fingerprint(model)
    with torch.no_grad():
        for parameter in getattr(model, part).parameters():
            parameter.add_(1)
    assert encoder_fingerprint(model) == fingerprint


def test_one_bit_of_any_encoder_tensor_shows(model: Autoencoder) -> None:
    seen = {encoder_fingerprint(model)}
    names = [
        name for name, _ in model.named_parameters() if name.startswith(("encoder.", "quant_conv_mu", "quant_conv_log"))
    ]
    assert names
    for name in names:
        flat = model.get_parameter(name).data.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        fingerprint = encoder_fingerprint(model)
        assert fingerprint not in seen, name
        seen.add(fingerprint)


def test_the_dtype_shows(model: Autoencoder) -> None:
    assert encoder_fingerprint(model) != encoder_fingerprint(model.double())
