"""The objective: each term is what its equation says, can be turned off, is logged, and stays with its own network."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from decovae.losses.adversarial import discriminator_loss, generator_loss
from decovae.losses.latent_head import LatentHead, kl_divergence
from decovae.losses.objective import PAPER_WEIGHT, LossConfig, VAEObjective
from decovae.losses.slices import random_slices
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.discriminators import Discriminators
from decovae.runtime import Runtime
from decovae.training.presets import QUICKSTART
from decovae.training.vae import VAEStage

WEIGHTS = LossConfig(perceptual_network="random")


@pytest.fixture
def outputs() -> dict[str, Any]:
    torch.manual_seed(0)
    image = torch.rand(2, 1, 32, 32, 32)
    return {
        "image": image,
        "reconstruction": (image + 0.1 * torch.randn_like(image)).requires_grad_(),
        "latent": LatentHead()(*torch.randn(2, 2, 4, 8, 8, 8, requires_grad=True)),
    }


def generator(objective: VAEObjective, outputs: dict[str, Any], discriminators: nn.Module | None, step: int = 0):
    planes = objective.slices(outputs["image"], outputs["reconstruction"], step, seed=1)
    return objective.generator(**outputs, planes=planes, discriminators=discriminators, step=step), planes


def test_kl_is_the_mean_divergence_between_gaussians() -> None:
    mu, log_variance = torch.randn(3, 4, 5, 5, 5), torch.randn(3, 4, 5, 5, 5)
    posterior = torch.distributions.Normal(mu, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mu, log_variance), expected)
    assert kl_divergence(torch.zeros(1, 1), torch.zeros(1, 1)) == 0


def test_least_squares_targets() -> None:
    ones, zeros = [torch.ones(2, 1, 3, 3)], [torch.zeros(2, 1, 3, 3)]
    assert generator_loss(ones) == 0
    assert generator_loss(zeros) == 1
    assert discriminator_loss(real=ones, fake=zeros) == 0
    assert discriminator_loss(real=zeros, fake=ones) == 2


def test_total_is_the_weighted_sum_of_the_logged_terms(outputs: dict[str, Any]) -> None:
    loss, _ = generator(VAEObjective(WEIGHTS, deco="sid"), outputs, Discriminators())
    weights = {
        "l1": 1.0,
        "kl": 5e-4,
        "deco": PAPER_WEIGHT["sid"],
        "perceptual_random": 0.3,
        "adversarial_volume": 0.1,
        "adversarial_slices": 0.1,
    }
    assert loss.terms.keys() == weights.keys() | {"generator"}
    expected = sum(weight * float(loss.terms[name]) for name, weight in weights.items())
    assert math.isclose(loss.total.item(), expected, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"l1": 0.0}, "l1"),
        ({"kl": 0.0}, "kl"),
        ({"deco": 0.0}, "deco"),
        ({"perceptual": 0.0}, "perceptual_random"),
        ({"perceptual_network": "none"}, "perceptual_random"),
    ],
)
def test_a_weight_of_zero_turns_a_term_off(outputs: dict[str, Any], change: dict, gone: str) -> None:
    loss, _ = generator(VAEObjective(replace(WEIGHTS, **change)), outputs, None)
    assert gone not in loss.terms
    assert len(loss.terms) == 4


def test_discriminators_may_be_absent_one_by_one(outputs: dict[str, Any]) -> None:
    objective = VAEObjective(replace(WEIGHTS, adversarial_slices=0.0))
    discriminators = Discriminators(slices=False)
    loss, planes = generator(objective, outputs, discriminators)
    assert "adversarial_slices" not in loss.terms
    own = objective.discriminator(
        outputs["image"], outputs["reconstruction"], planes=planes, discriminators=discriminators
    )
    assert own.terms.keys() == {"discriminator_volume"}


def test_warmup_keeps_the_adversarial_terms_out(outputs: dict[str, Any]) -> None:
    objective = VAEObjective(replace(WEIGHTS, adversarial_warmup=5))
    before, _ = generator(objective, outputs, Discriminators(), step=4)
    after, _ = generator(objective, outputs, Discriminators(), step=5)
    assert not any("adversarial" in name for name in before.terms)
    assert sum("adversarial" in name for name in after.terms) == 2


def test_nothing_left_to_train_is_refused(outputs: dict[str, Any]) -> None:
    off = LossConfig(l1=0, kl=0, deco=0, perceptual=0, adversarial_slices=0, adversarial_volume=0)
    with pytest.raises(ValueError, match="nothing to train"):
        generator(VAEObjective(off), outputs, None)


def test_each_network_s_gradient_comes_from_its_own_loss_only(outputs: dict[str, Any]) -> None:
    """The stage's two losses, with an autoencoder and discriminators that both take part in each of them."""
    stage = object.__new__(VAEStage)  # the losses alone: no volumes are needed
    stage.config, stage.runtime, stage.name = QUICKSTART, Runtime(torch.device("cpu")), "autoencoder"
    stage.objective, stage.slice_seed = VAEObjective(WEIGHTS), 0
    stage.autoencoder = Autoencoder(AutoencoderConfig(channels=(8, 16), residual_blocks=1, groups=4))
    stage.discriminators = Discriminators(channels=8)
    losses = stage.losses({"image": outputs["image"]}, step=0)

    name, loss = next(losses)
    assert name == "autoencoder"
    loss.total.backward()
    assert all(p.grad is None for p in stage.discriminators.parameters())
    assert all(p.grad is not None for p in stage.autoencoder.parameters())
    generated = [p.grad.clone() for p in stage.autoencoder.parameters()]

    name, loss = next(losses)
    assert name == "discriminators"
    loss.total.backward()
    assert all(p.grad is not None and p.requires_grad for p in stage.discriminators.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(stage.autoencoder.parameters(), generated, strict=True))
    assert next(losses, None) is None


