"""Channel moments: the mean and the centred second moments of C channels over all samples, from one read.

Every loss and every latent metric of DeCo-VAE is a function of these C + C² numbers. They are returned in float64,
where they cost nothing; the pass over the data works in float32 in Triton and in float64, a cached piece at a time, in
torch. Two measures keep means far from zero harmless:

- samples are shifted by the channel's first sample before anything is summed, which is exact or nearly so where the
  mean is large, and makes a constant channel's scatter exactly zero; then blocks are centred on their own mean and
  merged by Chan, Golub and LeVeque's formula: nowhere E[x²] − E[x]²;
- the backward subtracts the mean as a float32 pair (high + low part of the float64 mean).

Sums have a fixed order, without atomics: the same input on the same device gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from decovae_kernels._dispatch import wants_triton
from decovae_kernels._layout import readable_blocks, sample_blocks

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The torch path works on pieces of this many elements: a few MB, which stay in a CPU's cache and bound extra memory.
_CHUNK_ELEMENTS = 1 << 19

# What the Triton kernels keep in registers.
_TRITON_MAX_CHANNELS = 16


def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scatter of the channels of `x`, differentiable once, as one registered operator.

    Args:
        x: (N, C, *spatial) or (N, C), float16, bfloat16, float32 or float64. Contiguous and channels-last tensors and
            slices of them along batch or channels are read in place, others are copied once.

    Returns:
        mean (C,) and scatter Σ_s (x_s − mean)(x_s − mean)ᵀ (C, C) over the N·|spatial| samples, both float64, both
        zero for an empty batch. Non-finite samples make their channel's entries non-finite. The gradient has the
        dtype and, where `x` is dense, the strides of `x`.

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
        ValueError: `x` has fewer than 2 dimensions or no channel, or DECOVAE_KERNELS has an unknown value.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor (N, C, *spatial), got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"expected a tensor of {names}, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"expected a tensor (N, C, *spatial), got {x.ndim} dimension(s), shape {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"expected at least one channel, got shape {tuple(x.shape)}")
    return _channel_moments(x)


def merge_moments(
    counts: torch.Tensor, means: torch.Tensor, scatters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moments of a union of K disjoint sets of samples, from theirs (Chan, Golub, LeVeque 1979).

    Args:
        counts: (K,) float64, how many samples each set has; zero is allowed if the set's other moments are zero.
        means: (K, C) float64.
        scatters: (K, C, C) float64.

    Returns:
        count (), mean (C,), scatter (C, C), float64.
    """
    count = counts.sum()
    # Measured from the fullest set's mean rather than from zero: sets with equal means then differ by exactly zero.
    origin = means.index_select(0, counts.argmax().reshape(1))
    offsets = means - origin
    offset = (counts[:, None] * offsets).sum(0) / count.clamp(min=1)
    between = offsets - offset
    scatter = scatters.sum(0) + (counts[:, None] * between).T @ between
    return count, origin[0] + offset, scatter


@torch.library.custom_op("decovae::channel_moments", mutates_args=())
def _channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x.shape[1]
    if x.numel() == 0:
        zeros = x.new_zeros(channels + 1, channels, dtype=torch.float64)
        return zeros[0].clone(), zeros[1:].clone()
    blocks = readable_blocks(x)
    if _runs_in_triton(x):
        from decovae_kernels import moments_triton

        return moments_triton.moments(blocks)
    return _moments_torch(blocks)


@_channel_moments.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x.shape[1]
    return x.new_empty(channels, dtype=torch.float64), x.new_empty(channels, channels, dtype=torch.float64)


