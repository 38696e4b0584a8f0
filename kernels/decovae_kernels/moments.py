"""The operators on channel moments, and the functions that call them.

    decovae::channel_moments           x → packed moments, differentiable
    decovae::decorrelation             x → a sum of decorrelation losses, from the same single read
    decovae::moments_decorrelation     packed moments → the same losses, for moments that are at hand
    decovae::moments_gradient          the backward of the first two: one read of x, one write of its gradient

All of a loss's derivative is a C×C matrix, ∂L/∂S, that the forward finds along with the loss; the gradient with respect
to a sample is 2 ∂L/∂S (x_s − mean).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels import moments_torch, ranks, terms
from decovae_kernels import packed as packing
from decovae_kernels._autograd import differentiable
from decovae_kernels._dispatch import UNCAPTURED, full_precision, wants_triton
from decovae_kernels._layout import readable_blocks, sample_blocks
from decovae_kernels.terms import Terms

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What the Triton kernels hold; above it the torch path serves.
MAX_TRITON_CHANNELS = 64


def channel_moments(x: torch.Tensor, *, group: str = "") -> torch.Tensor:
    """Packed moments of the channels of `x`, differentiable once.

    Args:
        x: (N, C, *spatial) or (N, C), float16, bfloat16, float32 or float64. Contiguous and channels-last tensors and
            slices of them along batch or channels are read in place, others are copied once.
        group: name of a process group whose joint batch is meant. Each rank's gradient is then the world size times
            ∂L/∂x of the loss that all ranks compute alike, so that DDP's and FSDP's averaging yields the gradient of L.

    Returns:
        (1 + C + C²,) float64: count n, mean, scatter Σ_s (x_s − mean)(x_s − mean)ᵀ over the N·|spatial| samples; all
        zero for an empty batch. Non-finite samples make their channel's entries non-finite. The gradient has the
        dtype and, where `x` is dense, the strides of `x`; none flows through the count.

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
        ValueError: `x` has fewer than 2 dimensions or no channel, DECOVAE_KERNELS has an unknown value, or the ranks
            of the group differ in C.
    """
    check_latent(x)
    packed: torch.Tensor = _call_channel_moments(x, group)
    return packed


def decorrelation(x: torch.Tensor, terms: Terms, *, group: str = "") -> torch.Tensor:
    """A weighted sum of decorrelation losses of the channels of `x`, from one read of it; differentiable once.

    Arguments and errors as in `channel_moments`, and `terms`: the weights. Returns a scalar, float32, or float64 for a
    float64 `x`.
    """
    check_latent(x)
    loss: torch.Tensor = _call_decorrelation(x, *terms, group)[0]
    return loss


def moments_decorrelation(packed: torch.Tensor, terms: Terms) -> torch.Tensor:
    """The same sum from packed moments (1 + C + C²,), float64; a float32 scalar, differentiable once."""
    loss: torch.Tensor = _call_moments_decorrelation(packed, *terms)[0]
    return loss


def check_latent(x: torch.Tensor) -> None:
    """Refuse what has no channel statistics, naming it."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor (N, C, *spatial), got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"expected a tensor of {names}, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"expected a tensor (N, C, *spatial), got {x.ndim} dimension(s), shape {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"expected at least one channel, got shape {tuple(x.shape)}")


def runs_in_triton(x: torch.Tensor) -> bool:
    """Whether the kernels take `x`, by DECOVAE_KERNELS, dtype and number of channels."""
    # The kernels number samples, and lanes beyond the last, in 32 bits.
    numbered = x.numel() // x.shape[1] < 2**31 - 2**13
    return wants_triton(x) and x.dtype != torch.float64 and x.shape[1] <= MAX_TRITON_CHANNELS and numbered


@torch.library.custom_op("decovae::channel_moments", mutates_args=(), tags=UNCAPTURED)
def _channel_moments(x: torch.Tensor, group: str) -> torch.Tensor:
    return ranks.merge_across(_local_moments(x), group)


@_channel_moments.register_fake
def _(x: torch.Tensor, group: str) -> torch.Tensor:
    return x.new_empty(packing.size(x.shape[1]), dtype=torch.float64)