def test_slices_are_the_same_in_every_volume_and_as_many_as_asked() -> None:
    torch.manual_seed(0)
    first = torch.rand(2, 1, 20, 24, 28)
    planes = random_slices(0.2, first, 2 * first, seed=3)
    assert [tuple(plane[0].shape) for plane in planes] == [(8, 1, 24, 28), (10, 1, 20, 28), (12, 1, 20, 24)]
    for axis, (one, two) in zip((2, 3, 4), planes, strict=True):
        torch.testing.assert_close(two, 2 * one)
        every = first.movedim(axis, 1).flatten(0, 1)
        matches = [(every == slice_).flatten(1).all(1).nonzero().item() for slice_ in one]
        assert len(set(matches)) == len(matches)  # drawn without replacement
        ahead = [match < first.shape[axis] for match in matches]
        assert ahead == sorted(ahead, reverse=True)
        assert sum(ahead) == len(matches) // 2  # as many of each sample
    assert random_slices(1e-6, first, seed=3)[0][0].shape[0] == 2


def test_a_sample_s_slices_depend_on_seed_and_position_alone() -> None:
    volumes = torch.rand(4, 1, 10, 12, 14)

    def drawn(*samples: int, seed: int = 1, positions: tuple[int, ...] = ()) -> list[torch.Tensor]:
        places = positions or tuple(7 + sample for sample in samples)
        found = random_slices(0.3, volumes[list(samples)], seed=seed, positions=places)
        return [plane.unflatten(0, (len(samples), -1)) for (plane,) in found]

    whole = drawn(0, 1, 2, 3)
    for parts in ([(0, 1), (2, 3)], [(3,), (0, 2, 1)]):
        for part in parts:
            for found, expected in zip(drawn(*part), whole, strict=True):
                assert torch.equal(found, expected[list(part)])
    elsewhere, by_another_seed = drawn(0, positions=(8,)), drawn(0, seed=2)
    for other in (elsewhere, by_another_seed):
        assert not all(torch.equal(a[0], b[0]) for a, b in zip(other, whole, strict=True))
    seen = {random_slices(0.01, volumes[:1], seed=1, positions=[p])[0][0].sum().item() for p in range(100)}
    assert len(seen) == 10, "every slice has its turn"


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_an_impossible_share_of_slices_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=str(fraction)):
        random_slices(fraction, torch.zeros(1, 1, 4, 4, 4), seed=0)


def test_volumes_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="share one"):
        random_slices(0.5, torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 5), seed=0)
    with pytest.raises(ValueError, match="one position a sample: 1, not 2"):
        random_slices(0.5, torch.zeros(1, 1, 4, 4, 4), seed=0, positions=[4, 5])
