"""The flow's network is MONAI's DiffusionModelUNetMaisi: same keys, same function, weights exchangeable both ways."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.flow_baselines import monai
from decovae.models.conditions import CategoricalCondition, ScalarCondition, condition_from_dict
from decovae.models.flow_blocks import ResidualBlock, doubled, doubled_convolution, halved
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
from tests.channel_cases import DEVICE, implementation

TINY = FlowUNetConfig(channels=(8, 16), attention=(False, True), residual_blocks=1, head_channels=8, groups=4)
CONFIGS = [
    TINY,
    FlowUNetConfig(channels=(8, 8, 16), attention=(True, False, True), residual_blocks=2, head_channels=4, groups=8),
]
CONDITIONS = (ScalarCondition("age", 60.0, 8.0), CategoricalCondition("sex", ("F", "M")))
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def perturbed(network: Any, seed: int = 3) -> Any:
    """The network with no zeros left in it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def gradients(network: nn.Module, velocity: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    weights = torch.linspace(-1, 1, velocity.numel(), device=velocity.device).view(velocity.shape)
    (velocity * weights).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_default_is_maisi_s_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in FlowUNet().parameters()) == 178_566_276


@FUSED
@pytest.mark.parametrize("config", CONFIGS)
def test_weights_travel_both_ways_and_mean_the_same(config: FlowUNetConfig, fused: bool) -> None:
    torch.manual_seed(0)
    ours = FlowUNet(config, 3, fused=fused)
    torch.manual_seed(0)
    theirs = monai(config, 3)
    started = ours.state_dict()
    assert started.keys() == theirs.state_dict().keys()
    assert all(torch.equal(started[name], value) for name, value in theirs.state_dict().items())

    theirs.load_state_dict(perturbed(ours).state_dict(), strict=True)
    ours.load_state_dict(perturbed(theirs, seed=4).state_dict(), strict=True)
    x, t = torch.randn(2, 3, 8, 4, 12), torch.tensor([0.3, 0.9])
    found, expected = ours(x, t), theirs(x, 1000 * (1 - t))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    along, wanted = gradients(ours, found), gradients(theirs, expected)
    assert along.keys() == wanted.keys()
    # Some are zero but for rounding, a bias before a norm's: all are held against the scale of the largest.
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(along[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


@FUSED
def test_axes_are_padded_at_the_far_end_and_cropped(fused: bool) -> None:
    network = perturbed(FlowUNet(CONFIGS[1], 2, fused=fused))
    x, t = torch.randn(1, 2, 5, 4, 7), torch.tensor([0.5])
    padded = torch.zeros(1, 2, 8, 4, 8)
    padded[:, :, :5, :, :7] = x
    velocity = network(x, t)
    assert velocity.shape == x.shape
    torch.testing.assert_close(velocity, network(padded, t)[:, :, :5, :, :7])


def test_one_volume_without_gradients_is_what_it_is_with_them() -> None:
    network = perturbed(FlowUNet(CONFIGS[1], 2))
    x, t = torch.randn(1, 2, 8, 5, 7), torch.tensor([0.5])
    expected = network(x, t)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(x, t).dtype == torch.bfloat16
        torch.testing.assert_close(network.double()(x.double(), t).float(), expected, rtol=1e-4, atol=1e-4)


def test_one_time_for_all_is_each_one_s() -> None:
    network, x = perturbed(FlowUNet(TINY, 2)), torch.randn(3, 2, 4, 4, 4)
    torch.testing.assert_close(network(x, torch.tensor(0.25)), network(x, torch.full((3,), 0.25)))
    assert not torch.allclose(network(x, torch.tensor(0.25)), network(x, torch.tensor(0.26)))


def test_without_training_conditions_change_nothing() -> None:
    torch.manual_seed(0)
    without = FlowUNet(TINY, 2)
    network = FlowUNet(TINY, 2, CONDITIONS)
    perturbed(without)
    missing = network.load_state_dict(without.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("condition_embeddings.") for key in missing.missing_keys)
    x, t = torch.randn(2, 2, 4, 4, 4), torch.rand(2)
    rows = torch.tensor([[0.5, 1.0], [math.nan, 0.0]])
    assert torch.equal(network(x, t, rows), without(x, t))
    assert torch.equal(network(x, t), without(x, t))


def test_absence_is_an_embedding_and_no_nan_comes_through() -> None:
    network = perturbed(FlowUNet(TINY, 2, CONDITIONS))
    x, t = torch.randn(2, 2, 4, 4, 4), torch.rand(2)
    absent = torch.full((2, 2), math.nan)
    assert torch.equal(network(x, t), network(x, t, absent))
    rows = torch.tensor([[math.nan, 1.0], [0.5, math.nan]])
    velocity = network(x, t, rows)
    found = gradients(network, velocity)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found.keys() == dict(network.named_parameters()).keys()
    # A row sees its own conditions alone, and each of them.
    changed = rows.clone()
    changed[0, 1] = 0.0
    assert torch.allclose(network(x, t, changed)[1], velocity[1], atol=1e-6)
    assert not torch.allclose(network(x, t, changed)[0], velocity[0], atol=1e-6)
    changed[1, 0] = -0.5
    assert not torch.allclose(network(x, t, changed)[1], velocity[1], atol=1e-6)


def test_conditions_are_described_by_plain_values() -> None:
    for condition in CONDITIONS:
        assert condition_from_dict(condition.as_dict()) == condition
    for wrong in ({"kind": "scalar", "name": "age"}, {"kind": "other"}, {}):
        with pytest.raises(ValueError, match="condition"):
            condition_from_dict(wrong)


@FUSED
def test_compiles_whole(fused: bool) -> None:
    torch._dynamo.reset()
    network = perturbed(FlowUNet(TINY, 2, CONDITIONS, fused=fused))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x, t, rows = torch.randn(2, 2, 5, 4, 4), torch.rand(2), torch.tensor([[math.nan, 1.0], [0.5, math.nan]])
    expected = network(x, t, rows)
    found = compiled(x, t, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = gradients(network, expected)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in gradients(network, found).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


@FUSED
def test_16_bits_are_as_near_as_16_bits_are(fused: bool) -> None:
    network = perturbed(FlowUNet(TINY, 2, fused=fused))
    x, t = torch.randn(2, 2, 4, 8, 4), torch.rand(2)
    exact = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, t)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()  # a few roundings of 2⁻⁸ a layer, that add up


@pytest.mark.device
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_block_on_the_triton_path_hands_on_shifted_statistics(resample: Any) -> None:
    block = perturbed(ResidualBlock(4, 8, 16, groups=2, eps=1e-6, resample=resample)).to(DEVICE)
    x, emb = torch.randn(2, 4, 4, 2, 4, device=DEVICE), 5 * torch.randn(2, 16, device=DEVICE)
    expected = block(x, emb)
    wanted = gradients(block, expected)
    block.fused = True
    with implementation("triton"):
        found = block(x, emb)
        along = gradients(block, found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in along.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_convolution_of_the_doubled_is_one_of_the_voxels() -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    found = doubled_convolution(x, conv)
    torch.testing.assert_close(found, expected)
    along = torch.randn_like(expected)
    wanted = (x, *conv.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, wanted, along), torch.autograd.grad(expected, wanted, along))


def test_sizes_are_doubled_and_halved_as_by_torch() -> None:
    x = torch.randn(2, 3, 4, 2, 6)
    torch.testing.assert_close(doubled(x), F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(halved(x), F.avg_pool3d(x, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (8, 18)}, "groups=4 must divide"),
        ({"channels": (), "attention": ()}, "groups=4 must divide"),
        ({"attention": (True,)}, "an entry for each"),
        ({"head_channels": 5}, "head_channels=5 must divide"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowUNet(FlowUNetConfig(**{**vars(TINY), **change}))


def test_inputs_that_do_not_fit_are_refused() -> None:
    network = FlowUNet(TINY, 2, CONDITIONS)
    with pytest.raises(ValueError, match=r"latents have shape \(N, 2, d, h, w\)"):
        network(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match=r"conditions of 1 latents have shape \(1, 2\)"):
        network(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1), torch.zeros(1, 1))


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_the_cpu() -> None:
    network = perturbed(FlowUNet(CONFIGS[1], 4))
    x, t = torch.randn(2, 4, 8, 8, 8), torch.rand(2)
    with torch.no_grad():
        expected = network(x, t)
        network.cuda()
        found = network(x.cuda(), t.cuda()).cpu()
        with torch.autocast("cuda", torch.bfloat16):
            rounded = network(x.cuda(), t.cuda()).float().cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (rounded - expected).norm() < 0.03 * expected.norm()
