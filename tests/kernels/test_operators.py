"""What torch expects of a registered operator: fake tensors, autograd, FLOPs, compile, torch.func, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from decovae_kernels import (
    Terms,
    channel_moments,
    decorrelation,
    latent_head,
    moments_decorrelation,
)
from tests.channel_cases import DEVICE, IMPLEMENTATIONS, LAYOUTS, arrange, implementation

pytestmark = pytest.mark.device

VAD = Terms(covariance=1.0, variance=1.0, gamma=2.0)
ALL = Terms(1.0, 0.5, 2.0, 0.25, 1.5)


def seed(value: int = 7) -> torch.Tensor:
    return torch.full((1,), value, device=DEVICE)


def everything(x: torch.Tensor) -> torch.Tensor:
    """A scalar in which every operator takes part."""
    z, kl, packed = latent_head(x, x * 0.5, seed(), first=2)
    return z.float().square().mean() + kl + decorrelation(x, ALL) + moments_decorrelation(packed, VAD)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_registered_properly(name: str, layout: str) -> None:
    x = arrange(torch.randn(2, 3, 4, 5, device=DEVICE), layout)
    leaf = x.detach().requires_grad_()
    ops = torch.ops.decovae
    with implementation(name):
        packed = channel_moments(x)
        torch.library.opcheck(ops.channel_moments, (leaf, ""))
        torch.library.opcheck(ops.decorrelation, (leaf, *ALL, ""))
        torch.library.opcheck(ops.moments_decorrelation, (packed.detach().requires_grad_(), *ALL))
        torch.library.opcheck(ops.moments_gradient, (x, packed, packed, packed[0], 2))
        torch.library.opcheck(ops.latent_head, (leaf, leaf.detach().clone().requires_grad_(), seed(), 3, 60, ""))
        torch.library.opcheck(ops.latent_head_backward, (x, x, seed(), 3, 60, packed, x, packed[0], packed, 1))
        torch.library.opcheck(ops.latent_head_backward, (x, x, seed(), 3, 60, packed, None, None, packed, 1))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_torch_func_gives_the_same_gradient(name: str) -> None:
    x = torch.randn(3, 4, 5, 6, device=DEVICE, requires_grad=True)
    with implementation(name):
        (expected,) = torch.autograd.grad(everything(x), [x])
        torch.testing.assert_close(torch.func.grad(everything)(x.detach()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_checkpointing_gives_the_same_gradient(name: str) -> None:
    x = torch.randn(3, 4, 5, 6, device=DEVICE, requires_grad=True)
    with implementation(name):
        (expected,) = torch.autograd.grad(everything(x), [x])
        (again,) = torch.autograd.grad(checkpoint(everything, x, use_reentrant=False), [x])
    assert torch.equal(again, expected)


def test_compiles_once_for_all_batch_sizes_without_a_break() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
    for volumes in (2, 3, 5):
        x = torch.randn(volumes, 4, 3, 5, 4, device=DEVICE, requires_grad=True)
        value, eager = compiled(x), everything(x)
        torch.testing.assert_close(value, eager)
        torch.testing.assert_close(torch.autograd.grad(value, [x]), torch.autograd.grad(eager, [x]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_batch_sizes_are_dynamic_by_themselves() -> None:
    """Without dynamic=True: one recompilation, when the size is first seen to change."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for volumes in (2, 3, 4, 5, 6):
        compiled(torch.randn(volumes, 4, 3, 5, device=DEVICE))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fake_tensors_have_the_real_ones_shapes_and_strides(layout: str) -> None:
    x = arrange(torch.randn(2, 3, 4, 5, device=DEVICE), layout)
    real = [*latent_head(x, x, seed()), channel_moments(x), decorrelation(x, VAD)]
    with FakeTensorMode() as mode:
        fake_x, fake_seed = mode.from_tensor(x), mode.from_tensor(seed())
        fake = [*latent_head(fake_x, fake_x, fake_seed), channel_moments(fake_x), decorrelation(fake_x, VAD)]
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_flops_are_those_of_the_matrix_products() -> None:
    x = torch.randn(2, 4, 5, 6, device=DEVICE, requires_grad=True)
    product = 2 * 60 * 4**2
    for function, forward in (
        (lambda: decorrelation(x, VAD), product),
        (lambda: channel_moments(x).sum(), product),
        (lambda: latent_head(x, x, seed())[2].sum(), product),
    ):
        with FlopCounterMode(display=False) as counter:
            value = function()
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            value.backward()
        assert counter.get_total_flops() == product


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", [4, 12, 40])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_input_same_bits(name: str, channels: int, layout: str) -> None:
    x = arrange(torch.randn(3, channels, 7, 9, 4, device=DEVICE), layout).requires_grad_()

    def run() -> list[torch.Tensor]:
        outputs = [*latent_head(x, x * 0.5, seed()), channel_moments(x), decorrelation(x, ALL)]
        total = torch.stack([output.double().square().sum() for output in outputs]).sum()
        return [*outputs, *torch.autograd.grad(total, [x])]

    with implementation(name):
        assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(decorrelation(x, VAD), [x], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    with pytest.raises(RuntimeError):
        torch.func.hessian(lambda y: decorrelation(y, VAD))(x.detach())
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda y: torch.func.grad(everything)(y).sum())(x.detach())


def test_an_unused_loss_has_no_gradient() -> None:
    x = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    z, _, _ = latent_head(x, x, seed())
    (gradient,) = torch.autograd.grad(z.sum(), [x])
    assert gradient.isfinite().all()


@pytest.mark.gpu
def test_a_cuda_graph_replays_them() -> None:
    x = torch.randn(2, 4, 24, 24, 24, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(everything(x), [x])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = everything(x)
        (gradient,) = torch.autograd.grad(value, [x])
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    graph.replay()
    expected = everything(x)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, [x])[0])


@pytest.mark.gpu
def test_streams_do_not_share_a_counter() -> None:
    x = torch.randn(8, 4, 64, 64, 64, device="cuda")
    expected = decorrelation(x, ALL)
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    values = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                values.append(decorrelation(x, ALL))
    torch.cuda.synchronize()
    assert all(torch.equal(value, expected) for value in values)


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "launches"), [(4, 1), (8, 1)])
def test_one_launch_forward_and_one_backward(channels: int, launches: int) -> None:
    x = torch.randn(2, channels, 24, 24, 24, device="cuda", requires_grad=True)
    torch.autograd.grad(decorrelation(x, VAD), [x])
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        loss = decorrelation(x, VAD)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.device_type == DeviceType.CUDA) == launches
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(loss, [x], torch.ones_like(loss))
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    assert [name for name in names if "fill" not in name.lower()] == ["_gradient_kernel"]
