"""What torch expects of the blocks' operators, and what they keep for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from decovae_kernels import Geometry, convolution, group_norm, norm_conv, residual_block
from tests.block_cases import block_parameters, features, gradients, parameter
from tests.channel_cases import IMPLEMENTATIONS, implementation

pytestmark = pytest.mark.device

SHAPE = (2, 4, 6, 4, 8)
BLOCK = block_parameters(4, 8)
EPS = (1e-6, 1e-6)
LEAVES = [x for x in BLOCK if x is not None]


def everything(x: Tensor) -> Tensor:
    """All operators in a row."""
    x = group_norm(x, BLOCK.norm1_weight, BLOCK.norm1_bias, 2, shift=BLOCK.norm1_bias)
    x, statistics = convolution(x, BLOCK.conv1_weight, geometry=Geometry((2, 2, 2), (0, 0, 0)), far_padding=1)
    x, statistics = norm_conv(x, *BLOCK[4:6], 2, 1e-6, BLOCK.conv2_weight, BLOCK.conv2_bias, statistics=statistics)
    return residual_block(x, BLOCK._replace(**SQUARE), (2, 2), EPS, statistics=statistics)[0]


SQUARE = {
    "norm1_weight": BLOCK.norm2_weight,
    "norm1_bias": BLOCK.norm2_bias,
    "conv1_weight": BLOCK.conv2_weight,
    "shortcut_weight": None,
    "shortcut_bias": None,
}
PARAMETERS = [BLOCK.norm1_weight, BLOCK.norm1_bias, BLOCK.conv1_weight, *BLOCK[4:8]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_operators_are_registered_properly(name: str) -> None:
    x = features((1, 4, 3, 2, 2))
    ops = torch.ops.decovae
    walk = ([1] * 3, [1] * 3, [1] * 3, 1)
    with implementation(name):
        torch.library.opcheck(ops.group_norm, (x, *BLOCK[:2], None, 2, 1e-6, True))
        torch.library.opcheck(ops.norm_conv, (x, None, *BLOCK[:4], 2, 1e-6, True, *walk, 0))
        torch.library.opcheck(ops.convolution, (x, *BLOCK[2:4], *walk, 1))
        torch.library.opcheck(ops.residual_block, (x, None, *BLOCK, 2, 2, *EPS, False, 0))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_fakes_have_the_shapes_and_strides_of_results(name: str) -> None:
    def run(x: Tensor) -> list[Tensor]:
        y = everything(x)
        return [y, *torch.autograd.grad(y.sum(), [x])]

    x = features(SHAPE, layout="channels_last")
    with implementation(name):
        real = run(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run(mode.from_tensor(x.detach()).requires_grad_())
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    x = features(SHAPE)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    found, eager = compiled(x), everything(x)
    torch.testing.assert_close(found, eager, rtol=0, atol=0)
    for a, b in zip(gradients(found, [x, *PARAMETERS]), gradients(eager, [x, *PARAMETERS]), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_blocks_run_without_gradients_on_volumes_of_any_size() -> None:
    torch._dynamo.reset()
    parameters = BLOCK._replace(**SQUARE)
    compiled = torch.compile(
        lambda x: residual_block(x, parameters, (2, 2), EPS, tile_bytes=4096)[0], fullgraph=True, backend="aot_eager"
    )
    compiled(features((1, 8, 8, 8, 8))).sum().backward()
    for depth in (12, 20, 4):
        x = features((1, 8, depth, 6, 8)).detach()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), residual_block(x, parameters, (2, 2), EPS, tile_bytes=0)[0])


def test_torch_func_and_checkpointing_give_the_same_gradient() -> None:
    x = features(SHAPE)
    (expected,) = torch.autograd.grad(everything(x).square().sum(), [x])
    (again,) = torch.autograd.grad(checkpoint(everything, x, use_reentrant=False).square().sum(), [x])
    assert torch.equal(again, expected)
    assert torch.equal(torch.func.grad(lambda x: everything(x).square().sum())(x.detach()), expected)


def test_frozen_parameters_and_inputs() -> None:
    x = features(SHAPE)
    (expected,) = torch.autograd.grad(everything(x).sum(), [x])

    def backward_operations() -> int:
        y, _ = residual_block(x, BLOCK, (2, 2), EPS)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward(inputs=[x, *(leaf for leaf in LEAVES if leaf.requires_grad)])
        x.grad = None
        return int(counter.get_total_flops())

    operations = [backward_operations()]
    frozen = [leaf.requires_grad_(False) for leaf in LEAVES]
    try:
        (found,) = torch.autograd.grad(everything(x).sum(), [x])
        operations.insert(0, backward_operations())
    finally:
        for leaf in frozen:
            leaf.requires_grad_()
    assert torch.equal(found, expected)
    assert operations[0] * 2 == operations[1]  # only the input's gradients: half of a backward
    y = everything(x.detach())
    assert all(grad.isfinite().all() for grad in gradients(y, PARAMETERS))


def test_operations_are_those_of_the_convolutions() -> None:
    def plain(x: Tensor) -> Tensor:
        conv = torch.nn.functional.conv3d
        x = conv(torch.nn.functional.pad(x, (0, 1) * 3), BLOCK.conv1_weight, stride=2)
        for _ in range(3):
            x = conv(x, BLOCK.conv2_weight, padding=1)
        return x

    def count(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        return int(counter.get_total_flops())

    x = features(SHAPE)
    assert count(everything, x) == count(plain, x)


def test_tight_runs_one_convolution_more() -> None:
    x = features(SHAPE)
    counts = []
    for tight in (False, True):
        with FlopCounterMode(display=False) as counter:
            residual_block(x, BLOCK, (2, 2), EPS, tight=tight)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 27 * 4 * 8 * x[:, 0].numel()


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps for backward, parameters left out, by its address."""
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter) and not x.is_leaf:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tight", "kept"), [(False, 4 + 8), (True, 4)])
def test_a_block_keeps_its_input_and_its_inner_convolution(name: str, tight: bool, kept: int) -> None:
    x = features((1, 4, 8, 8, 8), layout="channels_last") * 1.0
    with implementation(name), saved_bytes() as found:
        residual_block(x, BLOCK, (2, 2), EPS, tight=tight)
    states = 2 * 3 * 8 * 4
    assert kept * x[0, 0].nbytes <= sum(found.values()) <= kept * x[0, 0].nbytes + states


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_other_operators_keep_their_input(name: str) -> None:
    x = features((1, 4, 8, 8, 8), layout="channels_last") * 1.0
    runs: list[Callable[[Tensor], object]] = [
        lambda x: group_norm(x, *BLOCK[:2], 2),
        lambda x: norm_conv(x, *BLOCK[:2], 2, 1e-6, BLOCK.conv1_weight),
        lambda x: convolution(x, BLOCK.conv1_weight, far_padding=1),
    ]
    for run in runs:
        with implementation(name), saved_bytes() as found:
            run(x)
        assert x.nbytes <= sum(found.values()) <= x.nbytes + 3 * 4 * 4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_norm_that_follows_a_convolution_folds_its_bias(name: str) -> None:
    x, shift = features((1, 4, 3, 4, 5)), parameter(4, seed=9)
    with implementation(name):
        folded = group_norm(x, *BLOCK[:2], 2, shift=shift)
        added = group_norm(x + shift.view(-1, 1, 1, 1), *BLOCK[:2], 2)
    torch.testing.assert_close(folded, added, rtol=1e-5, atol=1e-5)
