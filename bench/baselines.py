"""What the losses are measured against: the equations as one writes them in torch, and lightly's VICReg terms.

A latent becomes a matrix in one of two ways: one row a channel, or, as a latent is usually flattened, one row a sample
(a voxel). Either is centred and multiplied with itself. Right for the batch of one device; the gradient is autograd's.
The covariance is written out, because torch.cov and torch.corrcoef break torch.compile's graph. Everything stays in
the latent's dtype: in bfloat16 that halves the intermediate bytes and leaves two to three digits of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Loss = Callable[[torch.Tensor], torch.Tensor]


class Formulation(NamedTuple):
    """The statistics of a latent's channels, by one way of flattening it."""

    covariance: Loss
    deviation: Loss


def _channel_rows(mu: torch.Tensor) -> torch.Tensor:
    return mu.transpose(0, 1).reshape(mu.shape[1], -1)


def _sample_rows(mu: torch.Tensor) -> torch.Tensor:
    return mu.movedim(1, -1).reshape(-1, mu.shape[1])


def _covariance_of_channel_rows(mu: torch.Tensor) -> torch.Tensor:
    rows = _channel_rows(mu)
    centred = rows - rows.mean(dim=1, keepdim=True)
    return centred @ centred.T / (rows.shape[1] - 1)


def _covariance_of_sample_rows(mu: torch.Tensor) -> torch.Tensor:
    rows = _sample_rows(mu)
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / (rows.shape[0] - 1)


def _deviation_of_channel_rows(mu: torch.Tensor) -> torch.Tensor:
    return _channel_rows(mu).std(dim=1)


def _deviation_of_sample_rows(mu: torch.Tensor) -> torch.Tensor:
    return _sample_rows(mu).std(dim=0)


FORMULATIONS = {
    "channel-rows": Formulation(_covariance_of_channel_rows, _deviation_of_channel_rows),
    "sample-rows": Formulation(_covariance_of_sample_rows, _deviation_of_sample_rows),
}


def _off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix - torch.diag(torch.diagonal(matrix))


def sid(mu: torch.Tensor, of: Formulation) -> torch.Tensor:
    """Eq. 3."""
    sigma = of.covariance(mu)
    deviation = torch.diagonal(sigma).sqrt()
    return _off_diagonal(sigma / torch.outer(deviation, deviation)).square().sum() / mu.shape[1] ** 2


def covariance(mu: torch.Tensor, of: Formulation) -> torch.Tensor:
    """Eq. 4."""
    return _off_diagonal(of.covariance(mu)).square().sum() / mu.shape[1] ** 2


def variance(mu: torch.Tensor, of: Formulation) -> torch.Tensor:
    """Eq. 5 with γ = 1."""
    return torch.relu(1 - of.deviation(mu)).square().mean()


def vad(mu: torch.Tensor, of: Formulation) -> torch.Tensor:
    """Eq. 6 with γ = 1, both terms from one covariance."""
    sigma = of.covariance(mu)
    anchor = torch.relu(1 - torch.diagonal(sigma).sqrt()).square().mean()
    return _off_diagonal(sigma).square().sum() / mu.shape[1] ** 2 + anchor


def lightly_terms() -> Loss:
    """The covariance and the variance term of lightly's VICReg loss, summed, on one row a sample.

    The same work as VAD and another number: it divides by C and not C², and does not square the hinge.

    Raises:
        ImportError: lightly is not installed.
    """
    from lightly.loss.vicreg_loss import covariance_loss, variance_loss

    def terms(mu: torch.Tensor) -> torch.Tensor:
        rows = _sample_rows(mu)
        return covariance_loss(rows) + variance_loss(rows)

    return terms
