"""Fused networks compute what they computed before, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from decovae import fuse
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.fuse import Memory
from tests.channel_cases import DEVICE, IMPLEMENTATIONS, arrange, implementation
from tests.models.twins import monai_block, monai_twin, perturbed

pytestmark = pytest.mark.device

MEMORY: tuple[Memory, ...] = ("balanced", "tight")
SMALL = AutoencoderConfig(channels=(8, 16), residual_blocks=1, groups=4)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Networks and tensors are made where the kernels run."""
    with DEVICE:
        yield


def results(
    module: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)
) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = call(module, x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], weights)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    """Within a share of the largest value of each; gradients that cancel to nothing are held to all gradients."""
    largest = max(float(x.abs().max()) for x in expected[1:])
    for mine, theirs in zip(actual, expected, strict=True):
        bound = tolerance * max(float(theirs.detach().abs().max()), 0.01 * largest)
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=0, atol=bound)


def reconstruct(model: nn.Module, image: Tensor) -> Tensor:
    mu, sigma = model.encode(image)
    return model.decode(mu + ((0.5 * sigma).exp() if isinstance(model, Autoencoder) else sigma))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("batch", "channels", "out", "groups", "shape", "layout"),
    [
        (1, 1, 1, 1, (3, 5, 7), "contiguous"),
        (2, 4, 8, 4, (5, 3, 9), "channels_last"),
        (3, 32, 32, 32, (4, 5, 3), "spatial_slice"),
        (4, 6, 3, 3, (7, 1, 2), "transposed"),
        (1, 256, 256, 32, (3, 2, 3), "channels_last"),
    ],
)
def test_a_block_is_monai_s(
    memory: Memory, batch: int, channels: int, out: int, groups: int, shape: tuple[int, ...], layout: str
) -> None:
    block = perturbed(monai_block(channels, out, groups))
    x = arrange(torch.randn(batch, channels, *shape), layout)
    expected = results(block, x)
    assert_same(results(fuse(block, memory=memory, report=True)[0], x), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_splits": 2, "dim_split": 1}, {"num_splits": 2, "dim_split": 2, "use_convtranspose": True}],
    ids=["whole", "split", "transposed"],
)
@pytest.mark.parametrize("memory", MEMORY)
def test_maisi_is_itself(memory: Memory, options: dict[str, Any]) -> None:
    model = perturbed(monai_twin(SMALL, **options))
    shape = (7, 9, 5) if not options else (6, 16, 16)
    x = torch.rand(2, 1, *shape)
    expected = results(model, x, reconstruct)
    assert_same(results(fuse(model, memory=memory, report=True)[0], x, reconstruct), expected)


