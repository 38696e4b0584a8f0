"""What is tuned: every kernel at the shapes it meets, with inputs, the call to time, and what it should compute.

Shapes are those of the paper: latents of 4 channels at the training patch (24³), of a whole volume, and large; features
of the autoencoder's three levels, channels-last, as it has them. Other numbers of channels come last, at one shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decovae_kernels import packed as packing
from decovae_kernels import philox, reference, terms
from decovae_kernels._layout import readable_blocks
from decovae_kernels._norm import Norm
from decovae_kernels.terms import Terms

Tensors = tuple[Tensor, ...]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

_TERMS = Terms(covariance=1.0, variance=1.0)
_GROUPS = 32
_EPSILON = 1e-6


class Prepared(NamedTuple):
    """Inputs in place.

    run: the call, with every result in new memory.
    comparable: what two ways to compute it must agree on, from what `run` gave.
    expected: that, in plain torch, from the same inputs; for small sizes.
    bytes_moved: the least that the call moves.
    """

    run: Callable[[], Tensors]
    comparable: Callable[[Tensors], Tensors]
    expected: Callable[[], Tensors]
    bytes_moved: int


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel at one shape.

    Attributes:
        kernel: its name in the configurations.
        shape: a name for the sizes.
        sizes: (N, C, D, H, W) of its input; of the low resolution for upsampling.
        layout: of that in memory, "contiguous" or "channels_last".
        reads: the layout by which the kernel's configuration is looked up.
        channels: likewise, if not those of the input.
    """

    kernel: str
    shape: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    reads: str
    channels: int

    @property
    def id(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        return f"{self.kernel}[{self.shape}-{sizes}-{str(self.dtype).partition('.')[2]}-{self.layout}]"

    @property
    def condition(self) -> tuple[int, str, int]:
        """What the configuration is looked up by, after kernel and architecture."""
        return self.channels, self.reads, self.dtype.itemsize

    def prepare(self, device: torch.device, seed: int = 0) -> Prepared:
        """Inputs on `device`, the same for the same seed and kind of device."""
        return _PREPARE[self.kernel](self, Maker(self, device, seed))

    def tiny(self) -> Work:
        """The same kernel, dtype, layout and, if they are few, channels, for Triton's interpreter."""
        volumes, channels, *_ = self.sizes
        spatial = (7, 9, 11) if _is_latent(self.kernel) else (2, 3, 4)
        narrow = channels if _is_latent(self.kernel) else min(channels, 32)
        own = self.channels if self.channels != channels else narrow
        return dataclasses.replace(self, shape="tiny", sizes=(min(volumes, 2), narrow, *spatial), channels=own)


class Maker:
    """Random tensors for one work."""

    def __init__(self, work: Work, device: torch.device, seed: int) -> None:
        self.work, self.device = work, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def numbers(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=torch.float32).to(dtype)

    def tensor(self, scale: int = 1) -> Tensor:
        """Of the work's sizes, `scale` times as large along each spatial axis, its dtype and layout."""
        volumes, channels, *spatial = self.work.sizes
        x = self.numbers(volumes, channels, *(scale * size for size in spatial), dtype=self.work.dtype)
        return x.contiguous(memory_format=FORMATS[self.work.layout])


def _same(found: Tensors) -> Tensors:
    return found


def _moments(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import moments_triton

    x = make.tensor()
    blocks = readable_blocks(x)

    def expected() -> Tensors:
        mean, scatter = reference.channel_moments(x)
        packed = torch.cat([mean.new_full((1,), x.numel() // x.shape[1]), mean, scatter.flatten()])
        loss, direction = terms.loss_and_direction(packed, _TERMS)
        return loss.float(), packed, direction

    return Prepared(lambda: moments_triton.decorrelation(blocks, _TERMS), _same, expected, x.nbytes)


def _direction(make: Maker, channels: int, count: int) -> tuple[Tensor, Tensor]:
    """Packed moments, and a derivative with respect to them."""
    packed, direction = make.numbers(2, packing.size(channels)).double().unbind()
    packed[0] = count
    return packed.contiguous(), direction.contiguous()


def _along(x: Tensor, packed: Tensor, direction: Tensor) -> Tensor:
    """The gradient of moments with respect to their samples, in float64."""
    samples = x.double().movedim(1, -1) - packing.mean_of(packed)
    matrix = packing.scatter_of(direction)
    along = packing.mean_of(direction) / packed[0] + samples @ (matrix + matrix.T)
    return along.movedim(-1, 1)


def _moments_gradient(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import moments_triton

    x = make.tensor()
    blocks, scale = readable_blocks(x), make.numbers()
    packed, direction = _direction(make, x.shape[1], x.numel() // x.shape[1])

    def run() -> Tensors:
        out = torch.empty_like(x)
        moments_triton.input_gradient(blocks, packed, direction, scale, 1, out=readable_blocks(out))
        return (out,)

    return Prepared(run, _same, lambda: ((scale.double() * _along(x, packed, direction)).to(x.dtype),), 2 * x.nbytes)


def _loss(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import moments_triton

    x = make.tensor()
    mean, scatter = reference.channel_moments(x)
    packed = torch.cat([mean.new_full((1,), x.numel() // x.shape[1]), mean, scatter.flatten()])
    return Prepared(
        lambda: moments_triton.loss_and_direction(packed, _TERMS),
        _same,
        lambda: terms.loss_and_direction(packed, _TERMS),
        2 * packed.nbytes,
    )


def _noise(mu: Tensor, seed: Tensor) -> Tensor:
    volumes, channels, *spatial = mu.shape
    drawn = philox.normals(seed, 1, 0, mu.numel() // channels, channels)
    return drawn.view(channels, volumes, *spatial).movedim(0, 1)


def _head(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import latent_head_triton

    mu, log_variance = make.tensor(), make.tensor()
    seed = torch.tensor([3], device=make.device)

    def run() -> Tensors:
        z = torch.empty_like(mu)
        blocks = [readable_blocks(x) for x in (mu, log_variance, z)]
        kl, packed = latent_head_triton.forward(blocks[0], blocks[1], blocks[2], seed, 1)
        return z, kl, packed

    def expected() -> Tensors:
        z, kl, packed = reference.latent_head(mu.double(), log_variance.double(), _noise(mu, seed).double())
        return z.to(mu.dtype), kl.float(), packed

    return Prepared(run, _same, expected, 3 * mu.nbytes)


def _head_gradient(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import latent_head_triton

    mu, log_variance, grad = make.tensor(), make.tensor(), make.tensor()
    seed, grad_kl = torch.tensor([3], device=make.device), make.numbers()
    packed, direction = _direction(make, mu.shape[1], mu.numel() // mu.shape[1])

    def run() -> Tensors:
        outs = torch.empty_like(mu), torch.empty_like(log_variance)
        source, spread, upstream, to_mu, to_spread = (readable_blocks(x) for x in (mu, log_variance, grad, *outs))
        latent_head_triton.backward(source, spread, upstream, to_mu, to_spread, seed, 1, packed, grad_kl, direction, 1)
        return outs

    def expected() -> Tensors:
        variance, weight = log_variance.double().exp(), grad_kl.double() / mu.numel()
        along_mu = grad.double() + weight * mu.double() + _along(mu, packed, direction)
        along_spread = 0.5 * (grad.double() * variance.sqrt() * _noise(mu, seed) + weight * (variance - 1))
        return along_mu.to(mu.dtype), along_spread.to(mu.dtype)

    return Prepared(run, _same, expected, 5 * mu.nbytes)


def _norm(make: Maker, channels: int) -> Norm:
    # Of groups of one channel, the sum of the gradient is zero, and two ways to round it have nothing to agree on.
    return Norm(make.numbers(channels), make.numbers(channels), min(_GROUPS, channels // 2), _EPSILON, True)


def _merged(statistics: Tensor) -> Tensors:
    """Mean and standard deviation (N, C) of statistics of chunks (N, P, 3, C)."""
    count, mean, scatter = statistics.double().unbind(2)
    total = count.sum(1)
    centre = (count * mean).sum(1) / total
    spread = (scatter + count * (mean - centre[:, None]).square()).sum(1)
    return centre, (spread / total).sqrt()


def _norm_add(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    left, right, bias = make.tensor(), make.tensor(), make.numbers(work.sizes[1])

    def run() -> Tensors:
        out = torch.empty_like(left)
        return out, group_norm_triton.add(left, right, bias, out=out, statistics=True)

    def expected() -> Tensors:
        out = (left.float() + right.float() + bias.view(-1, 1, 1, 1)).to(left.dtype)
        wide = out.double().flatten(2)
        return out, wide.mean(2), wide.std(2, correction=0)

    return Prepared(run, lambda found: (found[0], *_merged(found[1])), expected, 3 * left.nbytes)


def _state_of(x: Tensor, norm: Norm) -> Tensor:
    """State (N, 3, C) of the norm of `x`."""
    volumes, channels = x.shape[:2]
    grouped = x.double().reshape(volumes, norm.groups, -1)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, correction=0) + norm.eps).rsqrt()
    each = channels // norm.groups
    centre, rstd = (value.repeat_interleave(each, 1) for value in (mean, rstd))
    return torch.stack([centre, rstd, (x.double().flatten(2).mean(2) - centre) * rstd], 1).float()


def _norm_state(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    x, norm = make.tensor(), _norm(make, work.sizes[1])
    statistics = group_norm_triton.add(None, x, None, out=None, statistics=True)
    return Prepared(
        lambda: (group_norm_triton.state(x, statistics, None, norm),), _same, lambda: (_state_of(x, norm),),
        statistics.nbytes,
    )  # fmt: skip


def _normalised(x: Tensor, state: Tensor, norm: Norm) -> Tensor:
    """x̂, in float64."""
    return (x.double() - _voxelwise(state[:, 0])) * _voxelwise(state[:, 1])


def _voxelwise(numbers: Tensor) -> Tensor:
    return numbers.double().view(*numbers.shape, 1, 1, 1)


def _norm_apply(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    x, norm = make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)

    def expected() -> Tensors:
        z = _normalised(x, state, norm) * _voxelwise(norm.weight) + _voxelwise(norm.bias)
        return (torch.nn.functional.silu(z).to(x.dtype),)

    return Prepared(lambda: (group_norm_triton.apply(x, state, norm),), _same, expected, 2 * x.nbytes)


def _activated(grad: Tensor, x: Tensor, state: Tensor, norm: Norm) -> Tensors:
    """x̂, the activation and the gradient behind it, dz, in float64."""
    normal = _normalised(x, state, norm)
    z = normal * _voxelwise(norm.weight) + _voxelwise(norm.bias)
    gate = z.sigmoid()
    return normal, z * gate, grad.double() * gate * (1 + z * (1 - gate))


def _norm_sums(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    grad, x, norm = make.tensor(), make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)

    def run() -> Tensors:
        (_, partial), again = group_norm_triton.begin_gradient(grad, x, state, norm, activation=True)
        return partial, again

    def expected() -> Tensors:
        normal, activation, dz = _activated(grad, x, state, norm)
        sums = torch.stack([dz.sum((2, 3, 4)), (dz * normal).sum((2, 3, 4))], 1)
        return sums, activation.to(x.dtype)

    return Prepared(run, lambda found: (found[0].double().sum(1), found[1]), expected, 3 * x.nbytes)


def _norm_gradient(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    grad, x, other, norm = make.tensor(), make.tensor(), make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)
    carry, _ = group_norm_triton.begin_gradient(grad, x, state, norm, activation=False)

    def run() -> Tensors:
        return group_norm_triton.finish_gradient(carry, x, state, norm, other=other, over=False)

    def expected() -> Tensors:
        normal, _, dz = _activated(grad, x, state, norm)
        scaled = dz * _voxelwise(norm.weight)
        grouped = (len(x), norm.groups, -1)
        means = [part.reshape(grouped).mean(2) for part in (scaled, scaled * normal)]
        mean, slope = (_voxelwise(part.repeat_interleave(x.shape[1] // norm.groups, 1)) for part in means)
        along = _voxelwise(state[:, 1]) * (scaled - mean - normal * slope)
        sums = [(part).sum((0, 2, 3, 4)).float() for part in (dz * normal, dz, along)]
        return ((along + other.double()).to(x.dtype), *sums)

    return Prepared(run, _same, expected, 4 * x.nbytes)


def _gathered(products: Tensor, bias: Tensor) -> Tensor:
    """Σ_k shift_k(U m_k) + bias, (N, C, 2D, 2H, 2W), of products (N, 27, C, D, H, W)."""
    volumes, taps, channels, *spatial = products.shape
    doubled = [2 * size for size in spatial]
    upsampled = torch.nn.functional.interpolate(products.flatten(0, 1), scale_factor=2, mode="trilinear")
    padded = torch.nn.functional.pad(upsampled, (1,) * 6).view(volumes, taps, channels, *(n + 2 for n in doubled))
    total = bias.view(-1, 1, 1, 1)
    for k in range(taps):
        d, h, w = k // 9, k // 3 % 3, k % 3
        total = total + padded[:, k, :, d : d + doubled[0], h : h + doubled[1], w : w + doubled[2]]
    return total


def _gather(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    volumes, channels, *spatial = work.sizes
    products = make.numbers(math.prod((volumes, *spatial)), 27 * channels, dtype=work.dtype)
    bias = make.numbers(channels)

    def run() -> Tensors:
        out = products.new_empty(volumes, *(2 * size for size in spatial), channels)
        upsample_conv_triton.gather(products, bias, out, 0, spatial[0], spatial[0])
        return (out,)

    def expected() -> Tensors:
        apart = products.double().view(volumes, *spatial, 27, channels).permute(0, 4, 5, 1, 2, 3)
        return (_gathered(apart, bias.double()).movedim(1, -1).to(work.dtype),)

    return Prepared(run, _same, expected, products.nbytes * 35 // 27)


def _spread(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    volumes, channels, *spatial = work.sizes
    grad = make.numbers(volumes, *(2 * size for size in spatial), channels, dtype=work.dtype)

    def run() -> Tensors:
        pulled = grad.new_empty(math.prod((volumes, *spatial)), 27 * channels)
        upsample_conv_triton.spread(grad, pulled, 0, spatial[0])
        return (pulled,)

    def expected() -> Tensors:
        products = grad.new_zeros(volumes, 27, channels, *spatial, dtype=torch.float64).requires_grad_()
        gathered = _gathered(products, grad.new_zeros(channels, dtype=torch.float64))
        (pulled,) = torch.autograd.grad(gathered, products, grad.double().movedim(-1, 1))
        return (pulled.permute(0, 3, 4, 5, 1, 2).reshape(-1, 27 * channels).to(work.dtype),)

    return Prepared(run, _same, expected, grad.nbytes * 35 // 8)


def _upsample(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    x = make.tensor()

    def expected() -> Tensors:
        return (torch.nn.functional.interpolate(x.double(), scale_factor=2, mode="trilinear").to(x.dtype),)

    return Prepared(lambda: (upsample_conv_triton.upsample(x),), _same, expected, 9 * x.nbytes)


def _downsample(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    grad = make.tensor(scale=2)

    def expected() -> Tensors:
        low = grad.new_zeros(work.sizes, dtype=torch.float64).requires_grad_()
        high = torch.nn.functional.interpolate(low, scale_factor=2, mode="trilinear")
        return (torch.autograd.grad(high, low, grad.double())[0].to(grad.dtype),)

    return Prepared(lambda: (upsample_conv_triton.downsample(grad),), _same, expected, grad.nbytes * 9 // 8)


def _slab(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton as kernels

    x, grad, channels = make.tensor(), make.tensor(scale=2), work.sizes[1]
    weight = (make.numbers(channels, channels, 3, 3, 3) / math.sqrt(27 * channels)).to(work.dtype)

    def run() -> Tensors:
        slab = kernels.slab_bytes(x)
        along_x, along_weight = kernels.backward(grad, x, weight, slab, (True, True))
        assert along_x is not None  # both were asked for
        assert along_weight is not None
        return kernels.forward(x, weight, None, slab), along_x, along_weight

    def expected() -> Tensors:
        leaves = [value.double().requires_grad_() for value in (x, weight)]
        y = reference.upsample_conv(leaves[0], leaves[1])
        along_x, along_weight = torch.autograd.grad(y, leaves, grad.double())
        return y.detach().to(x.dtype), along_x.to(x.dtype), along_weight.float()

    # Products written and read forward; their gradients written once and read twice.
    return Prepared(run, _same, expected, 5 * 27 * x.nbytes)


_PREPARE: Mapping[str, Callable[[Work, Maker], Prepared]] = {
    "moments": _moments,
    "moments_gradient": _moments_gradient,
    "moments_dot": _moments,
    "moments_gradient_dot": _moments_gradient,
    "loss": _loss,
    "head": _head,
    "head_gradient": _head_gradient,
    "norm_add": _norm_add,
    "norm_state": _norm_state,
    "norm_apply": _norm_apply,
    "norm_sums": _norm_sums,
    "norm_coefficients": _norm_gradient,
    "norm_gradient": _norm_gradient,
    "gather": _gather,
    "spread": _spread,
    "upsample": _upsample,
    "downsample": _downsample,
    "slab": _slab,
}

_LATENTS: Mapping[str, tuple[int, ...]] = {
    "training": (2, 4, 24, 24, 24),
    "whole": (1, 4, 32, 64, 32),
    "large": (1, 4, 384, 384, 384),
}
_FEATURES: Mapping[str, tuple[int, ...]] = {
    "level0": (2, 64, 96, 96, 96),
    "level1": (2, 128, 48, 48, 48),
    "level2": (2, 256, 24, 24, 24),
    "whole": (1, 64, 128, 256, 128),
}
# As many planes as a slab of 64 MiB of products has.
_SLABS: Mapping[str, tuple[int, ...]] = {"level2": (1, 256, 8, 24, 24), "level1": (1, 128, 4, 48, 48)}
_UPSAMPLED: Mapping[str, tuple[int, ...]] = {"level2": (2, 256, 24, 24, 24), "level1": (2, 128, 48, 48, 48)}

FUNCTIONS: Mapping[str, str] = {
    "moments": "_moments_kernel",
    "moments_gradient": "_gradient_kernel",
    "moments_dot": "_moments_dot_kernel",
    "moments_gradient_dot": "_gradient_dot_kernel",
    "loss": "_loss_kernel",
    "head": "_head_kernel",
    "head_gradient": "_head_gradient_kernel",
    "norm_add": "_add_kernel",
    "norm_state": "_norm_state_kernel",
    "norm_apply": "_norm_apply_kernel",
    "norm_sums": "_norm_sums_kernel",
    "norm_coefficients": "_norm_coefficients_kernel",
    "norm_gradient": "_norm_gradient_kernel",
    "gather": "_gather_kernel",
    "spread": "_spread_kernel",
    "upsample": "_upsample_kernel",
    "downsample": "_downsample_kernel",
}
"""The Triton function that each configuration launches; that of a slab launches none of its own."""

DTYPES = (torch.bfloat16, torch.float32)
_LATENT_KERNELS = ("moments", "moments_gradient", "head", "head_gradient")
_PASSES = ("norm_add", "norm_apply", "norm_sums", "norm_gradient")

ORDER = (
    "norm_sums", "norm_gradient", "norm_apply", "norm_add", "gather", "spread", "head", "head_gradient", "moments",
    "moments_gradient", "norm_state", "norm_coefficients", "slab", "upsample", "downsample",
    "moments_dot", "moments_gradient_dot", "loss",
)  # fmt: skip
"""The kernels, those that take most of a training step first."""


def works() -> list[Work]:
    """All that is tuned, in the order of its weight: kernels in `ORDER`, bfloat16 before float32, then odd channels."""
    found = [work for kernel in ORDER for dtype in DTYPES for work in _works(kernel, dtype)]
    return sorted(found, key=lambda work: work.shape.startswith("C"))


def _works(kernel: str, dtype: torch.dtype) -> Iterator[Work]:
    def one(shape: str, sizes: tuple[int, ...], layout: str, reads: str, channels: int | None = None) -> Work:
        return Work(kernel, shape, sizes, dtype, layout, reads, channels or sizes[1])

    if kernel in _LATENT_KERNELS:
        for shape, sizes in _LATENTS.items():
            yield one(shape, sizes, "channels_last", "interleaved")
            yield one(shape, sizes, "contiguous", "strided")
        if dtype == torch.bfloat16:
            for channels in (8, 16):
                yield from _other_latents(one, kernel, channels)
    elif kernel in ("moments_dot", "moments_gradient_dot") and dtype == torch.bfloat16:
        for channels in (32, 64):
            yield one(f"C{channels}", (1, channels, 32, 64, 32), "contiguous", "strided")
    elif kernel == "loss" and dtype == torch.float32:
        for channels in (16, 32):
            yield Work(
                kernel, f"C{channels}", (1, channels, 8, 8, 8), torch.float64, "contiguous", "contiguous", channels
            )
    elif kernel in _PASSES:
        for shape, sizes in _FEATURES.items():
            yield one(shape, sizes, "channels_last", "channels_last")
    elif kernel in ("norm_state", "norm_coefficients") and dtype == torch.bfloat16:
        for shape in ("level0", "level1", "level2"):
            sizes = _FEATURES[shape]
            yield one(shape, sizes, "channels_last", "contiguous", sizes[1] // _GROUPS)
    elif kernel in ("gather", "spread"):
        for shape, sizes in _SLABS.items():
            yield one(shape, sizes, "channels_last", "channels_last")
    elif kernel in ("slab", "upsample", "downsample"):
        for shape, sizes in _UPSAMPLED.items():
            yield one(shape, sizes, "channels_last", "channels_last")


def _other_latents(one: Any, kernel: str, channels: int) -> Iterator[Work]:
    """Latents of another number of channels, at one shape; the head takes more than 8 in parts of 8."""
    sizes = (1, channels, 32, 64, 32)
    head = kernel.startswith("head")
    if channels == 16 and head:
        return
    planes = (channels == 8 and head) or (channels == 16 and kernel == "moments")
    yield one(f"C{channels}", sizes, "channels_last", "interleaved")
    yield one(f"C{channels}", sizes, "contiguous", "planes" if planes else "strided")


def _is_latent(kernel: str) -> bool:
    return kernel in (*_LATENT_KERNELS, "moments_dot", "moments_gradient_dot", "loss")
