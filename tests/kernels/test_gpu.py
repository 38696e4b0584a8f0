"""What only a GPU shows: real dtypes at real sizes, indices beyond 32 bits, streams, graphs, compilers and memory."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import tour
from decovae import fuse, sid_loss, vad_loss
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.training.memory import predict_memory
from decovae_kernels import (
    Geometry,
    channel_moments,
    convolution,
    group_norm,
    latent_head,
    norm_conv,
    reference,
    residual_block,
    upsample_conv,
)
from decovae_kernels import packed as packing
from tests.block_cases import block_parameters, features, gradients, parameter, relative_error
from tests.channel_cases import DEVICE

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ("contiguous", "channels_last")

Case = Callable[[torch.dtype, str], functools.partial[Any]]
OPERATORS: dict[str, Case] = {
    "decorrelation, 4 channels": lambda d, s: functools.partial(tour.decorrelation_case, 4, (23, 25, 27), d, s),
    "decorrelation, 13 channels": lambda d, s: functools.partial(tour.decorrelation_case, 13, (11, 25, 27), d, s),
    "decorrelation, 33 channels": lambda d, s: functools.partial(tour.decorrelation_case, 33, (11, 9, 17), d, s),
    "moments": lambda d, s: functools.partial(tour.moments_case, 8, (23, 25, 27), d, s),
    "latent head, 4 channels": lambda d, s: functools.partial(tour.head_case, 4, (23, 25, 27), d, s),
    "latent head, 10 channels": lambda d, s: functools.partial(tour.head_case, 10, (13, 15, 17), d, s),
    "group norm, 32 channels": lambda d, s: functools.partial(tour.norm_case, (2, 32, 23, 25, 27), 8, d, s, True, True),
    "group norm, 96 channels": lambda d, s: functools.partial(
        tour.norm_case, (1, 96, 9, 17, 11), 32, d, s, False, False
    ),
    "norm and convolution": lambda d, s: functools.partial(
        tour.norm_conv_case, (2, 24, 9, 11, 13), d, Geometry(), (3, 3, 3)
    ),
    "convolution": lambda d, s: functools.partial(tour.convolution_case, (2, 24, 10, 12, 14), d),
    "residual block": lambda d, s: functools.partial(
        tour.block_case, (2, 24, 9, 11, 13), 48, (8, 8), d, s == "contiguous", True
    ),
    "upsampling, factorised": lambda d, s: functools.partial(
        tour.upsample_case, (2, 24, 7, 9, 11), 17, d, s, "factorised", 0
    ),
    "upsampling, direct": lambda d, s: functools.partial(tour.upsample_case, (2, 24, 7, 9, 11), 17, d, s, "direct", 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_odd_shapes_against_float64(operator: str, dtype: torch.dtype, layout: str) -> None:
    outcome = tour.run_case(tour.Case(operator, dtype, OPERATORS[operator](dtype, layout)), DEVICE)
    assert outcome.right, tour.line(outcome)


BLOCK = functools.partial(block_parameters, 16, 32)
EPS = (1e-6, 1e-6)


def blocks(x: Tensor, p: Any) -> Tensor:
    """All operators of the blocks in a row, (N, 16, 2D, …) → (N, 32, 2D, …)."""
    x = group_norm(x, p.norm1_weight, p.norm1_bias, 4)
    x, statistics = convolution(x, p.conv1_weight[:16], geometry=Geometry((2, 2, 2), (0, 0, 0)), far_padding=1)
    x, statistics = norm_conv(
        x, p.norm1_weight, p.norm1_bias, 4, 1e-6, p.conv1_weight[16:], p.conv1_bias[16:], statistics=statistics
    )
    y, _ = residual_block(x, p, (4, 8), EPS, statistics=statistics)
    return upsample_conv(y, p.conv2_weight, p.conv2_bias)


def latents(x: Tensor) -> Tensor:
    """All operators on latents."""
    z, kl, packed = latent_head(x, 0.5 * x, torch.full((1,), 7, device=DEVICE))
    return z.float().square().mean() + kl + vad_loss(x) + sid_loss(x) + 1e-3 * packing.scatter_of(packed).float().sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype, layout: str) -> None:
    x, p = features((2, 16, 18, 14, 10), dtype, layout), BLOCK()
    z = features((2, 4, 23, 25, 27), dtype, layout)

    def run() -> list[Tensor]:
        y, loss = blocks(x, p), latents(z)
        return [y, *gradients(y, [x, *p]), loss, *torch.autograd.grad(loss, [z])]

    first = run()
    torch.empty(1 << 24, device=DEVICE).fill_(torch.nan)  # memory that is handed out next is not what it was
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.fixture
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[float], None]]:
    """Skips the test where the GPU has fewer gigabytes free; of several workers, one at a time has so much."""

    def needs(gigabytes: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes:g} GB of GPU memory, {free:.0f} GB are free")

    fcntl = pytest.importorskip("fcntl", reason="workers cannot wait for each other without file locks")
    with (tmp_path_factory.getbasetemp().parent / "gpu-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield needs
        gc.collect()
        torch.cuda.empty_cache()


def repeated(small: Tensor, times: int) -> Tensor:
    """`small` (1, C, D, H, W) so many times along its first spatial axis, channels-last if it is."""
    axes = (0, 2, 3, 4, 1) if small.stride(1) == 1 else (0, 1, 2, 3, 4)
    large = small.permute(axes).repeat(*(times if axis == 2 else 1 for axis in axes))
    return large.permute([axes.index(axis) for axis in range(5)])


def assert_repeats(large: Tensor, truth: Tensor, tolerance: float) -> None:
    """Every repetition, the first and the last among them, is the same as `truth` in norm."""
    parts = large.split(truth.shape[2], dim=2)
    errors = torch.stack([(part.double() - truth).norm() for part in parts]) / truth.norm()
    assert errors.max() < tolerance, f"repetition {int(errors.argmax())} of {len(parts)}"


REPETITIONS = 540


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_of_more_than_two_to_the_31_elements(layout: str, memory: Callable[[float], None]) -> None:
    memory(16)
    small = features((1, 32, 8, 128, 128), BF16, layout).detach()
    weight, bias = parameter(32, around=1.0), parameter(32, seed=1)
    large = repeated(small, REPETITIONS).requires_grad_()
    assert large.numel() > 2**31
    y = group_norm(large, weight, bias, 8)
    # Statistics are those of the small one; so are the gradients of the large one's elements.
    exact = [x.detach().double().requires_grad_() for x in (small, weight, bias)]
    truth = reference.group_norm(*exact, 8, 1e-5)
    assert_repeats(y.detach(), truth.detach(), 5e-3)
    found = torch.autograd.grad(y, [large, weight, bias], large.detach())
    del y
    wanted = torch.autograd.grad(truth, exact, small.double())
    assert_repeats(found[0], wanted[0], 1e-2)
    for actual, expected in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(actual / REPETITIONS, expected) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_more_than_two_to_the_31_elements(layout: str, memory: Callable[[float], None]) -> None:
    memory(11)
    small = features((1, 4, 64, 128, 128), BF16, layout).detach()
    large = repeated(small, REPETITIONS).requires_grad_()
    assert large.numel() > 2**31
    found = channel_moments(large)
    truth = tour.packed_moments(small.double())
    assert found[0] == REPETITIONS * truth[0]
    torch.testing.assert_close(packing.mean_of(found), packing.mean_of(truth), rtol=1e-5, atol=1e-6)
    scatter = packing.scatter_of(truth)
    torch.testing.assert_close(
        packing.scatter_of(found) / REPETITIONS, scatter, rtol=1e-5, atol=1e-5 * float(scatter.max())
    )
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    (gradient,) = torch.autograd.grad(found, [large], direction)
    exact = small.double().requires_grad_()
    scaled = tour.packed_moments(exact)
    weights = direction.clone()
    packing.mean_of(weights).div_(REPETITIONS)
    (wanted,) = torch.autograd.grad(scaled, [exact], weights)
    assert_repeats(gradient, wanted, 5e-3)


PLANES = 40_000


@pytest.mark.parametrize("method", ["factorised", "direct"])
def test_upsampling_to_more_than_two_to_the_31_elements(method: str, memory: Callable[[float], None]) -> None:
    """The last planes, computed by themselves: what they depend on reaches a few planes back."""
    memory(12)
    from decovae_kernels import upsample_conv_triton

    x = torch.randn(1, PLANES, 30, 30, 8, device=DEVICE, dtype=BF16).movedim(-1, 1).requires_grad_()
    tail = x.detach()[:, :, -8:].double().requires_grad_()
    if method == "direct":  # its kernels alone: the convolution between them is cuDNN's
        y = upsample_conv_triton.upsample(x.detach())
        expected = nn.functional.interpolate(tail, scale_factor=2, mode="trilinear")
    else:
        weight = parameter(8, 8, 3, 3, 3, spread=0.07).detach()
        y = upsample_conv(x, weight.to(BF16), method=method)
        expected = reference.upsample_conv(tail, weight.to(BF16).double())
    assert y.numel() > 2**31
    assert relative_error(y[:, :, -8:], expected[:, :, -8:]) < 1e-2
    if method == "direct":
        found = upsample_conv_triton.downsample(y)
    else:
        (found,) = torch.autograd.grad(y, [x], y.detach())
    (wanted,) = torch.autograd.grad(expected, [tail], y.detach()[:, :, -16:].double())
    assert relative_error(found[:, :, -4:], wanted[:, :, -4:]) < 2e-2


def test_streams_do_not_disturb_each_other() -> None:
    x = features((4, 4, 48, 48, 48), BF16).detach()
    expected = latents(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[Tensor] = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(latents(x))
    torch.cuda.synchronize()
    assert all(torch.equal(value, expected) for value in found)


def test_a_cuda_graph_replays_the_blocks() -> None:
    x, p = features((2, 16, 18, 14, 10), BF16, "channels_last"), BLOCK()

    def run() -> list[Tensor]:
        with torch.autocast("cuda", BF16):
            y = blocks(x, p)
        return [y, *gradients(y, [x, *p])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for _ in range(2):
        graph.replay()
    for actual, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", [vad_loss, sid_loss, latents])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_losses_are_the_losses(function: Callable[[Tensor], Tensor], mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, mode=mode)
    for seed in range(4):  # with reduce-overhead, torch warms up, captures, and replays
        x = torch.randn(2, 4, 9, 11, 13, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()
        value = compiled(x)
        (gradient,) = torch.autograd.grad(value, [x])
        expected = function(x)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, [x])[0], rtol=1e-3, atol=1e-6)


CONFIG = AutoencoderConfig(channels=(16, 32, 64), residual_blocks=1, groups=8)


def step(model: nn.Module, image: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The loss and all gradients of a training step, from the mean of the posterior."""
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != F32):
        reconstruction, latent = model(image, sample=False)
    loss = (reconstruction.float() - image).abs().mean() + 1e-2 * latent.kl + 0.1 * vad_loss(latent.moments)
    loss = 1000 * loss  # else float16 would round gradients away
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("mode", ["balanced", "tight"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-3), (BF16, 0.1), (F16, 0.05)], ids=str)
def test_a_fused_step_is_the_plain_one(mode: Any, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    plain = Autoencoder(CONFIG, memory=None).to(DEVICE)
    fused = Autoencoder(CONFIG, memory=mode).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    for parameter_ in fused.parameters():
        if parameter_.ndim == 5:
            parameter_.data = parameter_.data.contiguous(memory_format=torch.channels_last_3d)
    image = torch.rand(2, 1, 32, 40, 24, device=DEVICE)
    exact = step(plain, image, F32)
    found = step(fused, image, dtype)
    # Of all parameters together: some gradients cancel to nothing.
    error = torch.stack([(a.double() - b.double()).norm() for a, b in zip(found[1:], exact[1:], strict=True)]).norm()
    assert error < tolerance * torch.stack([b.double().norm() for b in exact[1:]]).norm()
    torch.testing.assert_close(found[0], exact[0], rtol=tolerance, atol=0)


@pytest.mark.parametrize("mode", ["balanced", "tight", "none"])
def test_a_step_takes_the_memory_that_is_predicted(mode: Any, memory: Callable[[float], None]) -> None:
    """Within 3 % below and, since cuDNN's workspaces are not predicted, 15 % and half a gibibyte above."""
    memory(12)
    config, shape = AutoencoderConfig(), (64, 96, 64)
    predicted = predict_memory(config, shape, batch=2, memory=mode)
    before = torch.cuda.memory_allocated()
    model = Autoencoder(config, memory=None if mode == "none" else mode).to(DEVICE)
    moments = [torch.zeros_like(parameter_) for parameter_ in model.parameters() for _ in range(2)]
    image = torch.rand(2, 1, *shape, device=DEVICE)

    def run() -> None:
        with torch.autocast("cuda", BF16):
            reconstruction, latent = model(image)
        loss = (reconstruction.float() - image).abs().mean() + latent.kl
        del reconstruction, latent
        loss.backward()

    run()  # what libraries set up for themselves
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    assert len(moments) > 0
    assert 0.97 * predicted.training_peak < peak < 1.15 * predicted.training_peak + 2**29


def test_fused_networks_of_others_train_under_autocast() -> None:
    from tests.models.twins import monai_twin, perturbed

    torch.manual_seed(0)
    model = perturbed(monai_twin(AutoencoderConfig(channels=(8, 16), residual_blocks=1, groups=4))).to(DEVICE)
    image = torch.rand(2, 1, 16, 16, 16, device=DEVICE)

    def gradient() -> Tensor:
        with torch.autocast("cuda", BF16):
            mu, sigma = model.encode(image)
            y = model.decode(mu + sigma)
        found = torch.autograd.grad(y.float().square().mean(), list(model.parameters()))
        return torch.cat([x.flatten() for x in found]).double()

    expected = gradient()
    fuse(model, report=True)
    assert (gradient() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one() -> None:
    x = features((2, 16, 9, 7, 5)).detach()
    p = BLOCK()
    expected = residual_block(x, p, (4, 8), EPS)[0].cpu()
    other = torch.device("cuda", 1)
    there = type(p)(*(None if tensor is None else tensor.to(other) for tensor in p))
    torch.testing.assert_close(residual_block(x.to(other), there, (4, 8), EPS)[0].cpu(), expected)
    z = features((2, 4, 9, 7, 5)).detach()
    torch.testing.assert_close(vad_loss(z.to(other)).cpu(), vad_loss(z).cpu())
