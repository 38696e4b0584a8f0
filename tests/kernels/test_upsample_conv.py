"""The upsampling convolution: both ways and all implementations against interpolation and convolution in float64."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from decovae_kernels import _launch, reference, upsample_conv_cost, upsample_conv_torch
from decovae_kernels.upsample_conv import upsample_conv
from tests.channel_cases import DEVICE, IMPLEMENTATIONS, arrange, assert_gradient_close, implementation

pytestmark = pytest.mark.device

TRITON = IMPLEMENTATIONS[1]
WAYS = ("direct", "factorised")
ARRANGED = ("contiguous", "channels_last", "channel_slice", "spatial_slice")
SHAPES = [(2, 3, 4, 5, 6), (1, 1, 1, 1, 1), (3, 5, 2, 1, 7), (1, 40, 3, 2, 1)]


def tensors(
    shape: tuple[int, ...], out: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> list[torch.Tensor]:
    """Input, weight and bias, as leaves."""
    generator = torch.Generator().manual_seed(sum(shape) + out)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    x = arrange(draw(*shape), layout)
    weight = (draw(out, shape[1], 3, 3, 3).double() / (27 * shape[1]) ** 0.5).to(dtype)
    return [x.requires_grad_(), weight.requires_grad_(), draw(out).requires_grad_()]


def value_and_gradients(leaves: list[torch.Tensor], method: str, tile_bytes: int = 0) -> list[torch.Tensor]:
    y = upsample_conv(*leaves, method=method, tile_bytes=tile_bytes)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def truth(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y = reference.upsample_conv(*wide)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(leaves[0].dtype).to(y)
    return [y, *torch.autograd.grad(y, wide, grad)]


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float(((actual.double() - exact).norm() / exact.norm()).detach()) for actual, exact in pairs]


@pytest.mark.parametrize(("layout", "tile_bytes"), [*zip(ARRANGED, (0, 1, 3000, 0), strict=True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_torch_equals_the_definition(way: str, shape: tuple[int, ...], layout: str, tile_bytes: int) -> None:
    leaves = tensors(shape, 4, layout=layout)
    with implementation("torch"):
        found = value_and_gradients(leaves, way, tile_bytes)
    for actual, exact in zip(found, truth(leaves), strict=True):
        assert actual.shape == exact.shape
        assert_gradient_close(actual, exact)


@pytest.mark.parametrize("name", [TRITON])
@pytest.mark.parametrize(
    ("way", "shape", "out", "layout", "tile_bytes"),
    [
        ("factorised", (1, 3, 3, 2, 5), 4, "channels_last", 0),
        # The fewest planes of products, around their slots.
        ("factorised", (1, 2, 4, 1, 2), 6, "contiguous", 3 * 2 * 27 * 6 * 4),
        ("factorised", (1, 2, 5, 1, 1), 2, "spatial_slice", 4 * 27 * 2 * 4),  # two new planes at a time
        ("factorised", (3, 1, 2, 1, 1), 1, "contiguous", 2 * 2 * 27 * 4),  # two volumes at a time
        ("factorised", (1, 4, 1, 1, 1), 24, "channels_last", 0),  # more than one block of channels
        ("direct", (1, 3, 2, 3, 2), 4, "contiguous", 0),
        ("direct", (1, 20, 3, 1, 1), 2, "channels_last", 1),
    ],
)
def test_triton_equals_the_definition(
    name: str, way: str, shape: tuple[int, ...], out: int, layout: str, tile_bytes: int
) -> None:
    leaves = tensors(shape, out, layout=layout)
    with implementation(name):
        found = value_and_gradients(leaves, way, tile_bytes)
    for actual, exact in zip(found, truth(leaves), strict=True):
        assert_gradient_close(actual, exact)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=TRITON.marks),
    ],
)
def test_half_precision_is_as_exact_as_the_direct_way(name: str, dtype: torch.dtype) -> None:
    leaves = tensors((1, 16, 2, 2, 3), 8, dtype)
    exact = truth(leaves)
    with implementation(name):
        found = value_and_gradients(leaves, "factorised")
        direct = errors(value_and_gradients(leaves, "direct"), exact)
    assert [x.dtype for x in found] == [dtype] * 4
    assert all(error <= 2 * bound for error, bound in zip(errors(found, exact), direct, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck_in_float64(way: str) -> None:
    leaves = tensors((1, 2, 3, 1, 2), 1, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: upsample_conv(*x, method=way, tile_bytes=900), leaves)


@pytest.mark.parametrize("way", WAYS)
def test_same_input_same_bits(way: str) -> None:
    leaves = tensors((2, 3, 4, 5, 6), 4)
    first, second = (value_and_gradients(leaves, way) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_only_what_needs_a_gradient_gets_one(way: str) -> None:
    expected = value_and_gradients(tensors((1, 3, 2, 3, 2), 4), way)[1:]
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors((1, 3, 2, 3, 2), 4))]
        y = upsample_conv(*leaves, method=way)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]
        torch.testing.assert_close(leaves[wanted].grad, expected[wanted])


@pytest.mark.parametrize("way", WAYS)
def test_master_weights_and_autocast(way: str) -> None:
    x, weight, bias = tensors((1, 3, 4, 2, 3), 4)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in (x, weight)] + [bias]
    expected = value_and_gradients(half, way)
    mixed = value_and_gradients([half[0], half[1].detach().float().requires_grad_(), bias], way)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = upsample_conv(x, weight, bias, method=way)
        assert upsample_conv(x.double(), weight, bias, method=way).dtype == torch.float64
    grads = torch.autograd.grad(y.float().sum(), [x, weight, bias])
    assert [leaf.dtype for leaf in mixed] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(mixed[0], expected[0])
    assert torch.equal(y, expected[0])
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("way", WAYS)
def test_operators_are_registered_properly(way: str) -> None:
    x, weight, bias = tensors((1, 2, 2, 1, 1), 2)
    operators = torch.ops.decovae
    with implementation("torch"):
        torch.library.opcheck(operators.upsample_conv, (x, weight, bias, way, 600))
        grad = torch.randn(1, 2, 4, 2, 2, device=DEVICE)
        arguments = grad, x.detach(), weight.detach(), way, 0
        # The check above has traced the backward.
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.upsample_conv_backward, (*arguments, True, True, True), test_utils=checks)
        torch.library.opcheck(operators.upsample_conv_backward, (*arguments, False, True, False), test_utils=checks)
    assert operators.upsample_conv.default in _launch.IMPLEMENTATIONS
    assert operators.upsample_conv_backward.default in _launch.IMPLEMENTATIONS


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("way", "layout", "shape"),
    [
        ("factorised", "channels_last", (2, 3, 1, 2, 2)),
        ("factorised", "contiguous", (1, 1, 1, 1, 1)),
        ("direct", "contiguous", (2, 3, 1, 1, 2)),
    ],
)
def test_fake_tensors_have_the_same_layout(name: str, way: str, layout: str, shape: tuple[int, ...]) -> None:
    leaves = tensors(shape, 4, layout=layout)
    with implementation(name):
        real = value_and_gradients(leaves, way)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(leaf) for leaf in leaves]
            y = upsample_conv(*fakes, method=way)
            fake = [y, *torch.autograd.grad(y, fakes, torch.empty_like(y))]
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]
    if name == "triton" or not leaves[0].is_contiguous():
        assert real[0].is_contiguous(memory_format=torch.channels_last_3d)
    else:
        assert real[0].is_contiguous()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_but_input_and_weight_is_kept(way: str) -> None:
    leaves = tensors((1, 3, 4, 4, 4), 5)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        upsample_conv(*leaves, method=way)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in leaves[:2]}


def test_flops_are_those_of_the_way_taken() -> None:
    leaves = tensors((2, 3, 4, 5, 6), 7)
    forward = 2 * 27 * 3 * 7 * 2 * 4 * 5 * 6
    for way, factor in (("factorised", 1), ("direct", 8)):
        with FlopCounterMode(display=False) as counter:
            y = upsample_conv(*leaves, method=way)
        assert counter.get_total_flops() == factor * forward
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), leaves)
        assert counter.get_total_flops() == 2 * factor * forward


def test_a_gpu_factorises_the_layers_of_the_paper_and_not_narrow_ones() -> None:
    def chosen(channels: int, size: int, dtype: torch.dtype = torch.bfloat16) -> str:
        x = torch.empty(2, channels, size, size, size, dtype=dtype, device="meta")
        return upsample_conv_cost.chosen(x, channels, triton=True)

    for dtype in (torch.bfloat16, torch.float32):
        assert chosen(256, 24, dtype) == chosen(128, 48, dtype) == "factorised"
    assert chosen(8, 96) == "direct"
    gpus = {name: machine for name, machine in upsample_conv_cost.machines().items() if name != "cpu"}
    for machine in gpus.values():
        for channels, size in ((256, 24), (128, 48)):
            figures = channels, channels, 2 * size**3, 2
            assert machine.factorised(*figures) < machine.direct(*figures)


def test_published_rates_are_those_of_training_where_float32_is_multiplied_in_half_the_rate_of_bfloat16() -> None:
    data = json.loads(upsample_conv_cost.FILE.read_text(encoding="utf-8"))
    published = [gpu for name, gpu in data.items() if name != "cpu" and isinstance(gpu["chosen"], str)]
    for gpu in published:
        assert "in TF32, which training allows for float32" in gpu["chosen"]
        for rates in (gpu["products"], gpu["convolutions"]):
            assert rates["2"] / rates["4"] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(("channels", "out", "way"), [(1, 16, "direct"), (64, 64, "factorised")])
def test_auto_takes_the_way_of_less_predicted_time(channels: int, out: int, way: str) -> None:
    # On the CPU: in plain torch a GPU takes the direct way always.
    leaves = [x.detach().cpu().requires_grad_() for x in tensors((1, channels, 2, 3, 2), out)]
    assert upsample_conv_cost.chosen(leaves[0], out, triton=False) == way
    with implementation("torch"):
        auto, chosen = (value_and_gradients(leaves, method) for method in ("auto", way))
    assert all(torch.equal(a, b) for a, b in zip(auto, chosen, strict=True))


def test_the_deterministic_adjoint_of_interpolation() -> None:
    grad = torch.randn(2, 3, 8, 10, 2, dtype=torch.float64)
    halved = grad
    for axis in (2, 3, 4):
        halved = upsample_conv_torch._halved(halved, axis)
    torch.testing.assert_close(halved, upsample_conv_torch.downsample(grad))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2), (2, 3, 0, 2, 2)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    leaves = tensors(shape, 4)
    y = upsample_conv(*leaves)
    assert y.shape == (shape[0], 4, *(2 * size for size in shape[2:]))
    grads = torch.autograd.grad(y.sum(), leaves)
    assert grads[0].shape == shape
    assert not grads[1].any()


def test_compiles_in_one_graph() -> None:
    leaves = tensors((1, 3, 2, 3, 2), 4)
    expected = value_and_gradients(leaves, "factorised")
    compiled = torch.compile(upsample_conv, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves, method="factorised")
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    for actual, eager in zip([y, *torch.autograd.grad(y, leaves, grad)], expected, strict=True):
        torch.testing.assert_close(actual, eager)


def test_wrong_input_is_refused_by_name() -> None:
    x, weight, bias = (leaf.detach() for leaf in tensors((1, 3, 2, 2, 2), 4))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        upsample_conv(x.long(), weight)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        upsample_conv(x, weight.long())
    with pytest.raises(ValueError, match=r"\(3, 2, 2, 2\)"):
        upsample_conv(x[0], weight)
    with pytest.raises(ValueError, match=r"3 channels .* \(4, 2, 3, 3, 3\)"):
        upsample_conv(x, weight[:, :2])
    with pytest.raises(ValueError, match=r"\(4, 3, 1, 3, 3\)"):
        upsample_conv(x, weight[:, :, :1])
    with pytest.raises(ValueError, match=r"bias .* \(3,\)"):
        upsample_conv(x, weight, bias[:3])
    with pytest.raises(ValueError, match="'fast'"):
        upsample_conv(x, weight, method="fast")
    with pytest.raises(ValueError, match=r"tile_bytes .* -1"):
        upsample_conv(x, weight, tile_bytes=-1)
