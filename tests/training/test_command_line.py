"""Options become a typed configuration; what cannot be one is refused in one sentence that names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.training.checks import check
from decovae.training.command_line import parse
from decovae.training.config import VAEConfig
from decovae.training.presets import PAPER, QUICKSTART, VAE_PRESETS


def configuration(*arguments: str) -> VAEConfig:
    return parse(VAE_PRESETS, arguments, default="quickstart")


def test_presets_and_their_default() -> None:
    assert configuration() == configuration("quickstart") == QUICKSTART
    assert configuration("paper") == PAPER
    assert configuration("--deco", "sid") == replace(QUICKSTART, deco="sid")


def test_the_contract_s_options() -> None:
    config = configuration(
        *"paper --deco none --data.root volumes --out here --steps 7 --seed 3 --data.grid 8 16 24".split()
    )
    assert (config.deco, config.steps, config.seed, config.out) == ("none", 7, 3, Path("here"))
    assert config.data.root == Path("volumes")
    assert config.data.grid == (8, 16, 24)


def test_the_paper_preset_has_the_paper_s_values() -> None:
    data, loss, optimizer = PAPER.data, PAPER.loss, PAPER.optimizer
    assert (data.grid, data.patch, data.batch_size) == ((128, 256, 128), (96, 96, 96), 2)
    assert (PAPER.model.channels, PAPER.model.residual_blocks, PAPER.model.groups) == ((64, 128, 256), 2, 32)
    assert (PAPER.model.latent_channels, PAPER.model.compression, PAPER.model.eps) == (4, 4, 1e-6)
    assert (loss.perceptual, loss.kl, loss.discriminator, loss.slice_fraction) == (0.3, 5e-4, 0.5, 0.2)
    assert (loss.adversarial_slices, loss.adversarial_volume, loss.perceptual_network) == (0.1, 0.1, "pretrained")
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.eps) == (1e-4, 1e-5, 1e-6)
    assert (optimizer.clip_norm, PAPER.steps, PAPER.seed, PAPER.validate_every) == (1.0, 100_000, 42, 1_000)
    assert data.augment


def test_help_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["quickstart", "--help"]):
        with pytest.raises(SystemExit) as stop:
            configuration(*arguments)
        assert stop.value.code == 0
    assert "--data.root" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lambda", "3"], ["--lambda"]),
        (["--data.rot", "x"], ["--data.rot", "did you mean --data.root"]),
        (["--loss.adversarial_volum", "1"], ["did you mean --loss.adversarial-volume"]),
        (["--deco", "pca"], ["pca", "--deco", "vad"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--data.patch", "96", "96"], ["--data.patch", "3 values"]),
        (["thesis"], ["thesis"]),
        (["--out"], ["--out"]),
    ],
)
def test_unusable_arguments_are_named_in_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        configuration(*arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "│" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        "--steps 0",
        "--seed -1",
        "--data.batch-size 0",
        "--data.cohort-size 0",
        "--data.workers -1",
        "--data.prefetch 0",
        "--data.foreground 1.5",
        "--data.grid 64 70 64",
        "--data.patch 30 32 32",
        "--data.patch 0 32 32",
        "--data.cohort-shape 16 72 64",
        "--data.patch 128 32 32",
        "--data.patch 16 16 16",
        "--data.validation-fraction 1",
        "--optimizer.learning-rate nan",
        "--optimizer.learning-rate -1",
        "--optimizer.ema-decay 1",
        "--optimizer.accumulation 0",
        "--loss.kl -1",
        "--loss.deco nan",
        "--loss.gamma 0",
        "--loss.slice-fraction 0",
        "--model.groups 5",
        "--model.residual-blocks 0",
        "--model.image-channels 3",
        "--optimizer.discriminator-learning-rate -1",
        "--optimizer.weight-decay -1",
        "--optimizer.warmup-steps -1",
        "--loss.adversarial-warmup -1",
        "--model.latent-channels 0",
    ],
)
def test_values_that_cannot_be_trained_with_are_named(arguments: str) -> None:
    option, *values = arguments.split()
    with pytest.raises(InputError) as caught:
        check(configuration(*arguments.split()))
    assert option in str(caught.value)
    assert values[0] in str(caught.value)


def test_the_cohort_s_shape_does_not_bind_runs_on_files() -> None:
    larger = "--data.grid 128 128 128 --data.patch 96 96 96".split()
    check(configuration(*larger, "--data.root", "volumes"))
    with pytest.raises(InputError, match=r"--data\.cohort-shape"):
        check(configuration(*larger))


def test_a_perceptual_network_of_none_asks_for_no_image() -> None:
    off = "--loss.l1 0 --loss.perceptual-network none --loss.adversarial-slices 0 --loss.adversarial-volume 0"
    with pytest.raises(InputError, match=r"--loss\.l1 0"):
        check(configuration(*off.split()))


def test_presets_pass_their_own_check() -> None:
    check(QUICKSTART)
    check(PAPER)