@torch.library.custom_op("decovae::channel_moments_backward", mutates_args=())
def _channel_moments_backward(
    x: torch.Tensor, mean: torch.Tensor, grad_mean: torch.Tensor, grad_scatter: torch.Tensor
) -> torch.Tensor:
    """dx_s = grad_mean / n + (G + Gᵀ)(x_s − mean) for G = grad_scatter: one read of `x`, one write."""
    grad = torch.empty_like(x)
    if x.numel() == 0:
        return grad
    source, target = sample_blocks(x), sample_blocks(grad)
    if source is None or target is None or source.shape != target.shape:
        # Strides that are neither contiguous nor channels-last: one copy in, one out.
        return grad.copy_(_channel_moments_backward(x.contiguous(), mean, grad_mean, grad_scatter))
    if _runs_in_triton(x):
        from decovae_kernels import moments_triton

        moments_triton.input_gradient(source, mean, grad_mean, grad_scatter, out=target)
    else:
        _input_gradient_torch(source, mean, grad_mean, grad_scatter, out=target)
    return grad


@_channel_moments_backward.register_fake
def _(x: torch.Tensor, mean: torch.Tensor, grad_mean: torch.Tensor, grad_scatter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_mean: torch.Tensor, grad_scatter: torch.Tensor
) -> torch.Tensor:
    x, mean = ctx.saved_tensors  # type: ignore[attr-defined]
    return _channel_moments_backward(x, mean, grad_mean, grad_scatter)


_channel_moments.register_autograd(_backward, setup_context=_save_for_backward)


def _runs_in_triton(x: torch.Tensor) -> bool:
    return wants_triton(x) and x.dtype != torch.float64 and x.shape[1] <= _TRITON_MAX_CHANNELS


def _chunks(blocks: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the first and last axis of `blocks` (B, C, L) that tile it in pieces of bounded size."""
    count, channels, length = blocks.shape
    length_step = min(length, max(_CHUNK_ELEMENTS // channels, 1))
    count_step = max(_CHUNK_ELEMENTS // (channels * length_step), 1)
    for first in range(0, count, count_step):
        for start in range(0, length, length_step):
            yield slice(first, first + count_step), slice(start, start + length_step)


def _moments_torch(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # In float64, piece by piece: a float32 product of 65,536 samples was off by 1e-6 and the shift alone by 4e-8, which
    # (γ − √Σ_ii)² with √Σ_ii near γ multiplies; and no TF32 or autocast setting gets hold of float64.
    shift = blocks[0, :, :1].double()
    counts, means, scatters = [], [], []
    for volumes, samples in _chunks(blocks):
        centred = blocks[volumes, :, samples].to(torch.float64, copy=True)
        centred -= shift
        mean = centred.mean(dim=-1, keepdim=True)
        centred -= mean
        counts.append(mean.new_full((len(mean),), centred.shape[-1]))
        means.append(mean[..., 0])
        scatters.append(torch.bmm(centred, centred.mT))
    _, mean, scatter = merge_moments(torch.cat(counts), torch.cat(means), torch.cat(scatters))
    return shift[:, 0] + mean, scatter


def _input_gradient_torch(
    blocks: torch.Tensor, mean: torch.Tensor, grad_mean: torch.Tensor, grad_scatter: torch.Tensor, *, out: torch.Tensor
) -> None:
    # On CUDA a user's TF32 setting would round float32 products to 10 bits; float64 is out of its reach.
    dtype = torch.float64 if blocks.is_cuda else torch.promote_types(blocks.dtype, torch.float32)
    samples_total = blocks.shape[0] * blocks.shape[2]
    high = mean.to(dtype)
    low = mean - high
    matrix = grad_scatter + grad_scatter.T
    bias = (grad_mean / samples_total - matrix @ low).to(dtype)[:, None]
    high, matrix = high[:, None], matrix.to(dtype)
    # An operator's body still sees the caller's autocast, which would lower the product.
    with torch.autocast(blocks.device.type, enabled=False):
        for volumes, samples in _chunks(blocks):
            centred = blocks[volumes, :, samples] - high
            out[volumes, :, samples] = torch.baddbmm(bias, matrix.expand(len(centred), -1, -1), centred)