@pytest.mark.parametrize("channels", [(8, 16), (4, 4, 8)])
def test_monai_s_autoencoder_is_itself(channels: tuple[int, ...]) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.AutoencoderKL(
        spatial_dims=3,
        channels=channels,
        num_res_blocks=1,
        attention_levels=(False,) * len(channels),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        norm_num_groups=2,
    )
    x = torch.rand(1, 1, 8, 12, 4)
    expected = results(perturbed(model), x, reconstruct)
    model, report = fuse(model, report=True)
    assert_same(results(model, x, reconstruct), expected)
    assert [reason for _, reason in report.left] == ["nearest upsampling"] * (len(channels) - 1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_autoencoder_is_its_definition_with_either_kernels(name: str) -> None:
    config = AutoencoderConfig(channels=(2, 4), residual_blocks=1, groups=2, latent_channels=2)
    plain = perturbed(Autoencoder(config, memory=None))
    model = Autoencoder(config)
    model.load_state_dict(plain.state_dict())
    x = torch.rand(2, 1, 4, 6, 2)
    expected = results(plain, x, reconstruct)
    with implementation(name):
        assert_same(results(model, x, reconstruct), expected)


@pytest.mark.parametrize("memory", MEMORY)
def test_error_in_bf16_is_at_most_twice_monai_s(memory: Memory) -> None:
    """Of each tensor over several volumes: in one alone, few numbers may be exact by chance."""
    config = AutoencoderConfig(channels=(8, 16), residual_blocks=1, groups=4)
    theirs = perturbed(monai_twin(config))
    exact = Autoencoder(config, memory=None).double()
    exact.load_state_dict(theirs.state_dict())
    ours = fuse(copy.deepcopy(theirs), memory=memory, report=True)[0]
    errors = torch.zeros(2, 2 + len(list(theirs.parameters())), dtype=torch.float64)
    for _ in range(6):
        x = torch.rand(2, 1, 8, 8, 8)
        truth = results(exact, x.double(), reconstruct)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            both = [results(model, x, reconstruct) for model in (ours, theirs)]
        for row, found in zip(errors, both, strict=True):
            row += torch.stack([(mine - true).square().mean() for mine, true in zip(found, truth, strict=True)])
    assert (errors[0] <= 2**2 * errors[1]).all(), (errors[0] / errors[1]).sqrt()


DIFFUSERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], str, str]] = {
    "temporal": (
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32,)},
        (3, 4, 3, 5),
        "decode",
        "residual block",
    ),
    "hunyuan": ("AutoencoderKLHunyuanVideo", {"block_out_channels": (32,) * 4}, (1, 3, 5, 16, 16), "encode", "norms"),
    "cogvideox": ("AutoencoderKLCogVideoX", {"block_out_channels": (32,) * 4}, (1, 3, 5, 16, 16), "encode", "norms"),
    "magvit": ("AutoencoderKLMagvit", {"block_out_channels": (32,) * 4}, (1, 3, 5, 16, 16), "encode", "norms"),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_autoencoders_are_themselves(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    cls, options, shape, method, label = DIFFUSERS[name]
    model = perturbed(getattr(diffusers, cls)(**options, layers_per_block=1))

    def call(model: nn.Module, x: Tensor) -> Tensor:
        if method == "decode":
            return model.decode(x, num_frames=len(x)).sample
        return model.encode(x).latent_dist.mean

    half = getattr(model, f"{method}r")
    x = torch.rand(shape)
    with torch.no_grad():
        expected = call(model, x)
    gradients = half_gradients(half, lambda: call(model, x))
    report = fuse(model, report=True)[1]
    assert any(what.startswith(label) and place.startswith(method) for place, what in report.replaced)
    assert_same([call(model, x), *half_gradients(half, lambda: call(model, x))], [expected, *gradients])


def half_gradients(module: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(call().square().sum(), list(module.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ([nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 3, 3, padding=1)], ["norm → SiLU → convolution"]),
        (
            [nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.0), nn.Conv3d(4, 6, (3, 1, 2), stride=(1, 2, 1), dilation=2)],
            ["norm → SiLU → convolution"],
        ),
        ([nn.GroupNorm(1, 4), nn.Conv3d(4, 8, 1, groups=2, bias=False)], ["norm → convolution"]),
        ([nn.GroupNorm(4, 4), nn.SiLU()], ["norm → SiLU"]),
        (
            [nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()],
            ["norm → SiLU"],
        ),
        (
            [nn.Conv3d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()],
            ["norm → SiLU → convolution", "convolution → statistics"],
        ),
        ([nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), nn.ConvTranspose3d(4, 2, 2)], ["norm → SiLU"]),
    ],
)
def test_sequentials_are_themselves(layers: list[nn.Module], kinds: list[str]) -> None:
    model = perturbed(nn.Sequential(*copy.deepcopy(layers)))
    x = torch.randn(2, 4, 7, 6, 5)
    expected = results(model, x)
    model, report = fuse(model, report=True)
    assert [kind for _, kind in report.replaced] == kinds
    assert_same(results(model, x), expected)
    assert torch.equal(model[:1](x), model[0](x))  # a slice is a Sequential of its own


@pytest.mark.parametrize(("memory", "share"), [("balanced", 1), ("tight", 0)])
def test_blocks_keep_what_their_memory_mode_says(memory: Memory, share: int) -> None:
    """x, and the output of the first convolution in balanced mode; besides, three numbers a volume and channel."""
    block = fuse(monai_block(8, 16, 4), memory=memory, report=True)[0]
    x = torch.rand(2, 8, 6, 7, 8)
    parameters = {p.data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x.requires_grad_())
    states = sum(kept.values()) - x.nbytes - share * y.nbytes
    assert 0 <= states <= 2 * 2 * 3 * 16 * 4


def test_operations_are_counted_with_and_without_memory() -> None:
    """As many as torch counts for the definition; one convolution of a block more a backward where memory is tight."""

    def counted(memory: Memory | None, *, fake: bool = False) -> int:
        with FlopCounterMode(display=False) as counter:
            if fake:
                with FakeTensorMode():
                    model = Autoencoder(SMALL, memory=memory)
                    block(model, torch.rand(1, 1, 8, 8, 8))
            else:
                model = Autoencoder(SMALL, memory=memory)
                block(model, torch.rand(1, 1, 8, 8, 8))
        return counter.get_total_flops()

    def block(model: Autoencoder, image: Tensor) -> None:
        model.encode(image)[0].sum().backward()

    plain = counted(None)
    assert counted("balanced") == plain
    again = 2 * 27 * (8 * 8 * 8**3 + 8 * 16 * 4**3)
    assert counted("tight") == plain + again
    assert counted("balanced", fake=True) == plain


@pytest.mark.parametrize("memory", MEMORY)
def test_compiled_without_graph_breaks(memory: Memory) -> None:
    model = perturbed(Autoencoder(AutoencoderConfig(channels=(2, 4), residual_blocks=1, groups=2), memory=memory))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.rand(1, 1, 4, 4, 4)

    def call(model: nn.Module, image: Tensor) -> Tensor:
        reconstruction, latent = model(image, sample=False)
        return reconstruction + latent.kl

    expected = [call(model, image), *half_gradients(model, lambda: call(model, image))]
    assert_same([call(compiled, image), *half_gradients(model, lambda: call(compiled, image))], expected)
    block = model.encoder.blocks[1]
    x = torch.rand(1, 2, 4, 4, 4)
    assert_same(results(torch.compile(block, fullgraph=True, backend="aot_eager"), x), results(block, x))
