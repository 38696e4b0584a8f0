"""Inputs and calls of what streams over latents: moments, their gradient, the losses and the latent head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.tune.work import Maker, Prepared, Recipe, Tensors, Work, same
from decovae_kernels import packed as packing
from decovae_kernels import philox, reference, terms
from decovae_kernels._layout import readable_blocks
from decovae_kernels.terms import Terms

_TERMS = Terms(covariance=1.0, variance=1.0)


def _moments(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import moments_triton

    x = make.tensor()
    blocks = readable_blocks(x)

    def expected() -> Tensors:
        mean, scatter = reference.channel_moments(x)
        packed = torch.cat([mean.new_full((1,), x.numel() // x.shape[1]), mean, scatter.flatten()])
        loss, direction = terms.loss_and_direction(packed, _TERMS)
        return loss.float(), packed, direction

    return Prepared(lambda: moments_triton.decorrelation(blocks, _TERMS), same, expected, x.nbytes)


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

    return Prepared(run, same, lambda: ((scale.double() * _along(x, packed, direction)).to(x.dtype),), 2 * x.nbytes)


def _loss(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import moments_triton

    x = make.tensor()
    mean, scatter = reference.channel_moments(x)
    packed = torch.cat([mean.new_full((1,), x.numel() // x.shape[1]), mean, scatter.flatten()])
    return Prepared(
        lambda: moments_triton.loss_and_direction(packed, _TERMS),
        same,
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
        kl, packed = latent_head_triton.forward(blocks[0], blocks[1], blocks[2], seed, 1, 0)
        return z, kl, packed

    def expected() -> Tensors:
        z, kl, packed = reference.latent_head(mu.double(), log_variance.double(), _noise(mu, seed).double())
        return z.to(mu.dtype), kl.float(), packed

    return Prepared(run, same, expected, 3 * mu.nbytes)


def _head_gradient(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import latent_head_triton

    mu, log_variance, grad = make.tensor(), make.tensor(), make.tensor()
    seed, grad_kl = torch.tensor([3], device=make.device), make.numbers()
    packed, direction = _direction(make, mu.shape[1], mu.numel() // mu.shape[1])

    def run() -> Tensors:
        outs = torch.empty_like(mu), torch.empty_like(log_variance)
        source, spread, upstream, to_mu, to_spread = (readable_blocks(x) for x in (mu, log_variance, grad, *outs))
        blocks = source, spread, upstream, to_mu, to_spread
        latent_head_triton.backward(*blocks, seed, 1, 0, packed, grad_kl, direction, 1)
        return outs

    def expected() -> Tensors:
        variance, weight = log_variance.double().exp(), grad_kl.double() / mu.numel()
        along_mu = grad.double() + weight * mu.double() + _along(mu, packed, direction)
        along_spread = 0.5 * (grad.double() * variance.sqrt() * _noise(mu, seed) + weight * (variance - 1))
        return along_mu.to(mu.dtype), along_spread.to(mu.dtype)

    return Prepared(run, same, expected, 5 * mu.nbytes)


RECIPES: Mapping[str, Recipe] = {
    "moments": _moments,
    "moments_gradient": _moments_gradient,
    "moments_dot": _moments,
    "moments_gradient_dot": _moments_gradient,
    "loss": _loss,
    "head": _head,
    "head_gradient": _head_gradient,
}
