"""What augmentation does to intensities, in place, for batches whose samples each have their own strength.

`patches` are `(N, D, H, W)`, float32; strengths are on their device, `(N, 1, 1, 1)` where nothing else is said. Nothing
waits for a GPU. A sample with NaN keeps to itself, and has NaN afterwards.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from decovae.data.augmentation_draws import DEGREE, TERMS
from decovae.data.volumes import Shape

EPSILON = 1e-7
"""Added to the range that contrast is changed in, as in MONAI."""


def bias_tables(coefficients: np.ndarray, patch: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The binary logarithm of a bias field, a polynomial, as a sum of products, for `multiply_by_bias_field`.

    Args:
        coefficients: of the products of Legendre polynomials that `TERMS` lists, `(N, 20)`.
        patch: its size; it spans −1 to 1 along every axis.

    Returns:
        The polynomials of degree 0 to 3 along the first axis, `(4, D)`, and what each is multiplied by, `(N, 4, H, W)`;
        both float32.
    """
    cube = np.zeros((len(coefficients), *[DEGREE + 1] * 3))
    i, j, k = np.transpose(TERMS)
    cube[:, i, j, k] = coefficients
    depth, height, width = (np.polynomial.legendre.legvander(np.linspace(-1, 1, size), DEGREE) for size in patch)
    planes = height @ (cube @ width.T) / math.log(2)
    return np.ascontiguousarray(depth.T, dtype=np.float32), planes.astype(np.float32)


def multiply_by_bias_field(patches: torch.Tensor, depth: torch.Tensor, planes: torch.Tensor) -> None:
    """Multiply by the bias field whose binary logarithm is the sum of `depth` times `planes`, see `bias_tables`."""
    depth = depth[..., None, None]
    # The polynomial of degree 0 is 1. Sums, not a matrix product, which a GPU would round to TensorFloat-32.
    field = torch.addcmul(planes[:, 0, None], depth[1], planes[:, 1, None])
    for degree in range(2, DEGREE + 1):
        field.addcmul_(depth[degree], planes[:, degree, None])
    patches.mul_(field.exp2_())


def adjust_contrast(patches: torch.Tensor, gamma: torch.Tensor) -> None:
    """Raise intensities to the power of `gamma`, above 0, between a sample's darkest, as 0, and brightest, as 1."""
    dark, bright = extremes(patches)
    width = bright - dark
    patches.sub_(dark).div_(width + EPSILON)
    patches.log2_().mul_(gamma).exp2_().mul_(width).add_(dark)  # on CPUs twice as fast as `pow_`


def shift_histogram(patches: torch.Tensor, points: torch.Tensor) -> None:
    """Move evenly spaced control points between a sample's darkest, 0, and brightest, 1, to `points`, `(N, P)`.

    Intensities between two of them follow linearly. A constant sample is left as it is.
    """
    pieces = points.shape[1] - 1
    dark, bright = extremes(patches)
    width = bright - dark
    patches.sub_(dark).div_(width.masked_fill(width == 0, 1.0)).mul_(pieces)
    targets = points * width.flatten(1) + dark.flatten(1)
    slopes = targets.diff()
    starts = targets[:, :-1] - slopes * torch.arange(pieces, device=patches.device)
    piece = patches.to(torch.int32).clamp_(0, pieces - 1)  # bounded, as NaN may become any integer
    piece += pieces * torch.arange(len(patches), dtype=torch.int32, device=patches.device)[:, None, None, None]
    place = piece.flatten()
    patches.mul_(slopes.flatten().index_select(0, place).view_as(patches))
    patches.add_(starts.flatten().index_select(0, place).view_as(patches))


def extremes(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's darkest and brightest intensity, `(N, 1, 1, 1)`."""
    return patches.amin(dim=(1, 2, 3), keepdim=True), patches.amax(dim=(1, 2, 3), keepdim=True)
