"""Whole training steps of all implementations do the same work, and their floor is below it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import step_baselines
from bench.step_baselines import Step, floor, held_bytes, passes, step
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.discriminators import Discriminators
from decovae.training.presets import PAPER

TINY = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)
CONFIG = replace(
    PAPER,
    model=TINY,
    precision="fp32",
    loss=replace(PAPER.loss, slice_fraction=1.0),  # all slices, so that which are drawn first does not matter
)
SHAPE = (1, 1, 24, 24, 24)


def image() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


def with_the_weights_of(reference: Step, name: str) -> Step:
    made = step(name, CONFIG, image())
    for key, network in made.networks.items():
        network.load_state_dict(reference.networks[key].state_dict())
    return made


def outcome(made: Step) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The terms of one step, and the clipped gradients that reach each optimizer."""
    gradients: dict[str, list[Tensor]] = {}
    for name, optimizer in made.optimizers.items():

        def keep(optimizer: Any, *_: Any, name: str = name) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients[name] = [p.grad.clone() for p in parameters]

        optimizer.register_step_pre_hook(keep)
    return made(), gradients


@pytest.fixture(scope="module")
def reference() -> Step:
    made = step("plain-eager", CONFIG, image())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.networks["autoencoder"].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        # No noise, of which each draws its own: log σ² is about −25, inside the range that has a gradient.
        latent: Any = made.networks["autoencoder"]
        latent.quant_conv_log_sigma.conv.bias.fill_(-25)
    return made


@pytest.fixture(scope="module")
def expected(reference: Step) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    return outcome(with_the_weights_of(reference, "plain-eager"))


@pytest.mark.parametrize("name", ["ours-balanced", "ours-tight", "monai-eager", "monai-checkpointed"])
def test_terms_and_gradients_are_the_same(
    reference: Step, expected: tuple[dict[str, Tensor], dict[str, list[Tensor]]], name: str
) -> None:
    terms, gradients = outcome(with_the_weights_of(reference, name))
    wanted_terms, wanted_gradients = expected
    assert terms.keys() == wanted_terms.keys()
    torch.testing.assert_close(terms, wanted_terms, rtol=1e-3, atol=1e-5)
    assert {key: len(found) for key, found in gradients.items()} == {
        key: len(list(network.parameters())) for key, network in reference.networks.items()
    }
    for key, found in gradients.items():
        for one, other in zip(found, wanted_gradients[key], strict=True):
            assert (one - other).norm() <= 5e-3 * other.norm() + 1e-6


def test_a_step_changes_every_network_and_leaves_no_gradient() -> None:
    for name in ("ours-balanced", "monai-eager"):
        made = step(name, CONFIG, image())
        before = {key: [p.detach().clone() for p in n.parameters()] for key, n in made.networks.items()}
        made()
        for key, network in made.networks.items():
            changed = [not torch.equal(p, q) for p, q in zip(network.parameters(), before[key], strict=True)]
            assert any(changed)
            assert all(parameter.grad is None for parameter in network.parameters())


def test_what_learns_to_judge_has_the_layout_that_it_has_here() -> None:
    made = step("monai-float16-eager", CONFIG, image())
    for name, layout in (("volume", torch.channels_last_3d), ("slices", torch.channels_last)):
        kernels = [p for p in made.networks["discriminators"].get_submodule(name).parameters() if p.ndim > 1]
        assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    norms = [module for module in made.networks["autoencoder"].modules() if hasattr(module, "norm_float16")]
    assert all(norm.norm_float16 for norm in norms)
    assert norms
    assert made.dtype == torch.float16


def test_held_are_parameters_moments_features_and_the_image() -> None:
    made = step("monai-eager", CONFIG, image())
    weights = sum(p.nbytes for network in made.networks.values() for p in network.parameters())
    fixed = sum(p.nbytes for p in [*made.frozen.parameters(), *made.frozen.buffers()])
    assert held_bytes(made) == weights + fixed + made.image.nbytes
    made()
    assert held_bytes(made) == 3 * weights + fixed + made.image.nbytes


def test_the_floor_is_below_what_a_step_does() -> None:
    made = step("plain-eager", CONFIG, image())
    with FlopCounterMode(display=False) as count:
        made()
    least = floor(CONFIG, SHAPE, itemsize=4)
    # Upsampling convolutions are counted at an eighth; all else but LPIPS's heads is what runs.
    assert 0.5 * count.get_total_flops() < least.flops < count.get_total_flops()
    weights = sum(p.nbytes for network in made.networks.values() for p in network.parameters())
    moved = least.bytes_moved - step_baselines.OPTIMIZER_PASSES * weights
    assert 2 * (floor(CONFIG, SHAPE, itemsize=2).bytes_moved - step_baselines.OPTIMIZER_PASSES * weights) == moved > 0


def test_passes_count_products_as_torch_does() -> None:
    judges = Discriminators()
    planes = [torch.rand(3, 1, 24, 24)]
    with FlopCounterMode(display=False) as count, torch.no_grad():
        total, first = passes(judges, lambda: judges(image(), planes))
    assert total.flops == count.get_total_flops()
    assert 0 < first.flops < total.flops
    assert first.inside == image().numel() + planes[0].numel()
    assert not any(module._forward_hooks for module in judges.modules() if isinstance(module, nn.Module))