@torch.library.custom_op("decovae::decorrelation", mutates_args=(), tags=UNCAPTURED)
def _decorrelation(
    x: torch.Tensor,
    sid: float,
    covariance: float,
    variance: float,
    squared_variance: float,
    gamma: float,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, packed moments, and the loss's derivative with respect to them."""
    weights = Terms(sid, covariance, variance, squared_variance, gamma)
    if not group and x.numel() > 0 and runs_in_triton(x):
        from decovae_kernels import moments_triton

        return moments_triton.decorrelation(readable_blocks(x), weights)
    packed = ranks.merge_across(_local_moments(x), group)
    loss, direction = _loss_and_direction(packed, weights)
    return loss.to(_loss_dtype(x)), packed, direction


@_decorrelation.register_fake
def _(
    x: torch.Tensor,
    sid: float,
    covariance: float,
    variance: float,
    squared_variance: float,
    gamma: float,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = packing.size(x.shape[1])
    return (
        x.new_empty((), dtype=_loss_dtype(x)),
        x.new_empty(size, dtype=torch.float64),
        x.new_empty(size, dtype=torch.float64),
    )


@torch.library.custom_op("decovae::moments_decorrelation", mutates_args=())
def _moments_decorrelation(
    packed: torch.Tensor, sid: float, covariance: float, variance: float, squared_variance: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and its derivative with respect to `packed`."""
    loss, direction = _loss_and_direction(packed, Terms(sid, covariance, variance, squared_variance, gamma))
    return loss.float(), direction


@_moments_decorrelation.register_fake
def _(
    packed: torch.Tensor, sid: float, covariance: float, variance: float, squared_variance: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return packed.new_empty((), dtype=torch.float32), torch.empty_like(packed)


@torch.library.custom_op("decovae::moments_gradient", mutates_args=())
def _moments_gradient(
    x: torch.Tensor, packed: torch.Tensor, direction: torch.Tensor, scale: torch.Tensor | None, replicas: int
) -> torch.Tensor:
    """replicas · scale · (grad_mean / n + (G + Gᵀ)(x_s − mean)) for direction = [·, grad_mean, G]."""
    grad = torch.empty_like(x)
    if x.numel() == 0:
        return grad
    source, target = sample_blocks(x), sample_blocks(grad)
    if source is None or target is None or source.shape != target.shape:
        # Strides that are neither contiguous nor channels-last: one copy in, one out.
        return grad.copy_(_moments_gradient(x.contiguous(), packed, direction, scale, replicas))
    if runs_in_triton(x):
        from decovae_kernels import moments_triton

        moments_triton.input_gradient(source, packed, direction, scale, replicas, out=target)
        return grad
    factor = replicas if scale is None else scale.double() * replicas
    with full_precision(x):
        moments_torch.input_gradient(source, packed, direction, factor, out=target)
    return grad


@_moments_gradient.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, direction: torch.Tensor, scale: torch.Tensor | None, replicas: int
) -> torch.Tensor:
    return torch.empty_like(x)


def _local_moments(x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return x.new_zeros(packing.size(x.shape[1]), dtype=torch.float64)
    blocks = readable_blocks(x)
    if runs_in_triton(x):
        from decovae_kernels import moments_triton

        return moments_triton.moments(blocks)
    with full_precision(x):
        return moments_torch.moments(blocks)


def _loss_and_direction(packed: torch.Tensor, weights: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    if wants_triton(packed) and packing.channels_of(packed) <= MAX_TRITON_CHANNELS:
        from decovae_kernels import moments_triton

        return moments_triton.loss_and_direction(packed, weights)
    return terms.loss_and_direction(packed, weights)


def _loss_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _save_input_and_moments(ctx: Any, inputs: tuple[Any, ...], packed: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], packed)
    ctx.group = inputs[1]


def _channel_moments_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return _moments_gradient(*ctx.saved_tensors, grad, None, ranks.world_size(ctx.group)), None


def _save_input_and_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.group = inputs[-1]


def _decorrelation_backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    others = (None,) * (len(Terms._fields) + 1)
    if grad is None:
        return None, *others
    return _moments_gradient(*ctx.saved_tensors, grad, ranks.world_size(ctx.group)), *others


def _save_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _moments_decorrelation_backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    (direction,) = ctx.saved_tensors
    return None if grad is None else direction * grad, *(None,) * len(Terms._fields)


_call_channel_moments = differentiable(_channel_moments, _save_input_and_moments, _channel_moments_backward)
_call_decorrelation = differentiable(_decorrelation, _save_input_and_direction, _decorrelation_backward)
_call_moments_decorrelation = differentiable(_moments_decorrelation, _save_direction, _moments_decorrelation_backward)


def product_flops(shape: torch.Size, *_: Any, **__: Any) -> int:
    """Of one C×n by n×C product for an input of this shape; as elsewhere in torch's count, nothing else counts."""
    return 2 * shape.numel() * shape[1]


register_flop_formula(
    [torch.ops.decovae.channel_moments, torch.ops.decovae.decorrelation, torch.ops.decovae.moments_gradient]
)(product_flops)
