"""Channel moments in plain torch: for CPU tensors, float64, and more channels than the Triton kernels hold.

The latent is read in pieces that stay in a CPU's cache. A piece is cut into runs of about a thousand samples, whose C×C
products are merged in float64 by Chan's formula. Short runs keep float32 products accurate: over 65,536 samples their
error was 3e-7 of the variance, over 1,024 it is 1e-8.

Samples are centred before they are multiplied, which costs as much as all the rest; but not where it gains nothing:
while every channel's Σx² is at most four times its Σ(x − mean)², the difference of Σx² and n·mean² costs two bits, and
products are taken about zero. The outcome is verified; where that does not hold, all samples are centred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from decovae_kernels import packed as packing

# Elements of a piece: 2 MB in float32.
_PIECE = 1 << 19
_RUN = 1024
# Largest ratio of Σx² to Σ(x − mean)² for which products are taken about zero.
_NEAR = 4.0
# Numbers of unmerged run moments: what many runs of many channels may take, 4 MB.
_ROW_NUMBERS = 1 << 19


def moments(blocks: torch.Tensor) -> torch.Tensor:
    """Packed moments (1 + C + C²,), float64, of `blocks` (B, C, L), any strides, any float dtype."""
    pieces = list(_pieces(blocks))
    # One room for all of them: fresh memory costs a CPU as much as the arithmetic.
    elements = max(piece.numel() for piece in pieces)
    workspace = torch.empty(elements, dtype=_working_dtype(blocks), device=blocks.device)
    with np.errstate(all="ignore"):  # ∞ − ∞ is wanted: non-finite samples show
        found = None
        if blocks.device.type == "cpu":  # elsewhere, looking at the outcome would wait for the device
            found = _moments_about_zero(pieces, workspace)
        return packing.tensor(_moments_about_mean(pieces, workspace) if found is None else found)


def input_gradient(
    blocks: torch.Tensor, packed: torch.Tensor, direction: torch.Tensor, scale: torch.Tensor | float, out: torch.Tensor
) -> None:
    """Write scale · (grad_mean / n + (G + Gᵀ)(x − mean)) into `out`, for direction = [·, grad_mean, G]."""
    dtype = _working_dtype(blocks)
    moments, gradient = packing.quick(packed), packing.quick(direction)
    factor = packing.quick(scale) if isinstance(scale, torch.Tensor) else scale
    centre = None if _all_near(moments) else packing.mean_of(packed).to(dtype)[:, None]
    matrix = packing.scatter_of(gradient)
    with np.errstate(all="ignore"):
        matrix = (matrix + matrix.T) * factor
        # The mean, or what the dtype drops of it, is subtracted by way of the constant term.
        left = packing.mean_of(moments)[:, None] - (0.0 if centre is None else packing.quick(centre))
        constant = packing.mean_of(gradient)[:, None] * (factor / moments[0]) - matrix @ left
    weight, bias = (packing.tensor(part).to(dtype) for part in (matrix, constant))
    if centre is None and blocks.dtype == out.dtype == dtype and out.is_contiguous():
        torch.baddbmm(bias, weight.expand(len(blocks), -1, -1), blocks, out=out)
        return
    for source, target in zip(_parts(blocks), _parts(out), strict=True):
        samples = source.to(dtype) if centre is None else source - centre
        target.copy_(torch.baddbmm(bias, weight.expand(len(samples), -1, -1), samples))


def _all_near(moments: packing.Array) -> bool:
    """Whether no channel's mean is far from zero; never asked of a GPU, which would have to be waited for."""
    if isinstance(moments, torch.Tensor):
        return False
    scatter = np.diagonal(packing.scatter_of(moments))
    return bool((moments[0] * packing.mean_of(moments) ** 2 <= (_NEAR - 1) * scatter).all())


