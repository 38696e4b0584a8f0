"""What the blocks are measured against computes the same from the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import block_baselines, measure
from bench.block_baselines import Budgeted, Checkpointed
from decovae.models.autoencoder import AutoencoderConfig

CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)


def agree(modules: list[nn.Module], x: Tensor) -> None:
    """Outputs and gradients of all are those of the last, on its parameters in their order."""
    values = [parameter + 0.1 * torch.randn_like(parameter) for parameter in modules[-1].parameters()]
    results = []
    for module in modules:
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), values, strict=True):
                parameter.copy_(value)
        torch.manual_seed(0)
        features = x.clone().requires_grad_()
        y = module(features)
        along = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y, *torch.autograd.grad(y, [features, *module.parameters()], along)])
    for result in results:
        torch.testing.assert_close(result, results[-1], rtol=1e-4, atol=1e-5)


def test_norms_and_activations() -> None:
    modules = [block_baselines.norm_act(name, 8, 4) for name in ("ours", "monai", "plain")]
    agree(modules, torch.randn(2, 8, 3, 4, 5))


def test_residual_blocks() -> None:
    modules = [block_baselines.residual_block(name, 8, 4) for name in ("balanced", "tight", "monai", "plain")]
    agree([Checkpointed(block_baselines.residual_block("monai", 8, 4)), *modules], torch.randn(2, 8, 3, 4, 5))


def test_upsampling_convolutions() -> None:
    modules = [block_baselines.upsampling(name, 4) for name in ("auto", "factorised", "direct", "monai", "plain")]
    agree(modules, torch.randn(2, 4, 3, 4, 5))


def test_decoders() -> None:
    modules = [block_baselines.decoding(name, CONFIG) for name in ("ours", "monai", "plain")]
    keys = set(modules[-1].state_dict())
    for module in modules:
        assert set(module.state_dict()) == keys
        module.load_state_dict(modules[-1].state_dict())
    latent = torch.randn(1, 4, 2, 3, 2)
    with torch.no_grad():
        images = [module(latent) for module in modules]
    for image in images:
        torch.testing.assert_close(image, images[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ours-balanced", "ours-tight", "plain-eager", "monai-eager", "monai-checkpointed"])
def test_steps_have_the_same_loss(name: str) -> None:
    plain, step = block_baselines.training_step("plain-eager", CONFIG), block_baselines.training_step(name, CONFIG)
    with torch.no_grad():
        plain.network.quant_conv_log_sigma.conv.bias.fill_(-40)  # no noise: each draws its own
    step.load_state_dict(plain.state_dict())
    image = torch.rand(2, 1, 4, 4, 4)
    loss = step(image)
    torch.testing.assert_close(loss, plain(image), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(loss, list(step.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_norms_in_float16_are_a_matter_of_rounding() -> None:
    """Under autocast to float16, which is all that they run under."""
    modules = [block_baselines.training_step(f"monai-{name}", CONFIG) for name in ("float16-eager", "eager")]
    modules[1].network.quant_conv_log_sigma.conv.bias.data.fill_(-40)  # no noise: each draws its own
    modules[0].load_state_dict(modules[1].state_dict())
    image, written = torch.rand(2, 1, 4, 4, 4), []
    norm = modules[0].network.encoder.blocks[-2]
    norm.register_forward_hook(lambda module, inputs, output: written.append(output.dtype))
    with torch.autocast("cpu", torch.float16):
        losses = [module(image) for module in modules]
    assert written == [torch.float16]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-3)
    for gradient in torch.autograd.grad(losses[0], list(modules[0].parameters())):
        assert gradient.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        modules[0](image)
    latent = torch.randn(1, 4, 2, 3, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        images = [block_baselines.decoding(name, CONFIG).eval()(latent) for name in ("monai-float16-eager", "ours")]
    assert images[0].shape == images[1].shape


def test_a_budget_reaches_the_compiler_and_no_further() -> None:
    seen: list[float] = []

    class Compiled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch._functorch.config.activation_memory_budget)
            return x

    Budgeted(Compiled())(torch.ones(1))
    assert seen == [block_baselines.ACTIVATION_MEMORY_BUDGET]
    assert torch._functorch.config.activation_memory_budget == 1


def test_arithmetic_counts_what_runs_twice() -> None:
    x = torch.randn(1, 8, 3, 3, 3)
    totals = {}
    for name in ("balanced", "tight"):
        module = block_baselines.residual_block(name, 8, 4)
        totals[name] = measure.arithmetic(lambda module=module: module(x).sum().backward())
    convolution = 2 * 27 * 27 * 8 * 8
    assert totals["balanced"] == 6 * convolution
    assert totals["tight"] == 7 * convolution
