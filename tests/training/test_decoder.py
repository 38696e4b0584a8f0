"""Fine-tuning of the decoder: the encoder keeps its bits, and what trains is the decoder of that very autoencoder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decovae.losses.objective import LossConfig, VAEObjective
from decovae.models.weights import encoder_fingerprint, load_autoencoder
from decovae.runtime import Runtime
from decovae.training.config import DecoderConfig
from decovae.training.decoder import DecoderNetworks, DecoderStage
from decovae.training.main import train_decoder
from decovae.training.telemetry import OF_SPEED
from tests.training.conftest import TINY_DECODER, finished_vae, tiny_decoder_run, tiny_run, torchrun


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "autoencoder.safetensors")


def is_decoder(name: str) -> bool:
    return name.startswith(("decoder.", "post_quant_conv."))


def figures(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OF_SPEED} for line in lines]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_vae(tmp_path_factory.mktemp("decoder") / "vae")


def only_the_decoder_changed(before: Path, after: Path) -> None:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(is_decoder(name) for name in changed)
    assert {name for name in old if is_decoder(name)} == changed
    assert encoder_fingerprint(load_autoencoder(before)) == encoder_fingerprint(load_autoencoder(after))


@pytest.mark.parametrize("memory", ["balanced", "tight", "none"])
def test_the_encoder_keeps_its_bits_and_all_of_the_decoder_learns(vae: Path, tmp_path: Path, memory: str) -> None:
    assert tiny_decoder_run(vae, tmp_path / "run", ["--memory", memory]) == 0
    only_the_decoder_changed(vae, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stage"] == "decoder"
    assert summary["encoder"] == encoder_fingerprint(load_autoencoder(vae))
    assert {"psnr", "ssim", "lpips", "pearson", "effective_rank", "psnr_before_training"} <= summary.keys()
    assert any((tmp_path / "run" / "previews").iterdir())


def test_it_starts_where_the_autoencoder_s_training_ended(tmp_path: Path) -> None:
    """What a run validates last, its average of weights included, is what it exports."""
    assert tiny_run(tmp_path / "vae", ["--steps", "3"]) == 0
    assert tiny_decoder_run(tmp_path / "vae", tmp_path / "run", ["--steps", "1"]) == 0
    ended, begun = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("vae", "run"))
    assert begun["psnr_before_training"] == pytest.approx(ended["psnr"], rel=1e-6)
    assert begun["effective_rank"] == pytest.approx(ended["effective_rank"], rel=1e-6)


def test_the_data_are_those_of_the_autoencoder_s_run(vae: Path, tmp_path: Path) -> None:
    assert tiny_decoder_run(vae, tmp_path / "run", ["--steps", "1", "--data.batch-size", "1"]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "cohort_size: 5" in config
    assert "batch_size: 1" in config


def test_an_interrupted_run_continues_to_the_same_bits(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_decoder_run(vae, tmp_path / "whole") == 0
    losses = DecoderStage.losses

    def interrupted(self: DecoderStage, batch: dict, step: int):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(DecoderStage, "losses", interrupted)
        assert tiny_decoder_run(vae, tmp_path / "stopped") == 128 + signal.SIGTERM
    assert tiny_decoder_run(vae, tmp_path / "stopped") == 0
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_without_noise_the_decoder_sees_the_mean(vae: Path) -> None:
    autoencoder = load_autoencoder(vae)
    image = torch.rand(1, 1, 24, 24, 24)
    expected = autoencoder.decode(autoencoder.encode(image)[0]).detach()
    for scale, same in ((0.0, True), (1.0, False)):
        config = DecoderConfig(
            vae=vae, noise_scale=scale, loss=LossConfig(kl=0, perceptual=0, perceptual_network="none")
        )
        objective = VAEObjective(config.loss, deco="none")
        networks = DecoderNetworks(config, Runtime(torch.device("cpu")), objective, load_autoencoder(vae))
        reconstruction, latent = networks.reconstruct(image)
        assert latent is None
        assert torch.allclose(reconstruction, expected, atol=1e-5) == same


@pytest.mark.gpu
def test_a_gpu_trains_it_in_bf16_and_compiled(vae: Path, tmp_path: Path) -> None:
    assert tiny_decoder_run(vae, tmp_path / "run", ["--device", "cuda", "--data.workers", "1"]) == 0
    only_the_decoder_changed(vae, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_it(vae: Path, tmp_path: Path) -> None:
    done = torchrun("train/decoder.py", ["--vae", str(vae), *TINY_DECODER, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    only_the_decoder_changed(vae, tmp_path / "run")


def no_folder(vae: Path, at: Path) -> tuple[list[str], str]:
    return ["--vae", str(at / "nowhere")], "nowhere"


def unfinished(vae: Path, at: Path) -> tuple[list[str], str]:
    run = finished_vae(at / "begun")
    (run / "summary.json").unlink()
    return ["--vae", str(run)], "not finished"


def no_run(vae: Path, at: Path) -> tuple[list[str], str]:
    (at / "empty").mkdir()
    return ["--vae", str(at / "empty")], "holds no run"


def nothing_given(vae: Path, at: Path) -> tuple[list[str], str]:
    return [], "--vae"


def damaged_configuration(vae: Path, at: Path) -> tuple[list[str], str]:
    run = finished_vae(at / "damaged")
    (run / "config.yaml").write_text("data: {patch: [a, b]}\n")
    return ["--vae", str(run)], "config.yaml"


def a_loss_on_the_encoder(vae: Path, at: Path) -> tuple[list[str], str]:
    return ["--vae", str(vae), "--loss.kl", "1e-4"], "--loss.kl"


def a_grid_that_does_not_divide(vae: Path, at: Path) -> tuple[list[str], str]:
    return ["--vae", str(vae), "--data.grid", "33", "36", "32"], "--data.grid 33 36 32"


BAD = [
    no_folder,
    unfinished,
    no_run,
    nothing_given,
    damaged_configuration,
    a_loss_on_the_encoder,
    a_grid_that_does_not_divide,
]


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, named = case(vae, tmp_path)
    assert train_decoder([*options, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert named in message
    assert not (tmp_path / "run").exists()
