"""The autoencoder is MONAI's AutoencoderKlMaisi: same keys, same function, weights exchangeable both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decovae.errors import InputError
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.weights import load_autoencoder, save_autoencoder
from tests.models.twins import monai_twin, perturbed

SMALL = AutoencoderConfig(channels=(32, 64), residual_blocks=2, latent_channels=3)


def test_default_is_the_paper_s_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Autoencoder().parameters()) == 20_944_897


@pytest.mark.parametrize("config", [SMALL, AutoencoderConfig(channels=(32, 32, 64), residual_blocks=1)])
def test_weights_travel_both_ways_and_mean_the_same(config: AutoencoderConfig) -> None:
    torch.manual_seed(0)
    ours, theirs = perturbed(Autoencoder(config)), monai_twin(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = torch.rand(2, 1, 16, 12, 8)
    mu, log_variance = ours.encode(image)
    their_mu, their_sigma = theirs.encode(image)
    torch.testing.assert_close(mu, their_mu, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((0.5 * log_variance).exp(), their_sigma, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.decode(mu), theirs.decode(mu), rtol=1e-4, atol=1e-4)

    perturbed(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(image, sample=False)[0], theirs.reconstruct(image), rtol=1e-4, atol=1e-4)


def test_log_variance_is_clamped() -> None:
    model = Autoencoder(SMALL)
    with torch.no_grad():
        model.quant_conv_log_sigma.conv.bias.fill_(1e6)
    assert model.encode(torch.rand(1, 1, 8, 8, 8))[1].max() == 10


def test_sampling_adds_noise_of_the_posterior_s_scale() -> None:
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    seen: list[torch.Tensor] = []
    model.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(2, 1, 32, 32, 32)
    mu, log_variance = model.encode(image)
    model(image)
    epsilon = (seen[0] - mu) / (0.5 * log_variance).exp()
    assert abs(epsilon.mean()) < 0.02
    assert abs(epsilon.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("shape", "words"), [((1, 8, 8, 8), "shape"), ((1, 2, 8, 8, 8), "shape"), ((1, 1, 8, 9, 8), "multiples of 2")]
)
def test_wrong_image_is_named(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Autoencoder(SMALL).encode(torch.zeros(shape))


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="groups=32"):
        Autoencoder(AutoencoderConfig(channels=(48, 64)))


def test_export_round_trip_keeps_the_architecture(tmp_path: Path) -> None:
    config = AutoencoderConfig(channels=(8, 16), residual_blocks=1, groups=4, eps=1e-5)
    model = Autoencoder(config)
    save_autoencoder(model.state_dict(), config, tmp_path / "autoencoder.safetensors")
    loaded = load_autoencoder(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    image = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(loaded(image, sample=False)[0], model(image, sample=False)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["autoencoder.safetensors"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "vae.module._orig_mod."])
@pytest.mark.parametrize("nested", [False, True])
def test_pickled_checkpoints_of_others_load(tmp_path: Path, prefix: str, nested: bool) -> None:
    state = {prefix + key: value for key, value in monai_twin(SMALL).state_dict().items()}
    if prefix.startswith(("module", "vae")):
        state["discriminator.weight"] = torch.zeros(1)  # another network's, told apart by its prefix
    torch.save({"epoch": 3, "ema": [1.0], "model": {"state": state}} if nested else state, tmp_path / "model.pt")
    loaded = load_autoencoder(tmp_path / "model.pt")
    assert loaded.config == SMALL


def test_compiled_blocks_inside_a_name_load(tmp_path: Path) -> None:
    state = {key.replace("blocks.1.", "blocks.1._orig_mod."): v for key, v in Autoencoder(SMALL).state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    load_autoencoder(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", b"not a checkpoint", "weights_only"),
        ("b.safetensors", b"not a checkpoint", "safetensors"),
        ("c.pt", {"weight": torch.zeros(3)}, "no MAISI autoencoder"),
    ],
)
def test_bad_weights_files_are_named(tmp_path: Path, name: str, content: object, words: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=words) as caught:
        load_autoencoder(path)
    assert name in str(caught.value)


def test_missing_and_attention_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such weights file"):
        load_autoencoder(tmp_path / "nowhere.pt")
    state = Autoencoder(SMALL).state_dict() | {"encoder.blocks.2.attn.to_q.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "attention.pt")
    with pytest.raises(InputError, match=r"attention\.pt: not the weights"):
        load_autoencoder(tmp_path / "attention.pt")