def _parts(blocks: torch.Tensor) -> list[torch.Tensor]:
    """Views (b, C, l) of a piece's size that tile `blocks` (B, C, L)."""
    channels, length = blocks.shape[1:]
    if blocks.numel() <= _PIECE:
        return [blocks]
    step = max(_PIECE // (channels * length), 1)
    width = max(_PIECE // channels, 1)
    return [part for some in blocks.split(step) for part in some.split(width, dim=2)]


def _working_dtype(x: torch.Tensor) -> torch.dtype:
    """float32 where its products are true float32 products, else float64, which no TF32 or bf16 setting reaches."""
    try:
        lowered = x.is_cuda or torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the newer fp32_precision, which the older question does not understand
        lowered = True
    return torch.float64 if lowered else torch.promote_types(x.dtype, torch.float32)


def _pieces(blocks: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views (v, r, C, run) that tile `blocks` (B, C, L): v volumes by r runs, a last shorter run by itself."""
    volumes, channels, length = blocks.shape
    runs, run = _cut(length)
    whole = blocks[..., : runs * run].unflatten(-1, (runs, run)).transpose(1, 2)
    # Whole volumes to a piece where several fit, else parts of one.
    most = max(min(_PIECE // (channels * run), _ROW_NUMBERS // channels**2), 1)
    several, part = max(most // runs, 1), min(runs, most)
    for first in range(0, volumes, several):
        for start in range(0, runs, part):
            yield whole[first : first + several, start : start + part]
    if runs * run < length:
        yield from blocks[:, None, :, runs * run :].split(several)


def _cut(length: int) -> tuple[int, int]:
    """Runs and samples a run: about `_RUN`, without a remainder where a divisor lies near."""
    if length <= _RUN:
        return 1, length
    fewest = -(-2 * length // (3 * _RUN))
    for runs in range(fewest, length // (_RUN // 2) + 1):
        if length % runs == 0:
            return runs, length // runs
    return length // _RUN, _RUN


def _moments_about_zero(pieces: list[torch.Tensor], workspace: torch.Tensor) -> packing.Array | None:
    """Packed moments of pieces (v, r, C, run) from Σx and Σx xᵀ; None if a mean is too far from zero for that."""
    channels = pieces[0].shape[2]
    count, first, second = 0, np.zeros(channels), np.zeros((channels, channels))
    sums: list[torch.Tensor] = []
    products: list[torch.Tensor] = []
    for index, piece in enumerate(pieces):
        samples = _in_working_dtype(piece, workspace)
        sums.append(samples.sum(-1).flatten(0, 1))
        products.append(_products(samples))
        count += piece.numel() // channels
        if index in (0, len(pieces) - 1) or len(products) * products[0].numel() > _ROW_NUMBERS:
            first = first + torch.cat(sums).sum(0, dtype=torch.float64).numpy()
            second = second + torch.cat(products).sum(0, dtype=torch.float64).numpy()
            sums, products = [], []
            scatter = second - first[:, None] * (first / count)
            # False for what is not finite, too.
            if not (np.diagonal(second) <= _NEAR * np.diagonal(scatter)).all():
                return None
    return np.concatenate([[count], first / count, scatter.reshape(-1)])


def _moments_about_mean(pieces: list[torch.Tensor], workspace: torch.Tensor) -> packing.Array:
    """Packed moments of pieces (v, r, C, run), every run of samples centred, and merged by Chan's formula."""
    rows: list[packing.Array] = []
    numbers = 0
    for piece in pieces:
        rows.append(_centred_rows(piece, workspace))
        numbers += math.prod(rows[-1].shape)
        if numbers > _ROW_NUMBERS or piece is pieces[-1]:
            rows = [packing.merge_moments(packing.namespace(rows[0]).concatenate(rows))[None]]
            numbers = math.prod(rows[0].shape)
    return rows[0][0]


def _in_working_dtype(piece: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
    """The samples of `piece` with a stride of one and the dtype of `workspace`, which holds them where they had not."""
    if piece.dtype == workspace.dtype and piece.stride(-1) == 1:
        return piece
    return workspace[: piece.numel()].view(piece.shape).copy_(piece)


def _products(samples: torch.Tensor) -> torch.Tensor:
    """Σ x xᵀ of every run of `samples` (v, r, C, run): (v·r, C, C)."""
    if 1 in samples.shape[:2]:
        flat = samples.flatten(0, 1)
        return torch.bmm(flat, flat.mT)
    # Volumes and runs of a larger tensor are no single axis, and flattening them would copy.
    return torch.cat([torch.bmm(volume, volume.mT) for volume in samples])


def _centred_rows(piece: torch.Tensor, workspace: torch.Tensor) -> packing.Array:
    """Packed moments (v·r, 1 + C + C²) of the runs of `piece` (v, r, C, run)."""
    channels, run = piece.shape[2:]
    samples = _in_working_dtype(piece, workspace)
    mean = samples.mean(-1, keepdim=True)
    centred = torch.sub(samples, mean, out=workspace[: samples.numel()].view(samples.shape))
    # The mean was rounded: what is left of it is measured on the centred samples, and taken out of the product.
    rest = packing.quick(centred.mean(-1).double()).reshape(-1, channels)
    scatter = packing.quick(_products(centred.flatten(0, 1)[None]).double())
    mean = packing.quick(mean[..., 0].double()).reshape(-1, channels)
    xp = packing.namespace(mean)
    # A constant channel whose mean was rounded looks like one that varies by that rounding.
    smallest = run * (8 * torch.finfo(workspace.dtype).eps * mean) ** 2
    suspected = xp.diagonal(scatter, 0, 1, 2) <= smallest
    if piece.is_cuda or suspected.any():  # asking would make a GPU wait; there the samples are compared every time
        constant = packing.quick((piece == piece[..., :1]).all(-1)).reshape(-1, channels)
        mean = xp.where(constant, packing.quick(piece[..., 0].double()).reshape(-1, channels), mean)
        rest = xp.where(constant, 0.0, rest)
        scatter = xp.where(constant[:, :, None] | constant[:, None, :], 0.0, scatter)
    scatter = scatter - rest[:, :, None] * (run * rest)[:, None, :]
    return xp.concatenate([xp.full_like(mean[:, :1], run), mean + rest, scatter.reshape(len(mean), -1)], 1)
